"""Images and users' own factories as a Task: augmented batches, cross entropy, accuracy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit import training
from sparsekit.errors import DataError, UsageError, nearest
from sparsekit.factory import load_factory
from sparsekit.image_cache import Progress, cached_images
from sparsekit.images import MEAN, STD, ImageData, seeded_generator, stratified_order
from sparsekit.task import Batch, Fit, Task

AUGMENTATIONS = ("shift", "crop", "flip", "trivial", "erase", "mixup", "cutmix")
_EVAL_BATCH_SIZE = 512


def image_task(
    images: ImageData,
    *,
    batch_size: int = 128,
    seed: int = 0,
    augment: Collection[str] = ("shift", "flip"),
    fit: Fit = training.fit,
    limit: int | None = None,
) -> Task:
    """Classify `images`: shuffled, augmented batches; cross entropy; accuracy on all test images.

    An epoch's batches depend on `seed` and the epoch's number alone, and draw nothing from the global
    generator. A last batch of one image is left out, because BatchNorm cannot train on it.

    Args:
        images: what to train and test on.
        batch_size: images per training batch, at least 2.
        seed: of the order, the augmentation and the choice of `limit` images.
        augment: what is done to training images, any of these, in this order whatever the order given:
            "shift" by up to an eighth of the image; "crop" a random part, resized to the image's size; "flip", mirror
            half of them where `images.flip`; "trivial", TrivialAugment; "erase" a rectangle of one in ten; "mixup",
            "cutmix", one of the two per batch where both are given: targets are then class shares, float
            [N, num_classes].
        fit: the training loop.
        limit: train on this many images, the same share of each class.

    Raises:
        UsageError: `batch_size` or `limit` below 2, or an unknown augmentation.
    """
    if batch_size < 2 or (limit is not None and limit < 2):
        raise UsageError(f"batch size {batch_size}, limit {limit}: training needs at least 2 images")
    for name in augment:
        if name not in AUGMENTATIONS:
            raise UsageError(f"augment {name!r}: unknown{nearest(name, list(AUGMENTATIONS))}")
    labels = images.train_labels
    chosen = torch.arange(len(labels)) if limit is None else stratified_order(labels, seed)[:limit]
    full, rest = divmod(len(chosen), batch_size)

    def batches(epoch: int) -> Iterator[Batch]:
        generator = seeded_generator(seed, epoch)
        order = chosen[torch.randperm(len(chosen), generator=generator)]
        for index in order.split(batch_size):
            if len(index) > 1:
                yield _augment((images.train_images[index], labels[index]), images, augment, generator)

    return Task(
        example_inputs=(_normalize(images.test_images[:2], images),),
        batches=batches,
        num_batches=full + (rest > 1),
        loss=_cross_entropy,
        evaluate=lambda model: _accuracy(model, images),
        fit=fit,
        name=images.name,
    )


def unlabelled_images(
    spec: str,
    *,
    image_size: int,
    crop_pct: float = 1.0,
    num_images: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Images drawn from a folder and all folders in it, normalised as ImageNet's: float32 [N, 3, S, S].

    Args:
        spec: `imagefolder:PATH`; names of folders, which may be labels, say nothing here.
        image_size: S; the shorter side is scaled to S / `crop_pct` and the centre cut out.
        crop_pct: in (0, 1].
        num_images: N; all where there are fewer.
        seed: of the draw.
        progress: called with (done, total) while images are decoded.

    Raises:
        UsageError: not `imagefolder:PATH`.
        DataError: no such folder, no images in it, or one that cannot be decoded.
    """
    kind, _, name = spec.partition(":")
    if kind != "imagefolder" or not name:
        raise UsageError(f"calibrate {spec!r}: expected imagefolder:PATH")
    pixels = folder_pixels(
        Path(name), image_size=image_size, crop_pct=crop_pct, num_images=num_images, seed=seed, progress=progress
    )
    return _scaled(pixels, MEAN, STD)


