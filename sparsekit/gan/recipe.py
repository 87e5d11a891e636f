"""A GanRecipe says everything that the compression of a generator depends on; as TOML it repeats the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from sparsekit.errors import UsageError, nearest
from sparsekit.gan.schedule import SCHEDULES, GanSchedule
from sparsekit.recipe import TomlRecipe, check_choices, check_ranges

_CHOICES = {
    "recover": ("none", "bn", "lsq"),
    "retrain": ("none", "finetune", "rewind"),
    "discriminator": ("kept", "reset", "pruned"),
}
_RANGES = {
    **dict.fromkeys(("dense_epochs", "epochs", "retrain_epochs"), (0, math.inf)),
    **dict.fromkeys(("generator_lr", "discriminator_lr", "retrain_lr"), (0, math.inf)),
    **dict.fromkeys(("image_size", "z", "ch", "discriminator_ch", "num_blocks"), (1, math.inf)),
    **dict.fromkeys(("round_to", "threads"), (1, math.inf)),
    **dict.fromkeys(("batch_size", "generator_batch_size", "num_critic_steps"), (1, math.inf)),
    **dict.fromkeys(("limit", "num_samples"), (2, math.inf)),
    "num_noises": (8, math.inf),
    "domains": (0, math.inf),
    "average_decay": (0, 1),
    "seed": (0, 2**63),
}
# What a schedule takes from the recipe, where it says it.
_OF_SCHEDULE = (
    *("generator_lr", "discriminator_lr", "batch_size", "generator_batch_size", "num_critic_steps"),
    *("average_decay", "augment"),
)


@dataclass(frozen=True)
class GanRecipe(TomlRecipe):
    """One run; every key is a flag of `sparsekit gan compress`. What is None is as the GAN's authors set it.

    Attributes:
        model: a key of `SCHEDULES`.
        weights: safetensors or torch state dict of the dense generator; without it the GAN is trained.
        discriminator_weights: of the discriminator that goes with it; without them it starts anew.
        data: data set name or `imagefolder:PATH`.
        data_root: where torchvision's data sets lie; None is the cache.
        download: may data sets be downloaded.
        image_size: side in pixels; None keeps the data's own.
        domains: of cyclegan, the numbers of two classes of the data: the first is translated into the second.
        limit: train on this many images, the same share of each class; None takes all.
        z: features of the noise.
        ch: the generator's width.
        discriminator_ch: the discriminator's width.
        num_blocks: residual blocks of cyclegan's generators.
        method: "channel_pruning", "gan_slimming", or a name in `PRUNERS` that needs no labels.
        options: the method's own options.
        budget: see `Budget.parse`; of multiply-accumulates, parameters or channels.
        round_to: widths are multiples of this.
        recover: repair from noise alone before retraining: "none", "bn", "lsq" (which begins with bn).
        num_noises: images' worth of it.
        retrain: "finetune" the small generator, "rewind" it to the dense one's initial weights, or "none".
        discriminator: what retraining starts with: "kept" as it is, "reset" to its initial weights, or "pruned" to
            `discriminator_budget`; None resets it where the generator is rewound, and else keeps it.
        discriminator_budget: see `Budget.parse`.
        dense_epochs: training of the dense GAN, where no weights are given.
        epochs: of the method, where it trains; None is the method's own.
        retrain_epochs: None is as `dense_epochs`.
        generator_lr: of Adam in dense training, and in retraining unless `retrain_lr` is given.
        discriminator_lr: likewise, in all training.
        retrain_lr: the generator's in retraining.
        batch_size: real images per step of the discriminator.
        generator_batch_size: images per step of the generator.
        num_critic_steps: of the discriminator per step of the generator.
        average_decay: of the averaged generator.
        augment: keys of `AUGMENTATIONS`, of all that the discriminator sees.
        features: a network in `sparsekit.models` to measure distances by, or "inception"; None measures none.
        feature_weights: its weights file.
        feature_layers: of it, to compare the images of student and dense generator by; none compares pixels.
        num_samples: images that distances are measured on.
        target: the runtime, and the machine, that latency is measured on, see `parse_target`.
        threads: of the runtime meanwhile.
        seed: of everything drawn.

    Raises:
        UsageError: a number out of its range, an unknown word, no data.
    """

    model: str = "sngan"
    weights: str | None = None
    discriminator_weights: str | None = None
    data: str | None = "digits"
    data_root: str | None = None
    download: bool = True
    image_size: int | None = None
    domains: tuple[int, ...] = ()
    limit: int | None = None
    z: int | None = None
    ch: int | None = None
    discriminator_ch: int | None = None
    num_blocks: int | None = None
    method: str = "channel_pruning"
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: str = "macs<=0.5x"
    round_to: int = 1
    recover: str = "none"
    num_noises: int = 512
    retrain: str = "finetune"
    discriminator: str | None = None
    discriminator_budget: str = "macs<=0.5x"
    dense_epochs: int | None = None
    epochs: int | None = None
    retrain_epochs: int | None = None
    generator_lr: float | None = None
    discriminator_lr: float | None = None
    retrain_lr: float | None = None
    batch_size: int | None = None
    generator_batch_size: int | None = None
    num_critic_steps: int | None = None
    average_decay: float | None = None
    augment: tuple[str, ...] | None = None
    features: str | None = None
    feature_weights: str | None = None
    feature_layers: tuple[str, ...] = ()
    num_samples: int = 10_000
    target: str = "onnxruntime"
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(self, _RANGES)
        check_choices(self, _CHOICES)
        if self.model not in SCHEDULES:
            raise UsageError(f"model {self.model!r}: no such GAN{nearest(self.model, list(SCHEDULES))}")
        if self.data is None:
            raise UsageError("data: a GAN cannot be trained without")
        if len(set(self.domains)) != (2 if self.model == "cyclegan" else 0):
            raise UsageError(f"domains: cyclegan needs two classes, others none; got {list(self.domains)}")
        if self.feature_layers and self.features in (None, "inception"):
            raise UsageError("feature_layers: need a network of sparsekit.models as features")

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """Those whose contents the run depends on."""
        named = (self.weights, self.discriminator_weights, self.feature_weights)
        return tuple(Path(name) for name in named if name is not None)

    def schedule(self, stage: Literal["dense", "retrain"], *, flip: bool) -> GanSchedule:
        """How the recipe trains; `flip` says whether a mirrored image of the data is still one of them."""
        own = SCHEDULES[self.model]
        given = {name: getattr(self, name) for name in _OF_SCHEDULE if getattr(self, name) is not None}
        epochs = own.epochs if self.dense_epochs is None else self.dense_epochs
        if stage == "retrain":
            epochs = epochs if self.retrain_epochs is None else self.retrain_epochs
            given |= {} if self.retrain_lr is None else {"generator_lr": self.retrain_lr}
        return replace(own, **given, epochs=epochs, flip=own.flip and flip, seed=self.seed)
