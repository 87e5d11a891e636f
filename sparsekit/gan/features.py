"""Networks whose features say how alike two sets of images are.

Any classifier will do. The Inception network that FID and IS are defined by comes from torch-fidelity, with its
weights; nothing measured on another network carries those names.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.errors import DataError, UsageError, nearest
from sparsekit.images import MEAN, STD
from sparsekit.surgery import copied

_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # its last part: how the file's SHA-256 starts
_INCEPTION_NAMES = {"fd": "fid"}  # what goes by another name, measured on Inception


@dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """What images are compared by.

    Attributes:
        name: part of the name of every metric measured on it.
        key: a hash of all that its features depend on.
        extract: uint8 [N, C, H, W] -> features, float [N, D], and class logits, float [N, K].
        is_inception: it is the network of FID and IS.
    """

    name: str
    key: str
    extract: Callable[[Tensor], tuple[Tensor, Tensor]]
    is_inception: bool = False

    def metric(self, name: str) -> str:
        """What a metric measured on this network is called.

        >>> FeatureNetwork("resnet56", "", lambda x: (x, x)).metric("fd")
        'fd_resnet56'
        """
        return _INCEPTION_NAMES.get(name, name) if self.is_inception else f"{name}_{self.name}"


def features_of(
    network: nn.Module,
    name: str,
    *,
    layer: str | None = None,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    image_size: int | None = None,
) -> FeatureNetwork:
    """The features that `network`, a trained classifier, tells classes by. It is copied, where it is.

    Args:
        name: as in `fd_resnet56`.
        layer: path of the module whose input the features are, [N, D] or [N, D, H, W], then averaged over positions;
            the last linear layer unless given.
        mean: per channel, what the network expects pixels in [0, 1] to be shifted by; grey images become as many
            channels as it has.
        std: likewise, what they are divided by.
        image_size: height and width that images are scaled to; as they come unless given.

    Raises:
        UsageError: no such layer, or a layer is needed and the network has no linear one.
        DataError: on images of other channels, or features of another shape.

    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> features, logits = features_of(network, "tiny", mean=[0.5], std=[0.5]).extract(torch.zeros(5, 1, 2, 2).byte())
    >>> features.shape, logits.shape
    (torch.Size([5, 3]), torch.Size([5, 2]))
    """
    network = copied(network).eval().requires_grad_(False)
    path = layer or _last_linear(network, name)
    modules = dict(network.named_modules())
    if path not in modules:
        raise UsageError(f"layer {path!r} of {name}: no such module{nearest(path, [*filter(None, modules)])}")
    mean_C11, std_C11 = (torch.tensor(list(values))[:, None, None] for values in (mean, std))

    @torch.no_grad()
    def extract(pixels: Tensor) -> tuple[Tensor, Tensor]:
        seen: list[Tensor] = []
        device = next((parameter.device for parameter in network.parameters()), pixels.device)
        inputs = _scaled(pixels.to(device), mean_C11.to(device), std_C11.to(device), image_size, name)
        with modules[path].register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0])):
            logits = network(inputs)
        return _pooled(seen[-1], f"layer {path!r} of {name}"), logits

    return FeatureNetwork(name, _key(network, path, tuple(mean), tuple(std), image_size), extract)


def inception(weights: Path | None = None) -> FeatureNetwork:
    """The network of FID and IS: torch-fidelity's conversion of the weights of 2015, 2048 features, biasless logits.

    Args:
        weights: the file; where torch-fidelity keeps it unless given. Nothing is downloaded.

    Raises:
        UsageError: torch-fidelity is not installed.
        DataError: the weights are not there, or are others.

    Sources: Heusel et al. 2017 (FID), arXiv:1706.08500; Salimans et al. 2016 (IS), arXiv:1606.03498.
    """
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as source  # optional: the extra `gan`
    except ImportError:
        raise UsageError("FID and IS: torch-fidelity is not installed; pip install 'sparsekit[gan]'") from None
    path = weights or Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION
    if not path.is_file():
        raise DataError(f"{path}: no such file; FID's weights are at {source.URL_INCEPTION_V3}")
    content = path.read_bytes()
    key = hashlib.sha256(content).hexdigest()
    if not key.startswith(_INCEPTION.removesuffix(".pth").rpartition("-")[2]):
        raise DataError(f"{path}: damaged, or not the weights that FID is defined by ({_INCEPTION})")
    return _torch_fidelity(source.FeatureExtractorInceptionV3, content, key)


def _torch_fidelity(extractor: Callable[..., Any], content: bytes, key: str) -> FeatureNetwork:
    """Its extractor unpickles whatever file it is given, so it gets one written from what loads as plain tensors."""
    plain = io.BytesIO()
    try:
        torch.save(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True), plain)
    except pickle.UnpicklingError as error:
        raise DataError("Inception's weights: the file holds more than tensors") from error
    plain.seek(0)
    network = extractor("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=plain)

    @torch.no_grad()
    def extract(pixels: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = network(pixels.cpu().expand(-1, 3, -1, -1))
        return features, logits

    return FeatureNetwork("inception", key, extract, is_inception=True)


def _last_linear(network: nn.Module, name: str) -> str:
    paths: list[str] = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    if not paths:
        raise UsageError(f"{name}: has no linear layer; name the one whose input the features are")
    return paths[-1]


def _scaled(pixels: Tensor, mean_C11: Tensor, std_C11: Tensor, image_size: int | None, name: str) -> Tensor:
    """uint8 images as the network expects them."""
    if pixels.shape[1] not in (1, len(mean_C11)):
        raise DataError(f"{name}: takes images of {len(mean_C11)} channels, got {list(pixels.shape)}")
    images = pixels.expand(-1, len(mean_C11), -1, -1).float() / 255
    if image_size is not None and images.shape[2:] != (image_size, image_size):
        images = F.interpolate(images, (image_size, image_size), mode="bilinear", antialias=True)
    return (images - mean_C11) / std_C11


def _pooled(features: Tensor, where: str) -> Tensor:
    if features.dim() == 4:
        return features.mean((2, 3))
    if features.dim() == 2:
        return features
    raise DataError(f"{where}: reads {list(features.shape)}, expected features [N, D] or [N, D, H, W]")


def _key(network: nn.Module, *settings: object) -> str:
    digest = hashlib.sha256(repr((type(network).__qualname__, *settings)).encode())
    for name, value in network.state_dict().items():
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