def folder_pixels(
    folder: Path,
    *,
    image_size: int,
    crop_pct: float = 1.0,
    num_images: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """The images that `unlabelled_images` draws, uint8 [N, 3, S, S].

    Raises:
        DataError: no such folder, no images in it, or one that cannot be decoded.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    folder = folder.expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if not paths:
        raise DataError(f"{folder}: holds no images")
    drawn = torch.randperm(len(paths), generator=seeded_generator(seed, 0))[:num_images].sort().values
    chosen = [paths[number] for number in drawn.tolist()]
    return cached_images(chosen, image_size=image_size, crop_pct=crop_pct, progress=progress)


def load_task(spec: str) -> Task:
    """The Task that the user's `path/to/file.py:factory` returns.

    Raises:
        DataError: no such file or factory, a file that cannot be imported, a factory of something else.
    """
    task = load_factory(spec)()
    if not isinstance(task, Task):
        raise DataError(f"{spec}: expected the factory to return a sparsekit.Task, got {type(task).__name__}")
    return task


def _augment(batch: Batch, images: ImageData, names: Collection[str], generator: torch.Generator) -> Batch:
    """The batch of uint8 images and labels as the network gets it; draws from `generator` only.

    Settings are those of torchvision's own training recipes.
    """
    from torchvision.transforms import v2

    pixels, labels = batch
    if "shift" in names:
        pixels = _shift(pixels, generator)
    if "crop" in names:
        pixels = _each(v2.RandomResizedCrop(pixels.shape[-2:]), pixels, generator)
    if "flip" in names and images.flip:
        pixels = _flip(pixels, generator)
    if "trivial" in names:
        trivial = v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)
        pixels = _each(trivial, pixels, generator)
    inputs = _normalize(pixels, images)
    if "erase" in names:
        inputs = _each(v2.RandomErasing(p=0.1), inputs, generator)
    mixes = [
        mix(alpha=alpha, num_classes=images.num_classes)
        for name, mix, alpha in (("mixup", v2.MixUp, 0.2), ("cutmix", v2.CutMix, 1.0))
        if name in names
    ]
    if mixes:
        with _global_draws_from(generator):
            inputs, labels = v2.RandomChoice(mixes)(inputs, labels)
    return inputs, labels


def _shift(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each image of uint8 [N, C, H, W] at its own offset in a black border.

    torchvision's RandomCrop draws once for a whole batch; one gather over all windows draws per image.
    """
    from torchvision.transforms.v2 import functional

    num_images, _, height, width = pixels.shape
    pad_y, pad_x = height // 8, width // 8
    windows = functional.pad(pixels, [pad_x, pad_y]).unfold(2, height, 1).unfold(3, width, 1)
    y = torch.randint(2 * pad_y + 1, (num_images,), generator=generator)
    x = torch.randint(2 * pad_x + 1, (num_images,), generator=generator)
    shifted: Tensor = windows[torch.arange(num_images), :, y, x]
    return shifted


def _flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """About half of the images [N, C, H, W] mirrored."""
    mirrored = torch.rand(len(pixels), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)


def _each(transform: Callable[[Tensor], Tensor], images: Tensor, generator: torch.Generator) -> Tensor:
    """`transform` of every image by itself: given a batch, torchvision's transforms draw once for all of it."""
    with _global_draws_from(generator):
        return torch.stack([transform(image) for image in images])


@contextmanager
def _global_draws_from(generator: torch.Generator) -> Iterator[None]:
    """Let what draws from torch's global generator, as torchvision does, go on where `generator` is."""
    before = torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(before)


def _normalize(pixels: Tensor, images: ImageData) -> Tensor:
    return _scaled(pixels, images.mean, images.std)


def _scaled(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    from torchvision.transforms.v2 import functional

    scaled = functional.to_dtype(pixels, torch.float32, scale=True)
    normalized: Tensor = functional.normalize(scaled, list(mean), list(std), inplace=True)
    return normalized


def _cross_entropy(output: Tensor, target: Tensor, label_smoothing: float) -> Tensor:
    loss: Tensor = F.cross_entropy(output, target, label_smoothing=label_smoothing)
    return loss


def _accuracy(model: nn.Module, images: ImageData) -> float:
    """Share of the test images classified right, on the device of the model's parameters."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    training_flags = [(module, module.training) for module in model.modules()]
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    try:
        with torch.no_grad():
            labels = images.test_labels.to(device)
            for index in torch.arange(len(labels)).split(_EVAL_BATCH_SIZE):
                logits = model(_normalize(images.test_images[index].to(device), images))
                correct += (logits.argmax(1) == labels[index.to(device)]).sum()
    finally:
        for module, flag in training_flags:
            module.training = flag
    return int(correct) / len(images.test_labels)
