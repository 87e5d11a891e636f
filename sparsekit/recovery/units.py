"""The layers of a small network that can be repaired, each beside the dense network's layer of the same name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from sparsekit.errors import UsageError
from sparsekit.plan import COUNT, PruningPlan
from sparsekit.program import Program
from sparsekit.recovery.lockstep import Stop

Kept = Mapping[tuple[str, int], Tensor]  # (tensor, dim) -> int64, the dense positions that are left


@dataclass(frozen=True, eq=False)
class Unit:
    """A convolution or linear layer that the forward calls once, and the BatchNorm that reads its very output.

    Attributes:
        name: the layer's path.
        norm: the BatchNorm's path, None where there is none.
        kept: int64 [K], which of the dense layer's outputs the small layer has.
        moment: when the forward calls the layer; larger is later.
        end_moment: when the unit's last module returns.
        stream: where what the unit's output is added to is seen before that; None where it is not.
        stream_moment: when.
    """

    name: str
    norm: str | None
    kept: Tensor
    moment: int
    end_moment: int
    stream: Stop | None
    stream_moment: int

    @property
    def end(self) -> str:
        """The path of the unit's last module."""
        return self.norm or self.name


def units(dense: nn.Module, small: nn.Module, plan: PruningPlan, example: Tensor) -> list[Unit]:
    """The layers of `small` that can be repaired, in the order of its forward pass.

    Left out are layers that run several times, whose weight is shared or computed, and those of which the plan does
    not say what is left.

    Args:
        dense: the network that the plan was made for.
        small: what the plan made of it.
        plan: empty where nothing was cut.
        example: an input of both networks, batch first.

    Raises:
        UsageError: the small network is a recorded program, which has no layers.
    """
    if isinstance(small, Program):
        raise UsageError(
            "recovery: the small network is a recorded program, which has weights but no layers to repair; "
            "only distillation works on it"
        )
    kept, walk, twins = kept_positions(plan), _watch(small, example), _watch(dense, example).once
    owners = Counter(id(parameter) for _, parameter in small.named_parameters(remove_duplicate=False))
    found = []
    for name in walk.once:
        layer = small.get_submodule(name)
        if not isinstance(layer, nn.Linear | _ConvNd) or name not in twins:
            continue
        weight = layer._parameters.get("weight")
        if weight is None or owners[id(weight)] > 1:
            continue
        norm = walk.norm_of(name, small)
        outputs = _kept_outputs(name, norm, dense.get_submodule(name), kept)
        if len(outputs) == num_outputs(layer):
            stream = walk.stream_of(name, norm or name)
            if stream and stream.name not in twins:
                stream = None
            moments = walk.moment(Stop(name, "input")), walk.moment(Stop(norm or name, "output"))
            found.append(Unit(name, norm, outputs, *moments, stream, walk.moment(stream) if stream else -1))
    return found


def kept_positions(plan: PruningPlan) -> Kept:
    """Which positions along each dimension that the plan cuts are left: (tensor, dim) -> int64."""
    stays: dict[tuple[str, int], Tensor] = {}
    for group, keep in plan.keep.items():
        for slot in group.slots:
            if slot.dim != COUNT:
                mask = stays.setdefault((slot.tensor, slot.dim), torch.ones(slot.size, dtype=torch.bool))
                mask[slot.index[~keep].flatten()] = False
    return {place: mask.nonzero().flatten() for place, mask in stays.items()}


def num_outputs(layer: nn.Module) -> int:
    """Output channels of a convolution, output features of a linear layer."""
    return layer.out_channels if isinstance(layer, _ConvNd) else layer.get_parameter("weight").shape[0]


def channel_dim(layer: nn.Module) -> int:
    """The dimension of the layer's input and output that holds channels."""
    return 1 if isinstance(layer, _ConvNd | _BatchNorm) else -1


def holds_constant(network: nn.Module, unit: Unit) -> bool:
    """Whether there is a bias, or statistics of a BatchNorm, to which a constant of the output can be added."""
    layer, norm = network.get_submodule(unit.name), network.get_submodule(unit.end)
    return layer.bias is not None or (isinstance(norm, _BatchNorm) and norm.running_mean is not None)


@torch.no_grad()
def shift_output(network: nn.Module, unit: Unit, delta_K: Tensor) -> None:
    """Let what follows see the layer's output larger by `delta_K`, if anything holds such a constant."""
    layer, norm = network.get_submodule(unit.name), network.get_submodule(unit.end)
    if layer.bias is not None:
        layer.get_parameter("bias").add_(delta_K)
    elif isinstance(norm, _BatchNorm) and norm.running_mean is not None:
        norm.running_mean.sub_(delta_K)


