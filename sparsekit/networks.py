"""Names -> networks, and weight files -> networks. No pickle."""

from __future__ import annotations

import pickle
import struct
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsekit.errors import DataError, UsageError, nearest
from sparsekit.factory import load_factory
from sparsekit.models import CLASSIFIERS, GANS, MODELS

# What torch's unpickler raises on damaged files, found by damaging some thousands.
_UNREADABLE = (
    *(pickle.UnpicklingError, struct.error, OSError, EOFError, RuntimeError),
    *(ValueError, LookupError, TypeError, AttributeError, AssertionError),
)


def build_network(name: str, *, num_classes: int = 10, in_channels: int = 3) -> nn.Module:
    """A freshly initialised network, in eval mode.

    Args:
        name: a key of `MODELS`, `torchvision:NAME`, `timm:NAME` or `path/to/file.py:factory`; a user's factory
            takes no arguments and decides everything itself.
        num_classes: outputs, for the named ones.
        in_channels: channels of the input image; torchvision's have 3.

    Raises:
        UsageError: an unknown name, or timm is not installed.
        DataError: the user's file or factory is missing, or returns no nn.Module.
    """
    source, colon, inner = name.partition(":")
    if source == "torchvision" and colon:
        return _torchvision(inner, num_classes)
    if source == "timm" and colon:
        return _timm(inner, num_classes, in_channels)
    if source.endswith(".py") and colon:
        network = load_factory(name)()
        if not isinstance(network, nn.Module):
            raise DataError(f"{name}: expected the factory to return an nn.Module, got {type(network).__name__}")
        return network.eval()
    if name in GANS:
        raise UsageError(f"model {name!r}: one of a GAN's two networks; sparsekit.models.MODELS builds it")
    if name not in MODELS:
        raise UsageError(f"model {name!r}: unknown{nearest(name, [*CLASSIFIERS, 'torchvision:resnet50'])}")
    return MODELS[name](num_classes=num_classes, in_channels=in_channels).eval()


def _torchvision(name: str, num_classes: int) -> nn.Module:
    import torchvision  # takes over a second, and most networks do not come from there

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise UsageError(f"model 'torchvision:{name}': unknown{nearest(name, names)}")
    # Left alone, these two warn that their slow initialisation will change one day.
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    network: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes, **options)
    return network.eval()


def _timm(name: str, num_classes: int, in_channels: int) -> nn.Module:
    try:
        import timm  # optional: only for the networks that carry its name
    except ImportError:
        raise UsageError(f"model 'timm:{name}': timm is not installed; pip install timm") from None
    if name not in timm.list_models():
        raise UsageError(f"model 'timm:{name}': unknown{nearest(name, timm.list_models())}")
    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=num_classes, in_chans=in_channels)
    return network.eval()


def load_weights(network: nn.Module, path: Path) -> None:
    """Fill `network` in place from a safetensors file or a torch state dict; keys and shapes must match.

    Raises:
        DataError: a missing or damaged file, or the first three keys or shapes that do not match. The network is
            then as it was.
    """
    state = _read_state(path)
    # Wrappers (DataParallel, torch.compile) prefix every key alike.
    for prefix in ("module.", "_orig_mod."):
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    problems = _mismatches(network.state_dict(), state)
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise DataError(f"weights {path}: {'; '.join(problems[:3])}{more}")
    network.load_state_dict(state, strict=False)


def _mismatches(expected: dict[str, Tensor], state: dict[str, Tensor]) -> list[str]:
    problems = [
        f"{key!r} is missing" for key in expected if key not in state and not key.endswith("num_batches_tracked")
    ]
    problems += [f"{key!r} is not in the network" for key in state if key not in expected]
    problems += [
        f"{key!r} is {list(state[key].shape)}, the network's is {list(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    return problems


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise DataError(f"weights {path}: no such file")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise DataError(f"weights {path}: damaged: {error}") from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        # Torch's own text advises to load the file unsafely.
        reason = type(error).__name__
        raise DataError(f"weights {path}: damaged, or holds more than tensors ({reason})") from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict) or not state or not all(map(_is_weight, state.items())):
        raise DataError(f"weights {path}: expected a state dict of tensors")
    return dict(state)


def _is_weight(entry: tuple[object, object]) -> bool:
    name, value = entry
    return isinstance(name, str) and isinstance(value, Tensor)
