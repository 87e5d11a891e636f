"""The GANs of `sparsekit.models`: sizes as published, and each part what its paper says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparsekit.models import CLASSIFIERS, GANS, MODELS, gan_autogan
from sparsekit.models.gan_autogan import AutoGANGenerator
from sparsekit.models.gan_blocks import ConditionalBatchNorm2d, SelfAttention, pyramid, spectrally_normed
from sparsekit.models.gan_cyclegan import CycleGANDiscriminator
from sparsekit.models.gan_resnet_discriminators import DiscriminatorBlock, ProjectionDiscriminator, ResNetDiscriminator
from tests.gans import CONDITIONAL, DISCRIMINATORS, GENERATORS, NUM_CLASSES, Z, build, inputs_of, stirred


def layer(num_in: int, num_out: int, kernel: int = 1) -> int:
    """Weights and biases of a convolution, or of a linear layer."""
    return num_in * num_out * kernel**2 + num_out


def affine(*widths: int) -> int:
    """Gains and biases of normalisations."""
    return sum(2 * width for width in widths)


# AutoGAN publishes no counts. Linear 128 -> 256 x 4 x 4; three cells of two 3x3 convolutions; 1x1 convolutions of what
# earlier cells hand on, none, one and two; BatchNorm, and a convolution to the image.
CELLS = layer(128, 256 * 16) + 6 * layer(256, 256, 3) + 3 * layer(256, 256) + affine(256) + layer(256, 3, 3)
# CycleGAN neither. InstanceNorm has gains and biases but behind the second halving and at the end of each block.
CYCLEGAN = (
    *(layer(3, 64, 7), affine(64), layer(64, 128, 3), affine(128), layer(128, 256, 3)),
    *(9 * (2 * layer(256, 256, 3) + affine(256)),),
    *(layer(256, 128, 3), affine(128), layer(128, 64, 3), affine(64), layer(64, 3, 7)),
)
PATCHES = (
    *(layer(3, 64, 4), layer(64, 128, 4), layer(128, 256, 4), layer(256, 512, 4), layer(512, 1, 4)),
    affine(128, 256, 512),
)
NUM_PARAMS = {
    "acgan_discriminator": 1_057_169,
    "acgan_generator": 4_304_387,
    "autogan_a_discriminator": 1_053_824,
    "autogan_a_generator": CELLS + 2 * layer(256, 256),  # two cells with a shortcut
    "autogan_b_discriminator": 1_053_824,
    "autogan_b_generator": CELLS + 3 * layer(256, 256),  # three
    "autogan_c_discriminator": 1_053_824,
    "autogan_c_generator": CELLS + 2 * layer(256, 256) + affine(256, 256),  # two, and BatchNorm in the first cell
    "biggan_discriminator": 2_415_170,
    "biggan_generator": 9_416_196,
    "cyclegan_discriminator": sum(PATCHES),
    "cyclegan_generator": sum(CYCLEGAN),
    "dcgan_discriminator": 2_931_009,
    "dcgan_generator": 3_812_355,
    "ggan_discriminator": 2_931_009,
    "ggan_generator": 3_812_355,
    "projgan_discriminator": 1_057_159,
    "projgan_generator": 4_304_387,
    "sagan_discriminator": 1_075_586,
    "sagan_generator": 4_386_308,
    "sngan_discriminator": 1_053_824,
    "sngan_generator": 4_276_739,
    "wgan_gp_discriminator": 1_055_879,
    "wgan_gp_generator": 4_276_739,
}


@pytest.mark.parametrize("name", GANS)
def test_every_network_has_its_number_of_parameters(name: str) -> None:
    assert sum(parameter.numel() for parameter in GANS[name]().parameters()) == NUM_PARAMS[name]


@pytest.mark.parametrize(("name", "expected"), [("sngan_generator", 3_742_464), ("sngan_discriminator", 1_052_416)])
def test_sngan_has_its_number_of_weights_in_convolutions(name: str, expected: int) -> None:
    network = GANS[name]()
    assert sum(module.weight.numel() for module in network.modules() if isinstance(module, nn.Conv2d)) == expected


def test_every_gan_is_a_generator_and_a_discriminator_beside_the_classifiers() -> None:
    assert [name.removesuffix("_generator") for name in GENERATORS] == [
        name.removesuffix("_discriminator") for name in DISCRIMINATORS
    ]
    assert len(GENERATORS) + len(DISCRIMINATORS) == len(GANS)
    assert MODELS.keys() == CLASSIFIERS.keys() | GANS.keys()
    assert not CLASSIFIERS.keys() & GANS.keys()


@pytest.mark.parametrize(("image_size", "image_channels"), [(28, 1), (32, 3)])
@pytest.mark.parametrize("name", GENERATORS)
def test_generators_make_images_in_range_that_their_inputs_tell_apart(
    name: str, image_size: int, image_channels: int
) -> None:
    network = stirred(build(name, image_size=image_size, image_channels=image_channels))
    with torch.no_grad():
        images = network(*inputs_of(name, image_size=image_size, image_channels=image_channels))
    assert images.shape == (3, image_channels, image_size, image_size)
    assert images.abs().max() <= 1
    assert images.std(0).mean() > 0.01


@pytest.mark.parametrize(("image_size", "image_channels"), [(28, 1), (32, 3)])
@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_discriminators_give_every_image_a_logit(name: str, image_size: int, image_channels: int) -> None:
    network = stirred(build(name, image_channels=image_channels))
    inputs = inputs_of(name, image_size=image_size, image_channels=image_channels)
    before = inputs[0].clone()
    with torch.no_grad():
        logits = network(*inputs)
    if name == "acgan_discriminator":
        logits, class_logits = logits
        assert class_logits.shape == (3, NUM_CLASSES)
    assert logits.shape == (3,)
    assert logits.std() > 0
    assert torch.equal(inputs[0], before)


@pytest.mark.parametrize("name", GANS)
def test_one_loss_over_two_passes_reaches_every_parameter(name: str) -> None:
    network = build(name)
    inputs = inputs_of(name)
    passes = [network(*inputs), network(inputs[0].flip(0), *inputs[1:])]  # as real and fake images
    outputs = [output if isinstance(output, tuple) else (output,) for output in passes]
    sum(tensor.square().sum() for output in outputs for tensor in output).backward()
    for path, parameter in network.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path


@pytest.mark.parametrize("name", sorted(CONDITIONAL))
def test_conditional_networks_answer_to_the_class(name: str) -> None:
    network = stirred(build(name))
    given, labels = inputs_of(name)
    with torch.no_grad():
        one, other = network(given, labels), network(given, (labels + 1) % NUM_CLASSES)
    assert ((one - other).reshape(3, -1).abs().amax(1) > 0.01).all()


@pytest.mark.parametrize("name", [name for name in GENERATORS if not name.startswith("cyclegan")])
def test_images_of_a_size_that_cannot_be_doubled_to_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"image size must be 4, 5, 6 or 7 times 2, 4, 8, \.\.\., got 30"):
        build(name, image_size=30)


@pytest.mark.parametrize("image_size", [1, 4, 7, 9, 15, 30, 0, -8])
def test_sizes_without_a_pyramid_are_refused(image_size: int) -> None:
    with pytest.raises(ValueError, match=f"got {image_size}"):
        pyramid(image_size)


@pytest.mark.parametrize("image_size", [8, 10, 12, 14, 28, 32, 48, 64, 96, 256])
def test_a_pyramid_doubles_up_to_the_image(image_size: int) -> None:
    side, num_doublings = pyramid(image_size)
    assert 4 <= side <= 7
    assert side * 2**num_doublings == image_size


def test_conditional_batch_norm_is_batch_norm_with_the_class_s_gain_and_bias() -> None:
    torch.manual_seed(0)
    x, labels = torch.randn(6, 4, 5, 5, dtype=torch.float64), torch.tensor([2, 0, 1, 2, 2, 0])
    norm = ConditionalBatchNorm2d(4, nn.Embedding(3, 4), nn.Embedding(3, 4)).double()
    got = norm(x, labels)
    normed = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-4).sqrt()
    assert isinstance(norm.gain, nn.Embedding)
    assert isinstance(norm.bias, nn.Embedding)
    for row, label in enumerate(labels.tolist()):
        gain, bias = 1 + norm.gain.weight[label], norm.bias.weight[label]
        torch.testing.assert_close(got[row], normed[row] * gain[:, None, None] + bias[:, None, None])


def test_self_attention_starts_as_the_identity() -> None:
    x = torch.randn(2, 16, 6, 6)
    assert torch.equal(SelfAttention(16)(x), x)


def test_self_attention_averages_pooled_values_by_how_well_their_keys_fit() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(16).double()
    nn.init.constant_(attention.gate, 0.7)
    x = torch.randn(1, 16, 4, 4, dtype=torch.float64)
    got = attention(x)[0]

    def matrix(conv: nn.Conv2d) -> Tensor:
        return conv.weight[:, :, 0, 0]

    def maxima(conv: nn.Conv2d) -> list[Tensor]:
        maps = torch.einsum("oc,chw->ohw", matrix(conv), x[0])
        return [maps[:, i : i + 2, j : j + 2].amax((1, 2)) for i in (0, 2) for j in (0, 2)]

    keys, values = maxima(attention.key), maxima(attention.value)
    for i in range(4):
        for j in range(4):
            query = matrix(attention.query) @ x[0, :, i, j]
            fits = torch.stack([query @ key for key in keys]).exp()
            seen = sum(fit * value for fit, value in zip(fits / fits.sum(), values, strict=True))
            torch.testing.assert_close(got[:, i, j], x[0, :, i, j] + 0.7 * (matrix(attention.out) @ seen))


@pytest.mark.parametrize("name", ["sngan_discriminator", "sagan_discriminator", "sagan_generator", "biggan_generator"])
def test_every_layer_that_is_spectrally_normed_has_norm_one(name: str) -> None:
    network = build(name)
    plain = []
    for path, module in network.named_modules():
        if not isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
            continue
        if not parametrize.is_parametrized(module):
            plain.append(path)
            continue
        for _ in range(200):
            weight = module.weight  # every look in training mode is a step of the power iteration
        largest = torch.linalg.matrix_norm(weight.flatten(1), ord=2)
        assert largest.item() == pytest.approx(1, abs=1e-3), path
    assert plain == (["shared"] if name == "biggan_generator" else [])


def test_spectral_norm_is_left_out_where_it_is_not_asked_for() -> None:
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    spectrally_normed(layers[1])
    assert [parametrize.is_parametrized(module) for module in layers] == [False, True]


@pytest.mark.parametrize("inplace", [False, True])
def test_an_inplace_relu_in_front_of_the_block_is_also_in_front_of_its_shortcut(inplace: bool) -> None:
    torch.manual_seed(0)
    block = DiscriminatorBlock(8, nn.Identity, down=False, inplace=inplace)
    x = torch.randn(2, 8, 6, 6)
    residual = block.conv2(F.relu(block.conv1(F.relu(x))))
    expected = residual + (F.relu(x) if inplace else x)
    torch.testing.assert_close(block(x.clone()), expected)


def test_the_projection_discriminator_adds_the_product_of_class_and_features() -> None:
    network = stirred(build("projgan_discriminator"))
    assert isinstance(network, ProjectionDiscriminator)
    x, labels = inputs_of("projgan_discriminator")
    with torch.no_grad():
        features = network.features(x)
        classes = network.embedding.weight[labels]
        logits = network.linear(features)[:, 0]
        torch.testing.assert_close(network(x, labels), logits + torch.einsum("nc,nc->n", classes, features))


def test_residual_discriminators_sum_over_positions() -> None:
    network = stirred(build("sngan_discriminator"))
    assert isinstance(network, ResNetDiscriminator)
    maps: list[Tensor] = []
    network.blocks.register_forward_hook(lambda _, __, output: maps.append(output))
    (x,) = inputs_of("sngan_discriminator")
    with torch.no_grad():
        logits = network(x)
        weight = network.linear.weight[0]
    by_position = [F.relu(maps[0][:, :, i, j]) @ weight for i in range(7) for j in range(7)]
    torch.testing.assert_close(logits, torch.stack(by_position).sum(0))


@pytest.mark.parametrize(
    "name", [f"{gan}_{part}" for gan in ("sagan", "biggan") for part in ("generator", "discriminator")]
)
def test_attention_looks_at_images_of_half_the_size(name: str) -> None:
    network = build(name, image_size=32)
    shapes: list[torch.Size] = []
    for module in network.modules():
        if isinstance(module, SelfAttention):
            module.register_forward_hook(lambda _, args, __: shapes.append(args[0].shape))
    network(*inputs_of(name, image_size=32))
    assert shapes == [(3, 16, 16, 16)]


def test_each_block_of_biggan_reads_its_own_part_of_the_noise() -> None:
    network = stirred(build("biggan_generator"))
    outputs: list[Tensor] = []
    network.get_submodule("blocks.0").register_forward_hook(lambda _, __, output: outputs.append(output))
    z, labels = inputs_of("biggan_generator")
    moved = z.clone()
    moved[:, -Z // 3 :] += 1  # two blocks, hence three parts
    with torch.no_grad():
        images, others = network(z, labels), network(moved, labels)
    assert torch.equal(*outputs)
    assert not torch.allclose(images, others, atol=1e-3)


def test_biggan_refuses_noise_that_cannot_be_shared_out() -> None:
    with pytest.raises(ValueError, match="z must be a multiple of 4 at image size 32, got 81"):
        GANS["biggan_generator"](z=81)


def test_autogan_hands_on_the_sum_with_earlier_cells() -> None:
    torch.manual_seed(0)
    cell = gan_autogan.AutoGANCell(4, gan_autogan.Cell("bilinear", True), num_skips=1)
    x, skip = torch.randn(1, 4, 5, 5), torch.randn(1, 4, 3, 3)

    def up(maps: Tensor) -> Tensor:
        return F.interpolate(maps, size=(10, 10), mode="bilinear")

    out, inner = cell(x, [skip])
    expected = cell.conv1(up(F.relu(x))) + cell.skips[0](up(skip))
    assert cell.shortcut is not None
    torch.testing.assert_close(inner, expected)
    torch.testing.assert_close(out, cell.conv2(F.relu(expected)) + cell.shortcut(up(x)))


def test_autogan_refuses_images_that_need_more_cells_than_were_found() -> None:
    with pytest.raises(ValueError, match="image size 64 needs 4 cells, the network has 3"):
        AutoGANGenerator(gan_autogan.A, image_size=64)


def test_cyclegan_judges_patches_of_seventy_pixels_and_averages() -> None:
    network = CycleGANDiscriminator(ch=4)
    # InstanceNorm looks at whole images; what is left sees only its patch.
    for module in list(network.layers):
        if isinstance(module, nn.InstanceNorm2d):
            network.layers[list(network.layers).index(module)] = nn.Identity()
    torch.manual_seed(0)
    x = torch.randn(1, 3, 128, 128, requires_grad=True)
    patches = network.layers(x)
    torch.testing.assert_close(network(x), patches.flatten(1).mean(1))
    (gradient,) = torch.autograd.grad(patches[0, 0, 7, 7], x)
    rows, columns = gradient.abs().sum((0, 1)).nonzero().unbind(1)
    assert [int(places.amax() - places.amin()) + 1 for places in (rows, columns)] == [70, 70]
