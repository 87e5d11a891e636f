"""Data sets and folders of images, kept as uint8."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsekit.errors import DataError, UsageError, nearest
from sparsekit.image_cache import Progress, cached_images, default_cache_dir

# torchvision and scikit-learn are imported where they are used: together they cost seconds of start-up.

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for folders of images


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled image data set. The images may be read-only maps of files larger than the memory: index, don't write.

    Attributes:
        name: what the user called it.
        train_images: uint8 [N, C, H, W].
        train_labels: int64 [N], in [0, num_classes).
        test_images: uint8 [M, C, H, W], never trained on.
        test_labels: int64 [M].
        num_classes: number of classes.
        mean: per channel, of pixels scaled to [0, 1]; replace it where given weights expect another.
        std: likewise.
        flip: a mirrored image keeps its label.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    flip: bool = True


def load_images(
    name: str,
    *,
    data_root: Path | None = None,
    download: bool = True,
    cache_dir: Path | None = None,
    image_size: int | None = None,
    crop_pct: float = 1.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> ImageData:
    """The data set `digits`, `fashion-mnist`, `cifar10`, `cifar100` or the folder `imagefolder:PATH`.

    A folder holds `train/<class>/*` and `test/<class>/*` (or `val/`). Images of one size keep it; otherwise
    the shorter side is scaled to `image_size` (224 unless given) and the centre cut out, see `cached_images`. Decoded
    images are cached on disk; without a writable cache every load decodes them again, into memory.

    Args:
        name: as above.
        data_root: where torchvision's data sets lie or go; by default inside the cache.
        download: fetch what `data_root` lacks.
        cache_dir: by default `$SPARSEKIT_CACHE`, else `~/.cache/sparsekit`.
        image_size: pixels; folders only.
        crop_pct: in (0, 1]; the share of the shorter side that the cut leaves of a test image, which is scaled up
            accordingly; folders only. Training images stay whole: random crops are for them.
        seed: of the split of `digits`, which has no test half of its own.
        progress: called with (done, total) images while a folder is decoded.

    Raises:
        UsageError: an unknown name, an `image_size` below 1, a `crop_pct` out of its range.
        DataError: data that is missing, damaged or cannot be downloaded.

    >>> load_images("digits").train_images.shape
    torch.Size([1437, 1, 8, 8])
    """
    if image_size is not None and image_size < 1:
        raise UsageError(f"image size {image_size}: must be at least 1 pixel")
    if not 0 < crop_pct <= 1:
        raise UsageError(f"crop_pct {crop_pct:g}: must be in (0, 1]")
    cache_dir = cache_dir or default_cache_dir()
    kind, _, folder = name.partition(":")
    if kind == "imagefolder" and folder:
        path = Path(folder).expanduser().resolve()
        return _image_folder(
            name, path, cache_dir=cache_dir, image_size=image_size, crop_pct=crop_pct, progress=progress
        )
    if name == "digits":
        return _digits(seed)
    if name not in _TORCHVISION:
        valid = ["digits", *_TORCHVISION, "imagefolder:PATH"]
        raise UsageError(f"data {name!r}: unknown{nearest(name, valid)}")
    return _torchvision(name, data_root or cache_dir / "datasets", download=download)


# name -> class in torchvision.datasets, mean, std, flip
_TORCHVISION = {
    "fashion-mnist": ("FashionMNIST", (0.2860,), (0.3530,), False),
    "cifar10": ("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), True),
    "cifar100": ("CIFAR100", (0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762), True),
}


def _digits(seed: int) -> ImageData:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.from_numpy((digits.images * (255 / 16)).round().astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    order = stratified_order(labels, seed)
    num_train = len(order) * 4 // 5
    train, test = order[:num_train], order[num_train:]
    split = (pixels[train], labels[train], pixels[test], labels[test])
    return ImageData("digits", *split, num_classes=10, mean=(0.305,), std=(0.376,), flip=False)


def _torchvision(name: str, root: Path, *, download: bool) -> ImageData:
    from torchvision import datasets

    class_name, mean, std, flip = _TORCHVISION[name]
    dataset_class = getattr(datasets, class_name)
    try:
        halves = [dataset_class(root, train=train, download=download) for train in (True, False)]
    except (OSError, RuntimeError, ValueError) as error:
        if download:
            raise DataError(f"data {name!r}: cannot be downloaded to {root}: {error}") from error
        raise DataError(f"data {name!r}: missing or damaged in {root}, and downloading is off") from error
    train_images, test_images = (_channels_first(torch.as_tensor(half.data)) for half in halves)
    train_labels, test_labels = (torch.as_tensor(half.targets) for half in halves)
    num_classes = len(halves[0].classes)
    return ImageData(name, train_images, train_labels, test_images, test_labels, num_classes, mean, std, flip)


def _channels_first(pixels: Tensor) -> Tensor:
    return pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()


def _image_folder(
    name: str,
    folder: Path,
    *,
    cache_dir: Path,
    image_size: int | None,
    crop_pct: float,
    progress: Progress | None,
) -> ImageData:
    from torchvision.datasets import ImageFolder

    test_folder = folder / "test" if (folder / "test").is_dir() else folder / "val"
    halves = []
    for half in (folder / "train", test_folder):
        if not half.is_dir():
            raise DataError(f"{half}: no such folder; expected train/<class>/ and test/<class>/ in {folder}")
        try:
            halves.append(ImageFolder(half))
        except OSError as error:
            raise DataError(f"{half}: {error}") from error
    train, test = halves
    if train.classes != test.classes:
        differ = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(f"{folder}: train and {test_folder.name} differ in the classes {', '.join(differ)}")
    pixels = [
        cached_images(
            [Path(path) for path, _ in half.samples],
            image_size=image_size,
            crop_pct=share,
            cache_dir=cache_dir,
            progress=_counted(progress, before, len(train) + len(test)),
        )
        for half, share, before in ((train, 1.0, 0), (test, crop_pct, len(train)))
    ]
    if pixels[0].shape[1:] != pixels[1].shape[1:]:
        sizes = (f"{images.shape[3]}x{images.shape[2]}" for images in pixels)
        raise DataError(f"{folder}: images are {' to train and '.join(sizes)} to test; give one image size")
    return ImageData(
        name,
        pixels[0],
        torch.tensor(train.targets),
        pixels[1],
        torch.tensor(test.targets),
        num_classes=len(train.classes),
        mean=MEAN,
        std=STD,
    )


def _counted(progress: Progress | None, before: int, total: int) -> Progress | None:
    """Progress of a part, counted behind `before` others."""
    return progress and (lambda done, _: progress(before + done, total))


def stratified_order(labels: Tensor, seed: int) -> Tensor:
    """A shuffle of all indices, int64 [N], whose every prefix has each class in its share.

    >>> labels = torch.tensor([0, 0, 0, 0, 1, 1])
    >>> labels[stratified_order(labels, seed=0)[:3]].sort().values.tolist()
    [0, 0, 1]
    """
    shuffled = torch.randperm(len(labels), generator=seeded_generator(seed, 0))
    quantile = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        quantile[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    return shuffled[quantile[shuffled].argsort(stable=True)]


def seeded_generator(seed: int, epoch: int) -> torch.Generator:
    # Torch's CPU generator reads 32 bits of its seed, so both numbers are mixed into 32.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{epoch}".encode()))
