"""The stages of compressing one GAN, run one after the other, and what each said."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparsekit.baking import bake_all
from sparsekit.budget import Budget
from sparsekit.compaction import Certificate, certify, compact
from sparsekit.errors import BudgetError, PlanError
from sparsekit.fitting import Bench, Exported
from sparsekit.gan.cycle_training import CycleGan, train_cycle
from sparsekit.gan.game import Draw, Gan
from sparsekit.gan.metrics import Reference, evaluate, reference_of
from sparsekit.gan.recipe import GanRecipe
from sparsekit.gan.spectral import restore_spectral_norm
from sparsekit.gan.training import picture_writer, samples, train
from sparsekit.gan_ingredients import build, build_features, channel_pruning, load_data
from sparsekit.gan_methods import prune_generator, recover_from_noise
from sparsekit.graph import trace
from sparsekit.ingredients import build_pruner
from sparsekit.latency import LatencyComparison
from sparsekit.networks import load_weights
from sparsekit.plan import PruningPlan
from sparsekit.pruners import PRUNERS
from sparsekit.recipe import Recipe
from sparsekit.selection import allocate
from sparsekit.surgery import copied
from sparsekit.targets import parse_target
from sparsekit.task import Progress, Record

_NUM_SHOWN = 64  # images of every picture


@dataclass(frozen=True, eq=False)
class Compressed:
    """What is left to export: networks on the CPU, in eval mode and without computed weights."""

    dense: nn.Module
    small: nn.Module
    plan: PruningPlan
    certificate: Certificate


@dataclass(frozen=True, eq=False)
class Finished:
    """The files of both generators, the dense one first, and how long they take."""

    networks: Compressed
    files: tuple[Exported, Exported]
    timed: LatencyComparison


class GanStages:
    """Runs the stages of one compression and keeps what each said."""

    def __init__(self, recipe: GanRecipe, folder: Path, progress: Progress) -> None:
        self.recipe, self.folder, self.progress = recipe, folder, progress
        self.history: dict[str, list[Record]] = {}
        self.metrics: dict[str, dict[str, float]] = {}
        self.seconds: dict[str, float] = {}
        self.method = channel_pruning(recipe)
        self.data = load_data(recipe, progress=progress)
        self.subject = build(recipe, self.data)
        self.gan = self.subject.gan
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.shown = self.subject.shown(_NUM_SHOWN)
        self.example = tuple(part[:2] for part in self.shown)
        network, self.maps = build_features(recipe, self.data)
        self.reference: Reference | None = None
        if network is not None:
            with self.timed("reference of the images"):
                self.reference = reference_of(self.subject.images, network)

    def check_budget(self) -> None:
        """Fail before any training where the budget cannot be met.

        Raises:
            BudgetError: it cannot, or is one that only the exported file can tell.
        """
        budget = Budget.parse(self.recipe.budget)
        for limit in (*budget.measured, *filter(None, [budget.accuracy])):
            raise BudgetError(f"budget {limit}: a generator's is of macs, params or channels")
        allocate(trace(self.gan.generator, self.example), budget, round_to=self.recipe.round_to)

    def compress(self) -> Compressed:
        """Train, cut, repair and retrain; finished trainings come from their checkpoints.

        Raises:
            PlanError: the small generator is not what the plan says.
        """
        start = (self.gan.generator, self.gan.discriminator, *(self.subject.way_back or ()))
        initial = [copied(network) for network in start]
        dense = self._dense()
        self._measure(dense, "dense")
        gan = replace(self.gan, generator=dense)
        cut, plan = self._prune(gan)
        small = compact(cut, plan, self.example)
        certificate = certify(cut, plan, small, self.example)
        if not certificate.holds:
            raise PlanError(
                f"certificate: mask and compact differ by {certificate.max_relative_error:.1e}, allowed 1e-9"
            )
        self._measure(small, "pruned")
        if self.recipe.recover != "none" and self.recipe.retrain != "rewind":
            with self.timed("recover"):
                recover_from_noise(
                    cut,
                    small,
                    plan,
                    gan.draw,
                    recover=self.recipe.recover,
                    num_noises=self.recipe.num_noises,
                    seed=self.recipe.seed,
                    progress=self.progress,
                )
            self._measure(small, "recovered")
        if self.recipe.retrain != "none":
            small = self._retrain(small, plan, initial)
        self._measure(small, "compact")
        dense, small = (bake_all(copied(network)).eval() for network in (dense, small))
        return Compressed(dense, small, plan, certificate)

    def finish(self, networks: Compressed) -> Finished:
        """Export both generators, verify the files and time them."""
        bench = Bench(parse_target(self.recipe.target), self.recipe.threads, self.folder, self.progress)
        with self.timed("export"):
            dense = bench.write(networks.dense, self.example, "dense")
            small = bench.write(networks.small, self.example, "generator")
        with self.timed("latency"):
            timed = bench.compare([dense.timed, small.timed], "latency")
        return Finished(networks, (dense, small), timed)

    def _dense(self) -> nn.Module:
        """The trained generator; the GAN's discriminator is trained with it."""
        recipe = self.recipe
        if recipe.discriminator_weights is not None:
            load_weights(self.gan.discriminator, Path(recipe.discriminator_weights))
        if recipe.weights is not None:
            load_weights(self.gan.generator, Path(recipe.weights))
            return copied(self.gan.generator).eval()
        return self._train(self.gan, self.subject.way_back, "dense")

    def _prune(self, gan: Gan) -> tuple[nn.Module, PruningPlan]:
        """The network to cut, and the plan for it."""
        recipe, budget = self.recipe, Budget.parse(self.recipe.budget)
        with self.timed("prune"):
            if self.method is None:
                named = Recipe(method=recipe.method, options=recipe.options, round_to=recipe.round_to, seed=recipe.seed)
                counts = {"num_noises": recipe.num_noises, "seed": recipe.seed}
                return gan.generator, prune_generator(gan.generator, budget, build_pruner(named), gan.draw, **counts)
            slimmed = self.method(
                gan,
                self.subject.images,
                budget,
                recipe.schedule("dense", flip=self.data.flip),
                labels=self.subject.labels,
                maps=self.maps,
                **self._watched("prune"),
            )
        self.history["prune"] = slimmed.history
        return slimmed.generator, slimmed.plan

    def _retrain(self, small: nn.Module, plan: PruningPlan, initial: list[nn.Module]) -> nn.Module:
        """The small generator, trained on from where it is or from the dense one's initial weights."""
        rewinds, way_back = self.recipe.retrain == "rewind", self.subject.way_back
        if rewinds:
            small = compact(initial[0], PruningPlan(plan.keep), self.example)
            restore_spectral_norm(small, initial[0])
            way_back = (initial[2], initial[3]) if way_back else None
        start = self.recipe.discriminator or ("reset" if rewinds else "kept")
        discriminator = initial[1] if start == "reset" else self.gan.discriminator
        if start == "pruned":
            discriminator = self._smaller(discriminator, initial[1] if rewinds else discriminator)
        gan = replace(self.gan, generator=small.requires_grad_(True), discriminator=discriminator)
        return self._train(gan, way_back, "retrain")

    def _smaller(self, trained: nn.Module, weights: nn.Module) -> nn.Module:
        """`weights` without the channels that have the smallest filters in `trained`, spectrally normed as it was."""
        labels = (torch.zeros(2, dtype=torch.int64),) if self.gan.told_labels else ()
        inputs = (self.data.train_images[:2].float(), *labels)
        budget = Budget.parse(self.recipe.discriminator_budget)
        plan = PRUNERS["magnitude"]()(trace(trained, inputs), budget, None)
        small = compact(weights, plan, inputs)
        restore_spectral_norm(small, weights)
        return small

    def _train(
        self, gan: Gan, way_back: tuple[nn.Module, nn.Module] | None, stage: Literal["dense", "retrain"]
    ) -> nn.Module:
        """The averaged generator; all networks train in place."""
        schedule, watched = self.recipe.schedule(stage, flip=self.data.flip), self._watched(stage)
        images, sources = self.subject.images, self.subject.sources
        with self.timed(stage):
            if way_back is None or sources is None:
                trained = train(gan, images, schedule, labels=self.subject.labels, stage=stage, **watched)
            else:
                to_a, judge_a = way_back
                cycle = CycleGan(gan.generator, to_a, judge_a, gan.discriminator)
                trained = train_cycle(cycle, sources, images, schedule, stage=stage, **watched)
        self.history[stage] = trained.history
        return trained.average

    def _watched(self, stage: str) -> dict[str, Any]:
        """Pictures after every epoch, checkpoints and progress of a stage that trains."""
        observe = picture_writer(self.folder / "samples" / stage, self.shown)
        return {"observe": observe, "checkpoint_dir": self.folder, "progress": self.progress}

    def _measure(self, generator: nn.Module, point: str) -> None:
        """Distances to the real images, kept under the name of this point of the run."""
        if self.reference is None:
            return
        with self.timed(f"evaluate {point}"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)
            generate = partial(_generated, generator, self.subject.shown)
            self.metrics[point] = evaluate(generate, self.reference, num_samples=self.recipe.num_samples)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Announce a step and keep how long it took."""
        self.progress(step, 0, 0, {})
        start = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - start


def _generated(generator: nn.Module, draw: Draw, num_images: int) -> Tensor:
    return samples(generator, draw(num_images))
