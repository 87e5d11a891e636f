"""A recipe survives its file, and refuses what it cannot mean."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from sparsekit import training
from sparsekit.errors import DataError, UsageError
from sparsekit.ingredients import build_pruner, build_schedule, follow
from sparsekit.recipe import _CHOICES, Recipe
from sparsekit.recovery import RECOVERIES
from sparsekit.stages import Stages
from sparsekit.task import Record, Schedule, Task
from tests import tiny

OTHER = Recipe(
    model="torchvision:resnet18",
    weights="w.safetensors",
    data="imagefolder:photos",
    data_root="data",
    download=False,
    image_size=64,
    crop_pct=0.875,
    limit=100,
    batch_size=32,
    augment=("crop", "mixup"),
    method="magnitude",
    options={"norm": "l2"},
    budget="params<=1M and layer1.*=0.5",
    round_to=16,
    renormalise=True,
    dense_epochs=0,
    dense_lr=0.2,
    dense_milestones=(5, 8),
    epochs=3,
    lr=0.3,
    milestones=(),
    finetune_epochs=4,
    finetune_lr=0.4,
    finetune_milestones=(2,),
    gamma=0.5,
    warmup_epochs=0.5,
    optimizer="adamw",
    momentum=0.8,
    weight_decay=0.0,
    label_smoothing=0.1,
    precision="32-true",
    target="openvino",
    threads=2,
    allow_slower=True,
    quantize="int8",
    compare_stock=True,
    recover="lsq",
    recover_budget_s=60.0,
    calibrate="imagefolder:images",
    num_images=64,
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
        ("crop_pct = 0", "crop_pct must be in (0, 1], got 0"),
        ("crop_pct = 1.01", "crop_pct must be in (0, 1], got 1.01"),
        ("crop_pct = nan", "crop_pct must be in (0, 1], got nan"),
        ("threads = 0", "threads must be in [1, inf), got 0"),
        ("label_smoothing = 1.0", "label_smoothing must be in [0, 1), got 1.0"),
        ("momentum = 1.0", "momentum must be in [0, 1), got 1.0"),
        ("gamma = -0.1", "gamma must be in [0, inf), got -0.1"),
        ("finetune_epochs = -1", "finetune_epochs must be in [0, inf), got -1"),
        ("milestones = 60", "milestones must be tuple[int, ...] | None, got 60"),
        ("milestones = [60, 9.5]", "milestones must be tuple[int, ...] | None, got [60, 9.5]"),
        ("finetune_milestones = [3, 0]", "finetune_milestones must be in [1, inf), got 0"),
        ('augment = "flip"', "augment must be tuple[str, ...], got 'flip'"),
        ("augment = [1]", "augment must be tuple[str, ...], got [1]"),
        ("lr = [0.1]", "lr must be float, got [0.1]"),
        ("seed = -1", "seed must be in [0, 9223372036854775808), got -1"),
        ('optimizer = "sdg"', "optimizer 'sdg': unknown; did you mean sgd"),
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


@pytest.mark.parametrize("key", ["optimizer", "precision"])
def test_the_choices_are_those_that_training_knows(key: str) -> None:
    assert list(_CHOICES[key]) == training._CHOICES[key]


def test_the_recoveries_are_those_there_are() -> None:
    assert _CHOICES["recover"] == tuple(RECOVERIES)


# What a recipe says of training


def test_fine_tuning_is_as_long_as_the_method_unless_the_recipe_says_otherwise() -> None:
    assert build_schedule(Recipe(epochs=3), "finetune").epochs == 3
    assert build_schedule(Recipe(epochs=3, finetune_epochs=5), "finetune").epochs == 5
    assert build_schedule(Recipe(epochs=3, finetune_epochs=0), "finetune").epochs == 0
    assert build_schedule(Recipe(epochs=3, dense_epochs=7), "dense").epochs == 7


def test_a_stage_has_its_own_epochs_and_rate_and_the_settings_of_all() -> None:
    shared = {"weight_decay": 0.0, "label_smoothing": 0.1, "precision": "32-true", "seed": 7}
    assert build_schedule(OTHER, "dense") == Schedule(0, 0.2, **shared)  # type: ignore[arg-type]
    assert build_schedule(OTHER, "finetune") == Schedule(4, 0.4, **shared)  # type: ignore[arg-type]


def test_milestones_replace_the_decay_of_their_own_stage_only() -> None:
    schedule = Schedule(10)
    recipe = Recipe(dense_milestones=(5, 8), milestones=(), gamma=0.5)
    dense, method, tuned = (follow(recipe, schedule, stage=stage) for stage in ("dense", "prune", "finetune"))
    assert (dense.decay, dense.milestones, dense.gamma) == ("multistep", (5, 8), 0.5)
    assert (method.decay, method.milestones) == ("multistep", ())
    assert tuned == schedule


def test_a_recipe_that_says_nothing_leaves_a_methods_schedule_as_it_is() -> None:
    own = Schedule(10, 1e-3, optimizer="adamw", decay="multistep", milestones=(3,), gamma=0.5, label_smoothing=0.2)
    assert follow(Recipe(), own, stage="prune") == own
    sgd = follow(Recipe(optimizer="sgd", momentum=0.8, warmup_epochs=2), own, stage="prune")
    assert sgd == dataclasses.replace(own, optimizer="sgd", momentum=0.8, warmup_epochs=2)


def test_a_method_whose_own_rates_hold_for_one_optimizer_takes_no_other() -> None:
    for method, optimizer in (("transport", None), ("transport", "sgd"), ("gmp", "adamw"), ("magnitude", "adamw")):
        build_pruner(Recipe(method=method, optimizer=optimizer))
    for method, other, own in (("transport", "adamw", "sgd"), ("l0", "adamw", "sgd"), ("chipnet", "sgd", "adamw")):
        message = f"{method}: optimizer {other!r} would train .* at wrong rates; choose {own!r}"
        with pytest.raises(UsageError, match=message):
            build_pruner(Recipe(method=method, optimizer=other))


def test_both_the_methods_training_and_fine_tuning_follow_the_recipe(tmp_path: Path) -> None:
    asked: dict[str, Schedule] = {}

    def fit(
        model: nn.Module,
        task: Task,
        schedule: Schedule,
        *,
        stage: str,
        observe: Callable[[], Record] | None = None,
    ) -> list[Record]:
        asked[stage] = schedule
        return []

    recipe = Recipe(milestones=(2,), finetune_milestones=(3, 4), finetune_epochs=5, gamma=0.5, optimizer="adamw")
    stages = Stages(recipe, "", tmp_path, None)
    task = stages.watch(dataclasses.replace(tiny.task(), fit=fit))
    assert task is not None
    task.fit(nn.Identity(), task, Schedule(7, lr=0.3, weight_decay=0.2), stage="prune")
    stages.train(nn.Identity(), task, "finetune")
    settings = {"optimizer": "adamw", "decay": "multistep", "gamma": 0.5}
    assert asked["prune"] == Schedule(7, 0.3, weight_decay=0.2, milestones=(2,), **settings)  # type: ignore[arg-type]
    assert asked["finetune"] == Schedule(5, 0.01, milestones=(3, 4), **settings)  # type: ignore[arg-type]
