"""What runs network files, by name: the script that does it, the file it wants, the package it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from sparsekit.errors import MeasurementError, UsageError, nearest

PRECISIONS = ("float32", "native")


@dataclass(frozen=True)
class Runtime:
    """A runtime with its settings.

    Attributes:
        script: what a worker runs files with, `run_*.py`.
        packages: what must be importable where it runs, and here where it converts.
        options: what the script is told.
        suffix: the end of the names of the files that it runs.
        on_cpu: whether CPU time says how long a run takes.
    """

    script: Path
    packages: tuple[str, ...]
    options: Mapping[str, str] = field(default_factory=dict)
    suffix: str = ".onnx"
    on_cpu: bool = True

    def check(self) -> None:
        """MeasurementError, in one line that says what to install, where a package is missing here."""
        for package in self.packages:
            if find_spec(package) is None:
                raise MeasurementError(f"{package}: not installed; pip install 'sparsekit[{self.packages[0]}]'")


def _script(name: str) -> Path:
    return Path(__file__).with_name(f"run_{name}.py")


def _onnxruntime(variant: str) -> Runtime:
    """`variant` is an execution provider, with or without the words that end its name."""
    import onnxruntime

    known = {name.removesuffix("ExecutionProvider"): name for name in onnxruntime.get_all_providers()}
    spelt = {name.lower(): name for name in known}
    short = spelt.get((variant or "CPU").removesuffix("ExecutionProvider").lower())
    if short is None:
        raise UsageError(f"onnxruntime:{variant}: no such execution provider{nearest(variant, list(known))}")
    return Runtime(
        _script("onnxruntime"), ("onnxruntime",), {"provider": known[short]}, on_cpu=short in ("CPU", "Xnnpack")
    )


def _openvino(variant: str) -> Runtime:
    """`variant` is a device."""
    device = (variant or "CPU").upper()
    return Runtime(_script("openvino"), ("openvino",), {"device": device}, on_cpu=device == "CPU")


def _ncnn(variant: str) -> Runtime:
    if variant:
        raise UsageError(f"ncnn:{variant}: ncnn has no variants")
    return Runtime(_script("ncnn"), ("ncnn", "pnnx"), suffix=".ncnn")


def _torch(variant: str) -> Runtime:
    """`variant` is any of compile and cuda."""
    words = [word for word in variant.split(":") if word]
    for word in words:
        if word not in ("compile", "cuda", "cpu"):
            raise UsageError(f"torch:{variant}: unknown {word!r}{nearest(word, ['compile', 'cuda', 'cpu'])}")
    device = "cuda" if "cuda" in words else "cpu"
    options = {"device": device, "compile": "1" if "compile" in words else ""}
    return Runtime(_script("torch"), ("torch",), options, suffix=".pt2", on_cpu=device == "cpu")


def _executorch(variant: str) -> Runtime:
    if variant not in ("", "xnnpack"):
        raise UsageError(f"executorch:{variant}: unknown{nearest(variant, ['xnnpack'])}")
    return Runtime(_script("executorch"), ("executorch",), suffix=".pte")


RUNTIMES: dict[str, Callable[[str], Runtime]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "ncnn": _ncnn,
    "executorch": _executorch,
    "torch": _torch,
}


def parse_runtime(text: str, precision: str = "float32") -> Runtime:
    """The runtime that `NAME[:VARIANT]` names.

    Raises:
        UsageError: there is none, or no such precision.

    >>> parse_runtime("onnxruntime").options["provider"]
    'CPUExecutionProvider'
    """
    name, _, variant = text.partition(":")
    if name not in RUNTIMES:
        raise UsageError(f"runtime {name!r}: unknown{nearest(name, list(RUNTIMES))}")
    if precision not in PRECISIONS:
        raise UsageError(f"precision {precision!r}: unknown{nearest(precision, list(PRECISIONS))}")
    runtime = RUNTIMES[name](variant)
    return replace(runtime, options={**runtime.options, "precision": precision})
