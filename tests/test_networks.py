"""Names become networks, files become weights, and what cannot is named."""

from __future__ import annotations

import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsekit.errors import DataError, UsageError
from sparsekit.factory import load_factory
from sparsekit.models import MODELS
from sparsekit.networks import build_network, load_weights
from tests import tiny

State = dict[str, Tensor]


@pytest.mark.parametrize("name", ["digits_resnet", "resnet20", "mobilenet_v2"])
def test_a_name_in_models_is_that_network(name: str) -> None:
    network = build_network(name, num_classes=7, in_channels=1)
    assert type(network) is type(MODELS[name]())
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert not any(module.training for module in network.modules())


def test_torchvision_networks_go_by_their_names() -> None:
    network = build_network("torchvision:mobilenet_v3_small", num_classes=7)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert not network.training


@pytest.mark.parametrize("name", ["network", "Net"])
def test_a_users_factory_or_class_decides_everything_itself(name: str) -> None:
    network = build_network(f"{tiny.FILE}:{name}", num_classes=3, in_channels=5)
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert not network.training


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet65", "model 'resnet65': unknown; did you mean resnet56"),
        ("torchvision", "model 'torchvision': unknown; did you mean torchvision:resnet50"),
        ("torchvision:resnet5", "model 'torchvision:resnet5': unknown; did you mean resnet50"),
        ("zzz:resnet50", "model 'zzz:resnet50': unknown"),
        ("", "model '': unknown; valid: "),
    ],
)
def test_an_unknown_name_is_named_beside_the_nearest(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_network(name)


def test_without_timm_its_names_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="model 'timm:resnet18': timm is not installed; pip install timm"):
        build_network("timm:resnet18")


def test_timm_networks_go_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    timm = ModuleType("timm")
    vars(timm)["list_models"] = lambda: ["resnet18"]
    vars(timm)["create_model"] = lambda name, pretrained, num_classes, in_chans: nn.Linear(in_chans, num_classes)
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert build_network("timm:resnet18", num_classes=7, in_channels=2)(torch.zeros(1, 2)).shape == (1, 7)
    with pytest.raises(UsageError, match="model 'timm:resnet81': unknown; did you mean resnet18"):
        build_network("timm:resnet81")


USER_FILE = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Config:
    width: int = 8

def network():
    return Config()

