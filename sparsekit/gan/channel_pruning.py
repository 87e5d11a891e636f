"""Channel pruning of a trained generator: scales of normalisation shrink while it learns from itself.

A copy of the generator trains against the discriminator and towards the images that the generator itself makes of the
same inputs. After every step the scales gamma of channels are soft-thresholded, gamma <- sign(gamma) max(|gamma| -
rho lr, 0), which is all that the l1 norm does: it is in no gradient. Then the channels with the smallest |gamma| go,
and whatever their biases added is dropped with them; see `scales` for which and how many.

`ChannelPruning` has the settings of Algorithm 2, `GAN_SLIMMING` those of the method it is compared with: one stage, in
which the discriminator takes the dense generator's images for real ones.

Sources: Chen et al. 2021, "GANs Can Play Lottery Tickets Too", arXiv:2106.00134, Algorithm 2; Wang et al. 2020, "GAN
Slimming", arXiv:2008.11062.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

from sparsekit.budget import Budget
from sparsekit.errors import UsageError
from sparsekit.gan.distillation import Maps, distance
from sparsekit.gan.game import Gan
from sparsekit.gan.loop import Observe
from sparsekit.gan.scales import Scale, choose, keep_counts, scales_of
from sparsekit.gan.schedule import GanSchedule
from sparsekit.gan.training import Additions, train
from sparsekit.graph import trace
from sparsekit.plan import PruningPlan
from sparsekit.surgery import copied
from sparsekit.task import Progress, Record


@dataclass(frozen=True, eq=False)
class Slimmed:
    """Attributes:
    generator: trained under the penalty, not yet cut, in eval mode.
    plan: what to keep of it, and of every network of its shape.
    history: a record per epoch.
    """

    generator: nn.Module
    plan: PruningPlan
    history: list[Record]


@dataclass(frozen=True)
class ChannelPruning:
    """Algorithm 2, with SNGAN's settings.

    Attributes:
        epochs: passes over the images.
        lr: of Adam, for all parameters but the scales; falls linearly from half of the epochs on.
        scale_lr: of SGD, for the scales; times 0.1 at half and at three quarters of the epochs.
        scale_momentum: of it.
        rho: strength of the l1 norm; scales of 1 need some 1 / (rho scale_lr) steps of the generator to fade.
        distillation_weight: of the distance to the dense generator's images.
        gram_weight: of the Gram matrices within it, where feature maps are given.
        batch_size: images per step, of both networks.
        imitates: the discriminator takes the dense generator's images for real, not the data.
        num_replayed: images generated before that the discriminator is shown again.
        round_to: widths are multiples of this, or a group's full size.
        seed: of everything drawn.

    Raises:
        UsageError: a rate that is not above 0.
    """

    epochs: int = 100
    lr: float = 1e-3
    scale_lr: float = 0.1
    scale_momentum: float = 0.5
    rho: float = 5e-4
    distillation_weight: float = 1.0
    gram_weight: float = 1e5
    batch_size: int = 16
    imitates: bool = False
    num_replayed: int = 0
    round_to: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("lr", "scale_lr", "rho"):
            if getattr(self, name) <= 0:
                raise UsageError(f"channel_pruning: {name} must be above 0, got {getattr(self, name):g}")

    def __call__(
        self,
        gan: Gan,
        images: Tensor,
        budget: Budget,
        schedule: GanSchedule,
        *,
        labels: Tensor | None = None,
        maps: Maps | None = None,
        observe: Observe | None = None,
        checkpoint_dir: Path | None = None,
        progress: Progress | None = None,
    ) -> Slimmed:
        """Slim a copy of `gan.generator` and choose its channels; the discriminator trains on, in place.

        Args:
            gan: a trained generator, best the averaged one, which stays as it is, and its discriminator.
            images: as for `train`.
            budget: of multiply-accumulates, parameters or channels.
            schedule: the GAN's own: its loss, its critic steps, and how the discriminator learns.
            labels: as for `train`.
            maps: feature maps to compare images by; pixels without.
            observe, checkpoint_dir, progress: as for `train`; the stage is "prune".

        Raises:
            UsageError: no scale speaks for any of the generator's channels.
            BudgetError: the budget cannot be met.
            QualityError: the training diverged.
        """
        teacher = copied(gan.generator).eval().requires_grad_(False)
        student = copied(gan.generator).requires_grad_(True)
        example = gan.draw(4)
        graph = trace(teacher, example)
        scales = scales_of(graph, example)
        keep_counts(graph, scales, budget, round_to=self.round_to)  # fails before any training
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        teacher.to(device)
        own = replace(
            schedule,
            epochs=self.epochs,
            batch_size=self.batch_size,
            generator_batch_size=self.batch_size,
            average_decay=0.0,
            seed=self.seed,
        )
        additions = self._additions(teacher, student, [scale for found in scales.values() for scale in found], maps)
        trained = train(
            replace(gan, generator=student),
            images,
            own,
            labels=labels,
            stage="prune",
            additions=additions,
            observe=observe,
            checkpoint_dir=checkpoint_dir,
            progress=progress,
        )
        student.eval()
        plan = choose(replace(graph, model=student), scales, budget, round_to=self.round_to)
        return Slimmed(student, plan, trained.history)

    def _additions(
        self, teacher: nn.Module, student: nn.Module, scales: Sequence[Scale], maps: Maps | None
    ) -> Additions:
        parameters = dict(student.named_parameters())
        shrunk = {scale.slot.tensor: scale.offset for scale in scales}
        of_scales = SGD([parameters[name] for name in shrunk], self.scale_lr, momentum=self.scale_momentum)
        others = [parameter for name, parameter in parameters.items() if name not in shrunk]

        def optimizers(_: nn.Module) -> list[tuple[Optimizer, str]]:
            return [(Adam(others, self.lr, betas=(0.0, 0.9)), "linear"), (of_scales, "steps")]

        def imitation(inputs: tuple[Tensor, ...], fakes: Tensor) -> Tensor:
            with torch.no_grad():
                wanted = teacher(*inputs)
            return self.distillation_weight * distance(fakes, wanted, maps, gram_weight=self.gram_weight)

        def shrink(_: nn.Module) -> None:
            threshold = self.rho * float(of_scales.param_groups[0]["lr"])
            for name, offset in shrunk.items():
                soft_threshold_(parameters[name], threshold, offset=offset)

        return Additions(
            generator_term=imitation,
            optimizers=optimizers,
            after_generator_step=shrink,
            real_images=(lambda inputs: teacher(*inputs)) if self.imitates else None,
            num_replayed=self.num_replayed,
            settings=asdict(self) | {"maps": maps is not None},
        )


# Its penalty is far stronger and its weights move far less; as its authors set it for image translation.
GAN_SLIMMING = ChannelPruning(lr=1e-5, rho=0.01, distillation_weight=20.0, imitates=True, num_replayed=50)


@torch.no_grad()
def soft_threshold_(values: Tensor, threshold: float, *, offset: float = 0.0) -> None:
    """Move `values + offset` towards 0 by `threshold`, in place, and no further than 0.

    >>> gamma = torch.tensor([0.5, -0.5, 0.125])
    >>> soft_threshold_(gamma, 0.25)
    >>> gamma.tolist()
    [0.25, -0.25, 0.0]
    """
    values.copy_(F.softshrink(values + offset, threshold) - offset)
