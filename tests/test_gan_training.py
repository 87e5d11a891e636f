"""Adversarial training: every GAN trains, repeats, resumes bit for bit, and stops where it diverges."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sparsekit.errors import DataError, QualityError, UsageError
from sparsekit.gan.game import Gan, Noise, Sources, build_gan
from sparsekit.gan.grids import from_bytes
from sparsekit.gan.loop import Epochs, Losses, Players, play
from sparsekit.gan.schedule import DECAYS, SCHEDULES, GanSchedule
from sparsekit.gan.training import Additions, Trained, picture_writer, train
from sparsekit.models import GANS

NAMES = sorted(set(SCHEDULES) - {"cyclegan"})
TINY = GanSchedule(epochs=2, batch_size=16, generator_batch_size=8, num_critic_steps=2, average_decay=0.5)


def reals(count: int = 40) -> tuple[Tensor, Tensor]:
    """Seeded 8x8 images, and classes."""
    rng = torch.Generator().manual_seed(3)
    return torch.randint(256, (count, 1, 8, 8), generator=rng, dtype=torch.uint8), torch.arange(count) % 3


def tiny(name: str = "sngan", *, ch: int = 8) -> Gan:
    torch.manual_seed(0)
    return build_gan(name, image_size=8, image_channels=1, num_classes=3, z=8, ch=ch, discriminator_ch=8)


def trained(gan: Gan, schedule: GanSchedule = TINY, **options: Path) -> Trained:
    images, labels = reals()
    return train(gan, images, schedule, labels=labels, **options)  # type: ignore[arg-type]


def bits(*networks: nn.Module) -> list[Tensor]:
    return [value.clone() for network in networks for value in network.state_dict().values()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_every_gan_has_a_schedule() -> None:
    assert set(SCHEDULES) == {name.rpartition("_")[0] for name in GANS}


@pytest.mark.parametrize("name", NAMES)
def test_every_gan_trains_both_networks_and_says_how(name: str) -> None:
    gan = tiny(name)
    before = bits(gan.generator), bits(gan.discriminator)
    schedule = replace(SCHEDULES[name], epochs=1, batch_size=16, generator_batch_size=8)
    result = trained(gan, schedule)
    for network, old in zip((gan.generator, gan.discriminator), before, strict=True):
        moved = [not torch.equal(a, b) for a, b in zip(bits(network), old, strict=True)]
        assert sum(moved) > len(moved) / 2
    (record,) = result.history
    assert {"epoch", "discriminator_loss", "generator_loss", "sample_variance", "variance_ratio"} <= set(record)
    assert not result.average.training
    assert gan.generator.training


def test_training_repeats_with_the_seed_and_leaves_torchs_random_state() -> None:
    gans = [tiny() for _ in range(3)]
    state = torch.get_rng_state()
    results = [trained(gan, replace(TINY, seed=seed)) for gan, seed in zip(gans, (0, 0, 1), strict=True)]
    assert torch.equal(torch.get_rng_state(), state)
    first, again, other = (bits(result.average, gan.discriminator) for result, gan in zip(results, gans, strict=True))
    assert same(first, again)
    assert not same(first, other)


@pytest.mark.parametrize("name", ["sngan", "biggan"])
def test_an_interrupted_run_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    whole, cut = tiny(name), tiny(name)
    schedule = replace(TINY, epochs=3, decay="linear")
    expected = trained(whole, schedule, checkpoint_dir=tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(stage: str, done: int, total: int, record: dict[str, float]) -> None:
        if done == total - 1:
            raise Killed

    with pytest.raises(Killed):
        trained(cut, schedule, checkpoint_dir=tmp_path / "cut", progress=kill)  # type: ignore[arg-type]
    fresh = tiny(name)
    resumed = trained(fresh, schedule, checkpoint_dir=tmp_path / "cut")
    assert same(bits(resumed.average, *parts(fresh)), bits(expected.average, *parts(whole)))
    strip = [{key: value for key, value in row.items() if key != "seconds"} for row in resumed.history]
    assert strip == [{key: value for key, value in row.items() if key != "seconds"} for row in expected.history]
    # A finished one returns at once.
    again = trained(tiny(name), schedule, checkpoint_dir=tmp_path / "cut")
    assert same(bits(again.average), bits(expected.average))


def parts(gan: Gan) -> tuple[nn.Module, nn.Module]:
    return gan.generator, gan.discriminator


def test_a_checkpoint_of_another_schedule_is_refused(tmp_path: Path) -> None:
    trained(tiny(), checkpoint_dir=tmp_path)
    with pytest.raises(DataError, match=r"dense.ckpt: checkpoint of another run"):
        trained(tiny(), replace(TINY, generator_lr=1e-3), checkpoint_dir=tmp_path)


def test_the_generator_steps_with_every_nth_batch_from_the_first_on() -> None:
    calls: list[int] = []
    images, labels = reals(50)  # batches of 16: three, and one of two images
    additions = Additions(after_generator_step=lambda generator: calls.append(1))
    train(tiny(), images, replace(TINY, epochs=1, num_critic_steps=3), labels=labels, additions=additions)
    assert len(calls) == 2


def test_the_discriminators_step_leaves_the_generators_weights_alone() -> None:
    gan = tiny()
    before = [parameter.clone() for parameter in gan.generator.parameters()]
    trained(gan, replace(TINY, epochs=1, generator_lr=0.0))
    assert same([parameter.detach() for parameter in gan.generator.parameters()], before)


def test_a_term_of_the_generator_reaches_the_generator_only() -> None:
    term = Additions(generator_term=lambda inputs, fakes: 1e3 * fakes.square().mean())
    images, labels = reals()
    plain, pulled = tiny(), tiny()
    schedule = replace(TINY, epochs=6, generator_lr=1e-2, discriminator_lr=0.0, average_decay=0.0)
    results = [
        train(gan, images, schedule, labels=labels, additions=additions)
        for gan, additions in ((plain, None), (pulled, term))
    ]
    inputs = Noise(8)(64)
    sizes = [float(result.average(*inputs).square().mean()) for result in results]
    assert sizes[1] < 0.2 * sizes[0]
    assert same(
        [p.detach() for p in plain.discriminator.parameters()], [p.detach() for p in tiny().discriminator.parameters()]
    )
    assert "added_loss" in results[1].history[0]


def test_an_infinite_loss_stops_with_one_line_and_the_last_good_state(tmp_path: Path) -> None:
    good = tiny()
    trained(good, replace(TINY, epochs=1), checkpoint_dir=tmp_path / "good")
    gan, epochs = tiny(), iter(range(100))

    def poison(inputs: tuple[Tensor, ...], fakes: Tensor) -> Tensor:
        return fakes.sum() * (float("nan") if next(epochs) >= 2 else 0.0)  # two steps of the generator an epoch

    images, labels = reals()
    with pytest.raises(
        QualityError,
        match=r"dense: epoch 2: the added loss became nan; the state after epoch 1 is kept in .*dense.ckpt",
    ) as info:
        train(
            gan,
            images,
            TINY,
            labels=labels,
            additions=Additions(generator_term=poison),
            checkpoint_dir=tmp_path,
        )
    assert "\n" not in str(info.value)
    assert same(bits(*parts(gan)), bits(*parts(good)))


class Constant(nn.Module):
    """One image for all noise."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Parameter(torch.zeros(1, 1, 8, 8))

    def forward(self, z: Tensor) -> Tensor:
        return self.image.expand(len(z), -1, -1, -1)


