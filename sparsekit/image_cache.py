"""Images decoded once, into one file of bytes that is mapped and never read whole.

`images-KEY.uint8` holds uint8 [N, 3, H, W]. `images-KEY.json`, its mark, says how many leading images of it are whole
and their CRC-32. An interrupted decode goes on behind its last mark. A finished file is believed as long as its time
of change is the marked one; otherwise, and in an unfinished one, the marked images must still have their checksum.

Several processes may decode into the same file: they write the same bytes to the same places, and nothing is ever cut
off that another has mapped.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparsekit.errors import DataError

Progress = Callable[[int, int], None]
_T = TypeVar("_T")

_CACHE_VERSION = 2  # raise it when decoding changes, or old caches pass for new ones
_DEFAULT_SIZE = 224
_IMAGES_PER_MARK = 1024  # what an interruption may cost, at most
# What Pillow raises for a file that is cut short, damaged, no image at all, or suspiciously large.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def default_cache_dir() -> Path:
    """Where decoded images and data sets are kept."""
    return Path(os.environ.get("SPARSEKIT_CACHE") or Path.home() / ".cache" / "sparsekit")


def cached_images(
    paths: Sequence[Path],
    *,
    image_size: int | None,
    crop_pct: float = 1.0,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """The images as uint8 [N, 3, H, W], decoded once, of one size.

    Each is scaled so that its shorter side is `round(image_size / crop_pct)`, and the centre is cut out, as
    torchvision's Resize and CenterCrop do. The tensor is a read-only map of a file: it takes memory only as far as
    there is some to spare. Where no such file can be written, the images are held in memory.

    Args:
        paths: at least one.
        image_size: H = W in pixels; None is the size of the images where all have the same, else 224.
        crop_pct: in (0, 1].
        cache_dir: by default `default_cache_dir()`.
        progress: called with (done, total) images while they are decoded.

    Raises:
        DataError: an image that cannot be decoded, or room for all neither on disk nor in memory.
    """
    cache = (cache_dir or default_cache_dir()) / f"images-{_key(paths, image_size, crop_pct)}.uint8"
    mark = _believed(cache, progress)
    if mark is None:
        height, width = _common_size(paths) if image_size is None else (image_size, image_size)
        mark = _Mark((len(paths), 3, height, width))
    pixels = _decoded(paths[mark.num_images :], mark.shape, crop_pct)
    try:
        if mark.num_images < len(paths):
            _extend(cache, mark, pixels, progress)
        return _mapped(cache, mark.shape)
    except OSError as error:
        # A cache is a convenience: a full or read-only disk stops only what memory cannot hold.
        reason = error.strerror or str(error)
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    if mark.size_bytes > memory_bytes:
        raise DataError(
            f"{cache.parent}: no room for {mark.size_bytes:,} bytes of decoded images ({reason}), and half of the "
            f"memory is {memory_bytes:,} bytes; free some or set SPARSEKIT_CACHE to a folder with room"
        )
    images = torch.empty(mark.shape, dtype=torch.uint8)
    rows = images.view(len(paths), -1).numpy()
    for number, image in enumerate(_decoded(paths, mark.shape, crop_pct)):
        rows[number] = np.frombuffer(image, np.uint8)
        if progress:
            progress(number + 1, len(paths))
    return images


@dataclass(frozen=True)
class _Mark:
    """What the JSON beside a cache says of it; `mtime_ns` is that of the finished file."""

    shape: tuple[int, int, int, int]
    num_images: int = 0
    crc32: int = 0
    mtime_ns: int | None = None

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape)

    def write(self, cache: Path) -> None:
        partial = cache.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(asdict(self)), encoding="utf-8")
        partial.replace(cache.with_suffix(".json"))


def _key(paths: Sequence[Path], image_size: int | None, crop_pct: float) -> str:
    digest = hashlib.sha256(json.dumps([_CACHE_VERSION, image_size, crop_pct]).encode())
    for path in paths:
        try:
            stat = path.stat()
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from error
        digest.update(json.dumps([str(path), stat.st_size, stat.st_mtime_ns]).encode())
    return digest.hexdigest()[:32]


def _believed(cache: Path, progress: Progress | None) -> _Mark | None:
    """The cache's mark; None where there is none, or the file is not as it says."""
    try:
        mark = _Mark(**json.loads(cache.with_suffix(".json").read_bytes()))
        with cache.open("rb") as file:
            stat = os.fstat(file.fileno())
            if (stat.st_mtime_ns, stat.st_size) == (mark.mtime_ns, mark.size_bytes):
                return mark
            crc32 = 0
            for number in range(mark.num_images):
                crc32 = zlib.crc32(file.read(math.prod(mark.shape[1:])), crc32)
                if progress:
                    progress(number + 1, mark.shape[0])
    except (OSError, ValueError, TypeError):
        return None
    if not mark.num_images or crc32 != mark.crc32:
        return None
    if mark.num_images == mark.shape[0]:
        with suppress(OSError):  # a copy, on a disk that may be read-only
            replace(mark, mtime_ns=stat.st_mtime_ns).write(cache)
    return mark


