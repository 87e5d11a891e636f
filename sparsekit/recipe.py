"""A Recipe says everything that a run depends on; as TOML it repeats the run."""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import tomli_w

from sparsekit.errors import DataError, UsageError, nearest

_CHOICES = {
    "optimizer": ("sgd", "adamw"),
    "precision": ("auto", "32-true", "16-mixed", "bf16-mixed"),
    "recover": ("none", "bn", "lsq", "distill"),
    "quantize": ("none", "int8"),
}

# The least value of a key, and what it must stay below.
_RANGES = {
    **dict.fromkeys(("dense_epochs", "epochs", "finetune_epochs"), (0, math.inf)),
    **dict.fromkeys(("dense_lr", "lr", "finetune_lr", "gamma", "warmup_epochs", "weight_decay"), (0, math.inf)),
    **dict.fromkeys(("dense_milestones", "milestones", "finetune_milestones"), (1, math.inf)),
    **dict.fromkeys(("image_size", "round_to", "threads"), (1, math.inf)),
    **dict.fromkeys(("limit", "batch_size"), (2, math.inf)),
    "recover_budget_s": (0, math.inf),
    "num_images": (8, math.inf),
    **dict.fromkeys(("label_smoothing", "momentum"), (0, 1)),
    "seed": (0, 2**63),
}


