"""Weights that a module computes from others (spectral norm, weight norm, pruning masks), made plain parameters."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def is_computed(module: nn.Module) -> bool:
    """Whether the module computes one of its weights before every forward."""
    hooks = module._forward_pre_hooks.values()
    return _is_parametrized(module) or any(isinstance(hook, _HOOKS) for hook in hooks)


def _is_parametrized(module: nn.Module) -> bool:
    return "parametrizations" in module._modules and parametrize.is_parametrized(module)  # looked up alone, it is slow


_HOOKS = (SpectralNorm, WeightNorm, prune.BasePruningMethod)


def bake(module: nn.Module) -> None:
    """Replace, in place, each computed weight by a parameter of its present value: the function stays the same."""
    if _is_parametrized(module):
        _bake_parametrizations(module)
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
        elif isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)


def bake_all(model: nn.Module) -> nn.Module:
    """`bake` every module of `model`, in place; returns it."""
    for module in list(model.modules()):
        bake(module)
    return model


def _bake_parametrizations(module: nn.Module) -> None:
    """Torch's own removal changes the module's class, which a copy shares with the original."""
    computations = module.get_submodule("parametrizations").eval()  # or spectral norm takes a step of its iteration
    names = [name for name, _ in computations.named_children()]
    values = {name: getattr(module, name).detach() for name in names}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value))
