"""What the losses of GANs are, against their formulas written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from sparsekit.gan.losses import LOSSES, class_term, cycle_term, gradient_penalty, identity_term

REAL, FAKE = [2.0, 0.25, -1.0], [0.5, -3.0]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


# name -> loss of the discriminator and of the generator at REAL and FAKE
BY_FORMULA = {
    "hinge": (mean([max(0.0, 1 - x) for x in REAL]) + mean([max(0.0, 1 + x) for x in FAKE]), -mean(FAKE)),
    "non_saturating": (
        -mean([math.log(sigmoid(x)) for x in REAL]) - mean([math.log(1 - sigmoid(x)) for x in FAKE]),
        -mean([math.log(sigmoid(x)) for x in FAKE]),
    ),
    "wasserstein": (mean(FAKE) - mean(REAL), -mean(FAKE)),
    "least_squares": (
        (mean([(x - 1) ** 2 for x in REAL]) + mean([x**2 for x in FAKE])) / 2,
        mean([(x - 1) ** 2 for x in FAKE]),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_their_formulas(name: str) -> None:
    real, fake = torch.tensor(REAL), torch.tensor(FAKE)
    discriminator, generator = BY_FORMULA[name]
    assert LOSSES[name].discriminator(real, fake).item() == pytest.approx(discriminator, rel=1e-6)
    assert LOSSES[name].generator(fake).item() == pytest.approx(generator, rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_the_discriminator_pulls_apart_what_the_generator_pulls_up(name: str) -> None:
    real, fake = torch.tensor([0.3, -0.2], requires_grad=True), torch.tensor([0.1, 0.4], requires_grad=True)
    of_real, of_fake = torch.autograd.grad(LOSSES[name].discriminator(real, fake), (real, fake))
    assert (of_real < 0).all()
    assert (of_fake > 0).all()
    assert (torch.autograd.grad(LOSSES[name].generator(fake), fake)[0] < 0).all()


def test_cross_entropies_stay_finite_where_the_discriminator_is_certain() -> None:
    sure = torch.tensor([1e4], requires_grad=True)
    loss = LOSSES["non_saturating"].generator(-sure)
    assert loss.item() == 1e4
    assert torch.autograd.grad(loss, sure)[0].item() == 1


def images(num: int = 4) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(num, 2, 3, 3, dtype=torch.float64), torch.randn(num, 2, 3, 3, dtype=torch.float64)


class LinearCritic(nn.Module):
    """Logits whose gradient is `slope` long everywhere."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        torch.manual_seed(1)
        direction = torch.randn(2, 3, 3, dtype=torch.float64)
        self.weight = nn.Parameter(slope * direction / direction.norm())

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum((1, 2, 3))


@pytest.mark.parametrize(("slope", "expected"), [(1.0, 0.0), (3.0, 4.0), (0.5, 0.25), (0.0, 1.0)])
def test_the_penalty_of_a_linear_critic_is_its_slope_s_distance_from_one_squared(slope: float, expected: float) -> None:
    penalty = gradient_penalty(LinearCritic(slope), *images())
    assert penalty.item() == pytest.approx(expected, abs=1e-12)
    assert penalty.isfinite()


def test_the_slope_is_taken_between_each_real_image_and_its_fake() -> None:
    """Of half the squared length the slope is the place itself."""
    real, fake = images()
    share = torch.rand((4, 1, 1, 1), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    between = share * real + (1 - share) * fake
    expected = (between.flatten(1).norm(dim=1) - 1).square().mean()
    got = gradient_penalty(lambda x: x.square().sum((1, 2, 3)) / 2, real, fake, rng=torch.Generator().manual_seed(7))
    torch.testing.assert_close(got, expected)


def test_the_penalty_trains_the_critic_and_nothing_else() -> None:
    critic, (real, fake) = LinearCritic(2.0), images()
    real.requires_grad_()
    fake.requires_grad_()
    gradient_penalty(critic, real, fake).backward()
    torch.testing.assert_close(critic.weight.grad, 2 * (2 - 1) * critic.weight.detach() / 2)  # of (|w| - 1)^2
    assert real.grad is None
    assert fake.grad is None


def test_the_class_term_is_the_cross_entropy_of_the_labels() -> None:
    logits, labels = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]]), torch.tensor([1, 0])
    chances = [math.exp(2) / (math.e + math.exp(2) + 1), 1 / (2 + math.exp(3))]
    assert class_term(logits, labels).item() == pytest.approx(-mean([math.log(chance) for chance in chances]))


def test_cyclegan_s_terms_are_mean_absolute_differences_times_ten_and_five() -> None:
    x, y = images()
    difference = (x - y).abs().mean().item()
    assert cycle_term(x, y).item() == pytest.approx(10 * difference)
    assert identity_term(x, y).item() == pytest.approx(5 * difference)
