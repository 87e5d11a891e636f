"""int8: the file says nearly what the file in float says, or there is no file."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from sparsekit import onnx_network
from sparsekit.calibration import CALIBRATIONS
from sparsekit.data import image_task
from sparsekit.errors import DataError, ExportError, QualityError, UsageError
from sparsekit.export import export_onnx
from sparsekit.images import load_images
from sparsekit.onnx_network import OnnxNetwork, evaluate_onnx
from sparsekit.quantization import Int8, QuantizedFile, quantize_onnx, quantize_until
from sparsekit.task import Schedule, Task
from tests.tiny import Net


@pytest.fixture(scope="module")
def task() -> Task:
    return image_task(load_images("digits"), augment=(), batch_size=64)


@pytest.fixture(scope="module")
def network(task: Task) -> Net:
    torch.manual_seed(0)
    net = Net(width=32)
    task.fit(net, task, Schedule(epochs=3, lr=0.2, precision="32-true"), stage="dense")
    return net.eval()


@pytest.fixture(scope="module")
def images(task: Task) -> Tensor:
    return torch.cat([inputs for inputs, _ in task.batches(0)])[:150]


@pytest.fixture(scope="module")
def dense(network: Net, task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(network, task.example_inputs, tmp_path_factory.mktemp("int8") / "dense.onnx").path


@pytest.fixture(scope="module")
def int8(dense: Path, images: Tensor) -> QuantizedFile:
    return quantize_onnx(dense, images, dense.with_name("int8.onnx"), int8=Int8())


def stored(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_a_file_scores_what_its_network_scores(network: Net, dense: Path, task: Task) -> None:
    assert task.evaluate(network) > 0.8
    assert evaluate_onnx(dense, task) == task.evaluate(network)


def test_a_file_of_several_outputs_is_a_network_of_a_tuple(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x * 2, x.sum(1)

    x = torch.arange(6.0).reshape(2, 3)
    doubled, summed = OnnxNetwork(export_onnx(Two(), (x,), tmp_path / "two.onnx").path)(x)
    assert doubled.tolist() == (x * 2).tolist()
    assert summed.tolist() == [3.0, 12.0]


@pytest.mark.parametrize("calibration", CALIBRATIONS)
def test_int8_keeps_the_accuracy_whatever_calibrates_it(
    calibration: str, dense: Path, images: Tensor, task: Task, tmp_path: Path
) -> None:
    file = quantize_onnx(dense, images, tmp_path / "m.onnx", int8=Int8(calibration))
    assert evaluate_onnx(file.path, task) > evaluate_onnx(dense, task) - 0.02
    assert file.difference.sqnr_db > 20
    assert file.difference.agreement is not None
    assert file.difference.agreement > 0.97


def test_the_result_describes_the_file(int8: QuantizedFile, dense: Path, images: Tensor) -> None:
    expected, actual = (OnnxNetwork(path)(images) for path in (dense, int8.path))
    assert int8.size_bytes == int8.path.stat().st_size < dense.stat().st_size / 2
    assert int8.num_nodes == len(onnx.load(int8.path).graph.node)
    assert int8.float_layers == ()
    assert int8.difference.max_relative_error == pytest.approx(
        float((actual - expected).abs().max() / expected.abs().max())
    )
    noise = (actual - expected).double().square().sum() / expected.double().square().sum()
    assert int8.difference.sqnr_db == pytest.approx(-10 * float(noise.log10()))
    assert int8.difference.agreement == pytest.approx(float((expected.argmax(1) == actual.argmax(1)).double().mean()))


def test_the_runtime_multiplies_every_layer_in_integers(int8: QuantizedFile, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(int8.path), options, providers=["CPUExecutionProvider"])
    ops = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert (ops.count("QLinearConv"), ops.count("QGemm")) == (2, 1)
    assert not {"Conv", "Gemm", "Relu"}.intersection(ops)


def test_weights_are_symmetric_with_a_scale_for_each_channel(int8: QuantizedFile, network: Net) -> None:
    tensors = stored(int8.path)
    weight, scale, zero = (tensors[f"conv2.weight_{suffix}"] for suffix in ("quantized", "scale", "zero_point"))
    assert weight.dtype == np.int8
    assert scale.shape == (16,)
    assert not zero.any()
    assert np.abs(weight).reshape(16, -1).max(1).tolist() == [127] * 16


def test_the_file_is_valid_and_its_batch_dynamic(int8: QuantizedFile, images: Tensor) -> None:
    model = onnx.load(int8.path)
    onnx.checker.check_model(model, full_check=True)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert {entry.domain for entry in model.opset_import} == {""}
    assert len(OnnxNetwork(int8.path)(images[:7])) == 7


def test_a_reduced_range_leaves_a_bit_of_each_weight(dense: Path, images: Tensor, tmp_path: Path) -> None:
    file = quantize_onnx(dense, images, tmp_path / "m.onnx", int8=Int8(reduce_range=True))
    assert np.abs(stored(file.path)["conv2.weight_quantized"].astype(int)).max() <= 64


def test_ranges_do_not_depend_on_how_images_are_batched(
    int8: QuantizedFile, dense: Path, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_network, "_MAX_BATCH", 11)
    seen: list[int] = []
    file = quantize_onnx(
        dense, images, tmp_path / "m.onnx", int8=Int8(), progress=lambda done, total: seen.append(done)
    )
    assert seen == [*range(11, 150, 11), 150]
    one, other = stored(int8.path), stored(file.path)
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_allclose(other[name], value, rtol=1e-6, err_msg=name)


def test_named_layers_stay_in_float(dense: Path, images: Tensor, tmp_path: Path) -> None:
    file = quantize_onnx(dense, images, tmp_path / "m.onnx", int8=Int8(keep_float=("conv*",)))
    assert file.float_layers == ("conv1", "conv2")
    assert stored(file.path)["conv2.weight"].dtype == np.float32
    assert stored(file.path)["head.weight_quantized"].dtype == np.int8
    with pytest.raises(UsageError, match=r"keep_float 'conv3': none of 3 layers is called so \(conv1, conv2, head"):
        quantize_onnx(dense, images, tmp_path / "m.onnx", int8=Int8(keep_float=("conv3",)))


def with_outlier(network: Net) -> Net:
    """The same function, one channel between the convolutions a thousand times as large."""
    net = Net(width=32).eval()
    net.load_state_dict(network.state_dict())
    with torch.no_grad():
        norm = net.bn1
        norm.weight[0] *= 1000
        norm.bias[0] *= 1000
        net.conv2.weight[:, 0] /= 1000
    return net


def test_layers_go_back_to_float_from_the_costliest_until_the_file_will_do(
    network: Net, images: Tensor, task: Task, tmp_path: Path
) -> None:
    path = export_onnx(with_outlier(network), task.example_inputs, tmp_path / "dense.onnx").path
    tried: list[QuantizedFile] = []

    def accept(file: QuantizedFile) -> bool:
        assert file.path.is_file()
        tried.append(file)
        return file.difference.sqnr_db > 20

    file = quantize_until(path, images, tmp_path / "m.onnx", accept, int8=Int8())
    assert tried[0].float_layers == ()
    assert tried[0].difference.sqnr_db < 10
    assert file.difference.sqnr_db > 20
    assert file.float_layers == ("conv1", "conv2")
    assert sorted(os.listdir(tmp_path)) == ["dense.onnx", "m.onnx"]


def test_nothing_is_left_in_float_where_all_of_int8_will_do(int8: QuantizedFile, dense: Path, images: Tensor) -> None:
    file = quantize_until(dense, images, dense.with_name("until.onnx"), lambda _: True, int8=Int8())
    assert dataclasses.replace(file, path=int8.path) == int8


def test_an_accuracy_that_no_layer_in_int8_reaches_is_refused(dense: Path, images: Tensor, tmp_path: Path) -> None:
    counts: list[int] = []

    def refuse(file: QuantizedFile) -> bool:
        counts.append(len(file.float_layers))
        return False

    with pytest.raises(QualityError, match=r"dense\.onnx: int8 is not accurate enough, even for \w+ alone"):
        quantize_until(dense, images[:32], tmp_path / "m.onnx", refuse, int8=Int8())
    assert counts == [0, 1, 2]
    assert os.listdir(tmp_path) == []


def test_a_failure_keeps_the_old_file_and_says_why_in_one_line(
    int8: QuantizedFile, dense: Path, images: Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "m.onnx"
    out.write_bytes(b"old")
    relu = export_onnx(nn.ReLU(), (images[:2],), tmp_path / "relu.onnx").path
    text = tmp_path / "text.onnx"
    text.write_text("hello")
    for path, given, error, message in (
        (dense, images[:0], DataError, "no images to calibrate int8 with"),
        (dense, images[:, :, :3], ExportError, r"ONNX Runtime cannot run it: .*dimensions"),
        (relu, images, ExportError, "no layer to quantise; its operators are Relu"),
        (text, images, ExportError, "ONNX Runtime cannot load it"),
        (int8.path, images, ExportError, r"int8\.onnx: is quantised already"),
        (dense, images.double(), ExportError, "ONNX Runtime cannot run it: .*Unexpected input data type"),
        (dense, images / 0, DataError, "hold values that are not finite"),
    ):
        with pytest.raises(error, match=message) as caught:
            quantize_onnx(path, given, out)
        assert "\n" not in str(caught.value)
    assert out.read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "relu.onnx", "text.onnx"]


def test_an_unknown_calibration_is_named() -> None:
    with pytest.raises(UsageError, match="calibration 'min-max': unknown; did you mean minmax"):
        Int8("min-max")


def test_the_terminal_stays_clean(
    dense: Path, images: Tensor, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    quantize_onnx(dense, images, tmp_path / "m.onnx", int8=Int8("percentile"))
    assert capfd.readouterr() == ("", "")
