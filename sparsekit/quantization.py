"""An ONNX file in 8-bit integers: calibrated, quantised, run beside the file in floats.

ONNX Runtime's static quantisation as QuantizeLinear/DequantizeLinear pairs: symmetric weights with a scale per output
channel, activations with a scale per tensor, taken from what unlabelled images make of them. Whether integers are
faster depends on the processor and the network: convolutions and ReLU gain, SiLU and squeeze-excite lose it again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
from onnxruntime.quantization import QDQQuantizer, QuantType, quant_pre_process
from torch import Tensor

from sparsekit.calibration import CALIBRATIONS, Progress, measure_ranges, quiet
from sparsekit.environment import Environment
from sparsekit.errors import DataError, ExportError, QualityError, UsageError, nearest
from sparsekit.onnx_network import OnnxDifference, OnnxNetwork, compare_onnx

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# What ONNX Runtime's CPU provider computes in integers, or hands on as it is. Its LayerNorm and Softmax do not.
OPS = (
    *LAYERS,
    *("Add", "Mul", "Concat", "Relu", "LeakyRelu", "Clip", "Sigmoid", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Pad", "Slice", "Split", "Gather", "Resize", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"),
)
_NUM_SENSITIVITY_IMAGES = 16


@dataclass(frozen=True)
class Int8:
    """How to quantise.

    Attributes:
        calibration: activations' ranges: "minmax", all values; "percentile", all but 1 in 100,000; "entropy", those
            of the distribution that tells most about the whole.
        keep_float: shell patterns of layers that stay in float, by their names as in `layer_names`.
        signed_activations: int8 instead of uint8.
        reduce_range: weights of 7 bits, where products of 8 overflow.
    """

    calibration: str = "minmax"
    keep_float: tuple[str, ...] = ()
    signed_activations: bool = False
    reduce_range: bool = False

    def __post_init__(self) -> None:
        if self.calibration not in CALIBRATIONS:
            raise UsageError(f"calibration {self.calibration!r}: unknown{nearest(self.calibration, [*CALIBRATIONS])}")


def int8_for(machine: str, cpu_flags: Collection[str]) -> Int8:
    """The integers that a processor multiplies fast, and right.

    x86 multiplies unsigned with signed; without VNNI it adds pairs of products in 16 bits, which overflow.

    Args:
        machine: "x86_64", "aarch64"... as in `Environment`, like `cpu_flags`.

    >>> int8_for("x86_64", ["avx2"]).reduce_range, int8_for("x86_64", ["avx2", "avx_vnni"]).reduce_range
    (True, False)
    >>> int8_for("aarch64", ["asimddp"])
    Int8(calibration='minmax', keep_float=(), signed_activations=True, reduce_range=False)
    """
    if machine.lower() not in ("x86_64", "amd64"):
        return Int8(signed_activations=True)
    return Int8(reduce_range=not {"avx512_vnni", "avx_vnni", "amx_int8"}.intersection(cpu_flags))


@dataclass(frozen=True)
class QuantizedFile:
    """An ONNX file in int8 that was run beside its original in float, on the images it was calibrated with.

    Attributes:
        difference: from the original's outputs.
        float_layers: layers left in float, the network's own names for them.
    """

    path: Path
    size_bytes: int
    num_nodes: int
    difference: OnnxDifference
    float_layers: tuple[str, ...]


def quantize_onnx(
    path: Path | str, images: Tensor, out: Path | str, *, int8: Int8 | None = None, progress: Progress | None = None
) -> QuantizedFile:
    """Write the network in `path` as `out`, in int8; its batch stays dynamic.

    `out` takes its name only once it was run beside the original. Images pass in batches, whose activations are
    never kept.

    Args:
        path: a float32 ONNX file of one input.
        images: float32 [N, ...], inputs like those to come; some hundred do.
        int8: how; what this machine's processor likes unless given.
        progress: called with (done, total) images while ranges are measured.

    Raises:
        DataError: no images, or values that are not finite.
        UsageError: `keep_float` names no layer.
        ExportError: the file does not load, run on `images` or hold a layer that can be quantised.
    """
    with _calibrated(Path(path), images, int8, progress) as calibrated:
        return calibrated.write(calibrated.kept(), Path(out))


def quantize_until(
    path: Path | str,
    images: Tensor,
    out: Path | str,
    accept: Callable[[QuantizedFile], bool],
    *,
    int8: Int8 | None = None,
    progress: Progress | None = None,
) -> QuantizedFile:
    """`quantize_onnx`, with as many layers left in float as it takes until `accept` says yes.

    Layers go back to float in the order of what they cost: the noise at the network's output where that layer alone
    is in int8, measured on 16 images. How many is found by bisection.

    Args:
        accept: whether a file will do: it may look at the `difference`, or evaluate the file at `path`.

    Raises:
        QualityError: not even one layer can be in int8.
        SparsekitError: as `quantize_onnx`.
    """
    with _calibrated(Path(path), images, int8, progress) as calibrated, TemporaryDirectory() as folder:
        kept = calibrated.kept()
        tried = Path(folder, Path(out).name)
        if not accept(calibrated.write(kept, tried)):
            costly = calibrated.costliest(images[:_NUM_SENSITIVITY_IMAGES], kept, Path(folder, "one.onnx"))
            too_few, enough = 0, len(costly)
            while enough - too_few > 1:
                middle = (too_few + enough) // 2
                if accept(calibrated.write(kept | set(costly[:middle]), tried)):
                    enough = middle
                else:
                    too_few = middle
            if enough == len(costly):
                least = calibrated.names[costly[-1]]
                raise QualityError(f"{path}: int8 is not accurate enough, even for {least} alone")
            kept |= set(costly[:enough])
        return calibrated.write(kept, Path(out))


def layer_names(model: onnx.ModelProto) -> dict[str, str]:
    """Node -> name of every layer with a matrix product: its weight's, as in the network, else the node's own."""
    stored = {tensor.name for tensor in model.graph.initializer}
    names = {}
    for node in model.graph.node:
        if node.op_type in LAYERS:
            weight = node.input[1]
            known = weight in stored and weight.endswith(".weight")
            names[node.name] = weight.removesuffix(".weight") if known else node.name
    return names


@dataclass(frozen=True, eq=False)
class _Calibrated:
    """A float network with the ranges of its activations."""

    path: Path
    images: Tensor
    int8: Int8
    model: onnx.ModelProto
    ranges: Any
    names: dict[str, str]

    def kept(self) -> set[str]:
        """The nodes that `keep_float` names."""
        chosen = set()
        for pattern in self.int8.keep_float:
            matching = {node for node, name in self.names.items() if fnmatch(name, pattern) or fnmatch(node, pattern)}
            if not matching:
                some = ", ".join([*self.names.values()][:5])
                raise UsageError(f"keep_float {pattern!r}: none of {len(self.names)} layers is called so ({some} ...)")
            chosen |= matching
        return chosen

    def write(self, kept: set[str], out: Path) -> QuantizedFile:
        """The file `out` with all but the nodes `kept` in int8, compared with the original."""
        temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
        model = self.quantized(kept=kept)
        try:
            temporary.write_bytes(model.SerializeToString())
            difference = compare_onnx(self.path, temporary, self.images, name=out)
            size = temporary.stat().st_size
            temporary.replace(out)
        finally:
            temporary.unlink(missing_ok=True)
        left = tuple(self.names[node] for node in self.names if node in kept)
        return QuantizedFile(out, size, len(model.graph.node), difference, left)

    def costliest(self, images: Tensor, kept: Collection[str], scratch: Path) -> list[str]:
        """Nodes by the noise at the output where only that one is in int8, worst first."""
        sqnr = {}
        for node in self.names:
            if node not in kept:
                scratch.write_bytes(self.quantized(only=[node]).SerializeToString())
                sqnr[node] = compare_onnx(self.path, scratch, images).sqnr_db
        return sorted(sqnr, key=sqnr.__getitem__)

    def quantized(self, *, only: Collection[str] = (), kept: Collection[str] = ()) -> onnx.ModelProto:
        """The network in int8: the nodes `only` where there are some, else all but those `kept`."""
        if set(kept).issuperset(self.names):
            ops = ", ".join(sorted({node.op_type for node in self.model.graph.node}))
            raise ExportError(f"{self.path}: no layer to quantise; its operators are {ops}")
        model = onnx.ModelProto()
        model.CopyFrom(self.model)  # the quantiser changes what it gets
        with quiet(), _reported(self.path):
            quantizer = QDQQuantizer(
                model,
                per_channel=True,
                reduce_range=self.int8.reduce_range,
                weight_qType=QuantType.QInt8,
                activation_qType=QuantType.QInt8 if self.int8.signed_activations else QuantType.QUInt8,
                tensors_range=self.ranges,
                nodes_to_quantize=sorted(only),
                nodes_to_exclude=sorted(kept),
                op_types_to_quantize=OPS,
                extra_options={},
            )
            quantizer.quantize_model()
            quantizer.model.topological_sort()
        result: onnx.ModelProto = quantizer.model.model
        _drop_unused_domains(result)
        return result


@contextmanager
def _calibrated(path: Path, images: Tensor, int8: Int8 | None, progress: Progress | None) -> Iterator[_Calibrated]:
    if len(images) == 0:
        raise DataError(f"{path}: no images to calibrate int8 with")
    if not images.isfinite().all():
        raise DataError(f"{path}: the images to calibrate int8 with hold values that are not finite")
    here = Environment.collect()
    int8 = int8 or int8_for(here.machine, here.cpu_flags)
    network = OnnxNetwork(path)
    network.run(images[:1])  # says what is wrong with the images before the quantiser does
    with TemporaryDirectory(prefix="sparsekit-int8-") as folder:
        prepared = Path(folder, "prepared.onnx")
        with quiet():
            # The exporter has written every shape down already, symbols included.
            quant_pre_process(path, prepared, skip_symbolic_shape=True)
        model = onnx.load(prepared)
        if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
            raise ExportError(f"{path}: is quantised already")  # the quantiser would not end
        names = layer_names(model)
        ranges = None
        if names:
            with _reported(path):
                ranges = measure_ranges(prepared, OPS, images, method=int8.calibration, progress=progress)
        yield _Calibrated(path, images, int8, model, ranges, names)


def _drop_unused_domains(model: onnx.ModelProto) -> None:
    """ONNX Runtime's optimiser lists every operator set that it knows."""
    used = {node.domain for node in model.graph.node} | {""}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)


@contextmanager
def _reported(path: Path) -> Iterator[None]:
    """What the quantiser raises where an operator has it stumble, in one line that names the file."""
    try:
        yield
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        first_line = str(error).partition("\n")[0]
        raise ExportError(f"{path}: cannot be quantised: {type(error).__name__}: {first_line}") from error
