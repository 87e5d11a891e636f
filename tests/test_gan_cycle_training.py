"""Two generators that undo each other: they learn to, repeat, resume, and can be pruned one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsekit import Budget, compact
from sparsekit.errors import DataError, QualityError
from sparsekit.gan.channel_pruning import ChannelPruning
from sparsekit.gan.cycle_training import CycleGan, train_cycle
from sparsekit.gan.schedule import SCHEDULES
from sparsekit.models.gan_cyclegan import CycleGANGenerator
from tests.test_gan_training import bits, same

TINY = replace(SCHEDULES["cyclegan"], epochs=2, batch_size=4, generator_batch_size=4)


class Judge(nn.Sequential):
    """A patch discriminator for images of 8 pixels."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4), nn.Flatten(0))


def tiny() -> CycleGan:
    torch.manual_seed(0)
    to_b, to_a = (CycleGANGenerator(ch=8, num_blocks=1, image_channels=1) for _ in range(2))
    return CycleGan(to_b, to_a, Judge(), Judge())


def kinds() -> tuple[Tensor, Tensor]:
    """Twelve dark images and nine bright ones."""
    rng = torch.Generator().manual_seed(0)
    dark = torch.randint(128, (12, 1, 8, 8), generator=rng, dtype=torch.uint8)
    return dark, torch.randint(128, 256, (9, 1, 8, 8), generator=rng).to(torch.uint8)


def networks(gan: CycleGan) -> tuple[nn.Module, ...]:
    return gan.to_b, gan.to_a, gan.judge_a, gan.judge_b


def test_all_four_networks_learn_and_every_loss_is_recorded() -> None:
    gan = tiny()
    before = [bits(network) for network in networks(gan)]
    result = train_cycle(gan, *kinds(), TINY)
    assert not any(same(bits(network), old) for network, old in zip(networks(gan), before, strict=True))
    names = {"generator_loss", "discriminator_loss", "cycle_loss", "identity_loss", "variance_ratio", "sample_variance"}
    assert names < set(result.history[0])
    assert same(bits(result.average), bits(gan.to_b))  # CycleGAN averages nothing


def test_the_way_there_and_back_gets_shorter() -> None:
    history = train_cycle(tiny(), *kinds(), replace(TINY, epochs=12, generator_lr=2e-3)).history
    assert history[-1]["cycle_loss"] < 0.7 * history[0]["cycle_loss"]
    assert history[-1]["identity_loss"] < 0.7 * history[0]["identity_loss"]


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, cut, fresh = tiny(), tiny(), tiny()
    schedule = replace(TINY, epochs=3)
    train_cycle(whole, *kinds(), schedule, num_replayed=3)

    def kill(stage: str, done: int, total: int, record: dict[str, float]) -> None:
        if done == total - 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train_cycle(cut, *kinds(), schedule, num_replayed=3, checkpoint_dir=tmp_path, progress=kill)
    train_cycle(fresh, *kinds(), schedule, num_replayed=3, checkpoint_dir=tmp_path)
    assert same(bits(*networks(fresh)), bits(*networks(whole)))


def test_a_generator_of_one_image_stops_the_training() -> None:
    gan = tiny()
    with torch.no_grad():
        gan.to_a.get_parameter(last_weight(gan.to_a)).zero_()
    with pytest.raises(QualityError, match="dense: epoch 2: the generator collapsed"):
        train_cycle(gan, *kinds(), replace(TINY, generator_lr=0.0))


def last_weight(generator: nn.Module) -> str:
    return [name for name, parameter in generator.named_parameters() if parameter.dim() == 4][-1]


def test_one_way_is_pruned_and_trained_on_with_the_way_back() -> None:
    gan, (a, b) = tiny(), kinds()
    train_cycle(gan, a, b, TINY)
    options = ChannelPruning(epochs=1, batch_size=4, distillation_weight=0.0)
    slimmed = options(gan.one_way(a), b, Budget.parse("macs<=0.5x"), TINY)
    small = compact(slimmed.generator, slimmed.plan)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in gan.to_b.parameters())
    history = train_cycle(replace(gan, to_b=small), a, b, TINY, stage="retrain").history
    assert len(history) == 2


def test_kinds_without_images_are_refused() -> None:
    a, b = kinds()
    with pytest.raises(DataError, match="needs at least 2 images of each kind, got 12 and 1"):
        train_cycle(tiny(), a, b[:1], TINY)
