"""Algorithm 2: which channels scales speak for, what the proximal step does, budgets met, distillation."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit import Budget, certify, compact, trace
from sparsekit.cost import num_macs, num_params
from sparsekit.errors import BudgetError, UsageError
from sparsekit.gan.channel_pruning import GAN_SLIMMING, ChannelPruning, Slimmed, soft_threshold_
from sparsekit.gan.distillation import distance, feature_maps
from sparsekit.gan.game import Gan
from sparsekit.gan.scales import choose, keep_counts, magnitudes, scales_of
from sparsekit.gan.training import train
from tests.gans import build, inputs_of, stirred
from tests.test_gan_training import TINY, reals, tiny

HALF = Budget.parse("macs<=0.5x")

SPOKEN_FOR = {
    # The last sum is read by the last BatchNorm alone; those before it by shortcuts, too.
    "sngan_generator": {"blocks.0.conv1", "blocks.1.conv1", "blocks.1.conv2"},
    "dcgan_generator": {"layers.0", "layers.3"},
    "acgan_generator": {"blocks.0.conv1", "blocks.1.conv1", "blocks.1.conv2"},
    "sagan_generator": {"blocks.1.conv2"},  # the gains of its classes are spectrally normed
    "autogan_c_generator": {"cells.1.conv2"},  # skips read the others
    "cyclegan_generator": {
        *(f"layers.{number}" for number in (1, 4, 12, 15)),
        *(f"layers.{number}.layers.1" for number in (10, 11)),
    },
}


@pytest.mark.parametrize("name", SPOKEN_FOR)
def test_scales_speak_for_the_channels_that_only_normalisation_reads(name: str) -> None:
    graph = trace(stirred(build(name)), inputs_of(name))
    found = {group.name for group in scales_of(graph, inputs_of(name))}
    assert found == SPOKEN_FOR[name]


def test_a_generator_without_such_scales_is_refused() -> None:
    network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 16), nn.Unflatten(1, (1, 4, 4)))
    inputs = (torch.randn(2, 4),)
    with pytest.raises(UsageError, match="channel_pruning: no normalisation scales channels"):
        scales_of(trace(network, inputs), inputs)


@pytest.mark.parametrize("name", ["sngan_generator", "dcgan_generator", "acgan_generator", "cyclegan_generator"])
def test_channels_with_scale_and_bias_zero_go_without_a_change_and_first(name: str) -> None:
    generator, inputs = stirred(build(name)), inputs_of(name)
    graph = trace(generator, inputs)
    scales = scales_of(graph, inputs)
    with torch.no_grad():
        for group, found in scales.items():
            for scale in found:
                off = scale.slot.index[: group.size // 2].flatten()
                generator.get_parameter(scale.slot.tensor).index_fill_(scale.slot.dim, off, -scale.offset)
                generator.get_parameter(scale.bias).index_fill_(scale.slot.dim, off, 0.0)
        wanted = generator(*inputs)
    plan = choose(graph, scales, Budget.parse("macs<=1x"))
    assert plan.kept == {group.name: group.size - group.size // 2 for group in scales}
    with torch.no_grad():
        torch.testing.assert_close(compact(generator, plan, inputs)(*inputs), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["sngan_generator", "dcgan_generator", "acgan_generator", "cyclegan_generator"])
@pytest.mark.parametrize("budget", ["macs<=0.6x", "params<=0.4x", "macs<=0.05x"])
def test_a_budget_is_met_with_no_room_for_the_next_channel(name: str, budget: str) -> None:
    generator, inputs = stirred(build(name)), inputs_of(name)
    graph = trace(generator, inputs)
    scales, limit = scales_of(graph, inputs), Budget.parse(budget)
    plan = choose(graph, scales, limit)
    kept = {group: int(keep.sum()) for group, keep in plan.keep.items()}
    cost = num_macs if budget.startswith("macs") else num_params
    most = limit.limits[0].value * cost(graph)
    assert cost(graph, kept) <= most
    for group in scales:
        count = kept.get(group, group.size)
        assert count == group.size or cost(graph, kept | {group: count + 1}) > most, group
    small = compact(generator, plan, inputs)
    assert certify(generator, plan, small, inputs).holds


def test_channels_compete_by_scale_over_all_groups() -> None:
    generator, inputs = stirred(build("sngan_generator")), inputs_of("sngan_generator")
    with torch.no_grad():
        generator.get_parameter("blocks.0.norm2.weight").fill_(1.0)
        generator.get_parameter("norm.weight").fill_(1.0)
        generator.get_parameter("blocks.1.norm2.weight").copy_(torch.linspace(0.1, 0.2, 16))
    graph = trace(generator, inputs)
    scales = scales_of(graph, inputs)
    plan = choose(graph, scales, Budget.parse("macs<=0.7x"))
    (group,) = plan.keep  # all that goes is of the second block, and the smallest of it
    assert group.name == "blocks.1.conv1"
    assert plan.keep[group].tolist() == sorted(plan.keep[group].tolist())


@pytest.mark.parametrize(("num_alive", "share", "expected"), [(16, 0.4, 4), (2, 0.4, 2), (16, 0.05, 1)])
def test_a_layer_of_small_scales_keeps_a_quarter_of_what_is_alive_where_the_budget_allows_it(
    num_alive: int, share: float, expected: int
) -> None:
    generator, inputs = stirred(build("sngan_generator")), inputs_of("sngan_generator")
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
        generator.get_parameter("blocks.1.norm2.weight").copy_(1e-3 * (torch.arange(16) < num_alive))
    graph = trace(generator, inputs)
    counts = keep_counts(graph, scales_of(graph, inputs), Budget.parse(f"macs<={share}x"))
    assert {group.name: count for group, count in counts.items()}["blocks.1.conv1"] == expected


def test_widths_are_rounded_and_keep_ratios_pinned() -> None:
    generator, inputs = stirred(build("sngan_generator")), inputs_of("sngan_generator")
    graph = trace(generator, inputs)
    scales = scales_of(graph, inputs)
    counts = keep_counts(graph, scales, HALF, round_to=4)
    assert {counts[group] % 4 for group in scales} == {0}
    pinned = keep_counts(graph, scales, Budget.parse("macs<=0.7x and blocks.0.conv1=0.25"))
    assert {group.name: count for group, count in pinned.items()}["blocks.0.conv1"] == 4


def test_streams_lose_channels_only_where_the_others_cannot_meet_the_budget_alone() -> None:
    generator, inputs = stirred(build("sngan_generator")), inputs_of("sngan_generator")
    graph = trace(generator, inputs)
    scales = scales_of(graph, inputs)
    mild, hard = (keep_counts(graph, scales, Budget.parse(f"macs<={share}x")) for share in (0.5, 0.02))
    others = [group for group in graph.groups if group not in scales]
    assert all(mild[group] == group.size for group in others)
    assert any(hard[group] < group.size for group in others)
    with pytest.raises(BudgetError, match="below the floor"):
        keep_counts(graph, scales, Budget.parse("macs<=0.001x"))


def test_the_proximal_step_stops_at_zero_and_knows_gains_that_are_added_to_one() -> None:
    gains = torch.tensor([-1.5, -1.0, -0.9, 0.5])
    soft_threshold_(gains, 0.25, offset=1.0)
    assert gains.tolist() == pytest.approx([-1.25, -1.0, -1.0, 0.25])


@pytest.fixture(scope="module")
def dense() -> Gan:
    gan, (images, labels) = tiny(), reals()
    result = train(gan, images, replace(TINY, epochs=4), labels=labels)
    return replace(gan, generator=result.average)


def slim(gan: Gan, options: ChannelPruning, **more: Path) -> Slimmed:
    images, labels = reals()
    gan = replace(gan, discriminator=copy.deepcopy(gan.discriminator))
    return options(gan, images, HALF, TINY, labels=labels, **more)  # type: ignore[arg-type]


OPTIONS = ChannelPruning(epochs=6, rho=0.05)


def test_scales_reach_zero_exactly_and_the_plan_cuts_those(dense: Gan) -> None:
    dense = replace(dense, generator=copy.deepcopy(dense.generator))
    with torch.no_grad():
        dense.generator.get_parameter("blocks.0.norm2.weight").copy_(torch.linspace(0.05, 1, 8))
    before = {name: value.clone() for name, value in dense.generator.state_dict().items()}
    slimmed = slim(dense, replace(OPTIONS, rho=0.5))
    assert all(torch.equal(value, before[name]) for name, value in dense.generator.state_dict().items())
    graph = trace(slimmed.generator, dense.draw(2))
    zeros = 0
    for group, found in scales_of(trace(dense.generator, dense.draw(2)), dense.draw(2)).items():
        off = magnitudes(slimmed.generator, found) == 0
        zeros += int(off.sum())
        cuts = [keep for cut, keep in slimmed.plan.keep.items() if cut.name == group.name]
        assert not any((keep & off).any() for keep in cuts or [torch.ones_like(off)])
    assert zeros > 0
    counts = {group: slimmed.plan.kept.get(group.name, group.size) for group in graph.groups}
    assert num_macs(graph, counts) <= 0.5 * num_macs(graph)


def test_only_the_proximal_step_shrinks_scales(dense: Gan) -> None:
    """Without a loss on the generator each step takes exactly rho times the rate off, as the decays say."""
    gan = replace(dense, discriminator=Indifferent())
    options = ChannelPruning(epochs=2, rho=0.01, distillation_weight=0.0)
    slimmed = slim(gan, options)
    name = "blocks.0.norm2.weight"
    start, end = (network.get_parameter(name).detach() for network in (dense.generator, slimmed.generator))
    # 40 images in batches of 16: steps 0, 2 and 4 of 6 are the generator's, two at a rate of 0.1 and one at 0.01.
    torch.testing.assert_close(end, F.softshrink(start, 0.01 * (2 * 0.1 + 0.01)), rtol=0, atol=1e-6)


class Indifferent(nn.Module):
    """The same logit for all images."""

    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.logit + 0 * images.sum((1, 2, 3))


def test_distillation_draws_the_student_to_the_dense_generator(dense: Gan) -> None:
    z = dense.draw(64)
    errors = []
    for weight in (0.0, 100.0):
        student = slim(dense, replace(OPTIONS, distillation_weight=weight)).generator
        with torch.no_grad():
            errors.append(float((student(*z) - dense.generator(*z)).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_slimming_repeats_and_resumes(dense: Gan, tmp_path: Path) -> None:
    first, again = slim(dense, OPTIONS), slim(dense, OPTIONS, checkpoint_dir=tmp_path)
    resumed = slim(dense, OPTIONS, checkpoint_dir=tmp_path)
    for other in (again, resumed):
        states = zip(first.generator.state_dict().values(), other.generator.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in states)
        assert first.plan.kept == other.plan.kept


def test_gan_slimming_shows_the_discriminator_the_dense_generators_images(dense: Gan) -> None:
    seen: list[Tensor] = []

    class Watching(Indifferent):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.detach())
            return super().forward(images)

    slim(replace(dense, discriminator=Watching()), replace(GAN_SLIMMING, epochs=1))
    images, _ = reals()
    assert len(seen) == 2 * 3 + 2  # both steps of three batches, and the generator's steps
    real = {tuple(image.flatten().tolist()) for image in images.float() / 127.5 - 1}
    assert not any(tuple(image.flatten().tolist()) in real for batch in seen for image in batch)


def test_conditional_gains_shrink_towards_a_scale_of_zero(dense: Gan) -> None:
    gan, (images, labels) = tiny("acgan"), reals()
    slimmed = replace(OPTIONS, rho=1.0)(gan, images, HALF, TINY, labels=labels)
    gain = slimmed.generator.get_parameter("blocks.0.norm2.gain.weight") + 1
    assert (gain == 0).any()
    compact(slimmed.generator, slimmed.plan, gan.draw(2))


def test_distance_is_the_formula_written_out() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert float(distance(a, b, None, gram_weight=1e5)) == pytest.approx(float(((a - b) ** 2).mean()))

    def gram(x: Tensor) -> Tensor:
        return torch.stack([image.view(3, 16) @ image.view(3, 16).T / 48 for image in x])

    wanted = (
        (a - b).abs().mean() + 7 * ((gram(a) - gram(b)) ** 2).mean() + 7 * ((gram(2 * a) - gram(2 * b)) ** 2).mean()
    )
    assert float(distance(a, b, lambda x: [x, 2 * x], gram_weight=7.0)) == pytest.approx(float(wanted))


def test_feature_maps_pass_gradients_to_images_and_none_to_the_network() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    maps = feature_maps(network, ["0", "2"], mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    images = torch.rand(2, 1, 8, 8, requires_grad=True)
    first, second = maps(images)
    assert (first.shape, second.shape) == ((2, 4, 6, 6), (2, 5, 4, 4))
    expected = network[0](((images + 1) / 2 - 0.5).expand(-1, 3, -1, -1) / 0.25)
    torch.testing.assert_close(first, expected)
    second.sum().backward()
    assert images.grad is not None
    assert all(parameter.grad is None for parameter in network.parameters())
    with pytest.raises(UsageError, match="feature layer '7': no such module"):
        feature_maps(network, ["7"], mean=(0.5,), std=(0.5,))
