"""The networks of the zoo: how each is built, what it is fed, and how large it is. Random weights, no downloads.

Torchvision: everything it lists, but its quantised copies. timm: the smallest model of every module of `timm.models`,
and architectures that share a module with others. `python -m benchmarks.zoo_models` searches for the smallest anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torchvision.models as tv
from timm.models import list_models, list_modules
from torch import Tensor, nn

from benchmarks import zoo_networks as own

# name=millions of parameters: one per module of timm.models in timm 1.0.31, timm's own toy models (test_*) left out.
TIMM_FAMILIES = """
    beit_base_patch16_224=86.5 halonet_h1=8.1 mobileone_s1=4.8 cait_xxs24_224=12.0 coat_tiny=5.5 convit_tiny=5.7
    convmixer_768_32=21.1 convnext_zepto_rms=2.2 cpubone_nano=6.5 crossvit_tiny_240=7.0 csatv2=11.1
    cs3darknet_focus_s=3.3 cspnext_tiny=2.7 davit_tiny=28.4 deepseek_vit_412m=411.8 deit_tiny_patch16_224=5.7
    densenet121=8.0 dla46x_c=1.1 dpn48b=9.1 edgenext_xx_small=1.3 efficientformer_l1=12.3 efficientformerv2_s0=3.6
    mobilenetv2_035=1.7 efficientvim_m1=6.7 efficientvit_b0=3.4 efficientvit_m0=2.3 vit_tiny_patch16_dinov3_qkvb=5.5
    fasternet_t0=3.9 fastvit_t8=4.0 focalnet_tiny_srf=28.4 gcvit_xxtiny=12.0 gemma4_vit_167m=167.4 ghostnet_050=2.6
    hardcorenas_b=5.2 hgnetv2_b0=6.0 hiera_tiny_224=27.9 sam2_hiera_tiny=26.9 hrnet_w18_small=13.2 iformer_t=2.9
    inception_next_atto=4.2 inception_resnet_v2=55.8 inception_v3=23.8 inception_v4=42.7 lcnetv2_small=4.1
    levit_128s=7.8 lowformer_b0=14.1 mambaout_femto=7.3 maxvit_pico_rw_256=7.5 poolformerv2_s12=11.9
    gmlp_ti16_224=5.9 mobilenetv3_small_050=1.6 mobilenetv5_base=82.6 mobilevit_xxs=1.3 mvitv2_tiny=24.2
    naflexvit_base_patch16_parfac_gap=86.5 nasnetalarge=88.8 nest_tiny=17.1 nextvit_small=31.8 nf_regnet_b0=8.8
    pit_ti_224=4.8 pnasnet5large=86.1 pvt_v2_b0=3.7 qwen3_vit_88m=87.4 rdnet_tiny=23.9 regnetx_002=2.7
    repghostnet_050=2.3 repvit_m1=5.5 res2next50=24.7 resnest14d=10.6 resnet10t=5.4 resnetv2_18=11.7 rexnet_100=4.8
    selecsls42=30.4 legacy_seresnet18=11.8 sequencer2d_s=27.7 shvit_s1=6.3 skresnet18=12.0 starnet_s050=0.5
    swiftformer_xs=3.5 swin_tiny_patch4_window7_224=28.3 swinv2_tiny_window16_256=28.3 swinv2_cr_tiny_224=28.3
    tiny_vit_5m_224=12.1 tnt_s_legacy_patch16_224=23.8 tresnet_m=31.4 twins_svt_small=24.1 vgg11=132.9
    visformer_tiny=10.3 vit_tiny_patch16_224=5.7 vit_tiny_r_s16_p8_224=6.3 vit_srelpos_small_patch16_224=22.0
    samvit_base_patch16_224=86.5 vitamin_small_224=22.2 volo_d1_224=26.6 ese_vovnet19b_slim_dw=1.9
    legacy_xception=22.9 xception41p=26.9 xcit_nano_12_p8_224=3.0
