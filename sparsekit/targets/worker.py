"""A fresh process that runs files: `latency_worker.py`, spoken to over its stdin and stdout."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from tempfile import TemporaryFile
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from sparsekit.errors import MeasurementError
from sparsekit.samples import Loaded, Sample
from sparsekit.targets.machine import Site


@dataclass(frozen=True)
class Conditions:
    """How files are run.

    Attributes:
        affinity: the CPUs to run on, None for any.
        options: what the runtime's script is told.
    """

    threads: int
    batch_size: int
    affinity: tuple[int, ...] | None
    options: Mapping[str, str]


class Worker:
    """A process that runs files, by their index; any error it ends with is a MeasurementError of one line.

    Attributes:
        runtime: name, version and provider.
        device: what of the machine decides the times.
        pid: of the process here that talks to it, or is it.
    """

    def __init__(
        self, name: str, process: Popen[bytes], stderr: IO[bytes], files: Sequence[tuple[Path, str]], how: Conditions
    ) -> None:
        self._process, self._stderr, self._files, self._how = process, stderr, files, how
        self._stdin, self._stdout = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
        self.pid = process.pid
        answer = self._ask(name, {"command": "describe", "options": dict(how.options)})
        self.runtime: str = answer["runtime"]
        self.device: dict[str, str] = answer["device"]

    def load(self, i: int, *, min_warmups: int, warmup_s: float) -> Loaded:
        """Load file `i`, and run it at least so many times for at least so long."""
        path, how = self._files[i][1], self._how
        arguments = {
            "path": path,
            "threads": how.threads,
            "batch_size": how.batch_size,
            "seed": 0,
            "options": dict(how.options),
            "min_warmups": min_warmups,
            "warmup_s": warmup_s,
        }
        answer = self._ask_of(i, "load", arguments)
        return Loaded(*(answer[field] for field in Loaded._fields))

    def run(self, i: int, num_samples: int) -> list[Sample]:
        """So many samples of a loaded file."""
        return [Sample(*sample) for sample in self._ask_of(i, "run", {"num_samples": num_samples})["samples"]]

    def outputs(self, i: int) -> list[NDArray[np.float32]]:
        """What a loaded file gives, each output flat."""
        return [np.frombuffer(base64.b64decode(text), np.float32) for text in self._ask_of(i, "outputs", {})["outputs"]]

    def _ask_of(self, i: int, command: str, arguments: Mapping[str, object]) -> dict[str, Any]:
        file, path = self._files[i]
        return self._ask(file, {"command": command, "name": path, **arguments})

    def _ask(self, subject: object, command: Mapping[str, object]) -> dict[str, Any]:
        """The answer to one command; `subject` is what an error is about."""
        try:
            self._stdin.write(json.dumps(command).encode() + b"\n")
            answer = self._stdout.readline()
        except BrokenPipeError:
            answer = b""
        if answer:
            return dict(json.loads(answer))
        words = last_words(self._stderr, f"the measuring process ended with status {self._process.wait()}")
        raise MeasurementError(f"{subject}: {words}")


@contextmanager
def start(name: str, site: Site, files: Sequence[Path], how: Conditions) -> Iterator[Worker]:
    """A fresh process at `site` that has imported its runtime; killed at the end, whatever happens."""
    command = [*site.command, *([",".join(map(str, how.affinity))] if how.affinity else [])]
    with TemporaryFile() as stderr:
        # A session of its own: Ctrl-C comes to us.
        process = Popen(command, bufsize=0, stdin=PIPE, stdout=PIPE, stderr=stderr, start_new_session=True)
        with process:
            try:
                yield Worker(name, process, stderr, list(zip(files, site.paths, strict=True)), how)
            finally:
                process.kill()


def last_words(stderr: IO[bytes], instead: str) -> str:
    """The last line that an ended process wrote to `stderr`; `instead` if there is none."""
    stderr.seek(0)
    lines = [line.strip() for line in stderr.read().decode(errors="replace").splitlines()]
    # A traceback's last line, less the module path of the exception's class.
    return re.sub(r"^(\w+\.)+(?=\w+: )", "", next((line for line in reversed(lines) if line), instead))
