"""train(gan, images, schedule): a generator from noise or from images, and its discriminator, against each other.

What methods add comes through `Additions`: terms of the loss, other optimisers, what is done after a step. Masks need
none of them: a network whose weights are masked as it computes them (a parametrisation) is trained as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from sparsekit.errors import DataError
from sparsekit.fabric import seeded
from sparsekit.gan.averaging import averaged, update_average
from sparsekit.gan.game import Gan
from sparsekit.gan.grids import from_bytes, grid
from sparsekit.gan.loop import Epochs, Losses, Observe, Players, play, training_place
from sparsekit.gan.losses import LOSSES, class_term, gradient_penalty
from sparsekit.gan.replay import ReplayBuffer
from sparsekit.gan.schedule import GanSchedule
from sparsekit.task import Progress, Record

NUM_WATCHED = 64  # images that tell how much samples vary
_WATCHED_REALS = 1024  # their measure


@dataclass(frozen=True)
class Additions:
    """What a method adds to the training; nothing unless given.

    Attributes:
        generator_term: the generator's inputs and the images it made of them -> a scalar to add to its loss.
        optimizers: the generator -> those of its parameters with the keys of their decays, in place of one Adam.
        after_generator_step: called with the generator once its parameters have moved.
        real_images: the generator's inputs -> what the discriminator takes for real, in place of the data.
        num_replayed: size of the buffer of earlier generated images that the discriminator is shown; 0 for none.
        settings: JSON values that say what of this a checkpoint was made with.
    """

    generator_term: Callable[[tuple[Tensor, ...], Tensor], Tensor] | None = None
    optimizers: Callable[[nn.Module], Sequence[tuple[Optimizer, str]]] | None = None
    after_generator_step: Callable[[nn.Module], None] | None = None
    real_images: Callable[[tuple[Tensor, ...]], Tensor] | None = None
    num_replayed: int = 0
    settings: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Trained:
    """Attributes:
    average: the generator to keep, in eval mode and on the CPU.
    history: a record per epoch.
    """

    average: nn.Module
    history: list[Record]


def train(
    gan: Gan,
    images: Tensor,
    schedule: GanSchedule,
    *,
    labels: Tensor | None = None,
    stage: str = "dense",
    additions: Additions | None = None,
    observe: Observe | None = None,
    checkpoint_dir: Path | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train both networks of `gan` in place, on the GPU if there is one; they come back to the CPU.

    An epoch shows the discriminator every image once; the generator steps with every `num_critic_steps`-th batch, from
    the first one on. A last batch of one image is left out.

    Args:
        gan: the networks.
        images: uint8 [N, C, H, W], real ones; may be a map of a file larger than the memory.
        schedule: how long and how fast.
        labels: int64 [N], for networks that are told or name classes.
        stage: names the run in checkpoints, progress and errors.
        additions: what a method adds.
        observe: called after each epoch with its number and the averaged generator; its numbers join the record.
        checkpoint_dir: holds `<stage>.ckpt`; a run that finds one continues behind its last epoch.
        progress: called after each step.

    Returns:
        The averaged generator and per epoch `epoch`, `discriminator_loss`, `generator_loss` (with its class term but
        without the additions' one, which is `added_loss`), `sample_variance` and `variance_ratio`, that over the
        images' own, what `observe` returned, and `seconds`.

    Raises:
        QualityError: training diverged or the generator collapsed; both networks are back in the last good state.
        DataError: labels are needed and missing, fewer than two images, a damaged checkpoint or one of another run.
    """
    additions = additions or Additions()
    if len(images) < 2:
        raise DataError(f"{stage}: needs at least 2 images, got {len(images)}")
    if labels is None and (gan.told_labels or gan.names_labels):
        raise DataError(f"{stage}: the discriminator needs labels, and the images have none")
    players = _players(gan, schedule, additions, images.shape[1:])
    settings = asdict(schedule) | additions.settings
    epochs = Epochs(stage, schedule.epochs, num_batches(len(images), schedule.batch_size), schedule.seed, settings)
    average = players.networks.get_submodule("average")
    with training_place(players.networks) as device:
        run = _Run(gan, images, labels, schedule, additions, players, device)
        with seeded(schedule.seed, -1, 0):
            inputs = tuple(part.to(device) for part in gan.draw(NUM_WATCHED))
        real_variance = variance(from_bytes(images[:: max(1, len(images) // _WATCHED_REALS)]))

        def look(epoch: int) -> Record:
            with torch.no_grad():
                sample_variance = variance(average(*inputs))
            record = {"sample_variance": sample_variance, "variance_ratio": sample_variance / max(real_variance, 1e-9)}
            return record | (observe(epoch + 1, average) if observe else {})

        history = play(players, epochs, run.steps, look, checkpoint_dir=checkpoint_dir, progress=progress)
    return Trained(average, history)


def variance(images: Tensor) -> float:
    """How much images differ from each other: the variance of each of their values, averaged.

    >>> variance(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1).expand(2, 1, 4, 4))
    2.0
    """
    return float(images.double().var(0).mean())


def picture_writer(folder: Path, inputs: tuple[Tensor, ...], *, columns: int = 8) -> Observe:
    """Writes `epoch-0001.png` and so on into `folder`: what the generator makes of the same inputs after each epoch."""

    def write(epoch: int, generator: nn.Module) -> Record:
        folder.mkdir(parents=True, exist_ok=True)
        grid(samples(generator, inputs), columns).save(folder / f"epoch-{epoch:04d}.png")
        return {}

    return write


@torch.no_grad()
def samples(generator: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Images of inputs, on the CPU; the generator is in eval mode meanwhile."""
    modes = [(module, module.training) for module in generator.modules()]
    device = next(generator.parameters()).device
    images: Tensor = generator.eval()(*(part.to(device) for part in inputs)).cpu()
    for module, training in modes:
        module.training = training
    return images


def adam(network: nn.Module, lr: float, betas: tuple[float, float]) -> Adam:
    """Of all parameters that require gradients."""
    return Adam([parameter for parameter in network.parameters() if parameter.requires_grad], lr, betas=betas)


def batches(num_images: int, batch_size: int) -> list[Tensor]:
    """One epoch's batches in an order drawn from torch's own generator; a last one of a single image is left out."""
    return [index for index in torch.randperm(num_images).split(batch_size) if len(index) > 1 or batch_size == 1]


def real_batch(images: Tensor, index: Tensor, *, flip: bool, device: torch.device) -> Tensor:
    """Float32 in [-1, 1], half of them mirrored where `flip`."""
    reals = from_bytes(images[index].to(device))
    if not flip:
        return reals
    mirrored = torch.rand(len(reals)).to(device) < 0.5
    return torch.where(mirrored[:, None, None, None], reals.flip(3), reals)


def num_batches(num_images: int, batch_size: int) -> int:
    """How many `batches` makes."""
    full, rest = divmod(num_images, batch_size)
    return full + (rest > 1)


def _players(gan: Gan, schedule: GanSchedule, additions: Additions, image_shape: Sequence[int]) -> Players:
    networks = {"generator": gan.generator, "discriminator": gan.discriminator, "average": averaged(gan.generator)}
    networks["replay"] = ReplayBuffer(image_shape, num_images=additions.num_replayed)
    optimizers = {"discriminator": (adam(gan.discriminator, schedule.discriminator_lr, schedule.betas), schedule.decay)}
    of_generator: Sequence[tuple[Optimizer, str]] = [
        (adam(gan.generator, schedule.generator_lr, schedule.betas), schedule.decay)
    ]
    if additions.optimizers:
        of_generator = additions.optimizers(gan.generator)
    numbered = {f"generator {number}": pair for number, pair in enumerate(of_generator)}
    return Players(nn.ModuleDict(networks), {**optimizers, **numbered})


@dataclass(frozen=True, eq=False)
class _Run:
    """What stays the same over the epochs."""

    gan: Gan
    images: Tensor
    labels: Tensor | None
    schedule: GanSchedule
    additions: Additions
    players: Players
    device: torch.device

    def steps(self, epoch: int) -> Iterator[Losses]:
        """One pass over the images."""
        self.gan.generator.train()
        self.gan.discriminator.train()
        order = batches(len(self.images), self.schedule.batch_size)
        for step, index in enumerate(order, start=epoch * len(order)):
            losses = {"discriminator_loss": self._discriminator_step(index)}
            if step % self.schedule.num_critic_steps == 0:
                losses |= self._generator_step(step // self.schedule.num_critic_steps)
            yield losses

    def _discriminator_step(self, index: Tensor) -> Tensor:
        """Only the discriminator learns: what the generator made takes no gradients."""
        gan, schedule, additions = self.gan, self.schedule, self.additions
        optimizer, _ = self.players.optimizers["discriminator"]
        labels = None if self.labels is None else self.labels[index].to(self.device)
        inputs = self._draw(len(index))
        fake_labels = inputs[1] if len(inputs) > 1 else None
        with torch.no_grad():
            fakes = self.players.networks["replay"](gan.generator(*inputs))
            if additions.real_images:
                reals, labels = additions.real_images(inputs), fake_labels
            else:
                reals = real_batch(self.images, index, flip=schedule.flip, device=self.device)
        real_logits, real_classes = gan.judge(reals, labels, schedule.augment)
        fake_logits, fake_classes = gan.judge(fakes, fake_labels, schedule.augment)
        loss = LOSSES[schedule.loss].discriminator(real_logits, fake_logits)
        if schedule.penalty_weight:
            penalty = gradient_penalty(lambda between: gan.judge(between, labels)[0], reals, fakes)
            loss = loss + schedule.penalty_weight * penalty
        for classes, targets in ((real_classes, labels), (fake_classes, fake_labels)):
            if classes is not None and targets is not None:
                loss = loss + class_term(classes, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    def _generator_step(self, number: int) -> dict[str, Tensor]:
        gan, schedule, additions = self.gan, self.schedule, self.additions
        optimizers = [pair[0] for name, pair in self.players.optimizers.items() if name != "discriminator"]
        trained = [parameter for parameter in gan.generator.parameters() if parameter.requires_grad]
        inputs = self._draw(schedule.generator_batch_size)
        labels = inputs[1] if len(inputs) > 1 else None
        fakes = gan.generator(*inputs)
        logits, classes = gan.judge(fakes, labels, schedule.augment)
        loss = LOSSES[schedule.loss].generator(logits)
        if classes is not None and labels is not None:
            loss = loss + class_term(classes, labels)
        losses = {"generator_loss": loss.detach()}
        if additions.generator_term:
            added = additions.generator_term(inputs, fakes)
            losses["added_loss"] = added.detach()
            loss = loss + added
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward(inputs=trained)  # the discriminator's weights get no gradients, and cost none
        for optimizer in optimizers:
            optimizer.step()
        if additions.after_generator_step:
            additions.after_generator_step(gan.generator)
        decay = schedule.average_decay if number >= schedule.average_start else 0.0
        update_average(self.players.networks.get_submodule("average"), gan.generator, decay=decay)
        return losses

    def _draw(self, num_images: int) -> tuple[Tensor, ...]:
        return tuple(part.to(self.device) for part in self.gan.draw(num_images))
