"""Data sets and folders of images as a Task."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from sparsekit.data import AUGMENTATIONS, image_task, load_task, unlabelled_images
from sparsekit.errors import DataError, UsageError
from sparsekit.factory import load_factory
from sparsekit.images import ImageData, load_images
from sparsekit.task import Record, Schedule, Task


def fit(
    model: nn.Module,
    task: Task,
    schedule: Schedule,
    *,
    stage: str,
    observe: Callable[[], Record] | None = None,
) -> list[Record]:
    """A training loop that trains nothing."""
    return []


def make_folder(
    root: Path, *, sizes: tuple[tuple[int, int], ...] = ((12, 10),), suffix: str = "png", test: str = "test"
) -> Path:
    """Classes ant and bee, four training and two test images each; sizes (width, height) in turn."""
    rng = np.random.default_rng(0)
    number = 0
    for half, count in (("train", 4), (test, 2)):
        for label in ("ant", "bee"):
            (root / half / label).mkdir(parents=True)
            for index in range(count):
                width, height = sizes[number % len(sizes)]
                pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / half / label / f"{index}.{suffix}")
                number += 1
    return root


def load_folder(root: Path, cache_dir: Path, **options: float) -> ImageData:
    return load_images(f"imagefolder:{root}", cache_dir=cache_dir, **options)  # type: ignore[arg-type]


def ramp(num_images: int, *, channels: int = 1, size: int = 16) -> ImageData:
    """Images that tell which one they are: every pixel is the image's number + 1; labels alternate."""
    pixels = torch.arange(1, num_images + 1, dtype=torch.uint8).view(-1, 1, 1, 1)
    pixels = pixels.expand(-1, channels, size, size).contiguous()
    labels = torch.arange(num_images) % 2
    unit = (0.0,) * channels, (1.0,) * channels
    return ImageData("ramp", pixels, labels, pixels[:6], labels[:6], 2, *unit)


def epoch(task: Task, number: int) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*task.batches(number), strict=True)
    return torch.cat(inputs), torch.cat(targets)


def test_digits_split_into_four_fifths_and_a_fifth_with_every_class_in_its_share() -> None:
    images = load_images("digits")
    assert images.train_images.shape == (1437, 1, 8, 8)
    assert images.test_images.shape == (360, 1, 8, 8)
    assert images.train_images.dtype == torch.uint8
    assert images.train_images.max() == 255
    share = images.test_labels.bincount() / (images.test_labels.bincount() + images.train_labels.bincount())
    assert (share - 0.2).abs().max() < 0.01
    pixels = torch.cat([images.train_images, images.test_images]).double() / 255
    assert pixels.mean().item() == pytest.approx(images.mean[0], abs=1e-3)
    assert pixels.std().item() == pytest.approx(images.std[0], abs=1e-3)


def test_the_seed_alone_decides_the_split_of_digits() -> None:
    first, again, other = (load_images("digits", seed=seed).test_images for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_unknown_data_set_is_named_beside_the_nearest_known_one() -> None:
    with pytest.raises(UsageError, match="data 'cifar1': unknown; did you mean cifar10"):
        load_images("cifar1")
    with pytest.raises(UsageError, match="imagefolder:PATH"):
        load_images("imagefolder:")


@pytest.mark.parametrize("name", ["fashion-mnist", "cifar10", "cifar100"])
def test_missing_data_says_where_it_was_looked_for(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{name}.*{tmp_path}.*downloading is off"):
        load_images(name, data_root=tmp_path, download=False)


def test_a_failed_download_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(root: Path, *, train: bool, download: bool) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", unreachable)
    with pytest.raises(DataError, match=r"'cifar10': cannot be downloaded to .*no route to host"):
        load_images("cifar10", data_root=tmp_path)


def test_torchvision_arrays_become_uint8_images_with_channels_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)

    class Cifar:
        classes = ("a", "b")
        data = pixels
        targets = (0, 1, 0, 1, 1)

        def __init__(self, root: Path, *, train: bool, download: bool) -> None: ...

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Cifar)
    images = load_images("cifar10", data_root=tmp_path)
    assert torch.equal(images.train_images[3, 2], torch.from_numpy(pixels[3, :, :, 2]))
    assert images.train_labels.tolist() == [0, 1, 0, 1, 1]
    assert images.num_classes == 2


