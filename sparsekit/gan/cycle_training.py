"""train_cycle(gan, images_a, images_b, schedule): two generators that undo each other, each with its discriminator.

Source: Zhu et al. 2017, arXiv:1703.10593: adversarial, cycle and identity losses; discriminators see images from a
buffer of 50.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsekit.errors import DataError
from sparsekit.fabric import seeded
from sparsekit.gan.averaging import averaged, update_average
from sparsekit.gan.game import Gan, Sources, build_part
from sparsekit.gan.grids import from_bytes
from sparsekit.gan.loop import Epochs, Losses, Observe, Players, play, training_place
from sparsekit.gan.losses import LOSSES, cycle_term, identity_term
from sparsekit.gan.replay import ReplayBuffer
from sparsekit.gan.schedule import GanSchedule
from sparsekit.gan.training import NUM_WATCHED, Trained, adam, batches, num_batches, real_batch, variance
from sparsekit.task import Progress, Record


@dataclass(frozen=True, eq=False)
class CycleGan:
    """Two kinds of images, A and B, and what turns each into the other.

    Attributes:
        to_b: images of A in [-1, 1] -> images like those of B.
        to_a: the way back.
        judge_a: images -> logits [N], higher for real images of A.
        judge_b: likewise, of B.
    """

    to_b: nn.Module
    to_a: nn.Module
    judge_a: nn.Module
    judge_b: nn.Module

    def one_way(self, images_a: Tensor) -> Gan:
        """From A to B alone, as a GAN whose channels can be pruned: inputs are drawn from uint8 `images_a`."""
        return Gan(self.to_b, self.judge_b, Sources(images_a))


def build_cycle_gan(
    *, image_channels: int, ch: int | None = None, discriminator_ch: int | None = None, num_blocks: int | None = None
) -> CycleGan:
    """CycleGAN's four networks, freshly initialised from torch's random state; sizes that are None are its own."""
    sizes = {"image_channels": image_channels, "num_blocks": num_blocks}
    to_b, to_a = (build_part("cyclegan_generator", sizes | {"ch": ch}) for _ in range(2))
    judges = (build_part("cyclegan_discriminator", sizes | {"ch": discriminator_ch}) for _ in range(2))
    return CycleGan(to_b, to_a, *judges)


def train_cycle(
    gan: CycleGan,
    images_a: Tensor,
    images_b: Tensor,
    schedule: GanSchedule,
    *,
    stage: str = "dense",
    num_replayed: int = 50,
    observe: Observe | None = None,
    checkpoint_dir: Path | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train all four networks in place, on the GPU if there is one; they come back to the CPU.

    An epoch has as many steps as the larger kind has batches; of the smaller one images come again. The discriminators
    step with every batch, the generators with every `num_critic_steps`-th.

    Args:
        gan: the networks.
        images_a: uint8 [N, C, H, W].
        images_b: uint8 [M, C, H, W]; nothing pairs them.
        schedule: how long and how fast, `SCHEDULES["cyclegan"]` say; its augmentations and its penalty are not used.
        stage: names the run in checkpoints, progress and errors.
        num_replayed: size of each discriminator's buffer of earlier generated images.
        observe: called after each epoch with its number and the averaged generator from A to B.
        checkpoint_dir: holds `<stage>.ckpt`; a run that finds one continues behind its last epoch.
        progress: called after each step.

    Returns:
        The averaged generator from A to B, and per epoch the losses of both sides together, `cycle_loss` and
        `identity_loss` among them, `sample_variance` and `variance_ratio` of the side that varies less, what `observe`
        returned, and `seconds`.

    Raises:
        QualityError: training diverged or a generator collapsed; all networks are back in the last good state.
        DataError: fewer than two images of a kind, a damaged checkpoint or one of another run.
    """
    if min(len(images_a), len(images_b)) < 2:
        raise DataError(f"{stage}: needs at least 2 images of each kind, got {len(images_a)} and {len(images_b)}")
    players = _players(gan, schedule, images_a, images_b, num_replayed)
    steps_per_epoch = num_batches(max(len(images_a), len(images_b)), schedule.batch_size)
    settings = asdict(schedule) | {"num_replayed": num_replayed}
    epochs = Epochs(stage, schedule.epochs, steps_per_epoch, schedule.seed, settings)
    average = players.networks.get_submodule("average")
    with training_place(players.networks) as device:
        run = _Run(gan, images_a, images_b, schedule, players, device)
        with seeded(schedule.seed, -1, 0):
            watched = [Sources(images)(NUM_WATCHED)[0].to(device) for images in (images_a, images_b)]
        measures = [variance(from_bytes(images[:1024])) for images in (images_b, images_a)]

        def look(epoch: int) -> Record:
            made = [_eval(network, images) for network, images in zip((average, gan.to_a), watched, strict=True)]
            ratios = [variance(images) / max(real, 1e-9) for images, real in zip(made, measures, strict=True)]
            record = {"sample_variance": min(map(variance, made)), "variance_ratio": min(ratios)}
            return record | (observe(epoch + 1, average) if observe else {})

        history = play(players, epochs, run.steps, look, checkpoint_dir=checkpoint_dir, progress=progress)
    return Trained(average, history)


