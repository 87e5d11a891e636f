"""Where files are run: a machine, and what starts a process there."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

WORKER = Path(__file__).parents[1] / "latency_worker.py"


class Site(NamedTuple):
    """Files where they can be run: what starts a fresh worker there, and the paths that it knows them by."""

    command: tuple[str, ...]
    paths: tuple[str, ...]


class Machine(Protocol):
    """Somewhere that workers run."""

    def site(self, script: Path, files: Sequence[Path]) -> AbstractContextManager[Site]:
        """`files` there, with the worker and the `script` of its runtime; nothing of it is left at the end."""


@dataclass(frozen=True)
class Here:
    """This machine."""

    @contextmanager
    def site(self, script: Path, files: Sequence[Path]) -> Iterator[Site]:
        # -P: the worker's own folder must not shadow other modules.
        yield Site((sys.executable, "-P", str(WORKER), str(script)), tuple(str(file) for file in files))