@pytest.mark.parametrize("test", ["test", "val"])
def test_images_of_one_size_keep_every_pixel(tmp_path: Path, test: str) -> None:
    root = make_folder(tmp_path / "data", test=test)
    images = load_folder(root, tmp_path / "cache")
    assert images.train_images.shape == (8, 3, 10, 12)
    assert images.train_labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert images.test_labels.tolist() == [0, 0, 1, 1]
    on_disk = np.asarray(Image.open(root / test / "bee" / "1.png")).transpose(2, 0, 1)
    assert np.array_equal(images.test_images[3].numpy(), on_disk)


def test_images_of_many_sizes_are_scaled_and_cut_to_one(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", sizes=((40, 20), (16, 24)))
    assert load_folder(root, tmp_path / "cache").train_images.shape == (8, 3, 224, 224)
    assert load_folder(root, tmp_path / "cache", image_size=9).train_images.shape == (8, 3, 9, 9)


def test_the_centre_of_the_longer_side_is_kept(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    stripes = np.zeros((8, 24, 3), dtype=np.uint8)
    stripes[:, 8:16] = 200
    Image.fromarray(stripes).save(root / "train" / "ant" / "0.png")
    assert load_folder(root, tmp_path / "cache", image_size=8).train_images[0].unique().tolist() == [200]


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
@pytest.mark.parametrize("damage", ["cut", "no image"])
@pytest.mark.parametrize("image_size", [None, 8])
def test_an_image_that_cannot_be_decoded_is_named(
    tmp_path: Path, suffix: str, damage: str, image_size: int | None
) -> None:
    root = make_folder(tmp_path / "data", sizes=((32, 32),), suffix=suffix)
    broken = root / "test" / "bee" / f"1.{suffix}"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2] if damage == "cut" else b"hello")
    with pytest.raises(DataError, match=f"{broken}: cannot be decoded"):
        load_images(f"imagefolder:{root}", cache_dir=tmp_path / "cache", image_size=image_size)


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    (root / "train" / "ant" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"gone\.png: cannot be read: No such file"):
        load_folder(root, tmp_path / "cache")


def test_a_missing_folder_half_or_class_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere/train: no such folder"):
        load_folder(tmp_path / "nowhere", tmp_path / "cache")
    root = make_folder(tmp_path / "half")
    (root / "test").rename(root / "exam")
    with pytest.raises(DataError, match="half/val: no such folder"):
        load_folder(root, tmp_path / "cache")
    root = make_folder(tmp_path / "classes")
    (root / "test" / "bee").rename(root / "test" / "bug")
    with pytest.raises(DataError, match="classes: train and test differ in the classes bee, bug"):
        load_folder(root, tmp_path / "cache")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    (tmp_path / "empty" / "test").mkdir()
    with pytest.raises(DataError, match=r"empty/train: .*class folder"):
        load_folder(tmp_path / "empty", tmp_path / "cache")


def test_training_and_test_images_of_different_sizes_need_an_image_size(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    for path in (root / "test").rglob("*.png"):
        Image.new("RGB", (9, 8)).save(path)
    with pytest.raises(DataError, match="data: images are 12x10 to train and 9x8 to test; give one image size"):
        load_folder(root, tmp_path / "cache")
    assert load_folder(root, tmp_path / "cache", image_size=8).test_images.shape == (4, 3, 8, 8)


@pytest.mark.parametrize("options", [{"image_size": 0}, {"crop_pct": 0}, {"crop_pct": 1.5}], ids=str)
def test_a_size_or_share_that_no_image_can_have_is_refused(tmp_path: Path, options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=r"image size 0: must be at least 1|crop_pct [01.5]+: must be in \(0, 1\]"):
        load_folder(tmp_path, tmp_path, **options)


@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.7])
def test_images_are_resized_and_cut_as_torchvision_does_training_images_without_a_border(
    tmp_path: Path, crop_pct: float
) -> None:
    sizes = ((500, 375), (333, 500), (224, 224), (256, 301), (17, 90), (641, 239))
    root = make_folder(tmp_path / "data", sizes=sizes)
    images = load_images(f"imagefolder:{root}", cache_dir=tmp_path / "cache", image_size=224, crop_pct=crop_pct)

    def expected(half: str, shorter: int) -> Tensor:
        pipeline = transforms.Compose(
            [transforms.Resize(shorter), transforms.CenterCrop(224), transforms.PILToTensor()]
        )
        return torch.stack([pipeline(Image.open(path)) for path in sorted((root / half).rglob("*.png"))])

    assert torch.equal(images.train_images, expected("train", 224))
    assert torch.equal(images.test_images, expected("test", {1.0: 224, 0.875: 256, 0.7: 320}[crop_pct]))