answer = 42
"""


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("none.py:network", r"none.py:network: expected path/to/file.py:factory, but '.*none.py' is no Python file"),
        ("net.py:netwrok", r"net.py:netwrok: no function 'netwrok' in .*; did you mean network"),
        ("net.py:answer", r"no function 'answer'"),
        ("net.py:network", r"net.py:network: expected the factory to return an nn.Module, got Config"),
        ("imports.py:network", r"imports.py: cannot be imported: No module named 'no_such_module'"),
        ("syntax.py:network", r"syntax.py: cannot be imported: "),
    ],
)
def test_a_factory_that_is_none_is_named(spec: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(USER_FILE)
    (tmp_path / "imports.py").write_text("import no_such_module")
    (tmp_path / "syntax.py").write_text("def network(:")
    with pytest.raises(DataError, match=message) as caught:
        build_network(f"{tmp_path}/{spec}")
    assert "\n" not in str(caught.value)


def test_loading_a_factory_leaves_the_import_path_alone_and_no_half_module(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(USER_FILE)
    (tmp_path / "broken.py").write_text("import no_such_module")
    path, modules = list(sys.path), set(sys.modules)
    assert load_factory(f"{tmp_path}/net.py:network")().width == 8
    with pytest.raises(DataError, match="cannot be imported"):
        load_factory(f"{tmp_path}/broken.py:network")
    assert sys.path == path
    (new,) = set(sys.modules) - modules
    assert sys.modules[new].__file__ == str(tmp_path / "net.py")


def trained() -> State:
    torch.manual_seed(1)
    return {name: torch.rand_like(value.float()).to(value.dtype) for name, value in tiny.Net().state_dict().items()}


SAVED: dict[str, Callable[[State, Path], object]] = {
    "w.safetensors": save_file,
    "w.pt": torch.save,
    "nested.pth": lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path),
    "parallel.pt": lambda state, path: torch.save({f"module.{key}": value for key, value in state.items()}, path),
    "compiled.pt": lambda state, path: torch.save({f"_orig_mod.{key}": value for key, value in state.items()}, path),
    "half.safetensors": lambda state, path: save_file({k: v.double() for k, v in state.items()}, path),
    "old.pt": lambda state, path: torch.save({k: v for k, v in state.items() if "num_batches" not in k}, path),
}


@pytest.mark.parametrize("name", SAVED)
def test_weights_survive_every_usual_kind_of_file(name: str, tmp_path: Path) -> None:
    SAVED[name](trained(), tmp_path / name)
    network = tiny.Net()
    load_weights(network, tmp_path / name)
    expected = trained()
    assert all(value.equal(expected[key]) for key, value in network.state_dict().items() if "num_batches" not in key)
    assert {value.dtype for value in network.parameters()} == {torch.float32}


def _without(state: State, *keys: str) -> State:
    return {key: value for key, value in state.items() if key not in keys}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: _without(state, "conv1.weight"), r": 'conv1.weight' is missing$"),
        (lambda state: state | {"fc.weight": torch.ones(1)}, r": 'fc.weight' is not in the network$"),
        (
            lambda state: state | {"head.bias": torch.ones(7), "conv1.weight": torch.ones(8, 3, 3, 3)},
            r": 'conv1.weight' is \[8, 3, 3, 3\], the network's is \[8, 1, 3, 3\]; "
            r"'head.bias' is \[7\], the network's is \[10\]$",
        ),
        (
            lambda state: {key.replace("head", "fc"): value for key, value in state.items()},
            r": 'head.weight' is missing; 'head.bias' is missing; 'fc.bias' is not in the network \(and 1 more\)$",
        ),
    ],
    ids=["missing", "unknown", "shapes", "renamed"],
)
def test_the_first_three_mismatches_are_named_and_the_network_stays(
    change: Callable[[State], State], message: str, tmp_path: Path
) -> None:
    save_file(change(trained()), tmp_path / "w.safetensors")
    network = tiny.Net()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with pytest.raises(DataError, match=rf"weights .*w.safetensors{message}"):
        load_weights(network, tmp_path / "w.safetensors")
    assert all(value.equal(before[key]) for key, value in network.state_dict().items())


def _truncated(path: Path, share: float) -> None:
    (torch.save if path.suffix == ".pt" else save_file)(trained(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


class Custom:
    """Something that only pickle can bring back."""


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


DAMAGED: dict[str, Callable[[Path], object]] = {
    "none.safetensors": lambda path: None,
    "none.pt": lambda path: None,
    "folder.pt": lambda path: path.mkdir(),
    "empty.safetensors": lambda path: path.touch(),
    "empty.pt": lambda path: path.touch(),
    "half.safetensors": lambda path: _truncated(path, 0.5),
    "half.pt": lambda path: _truncated(path, 0.5),
    "text.safetensors": lambda path: path.write_text("hello, world"),
    "text.pt": lambda path: path.write_text("hello, world"),
    "zeros.pt": lambda path: path.write_bytes(bytes(1000)),
    "random.pt": lambda path: path.write_bytes(bytes((i * 7919) % 251 for i in range(4000))),
    "pickle.pt": lambda path: path.write_bytes(pickle.dumps({"a": 1})),
    "object.pt": lambda path: torch.save(Custom(), path),
    "module.pt": lambda path: torch.save(tiny.Net(), path),
    "zip.pt": _zip,
    "list.pt": lambda path: torch.save([torch.ones(2)], path),
    "numbered.pt": lambda path: torch.save({0: torch.ones(2)}, path),
    "numbers.pt": lambda path: torch.save({"a": 1.0}, path),
    "nothing.pt": lambda path: torch.save({}, path),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_without_weights_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    DAMAGED[name](tmp_path / name)
    with pytest.raises(DataError, match=rf"^weights .*{name}: \S") as caught:
        load_weights(tiny.Net(), tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("protocol", range(6))
def test_a_plain_pickle_of_any_protocol_is_refused_unread(protocol: int, tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(pickle.dumps(Custom(), protocol=protocol))
    with pytest.raises(DataError, match=r"w.pt: "):
        load_weights(tiny.Net(), tmp_path / "w.pt")
