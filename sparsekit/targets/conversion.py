"""The files of runtimes that do not run ONNX: made from an ONNX file, or from the network itself."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import ZipFile

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from sparsekit.errors import ExportError, MeasurementError


def to_ncnn(onnx_path: Path, path: Path, batch_size: int, precision: str) -> None:
    """Write the `.ncnn` file of an ONNX file, by pnnx; weights in float16 unless `precision` is "float32".

    Raises:
        MeasurementError: pnnx cannot convert it, an input has no fixed size, or the batch is not one.
    """
    import pnnx

    inputs = _onnx_inputs(onnx_path, batch_size)
    if any(shape[:1] != [1] for _, _, shape in inputs):
        # It would run the first of the batch and say nothing.
        raise MeasurementError(f"{onnx_path}: ncnn runs batches of one, not {[shape for _, _, shape in inputs]}")
    shapes = ",".join(f"{json.dumps(shape, separators=(',', ':'))}{_PNNX[dtype]}" for _, dtype, shape in inputs)
    with TemporaryDirectory(prefix="sparsekit-") as folder:
        # It writes beside what it reads.
        copied = Path(folder, "m.onnx")
        copied.write_bytes(onnx_path.read_bytes())
        command = (pnnx.EXEC_PATH, "m.onnx", f"inputshape={shapes}", f"fp16={int(precision != 'float32')}")
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
        param, weights = Path(folder, "m.ncnn.param"), Path(folder, "m.ncnn.bin")
        if done.returncode or not param.is_file() or not weights.is_file():
            words = (done.stderr + done.stdout).strip().splitlines() or [f"status {done.returncode}"]
            raise MeasurementError(f"{onnx_path}: pnnx cannot convert it to ncnn: {words[-1]}")
        with ZipFile(path, "w") as file:
            file.write(param, "model.param")
            file.write(weights, "model.bin")
            file.writestr("inputs.json", json.dumps(inputs))


_PNNX = {
    "float32": "f32",
    "float16": "f16",
    "float64": "f64",
    "int32": "i32",
    "int64": "i64",
    "int8": "i8",
    "uint8": "u8",
}


def _onnx_inputs(path: Path, batch_size: int) -> list[tuple[str, str, list[int]]]:
    """Name, dtype and shape of every input, with the batch for a first dimension of no fixed size."""
    graph = onnx.load(path, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    inputs = []
    for value in graph.input:
        if value.name in constants:
            continue
        tensor = value.type.tensor_type
        shape = [dimension.dim_value for dimension in tensor.shape.dim]
        shape[:1] = [size or batch_size for size in shape[:1]]
        dtype = str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)))
        if 0 in shape or dtype not in _PNNX:
            raise MeasurementError(
                f"{path}: input {value.name!r} ({dtype} {shape}): pnnx needs fixed sizes and numbers"
            )
        inputs.append((value.name, dtype, shape))
    return inputs


def to_torch(network: nn.Module, example_inputs: tuple[Tensor, ...], path: Path) -> None:
    """Write `network` as a torch.export archive with a dynamic batch, in float32 and eval mode.

    Raises:
        ExportError: torch.export cannot.
    """
    # A batch of one would be taken for a constant.
    torch.export.save(_program(network, example_inputs, 2, path, {0: torch.export.Dim.AUTO}), path)


def to_executorch(network: nn.Module, example_inputs: tuple[Tensor, ...], path: Path) -> None:
    """Write `network` as an ExecuTorch program for batch 1, lowered to XNNPACK, in float32 and eval mode.

    Raises:
        ExportError: torch.export cannot.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    program = _program(network, example_inputs, 1, path, None)
    path.write_bytes(to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch().buffer)


def _program(
    network: nn.Module, inputs: tuple[Tensor, ...], batch_size: int, path: Path, batch: Mapping[int, Any] | None
) -> ExportedProgram:
    network = copy.deepcopy(network).cpu().float().eval()
    examples = tuple(
        x[torch.arange(batch_size) % len(x)] if x.ndim else x
        for x in (x.detach().cpu().float() if x.is_floating_point() else x.cpu() for x in inputs)
    )
    try:
        return torch.export.export(network, examples, dynamic_shapes=tuple(batch if x.ndim else None for x in examples))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ExportError(
            f"{path}: {type(network).__name__} cannot be exported: {str(error).split(chr(10))[0]}"
        ) from error