def test_an_epoch_holds_every_image_once_with_its_own_label() -> None:
    task = image_task(ramp(11), batch_size=4, augment=(), fit=fit)
    inputs, targets = epoch(task, 0)
    numbers = (inputs[:, 0, 0, 0] * 255).round().long() - 1
    assert numbers.sort().values.tolist() == list(range(11))
    assert numbers.tolist() != list(range(11))
    assert torch.equal(targets, numbers % 2)


@pytest.mark.parametrize(("num_images", "sizes"), [(8, [4, 4]), (9, [4, 4]), (10, [4, 4, 2]), (3, [3])])
def test_the_last_partial_batch_stays_unless_it_is_one_image(num_images: int, sizes: list[int]) -> None:
    task = image_task(ramp(num_images), batch_size=4, fit=fit)
    assert [len(targets) for _, targets in task.batches(0)] == sizes
    assert task.num_batches == len(sizes)


def test_batches_depend_on_seed_and_epoch_alone_and_leave_the_global_generator_alone() -> None:
    images = ramp(40)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, _ = epoch(image_task(images, seed=3, fit=fit), 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, _ = epoch(image_task(images, seed=3, fit=fit), 5)
    assert torch.equal(first, again)
    assert not torch.equal(first, epoch(image_task(images, seed=3, fit=fit), 6)[0])
    assert not torch.equal(first, epoch(image_task(images, seed=4, fit=fit), 5)[0])
    # Seeds that agree in their low 32 bits are still different seeds.
    assert not torch.equal(first, epoch(image_task(images, seed=3 + 2**32, fit=fit), 5)[0])


def test_every_image_is_shifted_on_its_own_by_at_most_an_eighth_each_way() -> None:
    # A single bright pixel in the middle shows where each crop was taken.
    pixels = torch.zeros(600, 1, 16, 16, dtype=torch.uint8)
    pixels[:, :, 8, 8] = 255
    labels = torch.zeros(600, dtype=torch.int64)
    images = ImageData("dot", pixels, labels, pixels, labels, 1, (0.0,), (1.0,), flip=False)
    inputs, _ = next(iter(image_task(images, batch_size=600, fit=fit).batches(0)))
    _, _, rows, columns = inputs.nonzero(as_tuple=True)
    assert len(rows) == 600
    assert set(zip(rows.tolist(), columns.tolist(), strict=True)) == {
        (row, column) for row in range(6, 11) for column in range(6, 11)
    }


@pytest.mark.parametrize("flip", [True, False])
def test_half_of_the_images_are_mirrored_where_a_mirror_keeps_the_label(flip: bool) -> None:
    # 7 pixels are too few to shift by an eighth, so mirroring is all that can happen.
    pixels = torch.zeros(400, 1, 7, 7, dtype=torch.uint8)
    pixels[:, :, :, 0] = 255
    labels = torch.zeros(400, dtype=torch.int64)
    images = ImageData("edge", pixels, labels, pixels, labels, 1, (0.0,), (1.0,), flip=flip)
    inputs, _ = next(iter(image_task(images, batch_size=400, fit=fit).batches(0)))
    mirrored = inputs[:, 0, :, 6].all(dim=1)
    assert torch.equal(inputs[~mirrored][:, 0, :, 0], torch.ones(int((~mirrored).sum()), 7))
    assert 150 < mirrored.sum() < 250 if flip else not mirrored.any()


def test_augmentation_changes_neither_the_data_nor_the_test_images() -> None:
    images = ramp(20, channels=3)
    before = images.train_images.clone()
    task = image_task(images, fit=fit)
    epoch(task, 0)
    assert torch.equal(images.train_images, before)
    assert torch.equal(task.example_inputs[0], images.test_images[:2] / 255)


def test_inputs_are_normalised_per_channel() -> None:
    images = replace(ramp(4, channels=2), mean=(0.5, 0.25), std=(0.5, 0.125))
    (example,) = image_task(images, fit=fit).example_inputs
    pixels = images.test_images[:2] / 255
    expected = torch.stack([(pixels[:, 0] - 0.5) / 0.5, (pixels[:, 1] - 0.25) / 0.125], dim=1)
    assert example.dtype == torch.float32
    torch.testing.assert_close(example, expected)


def test_a_limit_trains_on_the_same_images_each_epoch_with_every_class_in_its_share() -> None:
    images = replace(ramp(100), train_labels=(torch.arange(100) >= 80).long())
    task = image_task(images, augment=(), limit=20, fit=fit)
    (first, targets), (second, _) = epoch(task, 0), epoch(task, 1)
    assert targets.bincount().tolist() == [16, 4]
    chosen = first[:, 0, 0, 0].sort().values
    assert torch.equal(chosen, second[:, 0, 0, 0].sort().values)
    assert len(chosen.unique()) == 20
    other, _ = epoch(image_task(images, augment=(), limit=20, seed=1, fit=fit), 0)
    assert not torch.equal(chosen, other[:, 0, 0, 0].sort().values)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"limit": 1}])
