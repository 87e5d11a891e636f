"""What a run measured, as rows of a report, and rows as plain JSON values and back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from sparsekit.errors import DataError

Row = TypeVar("Row")


@dataclass(frozen=True)
class Measurement:
    """One network, measured.

    Attributes:
        accuracy: in [0, 1] on held-out data, None without data.
        num_macs: multiply-accumulates of one forward pass at batch 1.
        size_bytes: of the exported file.
        latency_ms: wall time per run, p50 beside its p20 and p80; None where it was not measured.
        num_nonzero: of the weights that layers multiply with; None where the method removes channels only.
    """

    accuracy: float | None
    num_params: int
    num_macs: int
    size_bytes: int
    latency_ms: float | None = None
    latency_p20_ms: float | None = None
    latency_p80_ms: float | None = None
    num_nonzero: int | None = None


@dataclass(frozen=True)
class Width:
    """A channel group's `dense` channels and how many of them were `kept`; `layer` is the group's name.

    Attributes:
        edges: counts beyond which more would cost time, ascending, up to `dense`; empty where nobody measured them.
    """

    layer: str
    dense: int
    kept: int
    edges: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerTime:
    """One layer's share of the time and of the MACs of one example, in both networks; times from width tables."""

    name: str
    dense_ms: float
    compact_ms: float
    dense_macs: int
    compact_macs: int

    @property
    def time_ratio(self) -> float | None:
        """Compact / dense, None for a layer that never took time."""
        return self.compact_ms / self.dense_ms if self.dense_ms else None

    @property
    def macs_ratio(self) -> float | None:
        """Compact / dense, None for a layer that never multiplied."""
        return self.compact_macs / self.dense_macs if self.dense_macs else None


@dataclass(frozen=True)
class TargetFacts:
    """What the latencies of a report were measured on.

    Attributes:
        name: as the user wrote it.
        runtime: with its version, unless `version` has it.
        device: processor or GPU, "" for this machine's processor.
        precision: that the network ran in, like "float32".
        output_error: largest difference of the small network's outputs there, relative to the largest output.
    """

    name: str
    runtime: str
    precision: str
    threads: int
    version: str = ""
    device: str = ""
    output_error: float | None = None

    @property
    def text(self) -> str:
        """All of it but the device and the error.

        >>> TargetFacts("ssh://pi", "onnxruntime", "float32", 4, version="1.31.1").text
        'ssh://pi (onnxruntime 1.31.1), float32, 4 threads'
        >>> TargetFacts("openvino", "openvino 2026.4", "float32", 1).text
        'openvino 2026.4, float32, 1 thread'
        """
        runtime = f"{self.runtime} {self.version}".rstrip()
        named = runtime if runtime.startswith(self.name) else f"{self.name} ({runtime})"
        return f"{named}, {self.precision}, " + ("1 thread" if self.threads == 1 else f"{self.threads} threads")


@dataclass(frozen=True)
class Candidate:
    """A network that the search for the budget tried. Ratios are to the dense network, accuracy is in [0, 1]."""

    label: str
    latency_ratio: float
    macs_ratio: float
    accuracy: float | None = None
    latency_low: float | None = None
    latency_high: float | None = None


@dataclass(frozen=True)
class SearchStep:
    """One iteration of the loop that meets a latency budget; latencies and MACs are ratios to the dense network."""

    predicted_ratio: float
    measured_ratio: float
    low: float
    high: float
    macs_ratio: float
    in_band: bool


@dataclass(frozen=True)
class StockNetwork:
    """A smaller network of the same family, timed beside ours; ratios are to our dense network.

    Attributes:
        latency_ratio: None where it was not timed.
        published_accuracy: in [0, 1], None where none was published.
        data: what that was measured on.
        comparable: ours was measured on the same.
        note: what to know about it, such as why it was not timed, or that it beats the small network.
    """

    name: str
    macs_ratio: float
    latency_ratio: float | None
    published_accuracy: float | None = None
    data: str | None = None
    comparable: bool = False
    note: str = ""


def plain(value: Any) -> Any:
    """Strict JSON values: tuples become lists, dataclasses objects, and numbers that are not finite None.

    >>> plain(Width("conv1", 16, 8, (8, 16))), plain((float("nan"), 1.0))
    ({'layer': 'conv1', 'dense': 16, 'kept': 8, 'edges': [8, 16]}, [None, 1.0])
    """
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def row_of(kind: type[Row], document: Mapping[str, Any]) -> Row:
    """Inverse of `plain` for a dataclass that holds no others.

    >>> row_of(Width, plain(Width("conv1", 16, 8, (8, 16))))
    Width(layer='conv1', dense=16, kept=8, edges=(8, 16))
    """
    return kind(**{key: tuple(item) if isinstance(item, list) else item for key, item in document.items()})


def read_document(path: Path, parse: Callable[[Mapping[str, Any]], Row]) -> Row:
    """What `parse` makes of a JSON file that holds an object, and of any other JSON as if it held an empty one.

    Raises:
        DataError: no such file, no JSON, or what `parse` says of it, after the file's name.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: damaged: {error}") from error
    try:
        return parse(document if isinstance(document, dict) else {})
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
