"""Augmentation, the averaged generator, replayed images, and spectral norm after compaction."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsekit import Budget, compact, trace
from sparsekit.errors import UsageError
from sparsekit.gan.augment import AUGMENTATIONS, augment, color, cutout, translation
from sparsekit.gan.averaging import averaged, update_average
from sparsekit.gan.replay import ReplayBuffer
from sparsekit.gan.spectral import restore_spectral_norm
from sparsekit.pruners import PRUNERS
from tests.gans import build, inputs_of, stirred


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int) -> Tensor:
    return torch.rand(shape, generator=rng(9), dtype=torch.float64) + 0.5  # nowhere zero


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_keep_shape_and_dtype_and_repeat_with_the_seed(name: str) -> None:
    x = noise(5, 3, 12, 10)
    once, again, other = (AUGMENTATIONS[name](x, rng=rng(seed)) for seed in (1, 1, 2))
    assert once.shape == x.shape
    assert once.dtype == x.dtype
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_image_draws_its_own_change(name: str) -> None:
    x = noise(1, 3, 12, 12).expand(16, -1, -1, -1)
    out = AUGMENTATIONS[name](x, rng=rng())
    assert len({tuple(image.flatten().tolist()) for image in out}) > 10


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_gradients_flow_through_augmentations_exactly(name: str) -> None:
    x = noise(2, 2, 6, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: AUGMENTATIONS[name](x, rng=rng(3)), x)
    out = AUGMENTATIONS[name](x, rng=rng(3))
    assert (torch.autograd.grad(out.sum(), x)[0] != 0).any()


def test_color_is_brightness_then_saturation_then_contrast() -> None:
    x = noise(4, 3, 5, 5)
    draws = torch.rand((3, 4), generator=rng(), dtype=torch.float64)
    for image, got, (shift, saturation, contrast) in zip(x, color(x, rng=rng()), draws.T, strict=True):
        lit = image + (shift - 0.5)
        grey = (lit[0] + lit[1] + lit[2]) / 3
        coloured = grey * (1 - 2 * saturation) + lit * 2 * saturation
        middle = coloured.sum() / coloured.numel()
        torch.testing.assert_close(got, middle * (0.5 - contrast) + coloured * (contrast + 0.5))


def test_translation_moves_whole_images_by_up_to_an_eighth_and_fills_with_zeros() -> None:
    x = noise(200, 2, 16, 24)
    moves = set()
    for image, moved in zip(x, translation(x, rng=rng()), strict=True):
        rows, columns = (moved != 0).nonzero()[:, 1:].unbind(1)
        down = rows.amin() if rows.amin() > 0 else rows.amax() - 15
        right = columns.amin() if columns.amin() > 0 else columns.amax() - 23
        moves.add((int(down), int(right)))
        expected = torch.zeros_like(image)
        into = (slice(max(0, down), 16 + min(0, down)), slice(max(0, right), 24 + min(0, right)))
        out_of = (slice(max(0, -down), 16 - max(0, down)), slice(max(0, -right), 24 - max(0, right)))
        expected[:, into[0], into[1]] = image[:, out_of[0], out_of[1]]
        assert torch.equal(moved, expected)
    assert {down for down, _ in moves} == set(range(-2, 3))
    assert {right for _, right in moves} == set(range(-3, 4))


@pytest.mark.parametrize("size", [8, 10])  # holes of an even and of an odd side
def test_cutout_hides_one_square_of_half_the_side_that_may_reach_over_the_border(size: int) -> None:
    x = noise(400, 2, size, size)
    out = cutout(x, rng=rng())
    spans = set()
    for image, cut in zip(x, out, strict=True):
        hidden = (cut == 0).all(0)
        rows, columns = hidden.nonzero().unbind(1)
        assert hidden.sum() == (rows.amax() - rows.amin() + 1) * (columns.amax() - columns.amin() + 1)
        assert torch.equal(cut[:, ~hidden], image[:, ~hidden])
        spans.add((int(rows.amin()), int(rows.amax())))
    hole = size // 2
    starts = range(-(hole // 2), size + 1 - hole % 2 - hole // 2)
    assert spans == {(max(0, start), min(size, start + hole) - 1) for start in starts}


def test_a_policy_is_applied_in_its_order() -> None:
    x = noise(3, 3, 8, 8)
    draws = rng(5)
    expected = cutout(color(x, rng=draws), rng=draws)
    assert torch.equal(augment(x, ("color", "cutout"), rng=rng(5)), expected)
    assert torch.equal(augment(x, ()), x)


def test_an_unknown_augmentation_is_named() -> None:
    with pytest.raises(UsageError, match="augmentation 'colour': unknown; did you mean color"):
        augment(noise(1, 1, 4, 4), ("colour",))


def trained_a_step(network: nn.Module, name: str) -> None:
    """A step that moves everything: parameters, BatchNorm's statistics, and spectral norm's vectors."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network.train()(*inputs_of(name)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", ["sngan_generator", "sagan_generator"])