def test_too_few_images_to_train_on_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="at least 2"):
        image_task(ramp(4), fit=fit, **options)  # type: ignore[arg-type]


def noise(num_images: int, *, channels: int = 3, size: int = 16, flip: bool = True) -> ImageData:
    """Random images whose labels alternate between two of three classes."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(1, 256, (num_images, channels, size, size), dtype=torch.uint8, generator=generator)
    labels = torch.arange(num_images) % 2
    unit = (0.0,) * channels, (1.0,) * channels
    return ImageData("noise", pixels, labels, pixels[:6], labels[:6], 3, *unit, flip=flip)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_augmentation_depends_on_seed_and_epoch_alone_and_leaves_the_global_generator_alone(name: str) -> None:
    images = noise(40)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, targets = epoch(image_task(images, augment=[name], batch_size=20, fit=fit), 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, same_targets = epoch(image_task(images, augment=[name], batch_size=20, fit=fit), 5)
    assert torch.equal(first, again)
    assert torch.equal(targets, same_targets)
    plain, _ = epoch(image_task(images, augment=(), batch_size=20, fit=fit), 5)
    assert first.shape == plain.shape
    assert not torch.equal(first, plain)


@pytest.mark.parametrize("name", ["crop", "trivial", "erase"])
def test_every_image_is_changed_on_its_own(name: str) -> None:
    one = noise(1).train_images.expand(60, -1, -1, -1)
    images = replace(noise(60), train_images=one)
    inputs, _ = epoch(image_task(images, augment=[name], batch_size=30, fit=fit), 0)
    num_versions = len({image.numpy().tobytes() for image in inputs})
    # About six of sixty are erased, each elsewhere; the others stay the one image they all are. Some of what
    # TrivialAugment does is nothing, or the same twice.
    least, most = {"crop": (55, 60), "trivial": (25, 60), "erase": (3, 15)}[name]
    assert least <= num_versions <= most


def test_erased_rectangles_have_the_mean_colour_and_the_rest_stays() -> None:
    images = noise(60)
    (plain, _), (inputs, _) = (
        epoch(image_task(images, augment=names, batch_size=60, fit=fit), 0) for names in ((), ("erase",))
    )
    changed = inputs != plain
    assert changed.any()
    assert (inputs[changed] == 0).all()


def test_a_crop_shows_a_part_of_its_image_magnified() -> None:
    # A ramp from left to right: any part of it is a ramp between two of its values.
    row = torch.arange(16, dtype=torch.uint8) * 16
    pixels = row.expand(50, 1, 16, 16).contiguous()
    images = ImageData("ramp", pixels, torch.zeros(50).long(), pixels, torch.zeros(50).long(), 1, (0.0,), (1.0,))
    inputs, _ = epoch(image_task(images, augment=["crop"], batch_size=50, fit=fit), 0)
    assert (inputs[..., 1:] >= inputs[..., :-1]).all()
    assert (inputs[:, :, 1:] == inputs[:, :, :-1]).all()
    assert (inputs * 255).round().amax() == 240
    assert len((inputs[:, 0, 0, -1] - inputs[:, 0, 0, 0]).unique()) > 5


@pytest.mark.parametrize("names", [["mixup"], ["cutmix"], ["mixup", "cutmix"]], ids="+".join)
def test_mixed_images_have_class_shares_as_targets_and_the_loss_takes_them(names: list[str]) -> None:
    task = image_task(noise(40), augment=names, batch_size=8, fit=fit)
    for inputs, targets in task.batches(0):
        assert (targets.shape, targets.dtype) == ((8, 3), torch.float32)
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        assert not targets[:, 2].any()
        logits = inputs.flatten(1)[:, :3]
        expected = -(targets * logits.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(task.loss(logits, targets, 0.0), expected)


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_the_targets_of_a_mix_are_the_shares_of_the_images_in_it(name: str) -> None:
    # White images are class 0, black ones class 1, so that brightness tells the share.
    labels = torch.arange(40) % 2
    pixels = ((1 - labels) * 255).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 16, 16).contiguous()
    images = ImageData("black and white", pixels, labels, pixels, labels, 2, (0.0,), (1.0,))
    inputs, targets = epoch(image_task(images, augment=[name], batch_size=8, fit=fit), 0)
    torch.testing.assert_close(inputs.mean((1, 2, 3)), targets[:, 0])
    assert ((targets > 0) & (targets < 1)).any()


def test_where_both_mixes_are_given_each_batch_has_one_of_them() -> None:
    batches = image_task(noise(400), augment=["mixup", "cutmix"], batch_size=8, fit=fit).batches(0)
    # A cut pixel is one of an image, a whole number of 255ths.
    cut = [bool(((inputs * 255).frac() - 0.5).abs().min() > 0.49) for inputs, _ in batches]
    assert 15 < sum(cut) < 35


def test_training_on_mixed_images_records_no_accuracy() -> None:
    images = noise(16, channels=1, size=8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    task = image_task(images, augment=["mixup"], batch_size=8)
    (record,) = task.fit(model, task, Schedule(1), stage="dense")
    assert "train_accuracy" not in record
    assert record["loss"] > 0


def test_augmentations_are_applied_in_one_order_whatever_the_order_given() -> None:
    first, _ = epoch(image_task(noise(20), augment=("flip", "trivial", "shift"), fit=fit), 0)
    second, _ = epoch(image_task(noise(20), augment=("shift", "trivial", "flip"), fit=fit), 0)
    assert torch.equal(first, second)


def test_an_unknown_augmentation_is_named() -> None:
    with pytest.raises(UsageError, match="augment 'mixupp': unknown; did you mean mixup"):
        image_task(noise(4), augment=["mixupp"], fit=fit)


class ReadsNumber(nn.Module):
    """Answers class 1 for images whose number is at most `limit`; refuses to be in training mode."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = nn.Parameter(torch.tensor(float(limit)))
        self.frozen = nn.BatchNorm2d(1).eval()

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training
        assert not torch.is_grad_enabled()
        number = (x[:, 0, 0, 0] * 255).round() - 1
        return torch.stack([number - self.limit, self.limit - number + 0.5], dim=1)