def output_scale(network: nn.Module, unit: Unit) -> Tensor:
    """What each of the layer's outputs is multiplied with until the unit's end; 1 where no statistics say."""
    norm, weight = network.get_submodule(unit.end), network.get_parameter(f"{unit.name}.weight")
    if not isinstance(norm, _BatchNorm) or norm.running_var is None:
        return weight.new_ones(num_outputs(network.get_submodule(unit.name)))
    scale_K = (norm.running_var + norm.eps).rsqrt()
    return scale_K if norm.weight is None else scale_K * norm.weight


def batch_norms(network: nn.Module, example: Tensor) -> list[str]:
    """Paths of the BatchNorms that keep statistics and run once, in the order of the forward pass."""
    modules = dict(network.named_modules())
    found = [(name, modules[name]) for name in _watch(network, example).once]
    return [name for name, module in found if isinstance(module, _BatchNorm) and module.running_mean is not None]


@contextmanager
def eval_mode(*networks: nn.Module) -> Iterator[None]:
    """The networks in eval mode and without gradients; afterwards every module's mode as it was."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def split(images: Tensor, batch_size: int, network: nn.Module) -> Sequence[Tensor]:
    """The images in batches, on the network's device."""
    device = next((parameter.device for parameter in network.parameters()), images.device)
    return [batch.to(device) for batch in images.split(batch_size)]


def _kept_outputs(name: str, norm: str | None, dense_layer: nn.Module, kept: Kept) -> Tensor:
    places = [(f"{name}.bias", 0)]
    if not isinstance(dense_layer, _ConvTransposeNd):
        places.append((f"{name}.weight", 0))
    elif dense_layer.groups == 1:  # else the dimension counts the outputs of one conv group
        places.append((f"{name}.weight", 1))
    if norm:
        places += [(f"{norm}.weight", 0), (f"{norm}.running_mean", 0)]
    return next((kept[place] for place in places if place in kept), torch.arange(num_outputs(dense_layer)))


@dataclass(frozen=True, eq=False)
class _Walk:
    """What one forward pass did.

    Attributes:
        moments: stops in the order in which the pass came by, and what is there, a tensor or something else.
        sums: the two tensors of each addition of tensors of one shape.
        once: paths of the modules that ran once, in that order.
    """

    moments: list[tuple[Stop, Any]] = field(default_factory=list)
    sums: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @cached_property
    def once(self) -> list[str]:
        counts = Counter(stop.name for stop, _ in self.moments if stop.place == "output")
        return [name for name in dict.fromkeys(stop.name for stop, _ in self.moments) if counts[name] == 1]

    def moment(self, stop: Stop) -> int:
        return next(number for number, (moment, _) in enumerate(self.moments) if moment == stop)

    def norm_of(self, name: str, network: nn.Module) -> str | None:
        """The BatchNorm that reads the module's output."""
        _, output = self.moments[self.moment(Stop(name, "output"))]
        for stop, value in self.moments:
            is_norm = isinstance(network.get_submodule(stop.name), _BatchNorm)
            if is_norm and stop.place == "input" and value is output and stop.name in self.once:
                return stop.name
        return None

    def stream_of(self, name: str, end: str) -> Stop | None:
        """The last stop before module `name` at which there is what the output of `end` is added to."""
        _, output = self.moments[self.moment(Stop(end, "output"))]
        others = [b if a is output else a for a, b in self.sums if (a is output) != (b is output)]
        for stop, value in reversed(self.moments[: self.moment(Stop(name, "input"))]):
            found: Stop = stop
            if any(value is other for other in others) and stop.name in self.once:
                return found
        return None


_ADDITIONS = (torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__iadd__)


class _Sums(TorchFunctionMode):
    """Notes what is added to what."""

    def __init__(self, sums: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self._sums = sums

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _ADDITIONS:
            a, b = [*args, *(kwargs or {}).values()][:2]
            if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape:
                self._sums.append((a, b))
        return func(*args, **(kwargs or {}))


def _watch(network: nn.Module, example: Tensor) -> _Walk:
    """Run `example` in eval mode; the tensors stay alive, so that one object is one tensor."""
    walk = _Walk()
    with ExitStack() as hooks:
        for name, module in network.named_modules():
            for handle in _noting(name, module, walk.moments):
                hooks.callback(handle.remove)
        with eval_mode(network), _Sums(walk.sums):
            network(example)
    return walk


def _noting(name: str, module: nn.Module, moments: list[tuple[Stop, Any]]) -> list[RemovableHandle]:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        moments.append((Stop(name, "input"), next(iter((*args, *kwargs.values())), None)))

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        moments.append((Stop(name, "output"), output))

    return [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
