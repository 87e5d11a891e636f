"""Images are decoded once, whatever interrupts or damages it, and never held in memory as a whole."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sparsekit import image_cache
from sparsekit.errors import DataError
from sparsekit.image_cache import Progress, cached_images
from sparsekit.images import load_images

ROW_BYTES = 3 * 10 * 12


def make_images(folder: Path, num_images: int = 20, *, width: int = 12, height: int = 10) -> list[Path]:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    paths = [folder / f"{number:03}.png" for number in range(num_images)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return paths


def on_disk(paths: list[Path]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in paths])


def load(paths: list[Path], cache_dir: Path, progress: Progress | None = None) -> Tensor:
    return cached_images(paths, image_size=None, cache_dir=cache_dir, progress=progress)


def cache_file(cache_dir: Path) -> Path:
    (file,) = cache_dir.glob("*.uint8")
    return file


@pytest.fixture
def num_decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many images were converted to RGB so far, as the one item of a list."""
    counter, convert = [0], Image.Image.convert

    def counted(image: Image.Image, mode: str) -> Image.Image:
        counter[0] += 1
        return convert(image, mode)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "convert", counted)
        yield counter


def later(path: Path) -> None:
    """As if it had been written a second after it was; clocks of file systems tick too slowly for a test."""
    changed = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(changed, changed))


def test_the_second_load_decodes_and_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make_images(tmp_path / "images")
    first = load(paths, tmp_path / "cache")
    assert torch.equal(first, on_disk(paths))
    monkeypatch.setattr("PIL.Image.open", None)
    monkeypatch.setattr("sparsekit.image_cache.zlib", None)
    assert torch.equal(load(paths, tmp_path / "cache"), first)


def test_a_changed_image_is_decoded_again(tmp_path: Path) -> None:
    paths = make_images(tmp_path / "images")
    load(paths, tmp_path / "cache")
    Image.new("RGB", (12, 10), (7, 7, 7)).save(paths[0])
    assert load(paths, tmp_path / "cache")[0].unique().tolist() == [7]


def test_the_environment_names_the_cache_folder_and_nothing_else_is_left_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "cache"))
    cached_images(make_images(tmp_path / "images"), image_size=None)
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".json", ".uint8"]


def test_progress_counts_the_images_of_both_halves(tmp_path: Path) -> None:
    for half, label in (("train", "ant"), ("train", "bee"), ("test", "ant"), ("test", "bee")):
        make_images(tmp_path / "data" / half / label, 3)
    seen: list[tuple[int, int]] = []
    name = f"imagefolder:{tmp_path / 'data'}"
    load_images(name, cache_dir=tmp_path / "cache", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 12) for done in range(1, 13)]


# Memory