def test_accuracy_is_the_share_of_test_images_classified_right_and_the_mode_stays_as_it_was() -> None:
    task = image_task(ramp(10), fit=fit)
    model = ReadsNumber(0)
    # Test images 0 to 5 have labels 0 1 0 1 0 1; the model answers 1 0 0 0 0 0.
    assert task.evaluate(model) == 2 / 6
    assert model.training
    assert not model.frozen.training


def test_accuracy_counts_every_image_across_batches() -> None:
    images = ramp(10)
    many = replace(images, test_images=images.test_images.repeat(200, 1, 1, 1), test_labels=torch.ones(1200).long())
    assert image_task(many, fit=fit).evaluate(ReadsNumber(2)) == 600 / 1200


def test_the_mode_comes_back_even_when_the_network_fails() -> None:
    model = nn.Sequential(nn.Conv2d(5, 5, 1))
    with pytest.raises(RuntimeError, match="channels"):
        image_task(ramp(4), fit=fit).evaluate(model)
    assert model.training


def test_the_loss_is_cross_entropy_with_smoothed_labels() -> None:
    output, target = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([0])
    log_probabilities = output.log_softmax(1)[0]
    expected = -(0.9 * log_probabilities[0] + 0.1 * log_probabilities.mean())
    torch.testing.assert_close(image_task(ramp(4), fit=fit).loss(output, target, 0.1), expected)