def test_a_collapsed_generator_stops_the_training() -> None:
    gan = Gan(Constant(), tiny().discriminator, Noise(8))
    with pytest.raises(QualityError, match=r"dense: epoch 2: the generator collapsed, its images vary 0.0% as much"):
        trained(gan, replace(TINY, epochs=5))


def test_one_epoch_of_little_variance_is_forgiven_but_never_kept(tmp_path: Path) -> None:
    network = nn.Linear(1, 1)
    ratios = [1.0, 0.001, 0.5, 0.001, 0.002]
    players = Players(nn.ModuleDict({"network": network}), {})

    def steps(epoch: int) -> Iterator[Losses]:
        nn.init.constant_(network.bias, epoch + 1)
        yield {"loss": torch.zeros(())}

    with pytest.raises(QualityError, match=r"epoch 5: the generator collapsed.*; the state after epoch 3 is kept"):
        play(
            players,
            Epochs("dense", 9, 1, 0, {}),
            steps,
            lambda epoch: {"variance_ratio": ratios[epoch]},
            checkpoint_dir=tmp_path,
        )
    assert network.bias.item() == 3


def test_pictures_of_the_same_noise_are_written_every_epoch(tmp_path: Path) -> None:
    images, labels = reals()
    train(tiny(), images, TINY, labels=labels, observe=picture_writer(tmp_path / "samples", Noise(8)(6), columns=3))
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["epoch-0001.png", "epoch-0002.png"]
    with Image.open(tmp_path / "samples" / "epoch-0001.png") as picture:
        assert picture.size == (32, 22)


def test_learning_rates_fall_by_the_epoch() -> None:
    assert [DECAYS["linear"](n / 4) for n in range(4)] == [1, 1, 1, 0.5]
    assert [DECAYS["steps"](n / 4) for n in range(4)] == pytest.approx([1, 1, 0.1, 0.01])
    network = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=2.0)
    seen: list[float] = []

    def steps(epoch: int) -> Iterator[Losses]:
        seen.append(optimizer.param_groups[0]["lr"])
        yield {}

    play(Players(nn.ModuleDict(), {"only": (optimizer, "steps")}), Epochs("x", 8, 1, 0, {}), steps, lambda epoch: {})
    assert seen == pytest.approx([2, 2, 2, 2, 0.2, 0.2, 0.02, 0.02])