@torch.no_grad()
def _eval(generator: nn.Module, images: Tensor) -> Tensor:
    was_training = generator.training
    translated: Tensor = generator.eval()(images)
    generator.train(was_training)
    return translated


def _players(gan: CycleGan, schedule: GanSchedule, images_a: Tensor, images_b: Tensor, num_replayed: int) -> Players:
    generators = nn.ModuleDict({"to_a": gan.to_a, "to_b": gan.to_b})
    judges = nn.ModuleDict({"judge_a": gan.judge_a, "judge_b": gan.judge_b})
    networks = {"generators": generators, "judges": judges, "average": averaged(gan.to_b)}
    networks |= {
        f"replay_{kind}": ReplayBuffer(images.shape[1:], num_images=num_replayed)
        for kind, images in (("a", images_a), ("b", images_b))
    }
    optimizers = {
        "generators": (adam(generators, schedule.generator_lr, schedule.betas), schedule.decay),
        "judges": (adam(judges, schedule.discriminator_lr, schedule.betas), schedule.decay),
    }
    return Players(nn.ModuleDict(networks), optimizers)


@dataclass(frozen=True, eq=False)
class _Run:
    """What stays the same over the epochs."""

    gan: CycleGan
    images_a: Tensor
    images_b: Tensor
    schedule: GanSchedule
    players: Players
    device: torch.device

    def steps(self, epoch: int) -> Iterator[Losses]:
        """One pass over the larger kind."""
        for network in (self.players.networks["generators"], self.players.networks["judges"]):
            network.train()
        num_images = max(len(self.images_a), len(self.images_b))
        orders = [batches(num_images, self.schedule.batch_size) for _ in range(2)]
        for step, indices in enumerate(zip(*orders, strict=True), start=epoch * len(orders[0])):
            reals = [
                real_batch(images, index % len(images), flip=self.schedule.flip, device=self.device)
                for images, index in zip((self.images_a, self.images_b), indices, strict=True)
            ]
            losses: dict[str, Tensor] = {}
            if step % self.schedule.num_critic_steps == 0:
                losses |= self._generator_step(reals[0], reals[1], step // self.schedule.num_critic_steps)
            yield losses | {"discriminator_loss": self._judges_step(reals[0], reals[1])}

    def _generator_step(self, a: Tensor, b: Tensor, number: int) -> dict[str, Tensor]:
        gan, score = self.gan, LOSSES[self.schedule.loss].generator
        optimizer, _ = self.players.optimizers["generators"]
        fake_b, fake_a = gan.to_b(a), gan.to_a(b)
        adversarial = score(gan.judge_b(fake_b)) + score(gan.judge_a(fake_a))
        cycle = cycle_term(a, gan.to_a(fake_b)) + cycle_term(b, gan.to_b(fake_a))
        identity = identity_term(b, gan.to_b(b)) + identity_term(a, gan.to_a(a))
        optimizer.zero_grad()
        trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        (adversarial + cycle + identity).backward(inputs=trained)
        optimizer.step()
        decay = self.schedule.average_decay if number >= self.schedule.average_start else 0.0
        update_average(self.players.networks.get_submodule("average"), gan.to_b, decay=decay)
        named = {"generator_loss": adversarial, "cycle_loss": cycle, "identity_loss": identity}
        return {name: loss.detach() for name, loss in named.items()}

    def _judges_step(self, a: Tensor, b: Tensor) -> Tensor:
        gan, score = self.gan, LOSSES[self.schedule.loss].discriminator
        optimizer, _ = self.players.optimizers["judges"]
        with torch.no_grad():
            fake_b = self.players.networks["replay_b"](gan.to_b(a))
            fake_a = self.players.networks["replay_a"](gan.to_a(b))
        loss = score(gan.judge_b(b), gan.judge_b(fake_b)) + score(gan.judge_a(a), gan.judge_a(fake_a))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()