def _extend(cache: Path, mark: _Mark, pixels: Iterator[bytes], progress: Progress | None) -> None:
    """Write `pixels` behind the images that `mark` vouches for, and move the mark.

    Through a file and not through a map: a full disk is then an error and no signal.

    Raises:
        OSError: the folder or the file cannot be written, or there is no room.
    """
    cache.parent.mkdir(parents=True, exist_ok=True)
    needed = mark.size_bytes - (cache.stat().st_size if cache.exists() else 0)
    free = shutil.disk_usage(cache.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed:,} more needed, {free:,} free")
    cache.touch()
    try:
        with cache.open("r+b") as file:
            mark = _written(file, cache, mark, pixels, progress)
    except DataError:
        # Its repair gives the images another key: nobody would ever go on with this file.
        for path in (cache.with_suffix(".json"), cache):
            path.unlink(missing_ok=True)
        raise
    replace(mark, mtime_ns=cache.stat().st_mtime_ns).write(cache)


def _written(file: BinaryIO, cache: Path, mark: _Mark, pixels: Iterator[bytes], progress: Progress | None) -> _Mark:
    file.seek(mark.num_images * math.prod(mark.shape[1:]))
    for image in pixels:
        file.write(image)
        mark = replace(mark, num_images=mark.num_images + 1, crc32=zlib.crc32(image, mark.crc32))
        if mark.num_images % _IMAGES_PER_MARK == 0:
            file.flush()
            mark.write(cache)
        if progress:
            progress(mark.num_images, mark.shape[0])
    file.truncate(mark.size_bytes)
    file.flush()
    os.fsync(file.fileno())  # or a power cut could leave the mark and not the images
    return mark


def _mapped(cache: Path, shape: tuple[int, int, int, int]) -> Tensor:
    # Read-only and shared: Linux counts a private map that could be written as memory, and refuses one of more than
    # the machine has.
    rows = np.memmap(cache, np.uint8, "r", shape=tuple(shape))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        return torch.from_numpy(rows)


def _common_size(paths: Sequence[Path]) -> tuple[int, int]:
    """Height and width of all images, or 224 twice where they differ."""
    sizes = set(_in_order(_size, paths))
    return sizes.pop() if len(sizes) == 1 else (_DEFAULT_SIZE, _DEFAULT_SIZE)


def _size(path: Path) -> tuple[int, int]:
    with _opened(path) as image:
        return image.height, image.width


def _decoded(paths: Sequence[Path], shape: tuple[int, int, int, int], crop_pct: float) -> Iterator[bytes]:
    """The bytes of each image, uint8 [3, H, W]."""
    from torchvision.transforms.v2 import functional

    height, width = shape[2:]
    shorter = round(min(height, width) / crop_pct)

    def decode(path: Path) -> bytes:
        with _opened(path) as image:
            scaled = functional.resize(image.convert("RGB"), [shorter])
            cut = functional.center_crop(scaled, [height, width])
        return np.asarray(cut).transpose(2, 0, 1).tobytes()

    return _in_order(decode, paths)


def _in_order(function: Callable[[Path], _T], paths: Sequence[Path]) -> Iterator[_T]:
    """`function` of every path, a few ahead; Pillow decodes outside the interpreter lock, so threads help."""
    num_threads = os.cpu_count() or 1
    ahead: deque[Future[_T]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for path in paths:
            ahead.append(pool.submit(function, path))
            if len(ahead) > 4 * num_threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except _DECODE_ERRORS as error:
        raise DataError(f"{path}: cannot be decoded as an image: {error}") from error
