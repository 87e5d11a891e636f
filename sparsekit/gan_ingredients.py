"""What a GanRecipe names, as values: images, networks, method, and what images are compared by."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsekit.errors import DataError, UsageError, nearest
from sparsekit.gan.channel_pruning import GAN_SLIMMING, ChannelPruning
from sparsekit.gan.cycle_training import CycleGan, build_cycle_gan
from sparsekit.gan.distillation import Maps, feature_maps
from sparsekit.gan.features import FeatureNetwork, features_of, inception
from sparsekit.gan.game import Draw, Gan, Sources, build_gan
from sparsekit.gan.recipe import GanRecipe
from sparsekit.images import ImageData, load_images, stratified_order
from sparsekit.networks import build_network, load_weights
from sparsekit.pruners import PRUNERS, UNSTRUCTURED
from sparsekit.task import Progress

CHANNEL_PRUNINGS = {"channel_pruning": ChannelPruning(), "gan_slimming": GAN_SLIMMING}
_SHARED = ("epochs", "round_to", "seed")  # keys that mean the same to the recipe and to these methods


def channel_pruning(recipe: GanRecipe) -> ChannelPruning | None:
    """The recipe's method with its options, None where it is one of `PRUNERS`.

    Raises:
        UsageError: an unknown method or option, an option of the wrong type, a method that zeroes single weights.
    """
    if recipe.method not in CHANNEL_PRUNINGS:
        known = [*CHANNEL_PRUNINGS, *(name for name in PRUNERS if name not in UNSTRUCTURED)]
        if recipe.method not in known:
            raise UsageError(f"method {recipe.method!r}: unknown{nearest(recipe.method, known)}")
        return None
    method = CHANNEL_PRUNINGS[recipe.method]
    own = [field.name for field in dataclasses.fields(method) if field.name not in _SHARED]
    for name, value in recipe.options.items():
        if name not in own:
            raise UsageError(f"{recipe.method}: unknown option {name!r}{nearest(name, own)}")
        kind = type(getattr(method, name))
        right = isinstance(value, (float, int) if kind is float else kind)
        if not right or (isinstance(value, bool) and kind is not bool):
            raise UsageError(f"{recipe.method}: option {name} must be {kind.__name__}, got {value!r}")
    epochs = method.epochs if recipe.epochs is None else recipe.epochs
    return dataclasses.replace(
        method, epochs=epochs, round_to=recipe.round_to, seed=recipe.seed, **dict(recipe.options)
    )


def load_data(recipe: GanRecipe, *, progress: Progress | None = None) -> ImageData:
    """The recipe's images, as many for training as it wants.

    Raises:
        DataError: they are missing, or not square.
    """
    data = load_images(
        recipe.data or "",
        data_root=Path(recipe.data_root) if recipe.data_root else None,
        download=recipe.download,
        image_size=recipe.image_size,
        seed=recipe.seed,
        progress=partial(_decoding, progress) if progress else None,
    )
    height, width = data.train_images.shape[2:]
    if height != width:
        raise DataError(f"data {recipe.data!r}: images are {width}x{height}, expected squares; give an image size")
    if recipe.limit is None:
        return data
    chosen = stratified_order(data.train_labels, recipe.seed)[: recipe.limit]
    return dataclasses.replace(data, train_images=data.train_images[chosen], train_labels=data.train_labels[chosen])


@dataclass(frozen=True, eq=False)
class Subject:
    """What is trained and compressed.

    Attributes:
        gan: its generator is what is compressed.
        images: uint8 [N, C, H, W], real ones.
        labels: int64 [N], None where no network looks at them.
        shown: draws inputs for pictures and distances.
        sources: of cyclegan, uint8 images to translate.
        way_back: of cyclegan, the other generator and its discriminator.
    """

    gan: Gan
    images: Tensor
    labels: Tensor | None
    shown: Draw
    sources: Tensor | None = None
    way_back: tuple[nn.Module, nn.Module] | None = None


def build(recipe: GanRecipe, data: ImageData) -> Subject:
    """The recipe's GAN for these images, freshly initialised from its seed.

    Raises:
        UsageError: no such GAN for images of this size, or no such classes.
    """
    channels, side = data.train_images.shape[1], data.train_images.shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if recipe.model == "cyclegan":
            networks = build_cycle_gan(
                image_channels=channels,
                ch=recipe.ch,
                discriminator_ch=recipe.discriminator_ch,
                num_blocks=recipe.num_blocks,
            )
            return _cycle(recipe, data, networks)
        gan = build_gan(
            recipe.model,
            image_size=side,
            image_channels=channels,
            num_classes=data.num_classes,
            z=recipe.z,
            ch=recipe.ch,
            discriminator_ch=recipe.discriminator_ch,
        )
    return Subject(gan, data.train_images, data.train_labels, shown=gan.draw)


def _cycle(recipe: GanRecipe, data: ImageData, networks: CycleGan) -> Subject:
    kinds = [data.train_images[data.train_labels == number] for number in recipe.domains]
    shown = data.test_images[data.test_labels == recipe.domains[0]]
    if not all(map(len, (*kinds, shown))):
        raise UsageError(
            f"domains {list(recipe.domains)}: {recipe.data} has images of {data.num_classes} classes, from 0"
        )
    way_back = (networks.to_a, networks.judge_a)
    return Subject(networks.one_way(kinds[0]), kinds[1], None, Sources(shown), kinds[0], way_back)


def build_features(recipe: GanRecipe, data: ImageData) -> tuple[FeatureNetwork | None, Maps | None]:
    """What distances are measured by, and what the student's images are compared with the dense generator's by.

    Raises:
        UsageError: an unknown network or layer, or no weights for it.
    """
    if recipe.features is None:
        return None, None
    weights = Path(recipe.feature_weights) if recipe.feature_weights else None
    if recipe.features == "inception":
        return inception(weights), None
    if weights is None:
        raise UsageError(f"features {recipe.features!r}: feature_weights must name its weights file")
    network = build_network(recipe.features, num_classes=data.num_classes, in_channels=data.train_images.shape[1])
    load_weights(network, weights)
    maps = None
    if recipe.feature_layers:
        maps = feature_maps(network, recipe.feature_layers, mean=data.mean, std=data.std)
    return features_of(network, recipe.features, mean=data.mean, std=data.std), maps


def _decoding(progress: Progress, done: int, total: int) -> None:
    progress("decode images", done, total, {})
