"""A recipe survives its file, and refuses what it cannot mean."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from sparsekit import training
from sparsekit.errors import DataError, UsageError
from sparsekit.recipe import PRECISIONS, Recipe

OTHER = Recipe(
    model="torchvision:resnet18",
    weights="w.safetensors",
    data="imagefolder:photos",
    data_root="data",
    download=False,
    image_size=64,
    limit=100,
    batch_size=32,
    method="magnitude",
    options={"norm": "l2"},
    budget="params<=1M and layer1.*=0.5",
    round_to=16,
    renormalise=True,
    dense_epochs=0,
    dense_lr=0.2,
    epochs=3,
    lr=0.3,
    finetune_lr=0.4,
    weight_decay=0.0,
    label_smoothing=0.1,
    precision="32-true",
    threads=2,
    seed=7,
)


def written(recipe: Recipe, folder: Path) -> Path:
    path = folder / "recipe.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    return path


@pytest.mark.parametrize("recipe", [Recipe(), OTHER, Recipe(data=None)], ids=["default", "other", "no data"])
def test_a_recipe_survives_its_file(recipe: Recipe, tmp_path: Path) -> None:
    again = Recipe.from_toml(written(recipe, tmp_path))
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()


def test_the_other_recipe_differs_in_every_key() -> None:
    default = dataclasses.asdict(Recipe())
    assert [key for key, value in dataclasses.asdict(OTHER).items() if value == default[key]] == []


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(Recipe)])
def test_every_key_changes_the_fingerprint(key: str) -> None:
    changed = dataclasses.replace(Recipe(), **{key: getattr(OTHER, key)})
    assert changed.fingerprint() != Recipe().fingerprint()


def test_the_fingerprint_follows_the_weights_and_not_their_place(tmp_path: Path) -> None:
    first, copy, other = (tmp_path / name for name in ("first", "copy", "other"))
    for path, content in ((first, b"1"), (copy, b"1"), (other, b"2")):
        path.write_bytes(content)
    assert OTHER.fingerprint(first) == OTHER.fingerprint(copy)
    assert len({OTHER.fingerprint(), OTHER.fingerprint(first), OTHER.fingerprint(other)}) == 3


def test_missing_weights_have_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"weights .*/none.safetensors: No such file"):
        OTHER.fingerprint(tmp_path / "none.safetensors")


def test_a_recipe_file_may_leave_keys_out(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('lr = 1\nweights = "w.pt"\n')
    assert Recipe.from_toml(path) == Recipe(lr=1.0, weights="w.pt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "unknown key 'epoch'; did you mean epochs"),
        ('epochs = "3"', "epochs must be int, got '3'"),
        ("epochs = 3.5", "epochs must be int, got 3.5"),
        ("epochs = true", "epochs must be int, got True"),
        ("lr = false", "lr must be float, got False"),
        ("download = 1", "download must be bool, got 1"),
        ("options = 1", "options must be Mapping[str, Any], got 1"),
        ("model = 3", "model must be str, got 3"),
        ("epochs = -1", "epochs must be in [0, inf), got -1"),
        ("lr = nan", "lr must be in [0, inf), got nan"),
        ("lr = inf", "lr must be in [0, inf), got inf"),
        ("batch_size = 1", "batch_size must be in [2, inf), got 1"),
        ("limit = 1", "limit must be in [2, inf), got 1"),
        ("round_to = 0", "round_to must be in [1, inf), got 0"),
        ("image_size = 0", "image_size must be in [1, inf), got 0"),
        ("threads = 0", "threads must be in [1, inf), got 0"),
        ("label_smoothing = 1.0", "label_smoothing must be in [0, 1), got 1.0"),
        ("seed = -1", "seed must be in [0, 9223372036854775808), got -1"),
        ('precision = "bf16-mix"', "precision 'bf16-mix': unknown; did you mean bf16-mixed"),
    ],
)
def test_a_key_or_value_that_cannot_be_is_named_with_its_file(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=rf"recipe .*mine.toml: {re.escape(message)}") as caught:
        Recipe.from_toml(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"epochs == 3", b"\xff\xfe"], ids=["not TOML", "not UTF-8"])
def test_a_file_that_is_no_toml_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"recipe .*mine.toml: not TOML"):
        Recipe.from_toml(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"recipe .*mine.toml: No such file"):
        Recipe.from_toml(tmp_path / "mine.toml")


def test_ranges_hold_in_python_too() -> None:
    with pytest.raises(UsageError, match=r"epochs must be in \[0, inf\), got -1"):
        Recipe(epochs=-1)


@pytest.mark.parametrize("values", [{}, {"data": "none"}, {"data": None}, {"lr": 1}], ids=str)
def test_a_mapping_over_the_defaults_is_a_recipe(values: dict[str, Any]) -> None:
    recipe = Recipe.from_mapping(values, source="here")
    assert recipe == Recipe(**values | ({"data": None} if "data" in values else {}))


def test_the_precisions_are_those_that_training_knows() -> None:
    assert list(PRECISIONS) == training._CHOICES["precision"]