def test_the_average_is_the_weighted_mean_of_parameters_and_has_the_latest_buffers(name: str) -> None:
    generator = build(name)
    average = averaged(generator)
    start = copy.deepcopy(dict(generator.named_parameters()))
    trained_a_step(generator, name)
    update_average(average, generator, decay=0.9)
    assert any(not torch.equal(start[key], value) for key, value in generator.named_parameters())
    for key, value in average.named_parameters():
        torch.testing.assert_close(value, 0.9 * start[key] + 0.1 * generator.get_parameter(key))
    for key, buffer in average.named_buffers():
        assert torch.equal(buffer, generator.get_buffer(key)), key


def test_the_average_starts_as_a_copy_in_eval_mode_that_takes_no_gradients() -> None:
    generator = build("sagan_generator")
    average = averaged(generator)
    assert all(torch.equal(value, generator.state_dict()[key]) for key, value in average.state_dict().items())
    assert not any(module.training for module in average.modules())
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert generator.training
    assert all(parameter.requires_grad for parameter in generator.parameters())


def test_the_average_converges_to_a_generator_that_rests_and_copies_it_at_decay_zero() -> None:
    generator, average = build("dcgan_generator"), averaged(stirred(build("dcgan_generator")))
    distance = [(a - b).abs().max() for a, b in zip(average.parameters(), generator.parameters(), strict=True)]
    for _ in range(20):
        update_average(average, generator, decay=0.5)
    for before, a, b in zip(distance, average.parameters(), generator.parameters(), strict=True):
        assert (a - b).abs().max() <= before * 0.5**20 + 1e-6
    trained_a_step(generator, "dcgan_generator")
    update_average(average, generator, decay=0.0)
    assert all(torch.equal(value, generator.state_dict()[key]) for key, value in average.state_dict().items())


def numbered(start: int, count: int) -> Tensor:
    """Images of one pixel that tell which they are."""
    return torch.arange(start, start + count, dtype=torch.float32).view(-1, 1, 1, 1)


def test_a_buffer_gives_back_what_it_is_given_until_it_is_full() -> None:
    buffer = ReplayBuffer((1, 1, 1), num_images=5)
    assert torch.equal(buffer(numbered(0, 3)), numbered(0, 3))
    assert torch.equal(buffer(numbered(3, 2)), numbered(3, 2))
    assert buffer.images.flatten().tolist() == [0, 1, 2, 3, 4]


def test_a_full_buffer_swaps_half_of_the_images_for_earlier_ones_all_alike_and_loses_none() -> None:
    buffer, draws = ReplayBuffer((1, 1, 1)), rng()
    returned = torch.cat([buffer(numbered(start, 1), rng=draws) for start in range(4000)]).flatten()
    replayed = returned != torch.arange(4000.0)
    # Binomial of 3950 halves: four standard deviations are 126.
    assert abs(int(replayed.sum()) - 3950 / 2) < 126
    assert not replayed[:50].any()
    assert (returned <= torch.arange(4000.0)).all()
    seen = torch.cat([returned, buffer.images.flatten()])
    # Each of 50 places is the one with probability 1/50 per swap: an image waits 50 swaps on average, 100 steps.
    ages = (torch.arange(4000.0) - returned)[replayed]
    assert 80 < ages.mean() < 120
    assert set(range(4000)) <= set(seen.int().tolist())


def test_replayed_images_are_without_gradients_and_the_given_ones_unchanged() -> None:
    buffer = ReplayBuffer((1, 1, 1), num_images=2)
    given = numbered(0, 40).requires_grad_()
    returned = buffer(given, rng=rng())
    assert not returned.requires_grad
    assert torch.equal(given, numbered(0, 40))
    assert not torch.equal(returned, given)


def test_a_buffer_resumes_from_its_state() -> None:
    buffer = ReplayBuffer((1, 1, 1), num_images=3)
    buffer(numbered(0, 2))
    resumed = ReplayBuffer((1, 1, 1), num_images=3)
    resumed.load_state_dict(buffer.state_dict())
    assert torch.equal(buffer(numbered(2, 30), rng=rng()), resumed(numbered(2, 30), rng=rng()))


def test_a_buffer_of_nothing_gives_back_all_images() -> None:
    assert torch.equal(ReplayBuffer((1, 1, 1), num_images=0)(numbered(0, 9)), numbered(0, 9))


@pytest.mark.parametrize("name", ["sngan_discriminator", "biggan_generator"])
def test_spectral_norm_returns_to_the_layers_that_had_it_and_to_no_other(name: str) -> None:
    dense, inputs = stirred(build(name)), inputs_of(name)
    small = compact(dense, PRUNERS["magnitude"]()(trace(dense, inputs), Budget.parse("keep=0.5"), None), inputs)
    assert not any(map(parametrize.is_parametrized, small.modules()))  # what `compact` leaves to be restored
    restore_spectral_norm(small, dense)
    normed = [
        {path for path, module in network.named_modules() if parametrize.is_parametrized(module)}
        for network in (small, dense)
    ]
    assert normed[0] == normed[1]
    for path in normed[0]:
        layer = small.train().get_submodule(path)
        for _ in range(200):
            weight = layer.weight  # every look in training mode is a step of the power iteration
        assert isinstance(weight, Tensor)
        assert torch.linalg.matrix_norm(weight.flatten(1), ord=2).item() == pytest.approx(1, abs=1e-3), path
