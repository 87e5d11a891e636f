"""The recipes of the published tables: the sizes and speedups that the paper and its predecessor's code fix."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsekit.budget import Budget, Metric
from sparsekit.cost import Costs
from sparsekit.graph import ChannelGraph, trace
from sparsekit.ingredients import build_pruner, build_schedule, follow
from sparsekit.networks import build_network
from sparsekit.recipe import Recipe
from sparsekit.selection import allocate
from sparsekit.task import Schedule
from sparsekit.training import lr_factor

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = sorted(path.stem for path in (RECIPES / "dtp").glob("*.toml"))
NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "imagefolder:imagenet": 1000}


def load(name: str) -> Recipe:
    return Recipe.from_toml(RECIPES / "dtp" / f"{name}.toml")


@cache
def graph_of(model: str, num_classes: int, image_size: int) -> ChannelGraph:
    network = build_network(model, num_classes=num_classes)
    return trace(network, (torch.randn(2, 3, image_size, image_size),))


def dense_graph(recipe: Recipe) -> ChannelGraph:
    assert recipe.data is not None
    return graph_of(recipe.model, NUM_CLASSES[recipe.data], recipe.image_size or 32)


def kept(recipe: Recipe) -> dict[str, int]:
    return {group.name: count for group, count in allocate(dense_graph(recipe), Budget.parse(recipe.budget)).items()}


def shares(recipe: Recipe, *metrics: Metric) -> list[float]:
    """What the small network costs as a fraction of the dense one."""
    costs = Costs(dense_graph(recipe))
    counts = np.array(list(kept(recipe).values()))
    return [costs(metric, counts) / costs(metric, costs.dense) for metric in metrics]


def significant(number: float, like: str) -> str:
    """`number` with as many decimals as `like`."""
    return f"{number:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_names_a_method_with_its_options_and_a_budget_that_its_network_can_meet(name: str) -> None:
    recipe = load(name)
    build_pruner(recipe)
    counts = kept(recipe)
    assert all(count >= 1 for count in counts.values())
    assert counts != {group.name: group.size for group in dense_graph(recipe).groups}


def test_the_table_beside_the_recipes_lists_each_of_them_once_with_its_own_accuracy() -> None:
    table = (RECIPES / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (table\S+) \|.*\| ([\d.]+(?: \+- [\d.]+)?)[^|]*\|$", table, re.MULTILINE))
    assert sorted(rows) == NAMES
    for name, accuracy in rows.items():
        assert f": {accuracy} %" in (RECIPES / "dtp" / f"{name}.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "speedup", "params_removed"),
    [
        ("table1-resnet56-p50", "1.993", "49.82"),
        ("table1-resnet56-p70", "3.593", "70.58"),
        ("table1-resnet56-p90", "11.58", "90.45"),
        ("table1-resnet56-p92.5", "15.20", "93.41"),
        ("table1-resnet56-p95", "19.85", "95.18"),
        ("table1-vgg19-p50", "3.609", "74.87"),
        ("table1-vgg19-p60", "5.424", "84.00"),
        ("table1-vgg19-p70", "8.891", "90.98"),
        ("table1-vgg19-p80", "17.34", "95.95"),
        ("table1-vgg19-p90", "45.53", "98.96"),
        ("table4-resnet34-1.32x", "1.317", None),
        ("table4-resnet50-2.31x", "2.308", None),
        ("table4-resnet50-2.56x", "2.564", None),
        ("table4-resnet50-3.06x", "3.063", None),
        ("table7-resnet50-2.31x-stronger", "2.308", None),
        ("table8-wrn26-macs40", "2.500", None),
        ("table8-wrn26-macs20", "5.000", None),
    ],
)
def test_speedup_and_removed_parameters_are_those_of_the_published_ratios(
    name: str, speedup: str, params_removed: str | None
) -> None:
    macs, params = shares(load(name), Metric.NUM_MACS, Metric.NUM_PARAMS)
    assert significant(1 / macs, speedup) == speedup
    if params_removed is not None:
        assert significant(100 * (1 - params), params_removed) == params_removed
    table = (RECIPES / "README.md").read_text(encoding="utf-8")
    assert re.search(rf"^\| {re.escape(name)} \|[^|]*\|[^|]*\| {re.escape(speedup)} \|", table, re.MULTILINE)


@pytest.mark.parametrize(
    ("percent", "widths"),
    [
        ("50", (8, 16, 32)),
        ("70", (4, 9, 19)),
        ("90", (1, 3, 6)),
        ("92.5", (1, 2, 4)),
        ("95", (1, 1, 3)),
    ],
)
def test_resnet56_keeps_the_published_filters_in_every_block_and_all_between_blocks(
    percent: str, widths: tuple[int, int, int]
) -> None:
    recipe = load(f"table1-resnet56-p{percent}")
    counts = kept(recipe)
    inner = {f"layer{stage}.{block}.conv1": widths[stage - 1] for stage in (1, 2, 3) for block in range(9)}
    whole = {group.name: group.size for group in dense_graph(recipe).groups if group.name not in inner}
    assert counts == inner | whole


@pytest.mark.parametrize(("percent", "keep_ratio"), [(50, 0.5), (60, 0.4), (70, 0.3), (80, 0.2), (90, 0.1)])
def test_vgg19_prunes_every_convolution_but_the_first(percent: int, keep_ratio: float) -> None:
    counts = list(kept(load(f"table1-vgg19-p{percent}")).values())
    assert len(counts) == 16
    assert counts[0] == 64
    sizes = [64, 128, 128, *[256] * 4, *[512] * 8]
    # n - ceil(p n), written without the ceiling.
    assert counts[1:] == [int(round(keep_ratio * size, 6)) for size in sizes]


def test_resnet34_leaves_five_blocks_and_a_stage_whole_and_would_be_faster_without_the_five() -> None:
    recipe = load("table4-resnet34-1.32x")
    inner = {f"layer1.{block}.conv1": 32 for block in (1, 2)}
    inner |= {f"layer2.{block}.conv1": 51 for block in (1, 2)}
    inner |= {f"layer3.{block}.conv1": 153 for block in (1, 2, 3, 4)}
    whole = {group.name: group.size for group in dense_graph(recipe).groups if group.name not in inner}
    assert kept(recipe) == inner | whole
    table6 = replace(recipe, budget="layer1.*.conv1=0.5 and layer2.*.conv1=0.4 and layer3.*.conv1=0.6")
    assert f"{1 / shares(table6, Metric.NUM_MACS)[0]:.3f}" == "1.621"


@pytest.mark.parametrize(
    ("speedup", "widths"),
    [
        ("2.31", (25, 51, 102, 404)),
        ("2.56", (16, 33, 102, 404)),
        ("3.06", (20, 40, 81, 256)),
    ],
)
def test_resnet50_prunes_the_first_two_convolutions_of_every_block(speedup: str, widths: tuple[int, ...]) -> None:
    recipe = load(f"table4-resnet50-{speedup}x")
    counts = kept(recipe)
    for group in dense_graph(recipe).groups:
        inner = group.name.startswith("layer") and not group.name.endswith("conv3")
        assert counts[group.name] == (widths[int(group.name[5]) - 1] if inner else group.size)


@pytest.mark.parametrize("data", ["cifar10", "cifar100"])
@pytest.mark.parametrize(("percent", "share"), [(60, 0.4), (80, 0.2)])
def test_mobilenet_keeps_its_share_of_all_channels_to_the_channel(data: str, percent: int, share: float) -> None:
    recipe = load(f"table3-mobilenetv2-{data}-p{percent}")
    num_channels = sum(group.size for group in dense_graph(recipe).groups)
    assert sum(kept(recipe).values()) == int(share * num_channels)


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_has_the_published_schedule(name: str) -> None:
    """Table 5, and ChipNet's halving every 30 epochs for MobileNetV2; the stronger recipe is 5 times as fast."""
    recipe = load(name)
    scale = 5 if name.endswith("stronger") else 1
    batch_size, weight_decay, epochs = 256 if scale == 1 else 4096, 1e-4, (90, 90)
    rates = {0: 1e-2, 29: 1e-2, 30: 1e-3, 59: 1e-3, 60: 1e-4, 74: 1e-4, 75: 1e-5, 89: 1e-5}
    if "imagenet" not in str(recipe.data):
        weight_decay, epochs = 5e-4, (120, 120)
        rates = {0: 1e-2, 59: 1e-2, 60: 1e-3, 89: 1e-3, 90: 1e-4, 119: 1e-4}
    if recipe.model == "mobilenet_v2":
        batch_size, weight_decay, epochs = 128, 1e-3, (120, 300)
        rates = {0: 5e-2, 29: 5e-2, 30: 2.5e-2, 299: 5e-2 / 2**9}
    method = follow(recipe, Schedule(recipe.epochs, recipe.lr), stage="prune")
    tuning = follow(recipe, build_schedule(recipe, "finetune"), stage="finetune")
    assert (recipe.batch_size, recipe.weight_decay, method.epochs, tuning.epochs) == (batch_size, weight_decay, *epochs)
    assert (method.optimizer, method.momentum, tuning.optimizer, tuning.momentum) == ("sgd", 0.9, "sgd", 0.9)
    if recipe.model != "mobilenet_v2":
        assert method.decay == "cosine"
        assert method.lr == pytest.approx(0.1 * scale)
    for epoch, rate in rates.items():
        assert tuning.lr * lr_factor(epoch, tuning, num_batches=1) == pytest.approx(rate * scale)


@pytest.mark.parametrize("name", [name for name in NAMES if "imagenet" in str(load(name).data)])
def test_imagenets_test_images_are_those_of_the_published_accuracies(name: str) -> None:
    recipe = load(name)
    assert (recipe.image_size, round(224 / recipe.crop_pct)) == (224, 256)


def test_epsilon_is_one_for_the_light_networks_and_a_quarter_for_the_others() -> None:
    light = ("resnet56", "mobilenet_v2")
    assert all(load(name).options["epsilon"] == (1.0 if load(name).model in light else 0.25) for name in NAMES)
