"""One ONNX file out of a network: exported, checked, run in ONNX Runtime and compared with the network."""

from __future__ import annotations

import copy
import inspect
import io
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from sparsekit.acceleration import densify
from sparsekit.errors import ExportError
from sparsekit.onnx_network import OnnxNetwork

# A protobuf message holds 2 GiB, 16 MiB of it left for the graph; weights in a side file get lost.
MAX_WEIGHT_BYTES = 2**31 - 2**24
# Batch 1 was specialised by older torch versions, batch 2 never.
TRACE_BATCH = 2
CHECKED_BATCHES = (1, 3)


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file that was run beside its network.

    Attributes:
        path: the one file; there is no side file.
        opset: version of the default operator set.
        max_relative_error: max |file - network| / max |network|, the largest over outputs and batches.
        max_abs_error: max |file - network| over outputs and batches.
    """

    path: Path
    size_bytes: int
    num_nodes: int
    opset: int
    max_relative_error: float
    max_abs_error: float


def export_onnx(
    model: nn.Module, example_inputs: tuple[Tensor, ...], path: Path | str, *, tolerance: float = 1e-4
) -> OnnxFile:
    """Write `model` as one ONNX file with a dynamic batch, verified against the network.

    The network is exported as float32 in eval mode on the CPU; `model` itself is not touched. The file takes
    its name only after every check passed, and carries no source paths.

    Args:
        example_inputs: positional inputs of one forward pass, batch first; any batch size.
        tolerance: largest relative error allowed, see `OnnxFile`.

    Raises:
        ExportError: the network cannot be exported, the file is invalid or keeps a foldable BatchNorm, or its
            outputs in ONNX Runtime differ from the network's or prove nothing.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     file = export_onnx(nn.Linear(3, 2), (torch.ones(1, 3),), f"{folder}/linear.onnx")
    >>> file.num_nodes, file.max_abs_error < 1e-5
    (1, True)
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise ExportError(f"{path}: the folder {path.parent} does not exist")
    # No runtime has sparse kernels: what `accelerate` made is written with its zeros.
    network, inputs = _on_cpu(densify(model) if isinstance(model, GraphModule) else model, example_inputs)
    num_bytes = sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
    if num_bytes > MAX_WEIGHT_BYTES:
        raise ExportError(f"{path}: {num_bytes / 1e9:.1f} GB of weights, one ONNX file holds at most 2 GB")
    proto = _to_onnx(network, _with_batch(inputs, TRACE_BATCH), path)
    _strip_metadata(proto)
    _check(proto, path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(proto.SerializeToString())
        file = _verify(temporary, network, inputs, tolerance, path)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return replace(file, path=path)


def verify_onnx(
    path: Path | str, model: nn.Module, example_inputs: tuple[Tensor, ...], *, tolerance: float = 1e-4
) -> OnnxFile:
    """How far the outputs of an ONNX file are from `model`'s, on seeded random inputs at batch 1 and 3.

    Floating-point inputs are drawn from a standard normal in the example's shape, others repeat the example.

    Raises:
        ExportError: the error exceeds `tolerance`, the file does not load or run, or the comparison is
            vacuous: a file that ignored its inputs would pass it too (the head is still zero, say).

    >>> from tempfile import TemporaryDirectory
    >>> model, inputs = nn.Linear(3, 2), (torch.ones(1, 3),)
    >>> with TemporaryDirectory() as folder:
    ...     file = export_onnx(model, inputs, f"{folder}/linear.onnx")
    ...     verify_onnx(file.path, model, inputs) == file
    True
    """
    network, inputs = _on_cpu(model, example_inputs)
    return _verify(Path(path), network, inputs, tolerance, Path(path))


def _on_cpu(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A float32 copy of `model` in eval mode, and its inputs to match."""
    if isinstance(inputs, Tensor) or not inputs:
        raise ExportError("example_inputs: expected a tuple of tensors such as (x,)")
    network = copy.deepcopy(model).cpu().float().eval()
    return network, tuple(x.detach().cpu().float() if x.is_floating_point() else x.cpu() for x in inputs)


def _with_batch(inputs: Sequence[Tensor], batch_size: int) -> tuple[Tensor, ...]:
    """Each input repeated or cut to `batch_size` along its first dimension."""
    return tuple(x[torch.arange(batch_size) % len(x)] if x.ndim else x for x in inputs)


def _random_inputs(inputs: Sequence[Tensor], batch_size: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(x.shape, generator=generator) if x.is_floating_point() else x
        for x in _with_batch(inputs, batch_size)
    )


def _to_onnx(network: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> onnx.ModelProto:
    try:
        arguments = inspect.signature(network.forward).bind(*inputs).arguments
        dynamic_shapes = pytree.tree_map(lambda x: {0: "batch"} if x.ndim else {}, dict(arguments))
        with _quiet():
            program: Any = torch.onnx.export(
                network,
                inputs,
                dynamo=True,
                optimize=True,
                dynamic_shapes=dynamic_shapes,
                external_data=False,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, TypeError, ValueError) as error:
        raise ExportError(f"{path}: {type(network).__name__} cannot be exported: {_root_cause(error)}") from error
    _restore_constants(program.model.graph)
    proto: onnx.ModelProto = program.model_proto
    return proto


def _restore_constants(graph: Any) -> None:
    """Put back the initialisers that onnxscript drops where it makes two of one name, as of two clamps of a tensor."""
    for value in (value for node in graph for value in node.inputs if value is not None):
        if value.const_value is not None and value.producer() is None and value.name not in graph.initializers:
            graph.register_initializer(value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter off the terminal: where tracing fails it prints whole graphs before it raises."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
        # Raised whenever two inputs share the batch dimension, which is what we ask for.
        warnings.filterwarnings("ignore", message="# The axis name: batch will not be used")
        # torch 2.11 warns of what torch itself does.
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
        yield


def _root_cause(error: BaseException) -> str:
    """What went wrong, in one line: the exporter wraps it in a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    """The first line of a message, with the second where the first only announces it."""
    lines = str(error).split("\n")
    return " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])


def _strip_metadata(message: Any) -> None:
    """Drop the metadata and doc strings of a protobuf message and all inside it.

    The exporter hangs stack traces on every node: the user's source paths and lines of code.
    """
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.type == field.TYPE_MESSAGE:
            for child in value if isinstance(value, Sequence) else [value]:
                _strip_metadata(child)


def _check(proto: onnx.ModelProto, path: Path) -> None:
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path}: not valid ONNX: {_first_line(error)}") from error
    left = _foldable_batch_norms(proto.graph)
    if left:
        # ONNX Runtime does not repair it: MobileNetV2 measured 2.1 times slower.
        raise ExportError(f"{path}: {len(left)} BatchNorm not folded into the convolution before it ({left[0]})")


def _foldable_batch_norms(graph: onnx.GraphProto) -> list[str]:
    """Names of BatchNormalization nodes that could be part of the convolution they read.

    None behind a concat, as in DenseNet, nor behind a convolution that is read twice or shares its weight.
    """
    constants = {tensor.name for tensor in graph.initializer} - {value.name for value in graph.input}
    convs = {node.output[0]: node for node in graph.node if node.op_type in ("Conv", "ConvTranspose")}
    weights = Counter(conv.input[1] for conv in convs.values())
    uses = Counter(value.name for value in graph.output)
    for node in graph.node:
        uses.update(node.input)

    def foldable(norm: onnx.NodeProto) -> bool:
        conv = convs.get(norm.input[0])
        if conv is None or not constants.issuperset([conv.input[1], *norm.input[1:]]):
            return False
        return weights[conv.input[1]] == 1 and all(uses[name] == 1 for name in (*conv.input[2:], conv.output[0]))

    return [node.name for node in graph.node if node.op_type == "BatchNormalization" and foldable(node)]


def _verify(file: Path, network: nn.Module, inputs: Sequence[Tensor], tolerance: float, path: Path) -> OnnxFile:
    """Run `file` beside `network`; `path` is the name that errors carry."""
    written = OnnxNetwork(file, name=path)
    errors = []
    for batch_size in CHECKED_BATCHES:
        drawn, redrawn = (_random_inputs(inputs, batch_size, seed) for seed in (1, 2))
        expected, actual, other = _run_eager(network, drawn), written.run(*drawn), _run_eager(network, redrawn)
        shapes, wanted = [tuple(x.shape) for x in actual], [tuple(x.shape) for x in expected]
        if shapes != wanted or not wanted:
            raise ExportError(f"{path}: outputs at batch {batch_size} are {shapes}, the network's {wanted}")
        if not any(x.is_floating_point() for x in inputs):
            other = [torch.zeros_like(x) for x in expected]  # nothing to vary: at least, not all zero
        for i, outputs in enumerate(zip(expected, actual, other, strict=True)):
            errors.append(_output_error(*outputs, tolerance, f"{path}: output {i}"))
    proto = onnx.load(file)
    opset = next(entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    relative, absolute = (max(column) for column in zip(*errors, strict=True))
    return OnnxFile(path, file.stat().st_size, len(proto.graph.node), opset, relative, absolute)


def _output_error(expected: Tensor, actual: Tensor, other: Tensor, tolerance: float, where: str) -> tuple[float, float]:
    """Relative and absolute error of one output; `other` is what the network says to other inputs.

    A file that ignored its inputs would be off by about |expected - other|. Where that is not well above the
    error measured, or above rounding, the comparison cannot tell such a file from a right one.
    """
    if expected.numel() == 0:
        return 0.0, 0.0
    if not torch.isfinite(expected).all():
        raise ExportError(f"{where}: the network's own output on random inputs is not finite")
    wanted, got = expected.double(), actual.double()
    absolute, scale = float((wanted - got).abs().max()), float(wanted.abs().max())
    relative = absolute / scale if scale else absolute
    if not relative <= tolerance:  # so written, NaN fails too
        raise ExportError(
            f"{where}: differs from the network by {absolute:.2e} = {relative:.2e} of its largest value "
            f"{scale:.2e}, allowed {tolerance:.0e}"
        )
    rounding = torch.finfo(torch.float32).eps * scale
    spread = float((wanted - other.double()).abs().max()) if expected.shape == other.shape else scale
    if expected.is_floating_point() and spread <= 10 * max(absolute, rounding):
        raise ExportError(
            f"{where}: does not depend on the input (another input changes it by {spread:.2e}, its largest "
            f"value is {scale:.2e}), so the comparison proves nothing; is the last layer still zero?"
        )
    return relative, absolute


def _run_eager(network: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    with torch.no_grad():
        return [x for x in pytree.tree_leaves(network(*inputs)) if isinstance(x, Tensor)]
