"""How long each layer of a network takes at every width, measured on micro-models on the target.

Tables are kept in the cache folder, a file each, by device, runtime, versions, threads, batch size and layer. An
interrupted measurement goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from sparsekit.cost import Costs
from sparsekit.graph import ChannelGraph
from sparsekit.image_cache import default_cache_dir
from sparsekit.interpolation import LEAST_MS, WidthTable, build_tables
from sparsekit.latency import measure_files
from sparsekit.layer_shapes import Point, Shape, points, shape_of, weight_bytes
from sparsekit.micro_models import micro_model, neighbours_model
from sparsekit.micro_modules import micro_module
from sparsekit.targets import WRITERS, Target, parse_target

Progress = Callable[[int, int], None]
Timer = Callable[[Sequence[Path]], list[float]]  # milliseconds of each file

CACHE_VERSION = 1
_FEW_POINTS = 300
_LOADED_BYTES = 2**28  # of weights in one process, which keeps them more than once


def measure_tables(
    graph: ChannelGraph,
    target: Target | str = "onnxruntime",
    *,
    threads: int = 1,
    batch_size: int = 1,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> tuple[WidthTable | None, ...]:
    """A table per term of `graph.timed`, layers of equal shape sharing one; None where no layer is known.

    Args:
        cache_dir: where measurements are kept, the user's cache folder unless given.
        progress: called with the number of layers measured so far, and of how many.

    Raises:
        MeasurementError: the target does not run.
    """
    target = parse_target(target) if isinstance(target, str) else target
    dense = Costs(graph).dense
    # CPU time per file, loaded and timed: 24 ms in ONNX Runtime, 69 in OpenVINO, 280 in ncnn with the conversion.
    thorough = target.runtime.packages == ("onnxruntime",)
    shapes = [shape_of(term, dense, thorough=thorough) for term in graph.timed]
    wanted = [shape for shape in shapes if shape is not None]
    tables = build_tables(
        measure_shapes(wanted, target, threads=threads, batch_size=batch_size, cache_dir=cache_dir, progress=progress)
    )
    return tuple(None if shape is None else tables[shape] for shape in shapes)


def measure_shapes(
    shapes: Iterable[Shape],
    target: Target,
    *,
    threads: int = 1,
    batch_size: int = 1,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> dict[Shape, Mapping[Point, float]]:
    """Milliseconds at `points(shape)` for each shape, read from the cache where they are known; as `measure_tables`."""
    time_files = partial(measure_files, target=target, threads=threads, batch_size=batch_size, num_launches=1)
    conditions = {
        "version": CACHE_VERSION,
        "target": target.fingerprint(),
        "threads": threads,
        "batch_size": batch_size,
    }
    folder = (cache_dir or default_cache_dir()) / "latency"
    wanted = list(dict.fromkeys(shapes))
    keys = {shape: conditions | {"layer": type(shape.layer).__name__, "shape": asdict(shape)} for shape in wanted}
    known: dict[Shape, Mapping[Point, float]] = {}
    known |= {shape: ms for shape in wanted if (ms := _read(folder, keys[shape], shape)) is not None}
    if progress:
        progress(len(known), len(wanted))
    for together in _few([shape for shape in wanted if shape not in known]):
        for shape, ms in _measure(together, target, time_files).items():
            _write(folder, keys[shape], ms)
            known[shape] = ms
        if progress:
            progress(len(known), len(wanted))
    return known


def _few(shapes: Iterable[Shape]) -> Iterator[list[Shape]]:
    """Some shapes at a time: many, and processes start less often; few, and little is lost when interrupted."""
    few: list[Shape] = []
    for shape in shapes:
        few.append(shape)
        if sum(len(points(each)) for each in few) >= _FEW_POINTS:
            yield few
            few = []
    if few:
        yield few


def _measure(shapes: Sequence[Shape], target: Target, time_files: Timer) -> dict[Shape, dict[Point, float]]:
    """Milliseconds at `points(shape)` for each shape."""
    wanted = [(shape, point) for shape in shapes for point in points(shape)]
    if target.runtime.suffix in WRITERS:
        times_ms = _time_modules(wanted, target, time_files)
    else:
        times_ms = _time_models(wanted, time_files)
    found: dict[Shape, dict[Point, float]] = {shape: {} for shape in shapes}
    for (shape, point), ms in zip(wanted, times_ms, strict=True):
        found[shape][point] = max(ms, LEAST_MS)
    return found


def _time_models(wanted: Sequence[tuple[Shape, Point]], time_files: Timer) -> list[float]:
    """By micro-models, less the layer's neighbours in them."""
    pairs = [(micro_model(shape.layer, point), neighbours_model(shape.layer, point)) for shape, point in wanted]
    num_bytes = {
        model: weight_bytes(shape.layer, point) for (shape, point), (model, _) in zip(wanted, pairs, strict=True)
    }
    files = list(dict.fromkeys(model for pair in pairs for model in pair if model is not None))
    ms: dict[bytes | None, float] = {None: 0.0}
    for together in _batches(files, [num_bytes.get(file, 0) for file in files]):
        with TemporaryDirectory(prefix="sparsekit-") as folder:
            paths = [Path(folder, f"{number}.onnx") for number in range(len(together))]
            for path, model in zip(paths, together, strict=True):
                path.write_bytes(model)
            ms.update(zip(together, time_files(paths), strict=True))
    return [ms[model] - ms[alone] for model, alone in pairs]


def _time_modules(wanted: Sequence[tuple[Shape, Point]], target: Target, time_files: Timer) -> list[float]:
    """For runtimes that are given modules, which meet no layout but the one they like."""
    with TemporaryDirectory(prefix="sparsekit-") as folder:
        paths = []
        for number, (shape, point) in enumerate(wanted):
            module, inputs = micro_module(shape.layer, point)
            paths.append(target.prepare(module, inputs, Path(f"{number}.onnx"), Path(folder)))
        return time_files(paths)


def _batches(files: Sequence[bytes], sizes: Sequence[int]) -> Iterator[list[bytes]]:
    """Files that may be loaded at the same time, `sizes` bytes of weights each, in an order that is no order of width.

    >>> list(_batches([b"a", b"b", b"c"], [2**27, 2**27, 2**28]))
    [[b'a', b'b'], [b'c']]
    """
    batch: list[bytes] = []
    total = 0
    for i in random.Random(4).sample(range(len(files)), len(files)):
        if batch and total + sizes[i] > _LOADED_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(files[i])
        total += sizes[i]
    if batch:
        yield batch


def _path(folder: Path, key: Mapping[str, object]) -> Path:
    text = json.dumps(key, sort_keys=True)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _read(folder: Path, key: Mapping[str, object], shape: Shape) -> dict[Point, float] | None:
    """What `_write` wrote; None where there is nothing, or it is damaged."""
    try:
        document = json.loads(_path(folder, key).read_text(encoding="utf-8"))
        ms = {tuple(point): float(value) for point, value in document["ms"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return ms if set(ms) == set(points(shape)) and all(0 < value < math.inf for value in ms.values()) else None


def _write(folder: Path, key: Mapping[str, object], ms: Mapping[Point, float]) -> None:
    # A cache is a convenience: a full or read-only disk must not stop the run.
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        path = _path(folder, key)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps({**key, "ms": [[list(point), value] for point, value in ms.items()]}))
        temporary.replace(path)
