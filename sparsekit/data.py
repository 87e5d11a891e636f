"""Images and users' own factories as a Task: augmented batches, cross entropy, accuracy."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit import training
from sparsekit.errors import DataError, UsageError
from sparsekit.factory import load_factory
from sparsekit.images import ImageData, seeded_generator, stratified_order
from sparsekit.task import Batch, Fit, Task

_EVAL_BATCH_SIZE = 512


def image_task(
    images: ImageData,
    *,
    batch_size: int = 128,
    seed: int = 0,
    augment: bool = True,
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
        augment: shift by up to an eighth of the image; mirror where `images.flip`.
        fit: the training loop.
        limit: train on this many images, the same share of each class.

    Raises:
        UsageError: `batch_size` or `limit` below 2.
    """
    if batch_size < 2 or (limit is not None and limit < 2):
        raise UsageError(f"batch size {batch_size}, limit {limit}: training needs at least 2 images")
    labels = images.train_labels
    chosen = torch.arange(len(labels)) if limit is None else stratified_order(labels, seed)[:limit]
    full, rest = divmod(len(chosen), batch_size)

    def batches(epoch: int) -> Iterator[Batch]:
        generator = seeded_generator(seed, epoch)
        order = chosen[torch.randperm(len(chosen), generator=generator)]
        for index in order.split(batch_size):
            if len(index) > 1:
                pixels = images.train_images[index]
                if augment:
                    pixels = _augment(pixels, flip=images.flip, generator=generator)
                yield _normalize(pixels, images), labels[index]

    return Task(
        example_inputs=(_normalize(images.test_images[:2], images),),
        batches=batches,
        num_batches=full + (rest > 1),
        loss=_cross_entropy,
        evaluate=lambda model: _accuracy(model, images),
        fit=fit,
        name=images.name,
    )


def load_task(spec: str) -> Task:
    """The Task that the user's `path/to/file.py:factory` returns.

    Raises:
        DataError: no such file or factory, a file that cannot be imported, a factory of something else.
    """
    task = load_factory(spec)()
    if not isinstance(task, Task):
        raise DataError(f"{spec}: expected the factory to return a sparsekit.Task, got {type(task).__name__}")
    return task


def _augment(pixels: Tensor, *, flip: bool, generator: torch.Generator) -> Tensor:
    """Each image of uint8 [N, C, H, W] at its own offset in a black border; mirrored or not.

    RandomCrop and RandomHorizontalFlip of torchvision draw once for a whole batch, and from the global
    generator; one gather over all windows draws per image.
    """
    from torchvision.transforms.v2 import functional

    num_images, _, height, width = pixels.shape
    pad_y, pad_x = height // 8, width // 8
    windows = functional.pad(pixels, [pad_x, pad_y]).unfold(2, height, 1).unfold(3, width, 1)
    y = torch.randint(2 * pad_y + 1, (num_images,), generator=generator)
    x = torch.randint(2 * pad_x + 1, (num_images,), generator=generator)
    cropped: Tensor = windows[torch.arange(num_images), :, y, x]
    if flip:
        mirrored = torch.rand(num_images, generator=generator) < 0.5
        cropped[mirrored] = functional.horizontal_flip(cropped[mirrored])
    return cropped


def _normalize(pixels: Tensor, images: ImageData) -> Tensor:
    from torchvision.transforms.v2 import functional

    scaled = functional.to_dtype(pixels, torch.float32, scale=True)
    normalized: Tensor = functional.normalize(scaled, list(images.mean), list(images.std), inplace=True)
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