def test_a_generator_may_read_images() -> None:
    images, _ = reals()
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1), nn.Tanh()
    )
    gan = Gan(generator, tiny().discriminator, Sources(images))
    result = train(gan, images.flip(3), replace(TINY, loss="least_squares"))
    assert len(result.history) == 2


def test_labels_are_asked_for_where_they_are_needed() -> None:
    with pytest.raises(DataError, match="dense: the discriminator needs labels"):
        train(tiny("projgan"), reals()[0], TINY)


def test_unknown_names_and_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="model 'sngam': no such GAN; did you mean sngan"):
        tiny("sngam")
    with pytest.raises(UsageError, match="model 'sngan': image size must be"):
        build_gan("sngan", image_size=9, image_channels=1, num_classes=3)
    with pytest.raises(UsageError, match="two generators"):
        tiny("cyclegan")
    with pytest.raises(UsageError, match="loss 'hing': unknown; did you mean hinge"):
        GanSchedule(epochs=1, loss="hing")
    with pytest.raises(UsageError, match="num_critic_steps must be at least 1, got 0"):
        GanSchedule(epochs=1, num_critic_steps=0)


PLAIN = Noise(8)


class Linear(nn.Module):
    """A critic that weighs every pixel alike, says every class is as likely, and keeps what it is shown."""

    def __init__(self, *, num_classes: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((64,), 0.5))  # a slope of 4
        self.num_classes = num_classes
        self.seen: list[Tensor] = []

    def forward(self, images: Tensor) -> Any:
        self.seen.append(images.detach().clone())
        logits = images.flatten(1) @ self.weight
        return (logits, torch.zeros(len(images), self.num_classes)) if self.num_classes else logits


def judged(critic: Linear, schedule: GanSchedule, draw: Noise = PLAIN) -> Trained:
    """Training in which nothing moves; one batch an epoch."""
    torch.manual_seed(0)
    generator = Labelled() if draw.num_classes else tiny().generator
    gan = Gan(generator, critic, draw, names_labels=critic.num_classes > 0)
    images, labels = reals(16)
    still = replace(schedule, generator_lr=0.0, discriminator_lr=0.0)
    return train(gan, images, still, labels=labels)


class Labelled(nn.Module):
    """A generator that is given labels."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = tiny().generator

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        images: Tensor = self.generator(z)
        return images


ONE = replace(TINY, epochs=1, loss="wasserstein")


def test_the_gradient_penalty_joins_the_discriminators_loss() -> None:
    plain, bound = (judged(Linear(), replace(ONE, penalty_weight=weight)).history[0] for weight in (0.0, 10.0))
    assert bound["discriminator_loss"] - plain["discriminator_loss"] == pytest.approx(10 * (4 - 1) ** 2, rel=1e-4)


def test_class_terms_of_real_and_fake_join_both_losses() -> None:
    without, with_classes = (judged(Linear(num_classes=n), ONE, Noise(8, 3)).history[0] for n in (0, 3))
    of_classes = float(torch.log(torch.tensor(3.0)))
    assert with_classes["discriminator_loss"] - without["discriminator_loss"] == pytest.approx(2 * of_classes, rel=1e-4)
    assert with_classes["generator_loss"] - without["generator_loss"] == pytest.approx(of_classes, rel=1e-4)


def test_all_that_the_discriminator_sees_is_augmented() -> None:
    critic = Linear()
    judged(critic, replace(ONE, augment=("cutout",)))
    assert len(critic.seen) == 3  # real and generated images, and those of the generator's step
    assert all((images == 0).any(dim=1).flatten(1).any(dim=1).all() for images in critic.seen)


@pytest.mark.parametrize("flip", [False, True])
def test_half_of_the_real_images_are_mirrored_where_the_schedule_says_so(flip: bool) -> None:
    critic = Linear()
    judged(critic, replace(ONE, flip=flip, epochs=20))
    known = {tuple(image.flatten().tolist()) for image in from_bytes(reals(16)[0])}
    every = [tuple(image.flatten().tolist()) in known for batch in critic.seen for image in batch]
    # Twenty epochs of sixteen: 320 real images, binomial; four standard deviations are 36.
    assert (abs(sum(every) - 160) < 36) if flip else sum(every) == 320


def test_every_epoch_has_an_order_of_its_own() -> None:
    critic = Linear()
    judged(critic, replace(ONE, epochs=2, num_critic_steps=1))
    first, second = critic.seen[0], critic.seen[3]
    assert not torch.equal(first, second)
    assert torch.equal(first.flatten(1).sum(1).sort().values, second.flatten(1).sum(1).sort().values)


@pytest.mark.parametrize(("start", "follows"), [(0, False), (100, True)])
def test_the_average_follows_without_delay_before_it_starts(start: int, follows: bool) -> None:
    gan = tiny()
    result = trained(gan, replace(TINY, average_start=start))
    states = zip(result.average.parameters(), gan.generator.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in states) == follows
