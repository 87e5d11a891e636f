"""Export: the file is the network, or there is no file."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from sparsekit.errors import ExportError
from sparsekit.export import export_onnx, verify_onnx


class PairOutput(NamedTuple):
    logits: Tensor
    features: dict[str, Tensor]


class SmallNet(nn.Module):
    """A folded BatchNorm, a BatchNorm behind a concat that cannot be, dropout, and three nested outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.norm_of_concat = nn.BatchNorm2d(11)
        self.head = nn.Linear(11, 5)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> PairOutput:
        y = torch.relu(self.norm(self.conv(x)))
        y = self.norm_of_concat(torch.cat([y, x[:, :, 1:-1, 1:-1]], 1))
        pooled = self.drop(torch.relu(y).mean((2, 3)))
        logits = self.head(pooled)
        return PairOutput(logits, {"pooled": pooled, "class": logits.argmax(1)})


class TwoInputs(nn.Module):
    """A float and an integer input that share the batch; forward takes any number of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)

    def forward(self, *inputs: Tensor) -> Tensor:
        embedded: Tensor = self.embed(inputs[1])
        return inputs[0] + embedded


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return x


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5


def trained(seed: int = 0) -> SmallNet:
    """A network whose normalisations are not the identity, in training mode."""
    torch.manual_seed(seed)
    net = SmallNet()
    for norm in (net.norm, net.norm_of_concat):
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 2)
    return net


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "small.onnx"
    export_onnx(trained(), (torch.randn(1, 3, 8, 8),), path)
    return path


def test_the_file_says_what_the_network_says_for_every_output_and_any_batch(exported: Path) -> None:
    net = trained().eval()
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    logits, pooled, classes = onnxruntime.InferenceSession(str(exported)).run(None, {"x": x.numpy()})
    with torch.no_grad():
        expected = net(x)
    torch.testing.assert_close(torch.from_numpy(logits), expected.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(pooled), expected.features["pooled"], rtol=1e-4, atol=1e-5)
    assert classes.tolist() == expected.features["class"].tolist()


def test_the_batch_is_named_and_nothing_else_is_dynamic(exported: Path) -> None:
    graph = onnx.load(exported).graph
    dims = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input]
    assert dims == [["batch", 3, 8, 8]]
    assert graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_the_file_is_alone_and_holds_no_path_or_line_of_the_users_code(exported: Path) -> None:
    assert os.listdir(exported.parent) == ["small.onnx"]
    data = exported.read_bytes()
    for secret in (__file__, os.getcwd(), torch.__file__, "def forward", "self.norm_of_concat(", "stack_trace"):
        assert secret.encode() not in data


def test_a_batch_norm_is_folded_unless_it_stands_behind_a_concat(exported: Path) -> None:
    ops = [node.op_type for node in onnx.load(exported).graph.node]
    assert ops.count("BatchNormalization") == 1
    assert ops.index("BatchNormalization") > ops.index("Concat")


def test_the_result_describes_the_file(tmp_path: Path) -> None:
    file = export_onnx(trained(), (torch.randn(4, 3, 8, 8),), str(tmp_path / "m.onnx"))
    proto = onnx.load(file.path)
    assert file.path == tmp_path / "m.onnx"
    assert file.size_bytes == os.path.getsize(file.path)
    assert file.num_nodes == len(proto.graph.node)
    assert file.opset == proto.opset_import[0].version
    assert 0 < file.max_relative_error < 1e-4
    assert 0 < file.max_abs_error < 1e-4


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    net = trained().double().train()
    net.norm.eval()
    hook = net.conv.register_forward_hook(lambda *_: None)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    rng = torch.get_rng_state()
    export_onnx(net, (torch.randn(1, 3, 8, 8, generator=torch.Generator()),), tmp_path / "m.onnx")
    assert torch.equal(torch.get_rng_state(), rng)
    assert net.training
    assert not net.norm.training
    assert list(net.conv._forward_hooks) == [hook.id]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_several_inputs_share_the_batch_and_the_terminal_stays_clean(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    inputs = (torch.randn(1, 4), torch.tensor([3]))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        file = export_onnx(TwoInputs(), inputs, tmp_path / "m.onnx")
    assert [v.type.tensor_type.shape.dim[0].dim_param for v in onnx.load(file.path).graph.input] == ["batch"] * 2
    assert not caught
    assert capfd.readouterr() == ("", "")


def test_a_network_that_cannot_be_exported_says_why_in_one_line_and_leaves_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match=r"m\.onnx: Branches cannot be exported: .*data-dependent") as caught:
        export_onnx(Branches(), (torch.randn(2, 3),), tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, torch.onnx.OnnxExporterError)
    assert os.listdir(tmp_path) == []
    assert capfd.readouterr() == ("", "")


def test_a_zero_head_is_refused_with_and_without_a_bias(tmp_path: Path) -> None:
    for zeroed in (["weight"], ["weight", "bias"]):
        head = nn.Linear(3, 2)
        for name in zeroed:
            nn.init.zeros_(head.get_parameter(name))
        with pytest.raises(ExportError, match="output 0: does not depend on the input"):
            export_onnx(head, (torch.randn(2, 3),), tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def test_small_outputs_are_not_mistaken_for_none(tmp_path: Path) -> None:
    head = nn.Linear(3, 2)
    with torch.no_grad():
        head.weight.mul_(1e-12)
        head.bias.zero_()
    assert export_onnx(head, (torch.randn(2, 3),), tmp_path / "m.onnx").max_relative_error < 1e-4


def test_a_failed_comparison_names_path_and_numbers_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    with pytest.raises(ExportError, match=re.escape(str(path)) + r": output 0: differs .* allowed 0e\+00"):
        export_onnx(trained(), (torch.randn(2, 3, 8, 8),), path, tolerance=0.0)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_a_file_of_other_weights_or_shapes_is_not_verified(exported: Path) -> None:
    inputs = (torch.randn(2, 3, 8, 8),)
    assert verify_onnx(exported, trained(), inputs).max_relative_error < 1e-4
    with pytest.raises(ExportError, match="output 0: differs from the network by"):
        verify_onnx(exported, trained(seed=1), inputs)
    with pytest.raises(ExportError, match=r"outputs at batch 1 are .*, the network's"):
        verify_onnx(exported, Scale(), inputs)
    with pytest.raises(ExportError, match="ONNX Runtime cannot run it"):
        verify_onnx(exported, Scale(), (torch.randn(2, 4),))
    with pytest.raises(ExportError, match=r"has 1 inputs \(x\), got 2"):
        verify_onnx(exported, TwoInputs(), (torch.randn(1, 4), torch.tensor([3])))


def test_what_is_no_onnx_file_or_no_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(ExportError, match=r"text\.onnx: ONNX Runtime cannot load it"):
        verify_onnx(tmp_path / "text.onnx", Scale(), (torch.randn(2, 3),))
    with pytest.raises(ExportError, match=r"none\.onnx: ONNX Runtime cannot load it: .*No such file"):
        verify_onnx(tmp_path / "none.onnx", Scale(), (torch.randn(2, 3),))
    with pytest.raises(ExportError, match=r"the folder .* does not exist"):
        export_onnx(Scale(), (torch.randn(2, 3),), tmp_path / "nowhere" / "m.onnx")


def test_an_output_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.log()

    with pytest.raises(ExportError, match=r"output 0: .* not finite"):
        export_onnx(Log(), (torch.ones(2, 3),), tmp_path / "m.onnx")


def test_a_foldable_batch_norm_that_survives_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: export(*args, **options | {"optimize": False}))
    with pytest.raises(ExportError, match="1 BatchNorm not folded into the convolution before it"):
        export_onnx(trained(), (torch.randn(2, 3, 8, 8),), tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


def test_two_clamps_of_one_tensor_by_constants_export(tmp_path: Path) -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.limits = nn.ParameterList(torch.tensor(limit) for limit in (-1.0, 1.0, -0.5, 0.5))

        def forward(self, x: Tensor) -> Any:
            x = x * 2
            low, high, lower, higher = self.limits
            return self.a(torch.clamp(x, low, high)) + self.b(torch.clamp(x, lower, higher))

    assert export_onnx(Clamped(), (torch.randn(2, 4),), tmp_path / "clamped.onnx").max_relative_error < 1e-5


def test_the_batch_must_not_be_fixed_by_the_network(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.view(2, 3) * 2

    with pytest.raises(ExportError, match=r"Fixed cannot be exported: .*static shape of 2"):
        export_onnx(Fixed(), (torch.randn(2, 3),), tmp_path / "m.onnx")


def test_a_bare_tensor_is_no_tuple_of_inputs(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="example_inputs: expected a tuple"):
        export_onnx(Scale(), torch.randn(2, 3), tmp_path / "m.onnx")  # type: ignore[arg-type]
