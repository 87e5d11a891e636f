"""An ONNX file as an nn.Module: whatever runs or scores a network runs and scores the file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as ort
from torch import Tensor, nn

from sparsekit.errors import ExportError
from sparsekit.task import Task

_LOAD_ERRORS = (OSError, ort.Fail, ort.InvalidGraph, ort.InvalidProtobuf, ort.NotImplemented)
_RUN_ERRORS = (ort.Fail, ort.InvalidArgument, ort.NotImplemented, ort.RuntimeException)
# Activations are some hundred times the inputs.
_BATCH_ELEMENTS = 2**20
_MAX_BATCH = 64


@dataclass(frozen=True)
class OnnxInput:
    """What a file takes, e.g. "z", (None, 128), "float": a dimension that may vary, as the batch does, is None."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


class OnnxNetwork(nn.Module):
    """The network in an ONNX file, run by ONNX Runtime on the CPU with torch's number of threads.

    It takes the file's inputs in their order and returns its output, or a tuple of several. Nothing in it can be
    trained or moved: it has one parameter, without elements, for code that asks a network for its device.

    Args:
        path: an ONNX file.
        name: what errors call it; the path unless given.

    Raises:
        ExportError: the file does not load, or does not run on what it is given.
    """

    def __init__(self, path: Path | str, *, name: Path | str | None = None) -> None:
        super().__init__()
        self.name = name or path
        self.nothing = nn.Parameter(torch.empty(0), requires_grad=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # what goes wrong is raised, once is enough
        try:
            content = Path(path).read_bytes()
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except _LOAD_ERRORS as error:
            raise ExportError(f"{self.name}: ONNX Runtime cannot load it: {_first_line(error)}") from error
        self.inputs = tuple(_input(value) for value in self._session.get_inputs())

    def run(self, *inputs: Tensor) -> list[Tensor]:
        """Every output, on the CPU."""
        if len(self.inputs) != len(inputs):
            names = ", ".join(wanted.name for wanted in self.inputs)
            raise ExportError(f"{self.name}: has {len(self.inputs)} inputs ({names}), got {len(inputs)}")
        feeds = {wanted.name: x.detach().cpu().numpy() for wanted, x in zip(self.inputs, inputs, strict=True)}
        try:
            return [torch.from_numpy(x) for x in self._session.run(None, feeds)]
        except _RUN_ERRORS as error:
            raise ExportError(f"{self.name}: ONNX Runtime cannot run it: {_first_line(error)}") from error

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        outputs = [x.to(inputs[0].device) for x in self.run(*inputs)] if inputs else self.run()
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def evaluate_onnx(path: Path | str, task: Task) -> float:
    """What `task.evaluate` says of an ONNX file: its accuracy in [0, 1] on the test data.

    Raises:
        ExportError: the file does not load, or does not take the task's inputs.
    """
    return task.evaluate(OnnxNetwork(path))


@dataclass(frozen=True)
class OnnxDifference:
    """How far one ONNX file's outputs are from another's on the same images.

    Attributes:
        max_relative_error: max |other - original| / max |original|, over all outputs of all images.
        sqnr_db: 10 log10 of the original outputs' power over that of the difference; 40 is 1% of noise.
        agreement: share in [0, 1] of the images whose largest output is the same; None where the first output is
            not [N, C].
    """

    max_relative_error: float
    sqnr_db: float
    agreement: float | None


def compare_onnx(
    original: Path | str, other: Path | str, images: Tensor, *, name: Path | str | None = None
) -> OnnxDifference:
    """Run two files of one input on `images`, float32 [N, ...].

    Args:
        name: what errors call `other`; the path unless given.

    Raises:
        ExportError: a file does not load or run, or what they say of these images is zero or not finite.
    """
    networks = OnnxNetwork(original), OnnxNetwork(other, name=name)
    largest = difference = signal = noise = 0.0
    same, classifies = 0, True
    for batch in batches(images):
        expected, actual = (network.run(batch) for network in networks)
        for wanted, got in zip(expected, actual, strict=True):
            error = got.double() - wanted.double()
            largest = max(largest, float(wanted.abs().max()))
            difference = max(difference, float(error.abs().max()))
            signal += float(wanted.double().square().sum())
            noise += float(error.square().sum())
        classifies = classifies and expected[0].dim() == 2
        same += int((expected[0].argmax(1) == actual[0].argmax(1)).sum()) if classifies else 0
    if not (signal > 0 and math.isfinite(signal + noise)):
        raise ExportError(f"{name or other}: outputs on the given images are all zero, or not finite")
    sqnr_db = 10 * math.log10(signal / noise) if noise else math.inf
    return OnnxDifference(difference / largest, sqnr_db, same / len(images) if classifies else None)


def batches(images: Tensor) -> tuple[Tensor, ...]:
    """`images`, [N, ...], in parts small enough to keep every activation that a network makes of them.

    >>> [len(batch) for batch in batches(torch.zeros(20, 3, 224, 224))]
    [6, 6, 6, 2]
    """
    per_image = max(1, images[0].numel())
    parts: tuple[Tensor, ...] = images.split(max(1, min(_MAX_BATCH, _BATCH_ELEMENTS // per_image)))
    return parts


def _input(value: onnxruntime.NodeArg) -> OnnxInput:
    shape = tuple(size if isinstance(size, int) else None for size in value.shape)
    return OnnxInput(value.name, shape, value.type.removeprefix("tensor(").removesuffix(")"))


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].strip()