@dataclass(frozen=True)
class TomlRecipe:
    """What every kind of recipe can do: frozen dataclasses whose fields, `data` among them, are TOML keys."""

    def to_toml(self) -> str:
        """Every key with its value; keys that are None are left out, no data is written as "none"."""
        values = asdict(self)
        if values["data"] is None:
            values["data"] = "none"
        return tomli_w.dumps({key: value for key, value in values.items() if value is not None})

    @classmethod
    def from_toml(cls, path: Path) -> Self:
        """Read what `to_toml` wrote, or any subset of its keys.

        Raises:
            DataError: no such file, or not TOML.
            UsageError: an unknown key, or a value of the wrong type or out of range.
        """
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"recipe {path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"recipe {path}: not TOML: {error}") from error
        return cls.from_mapping(values, source=f"recipe {path}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, source: str) -> Self:
        """A recipe with `values` over the defaults; "none" as data means no data.

        Raises:
            UsageError: an unknown key, a value of the wrong type or out of range; begins with `source`.
        """
        known = {f.name: f.type for f in fields(cls)}
        for key, value in values.items():
            if key not in known:
                raise UsageError(f"{source}: unknown key {key!r}{nearest(key, list(known))}")
            if not _fits(value, str(known[key])):
                raise UsageError(f"{source}: {key} must be {known[key]}, got {value!r}")
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        if given.get("data") == "none":
            given["data"] = None
        try:
            return cls(**given)
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from error

    def fingerprint(self, *weights: Path) -> str:
        """SHA-256 in hex of the recipe and the bytes of weight files.

        Raises:
            DataError: a weights file cannot be read.
        """
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        for path in weights:
            try:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
            except OSError as error:
                raise DataError(f"weights {path}: {error.strerror}") from error
        return digest.hexdigest()


@dataclass(frozen=True)
class Recipe(TomlRecipe):
    """One compression run; every key is a flag of `sparsekit compress`.

    Attributes:
        model: a name in `sparsekit.models`, `torchvision:NAME`, `timm:NAME` or `path/to/file.py:factory`.
        weights: safetensors or torch state dict of the dense network; without it the dense network is trained.
        data: data set name, `imagefolder:PATH` or `path/to/file.py:factory`; None runs without data.
        data_root: where torchvision's data sets lie; None is the cache.
        download: may data sets be downloaded.
        image_size: side in pixels; None keeps the data's own (224 without data).
        crop_pct: in (0, 1]; of test images, and those to recover with, the shorter side is scaled to
            image_size / crop_pct before the centre is cut out; folders only.
        limit: train on this many images, the same share of each class; None takes all.
        batch_size: images per training batch.
        augment: what is done to training images, see `image_task`.
        method: a name in `PRUNERS`.
        options: the method's own options.
        budget: see `Budget.parse`.
        round_to: widths are multiples of this.
        renormalise: also prune channels that LayerNorm and its like run over.
        recover: repair without labels before fine-tuning: "none", "bn", "lsq" (which begins with bn), "distill" (with
            lsq).
        recover_budget_s: seconds that recovery may take; None lets it finish.
        calibrate: `imagefolder:PATH` of unlabelled images to recover with; None takes the training images or, without
            data, makes images of the BatchNorms' statistics.
        num_images: how many.
        dense_epochs: training of the dense network where no weights are given.
        dense_lr: its peak learning rate.
        dense_milestones: epochs after which it is multiplied by `gamma`, none for a constant rate; None is a cosine.
        epochs: of the method, where it trains.
        lr: peak learning rate of the method's training.
        milestones: likewise; None is the method's own decay.
        finetune_epochs: of fine-tuning; None is as `epochs`.
        finetune_lr: peak learning rate of fine-tuning.
        finetune_milestones: likewise; None is a cosine.
        gamma: at all milestones.
        warmup_epochs: linear warm-up at the start of all training.
        optimizer: "sgd" or "adamw" in all training; None is the method's own, and SGD elsewhere.
        momentum: in all training; of AdamW the first beta.
        weight_decay: in all training.
        label_smoothing: in all training, in [0, 1).
        precision: see `Schedule.precision`.
        quantize: "int8" also turns the finished file into integers, whose ranges come from `calibrate`'s images.
        target: the runtime, and the machine, that latency is measured on, see `parse_target`.
        threads: of the runtime meanwhile.
        allow_slower: also write a small network that is not faster than the dense one.
        compare_stock: also time smaller networks of the same family.
        seed: of everything drawn.

    Raises:
        UsageError: a number out of its range, an unknown optimizer or precision.
    """

    model: str = "digits_resnet"
    weights: str | None = None
    data: str | None = "digits"
    data_root: str | None = None
    download: bool = True
    image_size: int | None = None
    crop_pct: float = 1.0
    limit: int | None = None
    batch_size: int = 128
    augment: tuple[str, ...] = ("shift", "flip")
    method: str = "transport"
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: str = "macs<=0.5x"
    round_to: int = 1
    renormalise: bool = False
    recover: str = "none"
    recover_budget_s: float | None = None
    calibrate: str | None = None
    num_images: int = 512
    dense_epochs: int = 12
    dense_lr: float = 0.1
    dense_milestones: tuple[int, ...] | None = None
    epochs: int = 6
    lr: float = 0.01
    milestones: tuple[int, ...] | None = None
    finetune_epochs: int | None = None
    finetune_lr: float = 0.01
    finetune_milestones: tuple[int, ...] | None = None
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    optimizer: str | None = None
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    precision: str = "auto"
    quantize: str = "none"
    target: str = "onnxruntime"
    threads: int = 1
    allow_slower: bool = False
    compare_stock: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_ranges(self, _RANGES)
        check_choices(self, _CHOICES)
        if not 0 < self.crop_pct <= 1:
            raise UsageError(f"crop_pct must be in (0, 1], got {self.crop_pct}")


def check_ranges(recipe: object, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Refuse numbers below the least value of their key, or not below its end; None is always right.

    Raises:
        UsageError: the first of them.
    """
    for key, (least, end) in ranges.items():
        value = getattr(recipe, key)
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        for number in numbers:
            if not least <= number < end:
                raise UsageError(f"{key} must be in [{least}, {end}), got {number}")


def check_choices(recipe: object, choices: Mapping[str, Sequence[str]]) -> None:
    """Refuse words that are not among those of their key; None is always right.

    Raises:
        UsageError: the first of them, with the nearest that are.
    """
    for key, words in choices.items():
        value = getattr(recipe, key)
        if value is not None and value not in words:
            raise UsageError(f"{key} {value!r}: unknown{nearest(value, list(words))}")


def _fits(value: Any, annotation: str) -> bool:
    """Whether a TOML value has the type a field's annotation names; an int serves as a float, an array as a tuple."""
    if isinstance(value, list | tuple):
        return any(
            name.startswith("tuple[") and all(_fits(item, name[6:].partition(",")[0]) for item in value)
            for name in annotation.split(" | ")
        )
    kinds: dict[str, tuple[type, ...]] = {
        "str": (str,),
        "int": (int,),
        "float": (float, int),
        "bool": (bool,),
        "None": (type(None),),
        "Mapping[str, Any]": (dict,),
    }
    names = annotation.split(" | ")
    return isinstance(value, tuple(kind for name in names for kind in kinds.get(name, ()))) and (
        not isinstance(value, bool) or "bool" in names
    )
