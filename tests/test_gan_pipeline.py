"""A GAN's whole way: from a recipe to a folder, resumed, refused, and every method on the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import sparsekit
from sparsekit import Budget, certify, compact, trace
from sparsekit.cli import commands
from sparsekit.cost import num_macs
from sparsekit.errors import BudgetError, DataError, QualityError, UsageError
from sparsekit.gan.game import Gan, build_gan
from sparsekit.gan.recipe import GanRecipe
from sparsekit.gan.schedule import SCHEDULES
from sparsekit.gan_ingredients import build, channel_pruning, load_data
from sparsekit.gan_methods import prune_generator, recover_from_noise
from sparsekit.gan_pipeline import compress_gan
from sparsekit.gan_report import GanReport
from sparsekit.gan_stages import GanStages
from sparsekit.onnx_network import OnnxNetwork
from sparsekit.plan import PruningPlan
from sparsekit.pruners import PRUNERS
from tests.gans import stirred
from tests.tiny import quick_latency

HALF = Budget.parse("macs<=0.5x")
TINY = GanRecipe(
    data="digits",
    limit=64,
    z=8,
    ch=8,
    discriminator_ch=8,
    dense_epochs=2,
    epochs=1,
    retrain_epochs=1,
    batch_size=16,
    generator_batch_size=16,
    num_noises=64,
    options={"rho": 0.01},
)
FAST = replace(TINY, retrain="none", dense_epochs=1)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsekit.fitting.measure_latency", quick_latency)


def stages(recipe: GanRecipe, folder: Path) -> GanStages:
    folder.mkdir(exist_ok=True)
    return GanStages(recipe, folder, lambda *_: None)


# TINY, as flags.
FLAGS = (
    *("--data", "digits", "--limit", "64", "--z", "8", "--ch", "8", "--discriminator-ch", "8"),
    *("--dense-epochs", "2", "--epochs", "1", "--retrain-epochs", "1", "--batch-size", "16"),
    *("--generator-batch-size", "16", "--num-noises", "64", "-o", "rho=0.01"),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GanReport]:
    """A run of TINY on the command line."""
    out = tmp_path_factory.mktemp("gan") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sparsekit.fitting.measure_latency", quick_latency)
        result = CliRunner().invoke(commands, ["gan", "compress", *FLAGS, "--out", str(out), "--json"])
    assert result.exception is None, result.output
    assert "dense" in result.stderr
    return out, GanReport.from_json(json.loads(result.stdout))


def test_a_finished_run_is_told_in_a_few_lines(finished: tuple[Path, GanReport]) -> None:
    result = CliRunner().invoke(commands, ["gan", "compress", *FLAGS, "--out", str(finished[0]), "--resume"])
    assert result.exception is None, result.output
    assert "x the MACs at" in result.stdout
    assert "report.html" in result.stdout
    taken = CliRunner().invoke(commands, ["gan", "compress", *FLAGS, "--out", str(finished[0])])
    assert isinstance(taken.exception, UsageError)
    assert "exists; choose another folder, or --overwrite" in str(taken.exception)


def test_the_folder_holds_what_it_says(finished: tuple[Path, GanReport]) -> None:
    out, report = finished
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    pictures = {f"samples/{stage}/epoch-0001.png" for stage in ("dense", "prune", "retrain")}
    pictures |= {"samples/dense/epoch-0002.png", "side_by_side.png"}
    named = {"plan.json", "weights.safetensors", "recipe.toml", "report.json", "report.html"}
    assert files == pictures | named | {"dense.onnx", "generator.onnx"}
    assert GanReport.from_json(json.loads((out / "report.json").read_text())) == GanReport.from_json(report.to_json())
    assert GanRecipe.from_toml(out / "recipe.toml") == TINY
    assert not out.with_name("out.partial").exists()
    assert set(report.history) == {"dense", "prune", "retrain"}


def test_its_page_is_made_anew_from_its_numbers(finished: tuple[Path, GanReport], tmp_path: Path) -> None:
    page = (finished[0] / "report.html").read_bytes()
    (finished[0] / "report.html").unlink()
    result = CliRunner().invoke(commands, ["report", str(finished[0])])
    assert result.exception is None, result.output
    assert finished[1].headline in result.stdout
    assert (finished[0] / "report.html").read_bytes() == page
    compared = CliRunner().invoke(commands, ["report", str(finished[0]), "--out", str(tmp_path / "pareto.html")])
    assert "compares runs of sparsekit compress; give two or more" in str(compared.exception)


def test_the_small_generator_meets_the_budget_and_is_in_all_its_files(finished: tuple[Path, GanReport]) -> None:
    out, report = finished
    assert report.compact.num_macs <= 0.5 * report.dense.num_macs
    subject = build(TINY, load_data(TINY))
    small = sparsekit.load(out, lambda: subject.gan.generator)
    z = subject.gan.draw(5)
    file = OnnxNetwork(out / "generator.onnx")
    assert [wanted.name for wanted in file.inputs] == ["z"]
    with torch.no_grad():
        torch.testing.assert_close(file(*z), small(*z), rtol=0, atol=1e-4)
    assert num_macs(trace(small, z)) == report.compact.num_macs
    assert report.latency is not None
    assert report.certificate["holds"]
    assert [picture.title for picture in report.pictures] == ["From the same noise", "From one noise to another"]
    assert not any(picture.inputs for picture in report.pictures)


def test_the_same_recipe_gives_the_same_weights(finished: tuple[Path, GanReport], tmp_path: Path) -> None:
    old = load_file(finished[0] / "weights.safetensors")
    new = stages(TINY, tmp_path).compress().small.state_dict()
    assert all(torch.equal(old[name], new[name]) for name in old)


def test_an_interrupted_run_goes_on_and_ends_alike(finished: tuple[Path, GanReport], tmp_path: Path) -> None:
    out = tmp_path / "out"

    def kill(stage: str, done: int, total: int, record: dict[str, float]) -> None:
        if stage == "retrain" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress_gan(TINY, out, progress=kill)
    with pytest.raises(UsageError, match="holds an interrupted run; --resume continues it"):
        compress_gan(TINY, out)
    with pytest.raises(UsageError, match=r"was made with budget = 'macs<=0.5x', now 'macs<=0.4x'"):
        compress_gan(replace(TINY, budget="macs<=0.4x"), out, resume=True)
    steps: list[str] = []
    compress_gan(TINY, out, resume=True, progress=lambda stage, done, total, record: steps.append(f"{stage} {done}"))
    assert "dense 1" not in steps  # all its epochs were in the checkpoint
    old, new = (load_file(folder / "weights.safetensors") for folder in (finished[0], out))
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert compress_gan(TINY, out, resume=True).recipe_hash == finished[1].recipe_hash


def test_a_divergence_keeps_the_last_good_state(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(QualityError, match=r"prune: epoch 1: the .* became"):
        compress_gan(replace(FAST, options={"lr": 1e30}), out)
    assert not out.exists()
    assert (tmp_path / "out.partial" / "dense.ckpt").exists()


def test_a_ticket_is_the_initial_weights_cut_by_the_plan(tmp_path: Path) -> None:
    run = stages(replace(TINY, retrain="rewind", retrain_epochs=0), tmp_path)
    initial = {name: value.clone() for name, value in run.gan.generator.state_dict().items()}
    result = run.compress()
    network = build(TINY, load_data(TINY)).gan.generator
    assert all(torch.equal(value, initial[name]) for name, value in network.state_dict().items())
    expected = compact(network, PruningPlan(result.plan.keep), run.example).state_dict()
    for name, value in result.small.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(
    ("retrain", "discriminator"), [("rewind", "pruned"), ("rewind", "kept"), ("finetune", "reset"), ("finetune", None)]
)
def test_retraining_starts_with_the_discriminator_that_was_asked_for(
    retrain: str, discriminator: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stages(replace(TINY, model="sngan", retrain=retrain, discriminator=discriminator), tmp_path)
    initial = [value.clone() for value in run.gan.discriminator.parameters()]
    seen: list[nn.Module] = []
    original = GanStages._train

    def watched(self: GanStages, gan: Gan, way_back: Any, stage: Any) -> nn.Module:
        if stage == "retrain":
            seen.append(gan.discriminator)
            now = [value.detach().clone() for value in gan.discriminator.parameters()]
            if discriminator == "pruned":
                assert sum(p.numel() for p in now) < 0.8 * sum(p.numel() for p in initial)
                assert any("original" in name for name, _ in gan.discriminator.named_parameters())
            else:
                fresh = all(torch.equal(a, b) for a, b in zip(now, initial, strict=True))
                assert fresh == (discriminator == "reset")
        return original(self, gan, way_back, stage)

    monkeypatch.setattr(GanStages, "_train", watched)
    run.compress()
    assert len(seen) == 1


def test_repair_aims_at_the_network_that_was_cut_and_not_at_the_one_before_it_was_slimmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs: list[tuple[nn.Module, nn.Module, PruningPlan]] = []
    monkeypatch.setattr(
        "sparsekit.gan_stages.recover_from_noise",
        lambda wanted, small, plan, *_, **__: pairs.append((wanted, small, plan)),
    )
    run = stages(replace(FAST, recover="lsq", retrain="none"), tmp_path)
    run.compress()
    wanted, small, plan = pairs[0]
    cut = sparsekit.compact(wanted, plan, run.example).state_dict()
    assert all(torch.equal(value, cut[name]) for name, value in small.state_dict().items())


def test_given_weights_are_compressed_without_training(tmp_path: Path) -> None:
    generator = stirred(build(FAST, load_data(FAST)).gan.generator)
    save_file(dict(generator.state_dict()), tmp_path / "g.safetensors")
    recipe = replace(FAST, weights=str(tmp_path / "g.safetensors"), method="neuron_merging", options={}, recover="lsq")
    report = compress_gan(recipe, tmp_path / "out")
    assert not report.history
    assert report.compact.num_macs <= 0.5 * report.dense.num_macs
    save_file(dict(build(FAST, load_data(FAST)).gan.generator.state_dict()), tmp_path / "g.safetensors")
    with pytest.raises(UsageError, match="was made with other contents of"):
        compress_gan(recipe, tmp_path / "out", resume=True)


def test_labels_are_an_input_of_the_file(tmp_path: Path) -> None:
    report = compress_gan(replace(FAST, model="acgan"), tmp_path / "out")
    assert len(report.pictures) == 2
    file = OnnxNetwork(tmp_path / "out" / "generator.onnx")
    assert [wanted.name for wanted in file.inputs] == ["z", "labels"]


def test_gan_slimming_runs_as_a_method(tmp_path: Path) -> None:
    result = stages(replace(FAST, method="gan_slimming", options={}), tmp_path).compress()
    assert result.certificate.holds


def folder_of_stripes(folder: Path) -> str:
    """Two classes of images of 24 pixels: what CycleGAN needs at least."""
    from PIL import Image

    rng = torch.Generator().manual_seed(0)
    for half, count in (("train", 6), ("test", 2)):
        for kind in ("across", "down"):
            (folder / half / kind).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (24, 24), generator=rng, dtype=torch.uint8)
                pixels[:, ::3] = 255 if kind == "down" else 0
                Image.fromarray(pixels.numpy()).convert("RGB").save(folder / half / kind / f"{number}.png")
    return f"imagefolder:{folder}"


def test_one_way_of_a_cycle_is_compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "cache"))
    recipe = GanRecipe(
        model="cyclegan",
        data=folder_of_stripes(tmp_path / "data"),
        domains=(0, 1),
        ch=8,
        discriminator_ch=4,
        num_blocks=1,
        dense_epochs=1,
        epochs=1,
        options={"distillation_weight": 0.0},
        batch_size=3,
    )
    report = compress_gan(recipe, tmp_path / "out")
    assert report.compact.num_macs <= 0.5 * report.dense.num_macs
    assert "cycle_loss" in report.history["retrain"][0]
    assert [caption for picture in report.pictures for caption, _ in picture.panels] == ["given", "dense", "compact"]
    assert [wanted.name for wanted in OnnxNetwork(tmp_path / "out" / "generator.onnx").inputs] == ["x"]
    with pytest.raises(UsageError, match=r"domains \[0, 7\]: .* has images of 2 classes, from 0"):
        compress_gan(replace(recipe, domains=(0, 7)), tmp_path / "other")


def small_gan(model: str) -> Gan:
    torch.manual_seed(0)
    gan = build_gan(model, image_size=8, image_channels=1, num_classes=3, z=8, ch=16, discriminator_ch=8)
    return replace(gan, generator=stirred(gan.generator))


LABEL_FREE = ("magnitude", "random", "fpgm", "group_norm", "hrank", "column_subset", "neuron_merging")


@pytest.mark.parametrize("model", ["sngan", "dcgan", "acgan", "sagan"])
@pytest.mark.parametrize("method", LABEL_FREE)
def test_methods_without_labels_prune_generators(model: str, method: str) -> None:
    gan = small_gan(model)
    plan = prune_generator(gan.generator, HALF, PRUNERS[method](), gan.draw, num_noises=32)
    inputs = gan.draw(3)
    small = compact(gan.generator, plan, inputs)
    assert certify(gan.generator, plan, small, inputs).holds
    assert num_macs(trace(small, inputs)) <= 0.5 * num_macs(trace(gan.generator, inputs))


@pytest.mark.parametrize("method", ["transport", "taylor", "fisher", "network_slimming"])
def test_methods_that_need_more_say_so(method: str) -> None:
    gan = small_gan("sngan")
    with pytest.raises(UsageError, match="needs labels or a loss, and a generator has none"):
        prune_generator(gan.generator, HALF, PRUNERS[method](), gan.draw)


@pytest.mark.parametrize(("model", "share"), [("dcgan", 0.4), ("acgan", 0.9), ("sagan", 0.9)])
def test_noise_alone_brings_a_cut_generator_back_towards_the_dense_one(model: str, share: float) -> None:
    gan = small_gan(model)
    plan = prune_generator(gan.generator, HALF, PRUNERS["magnitude"](), gan.draw)
    inputs = gan.draw(64)
    small = compact(gan.generator, plan, inputs)

    def error() -> float:
        with torch.no_grad():
            wanted: Tensor = gan.generator(*inputs)
            return float((small(*inputs) - wanted).square().mean())

    before = error()
    records = recover_from_noise(gan.generator, small, plan, gan.draw, num_noises=256)
    assert [record.step for record in records] == ["pruned", "bn", "bias", "lsq"]
    assert error() < share * before


def test_schedules_are_the_gans_own_unless_the_recipe_says_otherwise() -> None:
    own = GanRecipe(model="wgan_gp").schedule("dense", flip=True)
    assert own == replace(SCHEDULES["wgan_gp"], seed=0)
    assert not GanRecipe(model="wgan_gp").schedule("dense", flip=False).flip
    recipe = GanRecipe(generator_lr=1e-3, retrain_lr=1.5e-4, dense_epochs=7, augment=("color",), seed=3)
    dense, retrain = recipe.schedule("dense", flip=True), recipe.schedule("retrain", flip=True)
    assert (dense.generator_lr, retrain.generator_lr) == (1e-3, 1.5e-4)
    assert (dense.epochs, retrain.epochs, dense.augment, dense.seed) == (7, 7, ("color",), 3)


def test_a_recipe_survives_toml(tmp_path: Path) -> None:
    recipe = replace(TINY, augment=("color", "cutout"), features="resnet20", feature_weights="w", feature_layers=("a",))
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    assert GanRecipe.from_toml(tmp_path / "recipe.toml") == recipe


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "sngam"}, "model 'sngam': no such GAN; did you mean sngan"),
        ({"data": "none"}, "data: a GAN cannot be trained without"),
        ({"retrain": "rewound"}, "retrain 'rewound': unknown; did you mean rewind"),
        ({"domains": [1, 2]}, "domains: cyclegan needs two classes, others none"),
        ({"average_decay": 1.0}, r"average_decay must be in \[0, 1\)"),
        ({"ch": "8"}, "ch must be int | None, got '8'".replace("|", r"\|")),
        ({"feature_layers": ["a"]}, "feature_layers: need a network"),
    ],
)
def test_recipes_that_mean_nothing_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GanRecipe.from_mapping(values, source="flags")


def test_methods_and_options_are_checked_before_any_training() -> None:
    with pytest.raises(UsageError, match="method 'gmp': unknown"):
        channel_pruning(GanRecipe(method="gmp"))
    with pytest.raises(UsageError, match="channel_pruning: unknown option 'roh'; did you mean rho"):
        channel_pruning(GanRecipe(options={"roh": 1.0}))
    with pytest.raises(UsageError, match="option imitates must be bool, got 1"):
        channel_pruning(GanRecipe(options={"imitates": 1}))
    found = channel_pruning(GanRecipe(epochs=3, round_to=4, seed=5, options={"rho": 1}))
    assert found is not None
    assert (found.epochs, found.round_to, found.seed, found.rho) == (3, 4, 5, 1)


@pytest.mark.parametrize(
    ("budget", "message"),
    [("latency<=0.5x", "a generator's is of macs, params or channels"), ("macs<=0.001x", "below the floor")],
)
def test_budgets_are_checked_before_any_training(budget: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=message):
        compress_gan(replace(TINY, budget=budget), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_distances_are_measured_by_a_given_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    classifier = sparsekit.models.MODELS["digits_resnet"](num_classes=10, in_channels=1)
    save_file(dict(classifier.state_dict()), tmp_path / "c.safetensors")
    layers = tuple(name for name, module in classifier.named_modules() if isinstance(module, nn.Conv2d))[:2]
    recipe = replace(
        TINY,
        features="digits_resnet",
        feature_weights=str(tmp_path / "c.safetensors"),
        feature_layers=layers,
        num_samples=64,
        recover="bn",
    )
    run = stages(recipe, tmp_path / "work")
    run.compress()
    assert list(run.metrics) == ["dense", "pruned", "recovered", "compact"]
    assert all(found["fd_digits_resnet"] > 0 for found in run.metrics.values())
    with pytest.raises(UsageError, match="feature_weights must name its weights file"):
        compress_gan(replace(recipe, feature_weights=None), tmp_path / "other")


def test_images_that_are_not_square_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = load_data(TINY)
    monkeypatch.setattr(
        "sparsekit.gan_ingredients.load_images",
        lambda *_, **__: replace(wide, train_images=wide.train_images[..., :7]),
    )
    with pytest.raises(DataError, match="images are 7x8, expected squares"):
        compress_gan(TINY, tmp_path / "out")
