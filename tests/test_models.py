"""The networks of `sparsekit.models`: sizes as published, keys as the given weights have them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sparsekit.models import CLASSIFIERS, MODELS
from sparsekit.models.resnet import CifarResNet
from sparsekit.models.wide_resnet import WideResNet

GIVEN = Path(__file__).parents[2] / "shared" / "data"
NUM_PARAMS = {
    "digits_resnet": 2_347_690,
    "lenet_300_100": 266_610,
    "lenet5": 431_080,
    "mobilenet_v1": 3_217_226,
    "mobilenet_v2": 2_296_922,
    "resnet20": 269_722,
    "resnet20_b": 272_474,
    "resnet32": 464_154,
    "resnet32_b": 466_906,
    "resnet44": 658_586,
    "resnet44_b": 661_338,
    "resnet56": 853_018,
    "resnet56_b": 855_770,
    "resnet110": 1_727_962,
    "resnet110_b": 1_730_714,
    "vgg16": 14_987_722,
    "vgg19": 20_035_018,
    "wrn26_12": 52_520_538,
    "wrn28_2": 1_467_610,
    "wrn28_10": 36_479_194,
    "wrn40_4": 8_949_210,
}
IMAGE_SIZES = {"digits_resnet": 8, "lenet_300_100": 28, "lenet5": 28}


def build(name: str, **sizes: int) -> nn.Module:
    """Initialising the widest networks takes seconds, and their shapes need no numbers."""
    with torch.device("meta"):
        return MODELS[name](**sizes)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_network_has_its_published_number_of_parameters(name: str) -> None:
    assert sum(parameter.numel() for parameter in build(name).parameters()) == NUM_PARAMS[name]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_network_maps_images_of_any_channel_count_to_one_logit_per_class(name: str) -> None:
    size = IMAGE_SIZES.get(name, 32)
    images = torch.empty(2, 2, size, size, device="meta")
    assert build(name, num_classes=7, in_channels=2)(images).shape == (2, 7)


@pytest.mark.parametrize("name", ["digits_resnet", "lenet5", "mobilenet_v2", "resnet20", "resnet20_b", "wrn28_2"])
def test_a_fresh_network_computes_finite_logits_and_a_gradient_for_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name](in_channels=1)
    size = IMAGE_SIZES.get(name, 16)
    logits = model(torch.randn(4, 1, size, size))
    assert logits.isfinite().all()
    assert logits.std() > 0
    logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_resnet_keys_are_those_of_the_published_weights() -> None:
    keys = list(build("resnet20").state_dict())
    assert keys[:2] == ["conv1.weight", "bn1.weight"]
    assert keys[-2:] == ["linear.weight", "linear.bias"]
    blocks = {key.rsplit(".", 2)[0] for key in keys if key.startswith("layer")}
    assert blocks == {f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)}
    assert not any("shortcut" in key for key in keys)


def test_option_b_adds_a_convolution_and_a_batchnorm_where_the_width_changes() -> None:
    extra = set(build("resnet20_b").state_dict()) - set(build("resnet20").state_dict())
    assert {key.rpartition(".")[0] for key in extra} == {
        f"layer{stage}.0.shortcut.{index}" for stage in (2, 3) for index in (0, 1)
    }


def test_option_a_shortcut_takes_every_second_pixel_and_centres_the_channels_between_zeros() -> None:
    shortcut = CifarResNet(8, width=2).get_submodule("layer2.0.shortcut")
    x = torch.arange(2 * 4 * 4, dtype=torch.float32).view(1, 2, 4, 4)
    out = shortcut(x)
    assert out.shape == (1, 4, 2, 2)
    assert torch.equal(out[:, 1:3], x[:, :, ::2, ::2])
    assert not out[:, [0, 3]].any()


def test_wrn26_is_twelve_times_as_wide_behind_the_stem_of_a_narrow_network() -> None:
    weights = build("wrn26_12").state_dict()
    assert weights["conv1.weight"].shape == (16, 3, 3, 3)
    assert weights["layer1.0.conv1.weight"].shape == (192, 16, 3, 3)
    assert weights["layer1.0.shortcut.0.weight"].shape == (192, 16, 1, 1)
    assert weights["layer3.3.conv2.weight"].shape == (768, 768, 3, 3)


def test_a_depth_that_no_network_of_the_family_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"6n \+ 2.*got 21"):
        CifarResNet(21)
    with pytest.raises(ValueError, match=r"6n \+ 4.*got 26"):
        WideResNet(26, 2)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("resnet20", "resnet20-cifar10.safetensors"),
        ("resnet56", "resnet56-cifar10.safetensors"),
        ("lenet_300_100", "lenet-300-100-fashionmnist.safetensors"),
    ],
)
def test_weights_trained_elsewhere_load_strictly(name: str, file: str) -> None:
    if not (GIVEN / file).exists():
        pytest.skip(f"{file} is not in this checkout's shared data folder")
    model = MODELS[name]()
    model.load_state_dict(load_file(GIVEN / file), strict=True)