USER_FILE = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from sparsekit.task import Task

@dataclass
class Options:
    size: int = 3

def factory():
    x = torch.zeros(2, Options().size)
    return Task((x,), lambda epoch: [], 0, lambda *_: x.sum(), lambda model: 0.5, None, name="mine")

def wrong():
    return 3

value = 1
"""


def test_a_file_of_the_user_gives_its_task_and_leaves_the_search_path_alone(tmp_path: Path) -> None:
    file = tmp_path / "json.py"  # the name of a module that must not be shadowed
    file.write_text(USER_FILE)
    path = list(sys.path)
    module = sys.modules.get("json")
    assert load_task(f"{file}:factory").name == "mine"
    assert sys.path == path
    assert sys.modules.get("json") is module
    assert load_factory(f"{file}:wrong")() == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("user.py:factoy", "no function 'factoy' in .*user.py; did you mean factory"),
        ("user.py:value", "no function 'value'"),
        ("user.py:wrong", "expected the factory to return a sparsekit.Task, got int"),
        ("gone.py:factory", "'gone.py' is no Python file"),
        ("user.py", r"expected path/to/file\.py:factory"),
        ("broken.py:factory", "broken.py: cannot be imported: invalid syntax"),
        ("needy.py:factory", "needy.py: cannot be imported: No module named 'no_such_module'"),
    ],
)
def test_a_wrong_file_or_factory_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("user.py").write_text(USER_FILE)
    Path("broken.py").write_text("def factory(: pass")
    Path("needy.py").write_text("import no_such_module")
    with pytest.raises(DataError, match=message):
        load_task(spec)


def test_unlabelled_images_are_drawn_from_all_folders_and_normalised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "cache"))
    folder = make_folder(tmp_path / "images")
    spec = f"imagefolder:{folder}"
    all_images = unlabelled_images(spec, image_size=8, num_images=100)
    assert all_images.shape == (12, 3, 8, 8)  # train and test, ant and bee
    some = unlabelled_images(spec, image_size=8, num_images=5)
    assert torch.equal(some, unlabelled_images(spec, image_size=8, num_images=5))
    assert not torch.equal(some, unlabelled_images(spec, image_size=8, num_images=5, crop_pct=0.5))
    assert not torch.equal(some, unlabelled_images(spec, image_size=8, num_images=5, seed=1))
    assert all(any(torch.equal(image, other) for other in all_images) for image in some)
    labelled = load_images(spec, image_size=8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (labelled.mean, labelled.std))
    expected = (labelled.train_images / 255 - mean) / std
    assert all(any(torch.allclose(image, other, atol=1e-5) for other in all_images) for image in expected)


def test_what_is_no_folder_of_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="calibrate 'cifar10': expected imagefolder:PATH"):
        unlabelled_images("cifar10", image_size=8, num_images=5)
    with pytest.raises(DataError, match="missing: no such folder"):
        unlabelled_images(f"imagefolder:{tmp_path}/missing", image_size=8, num_images=5)
    with pytest.raises(DataError, match="holds no images"):
        unlabelled_images(f"imagefolder:{tmp_path}", image_size=8, num_images=5)