MEMORY_SCRIPT = """
import os, resource, sys
from pathlib import Path

os.cpu_count = lambda: 2  # each thread's stack counts
import torch
from sparsekit import data
from sparsekit.images import load_images

torch.set_num_threads(1)
data._EVAL_BATCH_SIZE = 4


def epoch(folder):
    images = load_images(f"imagefolder:{folder}", cache_dir=Path(sys.argv[3]), image_size=224, crop_pct=0.875)
    task = data.image_task(images, batch_size=4, augment=["flip"], limit=len(images.train_labels) * 4 // 5)
    with torch.no_grad():
        total = sum(float(inputs.sum()) for inputs, _ in task.batches(0))
    task.evaluate(torch.nn.Sequential(torch.nn.AvgPool2d(224), torch.nn.Flatten(), torch.nn.Linear(3, 2)))
    return images, total


epoch(sys.argv[1])  # imports and warms up
status = Path("/proc/self/status").read_text()
used = int(status.split("VmData:")[1].split()[0]) * 1024
limit = used + 48 * 2**20
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
images, decoded = epoch(sys.argv[2])
again, mapped = epoch(sys.argv[2])
assert decoded == mapped
assert images.train_images.nbytes > 80 * 2**20
try:
    images.train_images.clone()
except RuntimeError:
    print("bounded")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no limit counts private memory alone")
def test_decoding_an_epoch_and_an_evaluation_take_less_memory_than_the_images(tmp_path: Path) -> None:
    """All memory that the kernel cannot take back, virtual or not, grows by at most 48 MiB for 100 MiB of images."""
    for folder, num_images in (("few", 4), ("many", 280)):
        for half, share in (("train", 1.0), ("val", 0.25)):
            for label in ("ant", "bee"):
                make_images(tmp_path / folder / half / label, int(num_images * share), width=6, height=4)
    command = [sys.executable, "-c", MEMORY_SCRIPT, *(str(tmp_path / name) for name in ("few", "many", "cache"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("bounded\n", "")


def test_images_are_decoded_only_a_few_ahead_of_the_one_that_is_asked_for(tmp_path: Path) -> None:
    seen: list[Path] = []
    results = image_cache._in_order(seen.append, [tmp_path] * 10_000)
    next(results)
    assert len(seen) <= 4 * (os.cpu_count() or 1) + 1


# Interruption


class Killed(BaseException):
    """No error of ours; nothing may catch it."""


@contextmanager
def marks_every(num_images: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_cache, "_IMAGES_PER_MARK", num_images)
        yield


def interrupted(paths: list[Path], cache_dir: Path, left: Path, *, after: int) -> None:
    """Leave behind what a kill after that many images would."""

    def kill(done: int, total: int) -> None:
        if done == after:
            shutil.copytree(cache_dir, left)
            raise Killed

    with marks_every(4), pytest.raises(Killed):
        load(paths, cache_dir, kill)


@pytest.mark.parametrize(("after", "num_left"), [(3, 20), (8, 12), (11, 12), (20, 0)])
def test_an_interrupted_decode_goes_on_behind_its_last_mark(
    tmp_path: Path, num_decoded: list[int], after: int, num_left: int
) -> None:
    paths = make_images(tmp_path / "images")
    interrupted(paths, tmp_path / "cache", tmp_path / "left", after=after)
    num_decoded[0] = 0
    seen: list[int] = []
    images = load(paths, tmp_path / "left", lambda done, total: seen.append(done))
    assert torch.equal(images, on_disk(paths))
    assert num_decoded[0] == num_left
    assert seen == list(range(1, 21))
    assert torch.equal(load(paths, tmp_path / "left"), images)
    assert num_decoded[0] == num_left


@pytest.mark.parametrize("position", [0, 8 * ROW_BYTES - 1, 8 * ROW_BYTES], ids=["first", "last", "behind the mark"])
def test_of_an_interrupted_decode_only_what_is_whole_is_used(tmp_path: Path, position: int) -> None:
    paths = make_images(tmp_path / "images")
    interrupted(paths, tmp_path / "cache", tmp_path / "left", after=11)
    with cache_file(tmp_path / "left").open("r+b") as file:
        file.seek(position)
        byte = file.read(1) or b"\0"
        file.seek(position)
        file.write(bytes([byte[0] ^ 1]))
    assert torch.equal(load(paths, tmp_path / "left"), on_disk(paths))


def test_two_that_decode_the_same_images_at_once_do_each_other_no_harm(tmp_path: Path, num_decoded: list[int]) -> None:
    paths = make_images(tmp_path / "images")
    others: list[Tensor] = []

    def join(done: int, total: int) -> None:
        if done == 10:
            others.append(load(paths, tmp_path / "cache"))

    with marks_every(4):
        images = load(paths, tmp_path / "cache", join)
        assert torch.equal(images, others[0])
        assert torch.equal(images, on_disk(paths))
        num_decoded[0] = 0
        load(paths, tmp_path / "cache")
    assert num_decoded[0] == 0


def test_an_image_that_cannot_be_decoded_leaves_no_file_that_nobody_would_go_on_with(tmp_path: Path) -> None:
    paths = make_images(tmp_path / "images")
    paths[15].write_bytes(b"hello")
    with marks_every(4), pytest.raises(DataError, match=r"015\.png: cannot be decoded"):
        cached_images(paths, image_size=8, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


# Damage


@pytest.mark.parametrize("damage", ["cut", "longer", "flipped", "foreign", "empty", "gone"])
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, damage: str) -> None:
    paths = make_images(tmp_path / "images")
    load(paths, tmp_path / "cache")
    cache = cache_file(tmp_path / "cache")
    content = cache.read_bytes()
    # A new file in its place, as the old one may still be mapped.
    cache.unlink()
    if damage != "gone":
        cache.write_bytes(
            {
                "cut": content[:-100],
                "longer": b"longer" + content,
                "flipped": content[:-1] + bytes([content[-1] ^ 1]),
                "foreign": b"no images",
                "empty": b"",
            }[damage]
        )
        later(cache)
    assert torch.equal(load(paths, tmp_path / "cache"), on_disk(paths))
    assert cache.read_bytes() == content


@pytest.mark.parametrize("text", ["", "[]", "3", "{}", '{"shape": 3}', '{"shape": [1, "a"]}', "\x00\xff"])
def test_a_cache_with_a_damaged_mark_is_rebuilt(tmp_path: Path, num_decoded: list[int], text: str) -> None:
    paths = make_images(tmp_path / "images")
    load(paths, tmp_path / "cache")
    cache_file(tmp_path / "cache").with_suffix(".json").write_text(text)
    num_decoded[0] = 0
    assert torch.equal(load(paths, tmp_path / "cache"), on_disk(paths))
    assert num_decoded[0] == 20


def test_a_copied_cache_is_checked_once_and_then_believed(
    tmp_path: Path, num_decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_images(tmp_path / "images")
    load(paths, tmp_path / "cache")
    later(cache_file(tmp_path / "cache"))
    num_decoded[0] = 0
    load(paths, tmp_path / "cache")
    monkeypatch.setattr("sparsekit.image_cache.zlib", None)
    assert torch.equal(load(paths, tmp_path / "cache"), on_disk(paths))
    assert num_decoded[0] == 0


# Room


def test_without_a_writable_cache_the_images_are_held_in_memory(tmp_path: Path) -> None:
    paths = make_images(tmp_path / "images")
    (tmp_path / "file").write_text("in the way of the cache folder")
    seen: list[int] = []
    images = load(paths, tmp_path / "file" / "cache", lambda done, total: seen.append(done))
    assert torch.equal(images, on_disk(paths))
    assert seen == list(range(1, 21))


def test_a_disk_that_turns_out_full_stops_nothing_that_memory_can_hold(tmp_path: Path) -> None:
    paths = make_images(tmp_path / "images")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 * ROW_BYTES, limits[1]))  # no file grows beyond that
    try:
        assert torch.equal(load(paths, tmp_path / "cache"), on_disk(paths))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_is_not_begun_to_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make_images(tmp_path / "images")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20 * ROW_BYTES - 1))
    assert torch.equal(load(paths, tmp_path / "cache"), on_disk(paths))
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20 * ROW_BYTES))
    load(paths, tmp_path / "cache")
    assert cache_file(tmp_path / "cache").stat().st_size == 20 * ROW_BYTES


def test_images_that_fit_neither_on_disk_nor_in_memory_are_refused_with_need_and_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = make_images(tmp_path / "images")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4321))
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    message = (
        r"cache: no room for 7,200 bytes of decoded images \(7,200 more needed, 4,321 free\), and half of the memory "
        r"is 5,000 bytes; free some or set SPARSEKIT_CACHE"
    )
    with pytest.raises(DataError, match=message) as caught:
        load(paths, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_an_interrupted_decode_needs_room_for_the_rest_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = make_images(tmp_path / "images")
    interrupted(paths, tmp_path / "cache", tmp_path / "left", after=12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=8 * ROW_BYTES))
    load(paths, tmp_path / "left")
    assert cache_file(tmp_path / "left").stat().st_size == 20 * ROW_BYTES
