"""A saved artifact is whole, holds six plain files, and gives the network back bit for bit."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsekit.artifact import FILES, Artifact, load
from sparsekit.errors import DataError, SparsekitError, UsageError
from sparsekit.pipeline import compress
from sparsekit.program import Program
from sparsekit.recipe import Recipe
from sparsekit.report import Report
from tests import tiny

RECIPE = Recipe(method="magnitude", data=None, allow_slower=True)


class Tied(nn.Module):
    """Two layers share one weight, so the state dict has two names for one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, padding=1)
        self.a = nn.Conv2d(12, 12, 3, padding=1)
        self.b = nn.Conv2d(12, 12, 3, padding=1)
        self.b.weight = self.a.weight
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.stem, self.a, self.b):
            x = torch.relu(layer(x))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def compressed(make: Callable[[], nn.Module]) -> Artifact:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsekit.fitting.measure_latency", tiny.quick_latency)
        torch.manual_seed(0)
        return compress(make(), RECIPE, None, example_inputs=(torch.randn(2, 1, 8, 8),))


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return compressed(tiny.Net)


@pytest.fixture
def folder(artifact: Artifact, tmp_path: Path) -> Path:
    return artifact.save(tmp_path / "out")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextmanager
def disk_for(num_bytes: int) -> Iterator[None]:
    """No file can grow beyond `num_bytes`: what a full disk does to us, but for the number of the error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_folder_holds_exactly_the_six_files(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert len(FILES) == 6
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_others_may_read_every_file_as_the_umask_says(artifact: Artifact, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        folder = artifact.save(tmp_path / "out")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
    assert folder.stat().st_mode & 0o777 == 0o755


def test_the_report_survives_and_the_recipe_is_readable(artifact: Artifact, folder: Path) -> None:
    document = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert Report.from_json(document).to_json() == artifact.report.to_json()
    assert Recipe.from_toml(folder / "recipe.toml") == RECIPE


def test_loading_gives_the_network_bit_for_bit(artifact: Artifact, folder: Path) -> None:
    small = load(folder, tiny.Net)
    state, expected = small.state_dict(), artifact.model.state_dict()
    assert list(state) == list(expected)
    assert all(value.equal(expected[name]) for name, value in state.items())
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(small(x), artifact.model(x))
    assert not any(module.training for module in small.modules())


def test_the_loaded_network_is_the_onnx_file(folder: Path) -> None:
    small = load(folder, tiny.Net)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = small(x).detach()
    error = (torch.from_numpy(got) - expected).abs().max() / expected.abs().max()
    assert error <= 1e-4


def test_the_loaded_network_is_physically_smaller(folder: Path) -> None:
    small = load(folder, tiny.Net)
    assert isinstance(small, tiny.Net)
    assert small.conv2.weight.shape[0] < 16
    assert small.conv2.weight.shape == load_file(folder / "weights.safetensors")["conv2.weight"].shape


def test_tied_weights_survive_as_one_tensor(tmp_path: Path) -> None:
    artifact = compressed(Tied)
    small = load(artifact.save(tmp_path / "out"), Tied)
    assert isinstance(small, Tied)
    assert small.a.weight is small.b.weight
    assert small.a.weight.shape[0] < 12
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(small(x), artifact.model(x))


def test_a_folder_in_the_way_is_refused_and_stays(artifact: Artifact, folder: Path) -> None:
    before = contents(folder)
    with pytest.raises(UsageError, match="out: exists; choose another folder, or overwrite it"):
        artifact.save(folder)
    assert contents(folder) == before


def test_overwriting_replaces_the_folder_whole(artifact: Artifact, folder: Path) -> None:
    (folder / "notes.txt").write_text("of the old run")
    (folder / "plan.json").write_text("old")
    artifact.save(folder, overwrite=True)
    assert {path.name for path in folder.iterdir()} == set(FILES)
    assert (folder / "plan.json").read_text() != "old"
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_overwriting_through_a_link_keeps_the_link(artifact: Artifact, folder: Path) -> None:
    link = folder.with_name("latest")
    link.symlink_to("out")
    (folder / "plan.json").write_text("old")
    artifact.save(link, overwrite=True)
    assert link.is_symlink()
    assert (folder / "plan.json").read_text() != "old"


def test_a_full_disk_leaves_the_old_folder_whole_and_nothing_else(artifact: Artifact, folder: Path) -> None:
    before = contents(folder)
    with disk_for(2000), pytest.raises(SparsekitError, match=r"out: cannot be written: \w") as caught:
        artifact.save(folder, overwrite=True)
    assert "\n" not in str(caught.value)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


def test_a_full_disk_leaves_nothing_under_a_new_name(artifact: Artifact, tmp_path: Path) -> None:
    with disk_for(2000), pytest.raises(SparsekitError, match="new: cannot be written"):
        artifact.save(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("moment", ["report", "swap"])
def test_an_interrupted_overwrite_leaves_the_old_folder_whole(
    moment: str, interruption: BaseException, artifact: Artifact, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(folder)
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise interruption
        return rename(path, target)

    def no_html(report: Report) -> str:
        raise interruption

    if moment == "swap":
        monkeypatch.setattr(Path, "rename", fail)
    else:
        monkeypatch.setattr(Report, "html", no_html)
    with pytest.raises((KeyboardInterrupt, SparsekitError)):
        artifact.save(folder, overwrite=True)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (lambda: tiny.Net(width=4), "out: the factory makes another network: group 'conv1'"),
        (
            lambda: tiny.Net(width=9),
            "out: the factory makes another network: group 'conv1': conv1.weight dim 0: expected 8",
        ),
        (Tied, "out: the factory makes another network: group 'conv1': the model has no 'conv1.weight'"),
        (lambda: None, "out: expected the factory to return an nn.Module, got NoneType"),
    ],
    ids=["narrower", "wider", "other", "none"],
)
def test_a_wrong_factory_is_refused_in_one_line(factory: Callable[[], nn.Module], message: str, folder: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(folder, factory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["plan.json", "weights.safetensors"])
@pytest.mark.parametrize(
    "content", [None, b"", b"{}", b"[]", b"\xff", bytes(100)], ids=["missing", "empty", "{}", "[]", "bytes", "zeros"]
)
def test_a_missing_or_damaged_file_is_named(name: str, content: bytes | None, folder: Path) -> None:
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: .*") as caught:
        load(folder, tiny.Net)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none: no such artifact folder"):
        load(tmp_path / "none", tiny.Net)


def test_a_copied_or_renamed_folder_loads(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert load(tmp_path / "copy", tiny.Net)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


class Literal(nn.Module):
    """Its forward writes a size that cutting cannot reach."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 12, 3, padding=1)
        self.b = nn.Conv2d(12, 10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x)).view(-1, 12, 8, 8)
        logits: Tensor = self.b(x).mean((2, 3))
        return logits


def test_a_recorded_program_is_saved_without_pickle_and_loads_without_a_factory(tmp_path: Path) -> None:
    made = compressed(Literal)
    assert isinstance(made.model, Program)
    assert any("a recorded program, not the network's own class: tests/" in text for text in made.report.warnings)
    folder = made.save(tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {*FILES, "program.json"}
    again = load(folder)
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(again(x), made.model(x))
    (folder / "program.json").write_text('{"format": "other"}', encoding="utf-8")
    with pytest.raises(DataError, match=r"program\.json: not a sparsekit program"):
        load(folder)


def test_what_was_tidied_away_first_is_cut_again_on_loading(tmp_path: Path) -> None:
    def half_dead() -> nn.Module:
        network = tiny.Net().eval()
        with torch.no_grad():
            network.bn1.weight[:3] = 0
            network.bn1.bias[:3] = 0
        return network

    made = compressed(half_dead)
    assert [plan.kept for plan in made.before] == [{"conv1": 5}]
    folder = made.save(tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {*FILES, "tidy-0.json"}
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(load(folder, tiny.Net)(x), made.model(x))
    with pytest.raises(UsageError, match="give its factory"):
        load(folder)