"""
# Failures of other tools that users reported, and architectures that share a module with the ones above.
TIMM_MORE = """
    botnet26t_256=12.5 caformer_s18=26.3 coat_lite_tiny=5.7 coatnet_pico_rw_224=10.9 convformer_s18=26.8
    convnextv2_atto=3.7 cspdarknet53=27.6 cspresnext50=20.6 deit3_small_patch16_224=22.1
    deit_tiny_distilled_patch16_224=5.9 dla34=15.7 dm_nfnet_f0=71.5 dpn68=12.6 eca_nfnet_l0=24.1
    eva02_tiny_patch14_224=5.5 flexivit_small=22.1 gernet_s=8.2 ghostnetv2_100=6.2 ghostnetv3_050=3.4
    halonet26t=12.5 lambda_resnet26t=11.0 lcnet_050=1.9 maxvit_tiny_tf_224=30.9 mixer_s32_224=19.1 mixnet_s=4.1
    mobileone_s0=5.3 mobilevitv2_050=1.4 nfnet_l0=35.1 pvt_v2_b2_li=22.6 regnety_002=3.2 repvgg_a0=9.1
    res2net50_14w_8s=25.1 resmlp_12_224=15.4 resnetv2_50=25.5 sehalonet33ts=13.7 seresnext26d_32x4d=16.8
    tf_efficientnet_b0=5.3 tinynet_e=2.0 twins_pcpvt_small=24.1 vovnet39a=22.6
"""
FLOWS = {"raft_large": 5.3, "raft_small": 1.0}


@dataclass(frozen=True)
class Case:
    """One network of the zoo.

    Attributes:
        name: unique, "torchvision:resnet18".
        kind: the heading it stands under.
        millions: parameters in millions, which decides the order of the run.
        build: a fresh network with random weights.
        shapes: of its inputs.
        listed: the inputs are one list of images instead of separate arguments.
    """

    name: str
    kind: str
    millions: float
    build: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    listed: bool = False

    def inputs(self) -> tuple[Any, ...]:
        """Positional arguments of one forward pass; standard normal."""
        tensors = [torch.randn(shape) for shape in self.shapes]
        return (tensors,) if self.listed else tuple(tensors)


def cases() -> list[Case]:
    """The whole zoo, heading by heading."""
    return [
        *(_classifier(name) for name in tv.list_models(module=tv)),
        *(_segmentation(name) for name in tv.list_models(module=tv.segmentation)),
        *(_video(name) for name in tv.list_models(module=tv.video)),
        *(_detection(name) for name in tv.list_models(module=tv.detection)),
        *(_flow(name) for name in tv.list_models(module=tv.optical_flow)),
        *_generators(),
        *(_timm(*entry.split("=")) for entry in (TIMM_FAMILIES + TIMM_MORE).split()),
    ]


def _millions(name: str) -> float:
    return float(tv.get_model_weights(name).DEFAULT.meta["num_params"] / 1e6)


def _classifier(name: str) -> Case:
    # Several weights of one network were trained at several sizes; the smallest is what its constructor assumes.
    size = min(weights.transforms().crop_size[0] for weights in tv.get_model_weights(name))
    # Left unset, they warn that their default will change.
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return Case(
        f"torchvision:{name}",
        "torchvision, classification",
        _millions(name),
        lambda: tv.get_model(name, weights=None, **options),
        ((1, 3, size, size),),
    )


def _segmentation(name: str) -> Case:
    return Case(
        f"torchvision:{name}",
        "torchvision, segmentation",
        _millions(name),
        lambda: tv.get_model(name, weights=None, weights_backbone=None),
        ((1, 3, 224, 224),),
    )


def _video(name: str) -> Case:
    size = 112 if name in ("mc3_18", "r2plus1d_18", "r3d_18") else 224
    return Case(
        f"torchvision:{name}",
        "torchvision, video",
        _millions(name),
        lambda: tv.get_model(name, weights=None),
        ((1, 3, 16, size, size),),
    )


def _detection(name: str) -> Case:
    # Untrained scores lie below every threshold, and a detector that finds nothing would prove nothing.
    options: dict[str, float] = {"detections_per_img": 20}
    if "rcnn" in name:
        options |= {"box_detections_per_img": 20, "box_score_thresh": 0.0, "rpn_post_nms_top_n_test": 50}
        options.pop("detections_per_img")
    else:
        options |= {"score_thresh": 0.0, "topk_candidates": 50}
    if not name.startswith("ssd"):
        options |= {"min_size": 160, "max_size": 224}
    return Case(
        f"torchvision:{name}",
        "torchvision, detection",
        _millions(name),
        lambda: tv.get_model(name, weights=None, weights_backbone=None, **options),
        ((3, 160, 192), (3, 192, 160)),
        listed=True,
    )


def _flow(name: str) -> Case:
    return Case(
        f"torchvision:{name}",
        "torchvision, optical flow",
        FLOWS[name],
        lambda: tv.get_model(name, weights=None),
        ((1, 3, 128, 128), (1, 3, 128, 128)),
    )


def _generators() -> list[Case]:
    def case(name: str, millions: float, build: Callable[[], nn.Module], *shape: int) -> Case:
        return Case(f"own:{name}", "generators and U-Net", millions, build, (shape,))

    return [
        case("dcgan", 3.6, own.dcgan, 1, 100, 1, 1),
        case("cyclegan", 11.4, own.cyclegan, 1, 3, 64, 64),
        case("edsr", 1.5, own.SuperResolution, 1, 3, 48, 48),
        case("sagan", 3.8, own.self_attention_generator, 1, 128, 1, 1),
        case("unet", 31.0, own.UNet, 1, 3, 96, 96),
    ]


def _timm(name: str, millions: str) -> Case:
    shape: Any = timm.get_pretrained_cfg_value(name, "input_size")
    return Case(f"timm:{name}", "timm", float(millions), lambda: timm.create_model(name), ((1, *shape),))


def redraw(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Replace what would make a comparison vacuous, in place; `model` is in eval mode.

    Zeros and LayerScale's 1e-5 hide whole branches, and where a bias or a gamma is one constant, cutting the wrong
    positions changes nothing: every parameter that holds a single value is redrawn. BatchNorm statistics become those
    of `inputs`, disturbed at random: away from them the signal dies within fifty layers, and any output is right.
    """
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if value.numel() > 0 and torch.equal(value.amin(), value.amax()):
            parameter.data = _drawn(name, value, float(value.flatten()[0]))
    hooks = [
        module.register_forward_pre_hook(_observe)
        for module in model.modules()
        if {"running_mean", "running_var"} <= dict(module.named_buffers(recurse=False)).keys()
    ]
    with torch.no_grad():
        model(*inputs)
    for hook in hooks:
        hook.remove()


