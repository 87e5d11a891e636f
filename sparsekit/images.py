"""Data sets and folders of images: decoded once, kept as uint8."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsekit.errors import DataError, UsageError, nearest

# torchvision and scikit-learn are imported where they are used: together they cost seconds of start-up.

Progress = Callable[[int, int], None]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, for folders of images
_FOLDER_IMAGE_SIZE = 224
_CACHE_VERSION = 1  # raise it when decoding changes, or old caches pass for new ones
# What Pillow raises for a file that is cut short, damaged, no image at all, or suspiciously large.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True, eq=False)
class ImageData:
    """A labelled image data set in memory.

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
    seed: int = 0,
    progress: Progress | None = None,
) -> ImageData:
    """The data set `digits`, `fashion-mnist`, `cifar10`, `cifar100` or the folder `imagefolder:PATH`.

    A folder holds `train/<class>/*` and `test/<class>/*` (or `val/`). Images of one size keep it; otherwise
    the shorter side is scaled to `image_size` (224 unless given) and the centre cut out. Decoded images are
    cached; without a writable cache every load decodes them again.

    Args:
        name: as above.
        data_root: where torchvision's data sets lie or go; by default inside the cache.
        download: fetch what `data_root` lacks.
        cache_dir: by default `$SPARSEKIT_CACHE`, else `~/.cache/sparsekit`.
        image_size: pixels; folders only.
        seed: of the split of `digits`, which has no test half of its own.
        progress: called with (done, total) images while a folder is decoded.

    Raises:
        UsageError: an unknown name, an `image_size` below 1.
        DataError: data that is missing, damaged or cannot be downloaded.

    >>> load_images("digits").train_images.shape
    torch.Size([1437, 1, 8, 8])
    """
    if image_size is not None and image_size < 1:
        raise UsageError(f"image size {image_size}: must be at least 1 pixel")
    cache_dir = cache_dir or default_cache_dir()
    kind, _, folder = name.partition(":")
    if kind == "imagefolder" and folder:
        path = Path(folder).expanduser().resolve()
        return _image_folder(name, path, cache_dir=cache_dir, image_size=image_size, progress=progress)
    if name == "digits":
        return _digits(seed)
    if name not in _TORCHVISION:
        valid = ["digits", *_TORCHVISION, "imagefolder:PATH"]
        raise UsageError(f"data {name!r}: unknown{nearest(name, valid)}")
    return _torchvision(name, data_root or cache_dir / "datasets", download=download)


def default_cache_dir() -> Path:
    """Where decoded images and data sets are kept."""
    return Path(os.environ.get("SPARSEKIT_CACHE") or Path.home() / ".cache" / "sparsekit")


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
    name: str, folder: Path, *, cache_dir: Path, image_size: int | None, progress: Progress | None
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
    paths = [Path(path) for path, _ in train.samples + test.samples]
    pixels = cached_images(paths, cache_dir=cache_dir, image_size=image_size, progress=progress)
    return ImageData(
        name,
        pixels[: len(train)],
        torch.tensor(train.targets),
        pixels[len(train) :],
        torch.tensor(test.targets),
        num_classes=len(train.classes),
        mean=MEAN,
        std=STD,
    )


def cached_images(
    paths: Sequence[Path],
    *,
    image_size: int | None,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """The images as uint8 [N, 3, H, W], of one size as `load_images` says; decoded once."""
    cache_dir = cache_dir or default_cache_dir()
    files = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        files.append((str(path), stat.st_size, stat.st_mtime_ns))
    key = hashlib.sha256(json.dumps([_CACHE_VERSION, image_size, files]).encode()).hexdigest()[:32]
    cache = cache_dir / f"images-{key}.safetensors"
    images = _read_cache(cache)
    if images is None:
        images = _decode(paths, image_size, progress=progress)
        _write_cache(cache, images)
    return images


def _read_cache(path: Path) -> Tensor | None:
    """None where there is no file, or one that is not what `_write_cache` wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            images: Tensor = file.get_tensor("images")
            checksum = (file.metadata() or {}).get("checksum")
    except (OSError, SafetensorError):
        return None
    return images if checksum == _checksum(images) else None


def _write_cache(path: Path, images: Tensor) -> None:
    # A cache is a convenience: a full or read-only disk must not stop the run.
    with suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            part = Path(folder) / path.name
            save_file({"images": images}, part, metadata={"checksum": _checksum(images)})
            part.replace(path)


def _checksum(images: Tensor) -> str:
    header = f"{images.dtype} {list(images.shape)}"
    return f"{header} {zlib.crc32(images.numpy().data, zlib.crc32(header.encode()))}"


def _decode(paths: Sequence[Path], image_size: int | None, *, progress: Progress | None) -> Tensor:
    """uint8 [N, 3, H, W]; Pillow decodes outside the interpreter lock, so threads help."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        if image_size is None:
            sizes = set(pool.map(_image_size, paths))
            width, height = sizes.pop() if len(sizes) == 1 else (_FOLDER_IMAGE_SIZE, _FOLDER_IMAGE_SIZE)
        else:
            width = height = image_size
        images = torch.empty(len(paths), 3, height, width, dtype=torch.uint8)
        rows = images.numpy()

        def decode(row: int) -> None:
            with _opened(paths[row]) as image:
                rgb = image.convert("RGB")
                if rgb.size != (width, height):
                    rgb = ImageOps.fit(rgb, (width, height), Image.Resampling.BILINEAR)
                rows[row] = np.asarray(rgb).transpose(2, 0, 1)

        for done, _ in enumerate(pool.map(decode, range(len(paths))), start=1):
            if progress:
                progress(done, len(paths))
    return images


def _image_size(path: Path) -> tuple[int, int]:
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except _DECODE_ERRORS as error:
        raise DataError(f"{path}: cannot be decoded as an image: {error}") from error


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