def _drawn(name: str, value: Tensor, constant: float) -> Tensor:
    if abs(constant) > 1e-3:
        return constant * torch.empty_like(value).uniform_(0.8, 1.2)
    if name.endswith("weight") and value.dim() > 1 and value[0].numel() > 1:
        return torch.randn_like(value).div_(value[0].numel() ** 0.5)
    if name.endswith("bias"):
        return 0.1 * torch.randn_like(value)
    # Zero gammas, LayerScale, gates: large enough to be seen, small enough for a hundred residual blocks.
    return torch.empty_like(value).uniform_(0.1, 0.3)


def _observe(module: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Statistics of the one example at hand; where a channel is a single position its own variance is zero."""
    channels = args[0].detach().movedim(1, 0).flatten(1)
    var = channels.var(1, correction=0).clamp_min(0.1 * channels.var() + 1e-6)
    module.get_buffer("running_mean").copy_(channels.mean(1) + 0.1 * var.sqrt() * torch.randn_like(var))
    module.get_buffer("running_var").copy_(var * torch.empty_like(var).uniform_(0.8, 1.2))


def smallest_of_timm() -> str:
    """The model with the fewest parameters of every module of timm.models; builds a thousand models without storage."""
    found = []
    for module in list_modules():
        sizes = {}
        for name in list_models(module=module, exclude_filters="test_*"):
            with torch.device("meta"):
                sizes[name] = sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        name = min(sizes, key=lambda name: (sizes[name], name))
        found.append(f"{name}={sizes[name] / 1e6:.1f}")
    return " ".join(found)


if __name__ == "__main__":
    print(smallest_of_timm())
