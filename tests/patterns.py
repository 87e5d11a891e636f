"""Small networks, one per pattern of code that networks are written in, and what must be prunable in each.

Sizes differ (batch 2, 7 inputs, 12 channels, 10 x 6 pixels, 3 heads of 4 dimensions, 5 outputs), so that no
dimension is taken for another by accident. A declaration is what an expert would cut by hand.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from sparsekit.plan import COUNT

Place = tuple[str, int]
Inputs = tuple[Tensor, ...]


def image(batch: int) -> Inputs:
    return (torch.randn(batch, 7, 10, 6),)


def tokens(batch: int) -> Inputs:
    return (torch.randn(batch, 10, 7),)


def vector(batch: int) -> Inputs:
    return (torch.randn(batch, 7),)


def series(batch: int) -> Inputs:
    return (torch.randn(batch, 7, 10),)


def volume(batch: int) -> Inputs:
    return (torch.randn(batch, 7, 4, 10, 6),)


def words(batch: int) -> Inputs:
    return (torch.randint(17, (batch, 10)),)


def image_and_class(batch: int) -> Inputs:
    return (*image(batch), torch.arange(batch) % 9)


def image_and_style(batch: int) -> Inputs:
    return (*image(batch), torch.randn(batch, 8))


@dataclass(frozen=True)
class Pattern:
    """A network and what must be found in it.

    Attributes:
        factory: builds the network.
        inputs: batch size -> example inputs.
        exact: places that must be prunable without re-normalising.
        renormalised: places that must be prunable with `renormalise=True`, and only then.
        either: places that must be prunable with `renormalise=True`, and may be without: a norm of the weights runs
            over them, to which a slice of zeros adds nothing.
        optional: places that are prunable, or refused with the reason `refused`.
        refused: regular expression that an (op, reason) of the refusals matches; empty: nothing is refused.
        sizes: sizes of all exact groups, where there is one right answer.
        renormalised_sizes: sizes of all groups with `renormalise=True`.
        fixed_batch: the forward writes the batch size as a number.
    """

    factory: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    exact: frozenset[Place]
    renormalised: frozenset[Place]
    either: frozenset[Place]
    optional: frozenset[Place]
    refused: str
    sizes: tuple[int, ...] | None
    renormalised_sizes: tuple[int, ...] | None
    fixed_batch: bool

    @property
    def modes(self) -> tuple[bool, ...]:
        """The values of `renormalise` under which the laws are tested."""
        return (False, True) if self.renormalised or self.either or self.renormalised_sizes else (False,)


PATTERNS: dict[str, Pattern] = {}


def _places(text: str) -> frozenset[Place]:
    """Split "a.weight:01 c.groups:#" into ("a.weight", 0), ("a.weight", 1), ("c.groups", COUNT)."""
    words = [word.split(":") for word in text.split()]
    return frozenset((name, COUNT if dim == "#" else int(dim)) for name, dims in words for dim in dims)


def pattern(
    exact: str = "",
    *,
    name: str = "",
    inputs: Callable[[int], Inputs] = image,
    renormalised: str = "",
    either: str = "",
    optional: str = "",
    refused: str = "",
    sizes: tuple[int, ...] | None = None,
    renormalised_sizes: tuple[int, ...] | None = None,
    fixed_batch: bool = False,
    args: tuple[Any, ...] = (),
) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Declare the decorated network; twice with different `args` and `name` for its variants."""

    def declare(network: type[nn.Module]) -> type[nn.Module]:
        PATTERNS[name or network.__name__] = Pattern(
            lambda: network(*args),
            inputs,
            _places(exact),
            _places(renormalised),
            _places(either),
            _places(optional),
            refused,
            sizes,
            renormalised_sizes,
            fixed_batch,
        )
        return network

    return declare


def make(name: str) -> tuple[nn.Module, Inputs]:
    """The network in eval mode after some training passes, no parameter neutral, and seeded example inputs."""
    torch.manual_seed(0)
    network = PATTERNS[name].factory()
    inputs = PATTERNS[name].inputs(2)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, parameter[0].numel() ** -0.5)
            else:
                parameter.uniform_(0.4, 1.6)
    for _ in range(10):  # running statistics and power iterations leave their start
        network.train()(*inputs)
    return network.eval(), inputs


class Net(nn.Module):
    """conv a (7 -> 12) -> ReLU -> `middle` -> conv b (`width` -> 5)."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.a = nn.Conv2d(7, 12, 3, padding=1)
        self.b = nn.Conv2d(width, 5, 1)

    def middle(self, x: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        return self.b(self.middle(self.a(x).relu()))


class Block(nn.Module):
    """linear a (7 -> 12) -> x + `mix`(x) -> linear b (12 -> 5), over 10 tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(7, 12)
        self.b = nn.Linear(12, 5)

    def mix(self, x: Tensor) -> Any:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Any:
        x = self.a(x)
        return self.b(x + self.mix(x))


A, B = "a.weight:0 a.bias:0 ", "b.weight:1 "

# --- convolutions


@pattern(A + B + "up.weight:01 up.bias:0", sizes=(9, 12))
class Transposed(Net):
    def __init__(self) -> None:
        super().__init__(9)
        self.up = nn.ConvTranspose2d(12, 9, 4, 2, 1)

    def middle(self, x: Tensor) -> Any:
        return self.up(x).relu()


@pattern(A + B + "up.weight:0 up.bias:0")
class TransposedGrouped(Net):
    def __init__(self) -> None:
        super().__init__(8)
        self.up = nn.ConvTranspose2d(12, 8, 4, 2, 1, groups=4)

    def middle(self, x: Tensor) -> Any:
        return self.up(x).relu()


@pattern(A + B + "up.weight:0 up.bias:0 up.groups:#", sizes=(12,))
class TransposedDepthwise(Net):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(12, 12, 4, 2, 1, groups=12)

    def middle(self, x: Tensor) -> Any:
        return self.up(x).relu()


@pattern(A + B + "g.weight:0 g.bias:0", args=(3,), name="Grouped3")
@pattern(A + B + "g.weight:0 g.bias:0", args=(4,), name="Grouped4")
@pattern(A + B + "g.weight:0 g.bias:0 g.groups:#", args=(12,), name="DepthwiseMultiplier2", sizes=(12,))
class Grouped(Net):
    def __init__(self, num_conv_groups: int) -> None:
        super().__init__(24)
        self.g = nn.Conv2d(12, 24, 3, padding=1, groups=num_conv_groups)

    def middle(self, x: Tensor) -> Any:
        return self.g(x).relu()


@pattern(A + B + "c.weight:01 c.bias:0", sizes=(9, 12))
class PixelShuffle(Net):
    def __init__(self) -> None:
        super().__init__(9)
        self.c = nn.Conv2d(12, 36, 1)
        self.shuffle = nn.PixelShuffle(2)

    def middle(self, x: Tensor) -> Any:
        return self.shuffle(self.c(x)).relu()


@pattern(A + B, sizes=(12,))
class PixelUnshuffle(Net):
    def __init__(self) -> None:
        super().__init__(48)

    def middle(self, x: Tensor) -> Any:
        return F.pixel_unshuffle(x, 2)


@pattern(A + B, sizes=(3, 4))
class ChannelShuffle(Net):
    groups = 3

    def middle(self, x: Tensor) -> Any:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


@pattern(A + B, sizes=(4,))  # the module's number of parts stays
class ChannelShuffleOp(Net):
    def __init__(self) -> None:
        super().__init__()
        self.shuffle = nn.ChannelShuffle(3)

    def middle(self, x: Tensor) -> Any:
        return self.shuffle(x)


@pattern("stem.weight:0 c.weight:01 d.weight:0 e.weight:01 " + B)
class ShuffleUnit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(7, 12, 1)
        self.c, self.e = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.d = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.b = nn.Conv2d(12, 5, 1)

    def forward(self, x: Tensor) -> Any:
        left, right = self.stem(x).chunk(2, dim=1)
        x = torch.cat((left, self.e(self.d(self.c(right).relu())).relu()), dim=1)
        n, c, h, w = x.size()
        return self.b(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, -1, h, w))


@pattern(A + B + "c.weight:01 c.bias:0", inputs=series, sizes=(9, 12))
class Series(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.b = nn.Conv1d(7, 12, 3), nn.Conv1d(12, 9, 3, padding=1), nn.Conv1d(9, 5, 1)

    def forward(self, x: Tensor) -> Any:
        return self.b(F.max_pool1d(self.c(self.a(x).relu()).relu(), 2)).mean(-1)


@pattern(A + B + "c.weight:01 norm.weight:0 norm.running_mean:0", inputs=volume, sizes=(9, 12))
class Volume(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.b = nn.Conv3d(7, 12, 3, padding=1), nn.Conv3d(12, 9, (3, 1, 1)), nn.Conv3d(9, 5, 1)
        self.norm, self.pool = nn.BatchNorm3d(9), nn.AdaptiveAvgPool3d(1)

    def forward(self, x: Tensor) -> Any:
        x = self.norm(self.c(F.max_pool3d(self.a(x), (1, 2, 2))))
        return self.b(self.pool(x.relu())).flatten(1)


@pattern(
    A + B + "offset.weight:1 deform.weight:01 deform.bias:0",
    optional="offset.weight:0",
    refused="deform",
    sizes=(9, 12),
)
class Deformable(Net):
    def __init__(self) -> None:
        super().__init__(9)
        self.offset = nn.Conv2d(12, 18, 3, padding=1)
        self.deform = torchvision.ops.DeformConv2d(12, 9, 3, padding=1)

    def middle(self, x: Tensor) -> Any:
        return self.deform(x, self.offset(x)).relu()


@pattern(A + B + "c.weight:01 d.weight:01 e.weight:01", sizes=(8, 9, 11, 12))
class UNet(Net):
    def __init__(self) -> None:
        super().__init__(20)
        self.c, self.d = nn.Conv2d(12, 9, 3, 2, 1), nn.ConvTranspose2d(9, 11, 2, 2)
        self.e = nn.Conv2d(23, 8, 3, padding=1)

    def middle(self, x: Tensor) -> Any:
        up = self.d(self.c(x).relu())
        return torch.cat([self.e(torch.cat([x, up], 1)).relu(), x], 1)


@pattern(A + B + "c.weight:01 d.weight:01 norm.weight:0", sizes=(8, 9, 12))
class CatOfCats(Net):
    def __init__(self) -> None:
        super().__init__(50)
        self.c, self.d = nn.Conv2d(12, 9, 1), nn.Conv2d(21, 8, 1)
        self.norm = nn.BatchNorm2d(50)

    def middle(self, x: Tensor) -> Any:
        both = torch.cat([x, self.c(x)], 1)
        return self.norm(torch.cat([both, torch.cat([self.d(both), both], 1)], 1)).relu()


@pattern(A + B, args=("bilinear",), name="Bilinear", sizes=(12,))
@pattern(A + B, args=("bicubic",), name="Bicubic", sizes=(12,))
@pattern(A + B, args=("area",), name="Area", sizes=(12,))
class Interpolated(Net):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def middle(self, x: Tensor) -> Any:
        return F.interpolate(x, size=(13, 9), mode=self.mode)


@pattern(A + B, sizes=(12,))
class GridSample(Net):
    def __init__(self) -> None:
        super().__init__()
        self.grid = nn.Buffer(torch.rand(1, 8, 9, 2) * 2 - 1)

    def middle(self, x: Tensor) -> Any:
        return F.grid_sample(x, self.grid.expand(len(x), -1, -1, -1), align_corners=False)


@pattern("c.weight:0 b.weight:1", optional=A, refused="unpool|pool|no rule")
class MaxUnpool(Net):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.unpool = nn.Conv2d(12, 12, 1), nn.MaxUnpool2d(2)

    def middle(self, x: Tensor) -> Any:
        pooled, indices = F.max_pool2d(x, 2, return_indices=True)
        return self.c(self.unpool(pooled, indices)).relu()


@pattern(A + B, sizes=(12,))
class RoiAlign(Net):
    def __init__(self) -> None:
        super().__init__()
        self.boxes = nn.Buffer(torch.tensor([[0.0, 0, 0, 4, 5], [0, 1, 2, 5, 8], [0, 0, 0, 3, 3]]))

    def middle(self, x: Tensor) -> Any:
        return torchvision.ops.roi_align(x, self.boxes, (4, 4), aligned=True)


# --- halves, slices, padding


@pattern(A + B + "c.weight:01 c.bias:0", sizes=(9, 12))
class Glu(Net):
    def __init__(self) -> None:
        super().__init__(9)
        self.c = nn.Conv2d(12, 18, 1)

    def middle(self, x: Tensor) -> Any:
        return F.glu(self.c(x), dim=1)


@pattern(A + B + "up.weight:01 gate.weight:01 down.weight:01", inputs=tokens, sizes=(12, 18))
class SwiGlu(Block):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(12, 18), nn.Linear(12, 18), nn.Linear(18, 12)

    def mix(self, x: Tensor) -> Any:
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pattern(A + B + "both.weight:01 down.weight:01", inputs=tokens, sizes=(12, 18))
class SwiGluPacked(Block):
    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(12, 36), nn.Linear(18, 12)

    def mix(self, x: Tensor) -> Any:
        gate, value = self.both(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)


@pattern(A + B + "cv1.weight:01 m.0.weight:01 m.1.weight:01 cv2.weight:01", args=("split",), name="C2fSplit")
@pattern(A + B + "cv1.weight:01 m.0.weight:01 m.1.weight:01 cv2.weight:01", args=("chunk",), name="C2fChunk")
class C2f(Net):
    def __init__(self, how: str) -> None:
        super().__init__(9)
        self.how, self.c = how, 8
        self.cv1, self.cv2 = nn.Conv2d(12, 2 * self.c, 1), nn.Conv2d(4 * self.c, 9, 1)
        self.m = nn.ModuleList(nn.Conv2d(self.c, self.c, 3, padding=1) for _ in range(2))

    def middle(self, x: Tensor) -> Any:
        x = self.cv1(x)
        y = list(x.chunk(2, 1) if self.how == "chunk" else x.split((self.c, self.c), 1))
        y.extend(m(y[-1]).relu() for m in self.m)
        return self.cv2(torch.cat(y, 1)).relu()


@pattern(A + B + "pconv.weight:01", sizes=(5, 5, 7))
class PartialConv(Net):
    def __init__(self) -> None:
        super().__init__()
        self.pconv = nn.Conv2d(5, 5, 3, padding=1)

    def middle(self, x: Tensor) -> Any:
        return torch.cat((self.pconv(x[:, :5]).relu(), x[:, 5:]), 1)


@pattern("d.weight:0 b.weight:1", optional=A + "pconv.weight:01", refused="slice|copy_|no rule|in.place")
class SliceAssigned(Net):
    def __init__(self) -> None:
        super().__init__()
        self.pconv, self.d = nn.Conv2d(5, 5, 3, padding=1), nn.Conv2d(12, 12, 1)

    def middle(self, x: Tensor) -> Any:
        y = x.clone()
        y[:, :5, :, :] = self.pconv(x[:, :5, :, :])
        return self.d(y).relu()


@pattern(A + B + "cheap.weight:0", args=(15,), name="Ghost")
class GhostModule(Net):
    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.width = width
        self.cheap = nn.Conv2d(12, 12, 3, padding=1, groups=12)

    def middle(self, x: Tensor) -> Any:
        return torch.cat([x, self.cheap(x).relu()], dim=1)[:, : self.width]


# Equal parts keep the same positions: a forward that divides what is left into equal parts goes on to do so.
@pattern(A + B + "convs.0.weight:01 convs.1.weight:01", sizes=(4, 4))
class Res2Net(Net):
    def __init__(self) -> None:
        super().__init__()
        self.width = 4
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def middle(self, x: Tensor) -> Any:
        parts = torch.split(x, self.width, 1)
        first = self.convs[0](parts[0]).relu()
        second = self.convs[1](first + parts[1]).relu()
        return torch.cat((first, second, parts[2]), 1)


@pattern(A + B + "c.weight:01", args=("literal",), name="ZeroPadLiteral")
@pattern(A + B + "c.weight:01", args=("cat",), name="ZeroPadCat")
class ZeroPaddedShortcut(Net):
    def __init__(self, how: str) -> None:
        super().__init__(18)
        self.how = how
        self.c = nn.Conv2d(12, 18, 3, 2, 1)

    def middle(self, x: Tensor) -> Any:
        thin = x[:, :, ::2, ::2]
        if self.how == "literal":
            return (self.c(x) + F.pad(thin, (0, 0, 0, 0, 2, 4))).relu()
        zeros = torch.zeros(thin.size(0), 6, thin.size(2), thin.size(3), dtype=x.dtype, device=x.device)
        return (self.c(x) + torch.cat((thin, zeros), dim=1)).relu()


@pattern(A + "c.weight:1 c.weight:0 c.bias:0 b.weight:1")
class WrittenInParts(Net):
    """Rows are pooled by themselves and written into one tensor, as detectors do with regions of several scales."""

    def __init__(self) -> None:
        super().__init__(9)
        self.c = nn.Conv2d(12, 9, 1)

    def middle(self, x: Tensor) -> Any:
        pooled = torch.zeros(len(x), x.shape[1], 5, 3, dtype=x.dtype)
        for part in (torch.arange(0, len(x), 2), torch.arange(1, len(x), 2)):
            pooled[part] = F.adaptive_max_pool2d(x[part], (5, 3))
        return self.c(pooled).relu()


@pattern("c.weight:0 b.weight:1", args=(list(range(11, -1, -1)),), name="IndexedByList", optional=A, refused="index")
class Indexed(Net):
    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.order = order
        self.c = nn.Conv2d(12, 12, 1)

    def middle(self, x: Tensor) -> Any:
        return self.c(x[:, self.order]).relu()


# --- shapes


@pattern(
    "fc.weight:0 fc.bias:0 c.weight:01 b.weight:1", inputs=vector, args=(False,), name="ViewLiteral", sizes=(9, 12)
)
@pattern(
    "fc.weight:0 fc.bias:0 c.weight:01 b.weight:1", inputs=vector, args=(True,), name="ViewAttribute", sizes=(9, 12)
)
class LinearViewConv(nn.Module):
    def __init__(self, attribute: bool) -> None:
        super().__init__()
        self.attribute, self.channels = attribute, 12
        self.fc = nn.Linear(7, 12 * 5 * 3)
        self.c, self.b = nn.ConvTranspose2d(12, 9, 4, 2, 1), nn.Conv2d(9, 5, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.fc(x)
        x = x.view(-1, self.channels, 5, 3) if self.attribute else x.view(-1, 12, 5, 3)
        return self.b(self.c(x.relu()).relu())


@pattern(A + "fc.weight:01 b.weight:1", sizes=(9, 12))
class FlattenLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(7, 12, 3, padding=1)
        self.fc, self.norm, self.b = nn.Linear(12 * 15, 9), nn.BatchNorm1d(9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Any:
        x = F.max_pool2d(self.a(x), 2).view(-1, 180)
        return self.b(self.norm(self.fc(x)).relu())


@pattern(A + B, args=((0, -1, 60),), name="ReshapeMinusOne", sizes=(12,))
@pattern(A + B, args=((0, 12, -1),), name="ReshapeLiteral", sizes=(12,))
@pattern(A + B, args=((-1, 12, 60),), name="ReshapeBatchMinusOne", sizes=(12,))
@pattern(A + B, args=((2, 12, 60),), name="ViewLiteralBatch", sizes=(12,), fixed_batch=True)
@pattern(A + B, args=((0, 3, 4, 60),), name="ReshapeInFactors", sizes=(3, 4))
class Reshaped(Net):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def middle(self, x: Tensor) -> Any:
        shape = (self.shape[0] or x.shape[0], *self.shape[1:])
        y = x.reshape(shape).sigmoid()
        return y.reshape(shape[0], *((-1, 10, 6) if 12 not in shape else (12, 10, 6)))


@pattern(A + B + "c.weight:01 d.weight:01", sizes=(9, 12))
class StackSum(Net):
    def __init__(self) -> None:
        super().__init__(9)
        self.c, self.d = nn.Conv2d(12, 9, 1), nn.Conv2d(12, 9, 3, padding=1)

    def middle(self, x: Tensor) -> Any:
        return torch.stack([self.c(x), self.d(x).relu()], dim=1).sum(1)


@pattern(A + B, sizes=(12,))
class Unfold(Net):
    """im2col, a weight of its own per offset, col2im."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, 1, 9, 60))

    def middle(self, x: Tensor) -> Any:
        n, c, h, w = x.shape
        columns = F.unfold(x, 3, padding=1).view(n, c, 9, h * w) * self.scale
        return F.fold(columns.view(n, c * 9, h * w), (h, w), 3, padding=1)


@pattern(A + B + "c.weight:01", sizes=(9, 12))
class UnfoldLinear(nn.Module):
    """A convolution written as im2col and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.b = nn.Conv2d(7, 12, 1), nn.Linear(12 * 9, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Any:
        columns = F.unfold(self.a(x).relu(), 3, padding=1).transpose(1, 2)
        return self.b(self.c(columns).relu())


@pattern(A + B, sizes=(12,))
class TensorUnfold(Net):
    def middle(self, x: Tensor) -> Any:
        return x.unfold(2, 4, 2).unfold(3, 3, 1).mean((-1, -2))


@pattern(A + B, args=("where",), name="WhereMask", sizes=(12,))
@pattern(A + B, args=("fill",), name="MaskedFill", sizes=(12,))
class Masked(Net):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.hidden = nn.Buffer(torch.rand(10, 6) > 0.6)

    def middle(self, x: Tensor) -> Any:
        if self.how == "fill":
            return x.masked_fill(self.hidden, 0.5)
        return torch.where(self.hidden, torch.zeros((), dtype=x.dtype, device=x.device), x) + torch.where(x > 1, x, 2.0)


# --- sharing, broadcasting, gates


@pattern(A + B + "c.weight:01", sizes=(12,))
class SharedWeight(Net):
    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(12, 12, 1), nn.Conv2d(12, 12, 1)
        self.d.weight = self.c.weight

    def middle(self, x: Tensor) -> Any:
        return self.d(self.c(x).relu()).relu()


@pattern(A + B + "c.weight:01", sizes=(12,))
class CalledTwice(Net):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(12, 12, 1)

    def middle(self, x: Tensor) -> Any:
        return self.c(self.c(x).relu()).relu()


@pattern(A + "c.weight:01 b.weight:1", sizes=(9, 12))
class HeadOverLevels(nn.Module):
    """One head over feature maps of two sizes, as in detection."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c, self.b = nn.Conv2d(7, 12, 3), nn.Conv2d(12, 9, 3), nn.Conv2d(9, 5, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x).relu()
        return [self.b(self.c(level).relu()) for level in (x, F.max_pool2d(x, 2, padding=1))]


@pattern(A + B + "scale:1 position:1 shift:1", sizes=(12,))
class BroadcastParameters(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.position = nn.Parameter(torch.ones(1, 12, 1, 1)), nn.Parameter(torch.zeros(1, 12, 10, 6))
        self.shift = nn.Buffer(torch.randn(1, 12, 1, 1))

    def middle(self, x: Tensor) -> Any:
        return (x - self.shift) * self.scale + self.position


@pattern(A + B + "gate.weight:1", sizes=(12,))
class OneChannelGate(Net):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(12, 1, 3, padding=1)

    def middle(self, x: Tensor) -> Any:
        return x * self.gate(x).sigmoid()


@pattern(A + B + "squeeze.weight:01 excite.weight:01", sizes=(8, 12))
class SqueezeExcite(Net):
    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Linear(12, 8), nn.Linear(8, 12)

    def middle(self, x: Tensor) -> Any:
        n, c, _, _ = x.size()
        gate = self.excite(self.squeeze(F.adaptive_avg_pool2d(x, 1).view(n, c)).relu()).sigmoid()
        return x * gate.view(n, c, 1, 1).expand_as(x)


@pattern("eca.weight:0 b.weight:1", optional=A, refused="convolution slides")
class EfficientChannelAttention(Net):
    """ECA: a 1-d convolution along the channels; they cannot go, the layer behind still can."""

    def __init__(self) -> None:
        super().__init__()
        self.slide, self.eca = nn.Conv1d(1, 1, 3, padding=1), nn.Conv2d(12, 12, 1)

    def middle(self, x: Tensor) -> Any:
        gate = self.slide(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1).sigmoid()
        return self.eca(x * gate).relu()


@pattern(
    "head.weight:1 c.weight:0 b.weight:1 squeeze.weight:0 excite.weight:1",
    renormalised=A + "squeeze.weight:1 excite.weight:0",
)
class SoftmaxGate(Net):
    def __init__(self) -> None:
        super().__init__(9)
        self.squeeze, self.excite = nn.Conv2d(12, 8, 1), nn.Conv2d(8, 12, 1)
        self.c, self.head = nn.Conv2d(12, 9, 1), nn.Conv2d(9, 5, 1)

    def middle(self, x: Tensor) -> Any:
        gate = self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).softmax(dim=1)
        return self.c(x * gate).relu()

    def forward(self, x: Tensor) -> Any:
        x = self.middle(self.a(x).relu())
        return self.b(x), self.head(x)


@pattern(A + B + "c.weight:01 d.weight:01 fc.weight:01 fcs.0.weight:01 fcs.1.weight:01", sizes=(8, 9, 12))
class SelectiveKernel(Net):
    def __init__(self) -> None:
        super().__init__(9)
        self.c, self.d = nn.Conv2d(12, 9, 3, padding=1), nn.Conv2d(12, 9, 3, padding=2, dilation=2)
        self.fc, self.fcs = nn.Linear(9, 8), nn.ModuleList(nn.Linear(8, 9) for _ in range(2))

    def middle(self, x: Tensor) -> Any:
        branches = torch.stack([self.c(x).relu(), self.d(x).relu()], 0)
        z = self.fc(branches.sum(0).mean((-1, -2)))
        weights = torch.stack([fc(z)[:, :, None, None] for fc in self.fcs], 0).softmax(0)
        return (weights * branches).sum(0)


@pattern("c.weight:0 b.weight:1 fc.weight:01", sizes=(8, 9))
class SplitAttention(nn.Module):
    """ResNeSt: radix 2, the softmax over it, the channels of both splits live together."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.b = nn.Conv2d(7, 18, 3, padding=1), nn.Conv2d(9, 5, 1)
        self.fc, self.gates = nn.Conv2d(9, 8, 1), nn.Conv2d(8, 18, 1)

    def forward(self, x: Tensor) -> Any:
        n = x.shape[0]
        x = self.c(x).relu()
        x = x.reshape(n, 2, x.shape[1] // 2, *x.shape[2:])
        gates = self.gates(self.fc(x.sum(1).mean((2, 3), keepdim=True)).relu())
        return self.b((x * gates.view(n, 2, -1, 1, 1).softmax(1)).sum(1))


@pattern("c.weight:0 b.weight:1", renormalised=A)
class SpatialGate(Net):
    """CBAM: mean and maximum over the channels, a convolution over the two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.c = nn.Conv2d(2, 1, 3, padding=1), nn.Conv2d(12, 12, 1)

    def middle(self, x: Tensor) -> Any:
        maps = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], dim=1)
        return self.c(x * self.gate(maps).sigmoid()).relu()


# --- normalisation


@pattern(A + B, args=(False,), name="InPlaceAfterInstanceNorm", sizes=(12,))
@pattern(A + B + "norm.weight:0 norm.bias:0", args=(True,), name="InPlaceAfterAffineInstanceNorm", sizes=(12,))
class InPlaceInstanceNorm(Net):
    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(12, affine=affine)

    def middle(self, x: Tensor) -> Any:
        return self.norm(x).add_(0.5).relu_()


@pattern(A + B + "c.weight:01 d.weight:01", args=(False,), name="CycleGanBlock", sizes=(12, 12))
@pattern(A + B + "c.weight:01 d.weight:01", args=(True,), name="CycleGanBlockAffine", sizes=(12, 12))
class ReflectionBlock(Net):
    def __init__(self, affine: bool) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(12, 12, 3), nn.Conv2d(12, 12, 3)
        norms = [nn.InstanceNorm2d(12, affine=affine) for _ in range(2)]
        pads = [nn.ReflectionPad2d(1) for _ in range(2)]
        self.block = nn.Sequential(pads[0], self.c, norms[0], nn.ReLU(True), pads[1], self.d, norms[1])

    def middle(self, x: Tensor) -> Any:
        return x + self.block(x)


@pattern(A + B + "embed.weight:1 norm.running_mean:0", inputs=image_and_class, sizes=(12,))
class ConditionalBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(7, 12, 3), nn.Conv2d(12, 5, 1)
        self.norm, self.embed = nn.BatchNorm2d(12, affine=False), nn.Embedding(9, 24)

    def forward(self, x: Tensor, label: Tensor) -> Any:
        x = self.norm(self.a(x))
        gamma, beta = self.embed(label).chunk(2, 1)
        return self.b((gamma.view(-1, x.shape[1], 1, 1) * x + beta.view(-1, x.shape[1], 1, 1)).relu())


@pattern(A + B + "style.weight:0", inputs=image_and_style, sizes=(12,))
class AdaptiveInstanceNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.style = nn.Conv2d(7, 12, 3), nn.Conv2d(12, 5, 1), nn.Linear(8, 24)
        self.norm, self.num_features = nn.InstanceNorm2d(12), 12

    def forward(self, x: Tensor, style: Tensor) -> Any:
        style = self.style(style).view(-1, 2 * self.num_features, 1, 1)
        gamma, beta = style.chunk(2, dim=1)
        return self.b(((1 + gamma) * self.norm(self.a(x)) + beta).relu())


@pattern(A + B + "norm.weight:0 norm.bias:0 norm.running_mean:0 norm.running_var:0", sizes=(12,))
class FrozenBatchNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torchvision.ops.FrozenBatchNorm2d(12)
        for buffer in self.norm.buffers():
            buffer.uniform_(0.5, 2)

    def middle(self, x: Tensor) -> Any:
        return self.norm(x).relu()


@pattern(
    A + "norm.weight:0 c.weight:01 b.weight:1",
    args=(3, 12),
    name="GroupNorm3",
    sizes=(3, 9),  # whole normalisation groups
)
@pattern("c.weight:0 b.weight:1", args=(1, 12), name="GroupNorm1", renormalised=A + "norm.weight:0 c.weight:1")
class GroupNorm(Net):
    def __init__(self, num_groups: int, width: int) -> None:
        super().__init__(9)
        self.norm, self.c = nn.GroupNorm(num_groups, width), nn.Conv2d(width, 9, 1)

    def middle(self, x: Tensor) -> Any:
        return self.c(self.norm(x)).relu()


MLP, STREAM = "fc1.weight:0 fc1.bias:0 fc2.weight:1 ", "fc1.weight:1 fc2.weight:0 "


@pattern(
    MLP,
    renormalised=A + B + STREAM + "norm.weight:0 norm.bias:0 dw.weight:0",
    sizes=(18,),
    renormalised_sizes=(12, 18),
)
class ConvNext(Net):
    def __init__(self) -> None:
        super().__init__()
        self.dw, self.norm = nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.LayerNorm(12, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(12, 18), nn.Linear(18, 12)
        self.gamma = nn.Parameter(torch.ones(12))

    def middle(self, x: Tensor) -> Any:
        y = self.fc2(F.gelu(self.fc1(self.norm(self.dw(x).permute(0, 2, 3, 1)))))
        return x + (self.gamma * y).permute(0, 3, 1, 2)


@pattern("c.weight:0 b.weight:1", renormalised=A + "norm.weight:0 norm.bias:0 c.weight:1")
class LayerNorm2d(Net):
    """torchvision's and timm's channels-first layer norm: F.layer_norm between two permutes, sizes from itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.c = nn.LayerNorm(12), nn.Conv2d(12, 12, 1)

    def middle(self, x: Tensor) -> Any:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.norm.normalized_shape, self.norm.weight, self.norm.bias, self.norm.eps)
        return self.c(x.permute(0, 3, 1, 2)).relu()


@pattern("c.weight:0 b.weight:1", renormalised=A + "gain:0 c.weight:1")
class LayerNormByHand(Net):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.c = nn.Parameter(torch.ones(12)), nn.Conv2d(12, 12, 1)

    def middle(self, x: Tensor) -> Any:
        mean = x.mean(1, keepdim=True)
        var = (x - mean).pow(2).mean(1, keepdim=True)
        return self.c(self.gain[:, None, None] * (x - mean) / torch.sqrt(var + 1e-6)).relu()


@pattern(
    MLP,
    args=(nn.RMSNorm,),
    name="RmsNormMlp",
    inputs=tokens,
    renormalised=A + B + STREAM + "norm.weight:0",
    sizes=(18,),
)
@pattern(
    MLP, args=(nn.LayerNorm,), name="LayerNormMlp", inputs=tokens, renormalised=A + B + STREAM + "norm.weight:0",
    sizes=(18,), renormalised_sizes=(12, 18),
)  # fmt: skip
class NormMlp(Block):
    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = norm(12), nn.Linear(12, 18), nn.Linear(18, 12)

    def mix(self, x: Tensor) -> Any:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


@pattern(A + B + STREAM, inputs=tokens, renormalised=MLP + "gamma:3 beta:3", sizes=(12,), renormalised_sizes=(12, 18))
class GlobalResponseNorm(Block):
    """ConvNeXt V2: every channel's norm over space is divided by the mean over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(12, 18), nn.Linear(18, 12)
        self.gamma, self.beta = nn.Parameter(torch.ones(1, 1, 1, 18)), nn.Parameter(torch.ones(1, 1, 1, 18))

    def mix(self, x: Tensor) -> Any:
        y = F.gelu(self.fc1(x[:, :, None]))
        norm = torch.norm(y, p=2, dim=(1, 2), keepdim=True)
        norm = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        return self.fc2(self.gamma * (y * norm) + self.beta + y)[:, :, 0]


@pattern("c.weight:0 b.weight:1", optional=A, refused="norm|pool|runs over|slides")
class LocalResponseNorm(Net):
    """AlexNet's, over neighbouring channels: they cannot go."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.c = nn.LocalResponseNorm(5), nn.Conv2d(12, 12, 1)

    def middle(self, x: Tensor) -> Any:
        return self.c(self.norm(x)).relu()


@pattern(
    A + B + "c.weight:01 c.bias:0", args=(parametrizations.weight_norm,), name="WeightNormParametrized", sizes=(9, 12)
)
@pattern(A + B + "c.weight:01 c.bias:0", args=(weight_norm,), name="WeightNormHook", sizes=(9, 12))
@pattern(
    A + B + "c.weight:01 c.bias:0",
    args=(parametrizations.spectral_norm,),
    name="SpectralNormParametrized",
    sizes=(9, 12),
)
@pattern(A + B + "c.weight:01 c.bias:0", args=(spectral_norm,), name="SpectralNormHook", sizes=(9, 12))
class Reparametrized(Net):
    """The weight that is computed is what channels are cut from, so that what is left computes what it did."""

    def __init__(self, norm: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__(9)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`torch.nn.utils.weight_norm` is deprecated", FutureWarning)
            self.c = norm(nn.Conv2d(12, 9, 3, padding=1))

    def middle(self, x: Tensor) -> Any:
        return self.c(x).relu()


@pattern("c.weight:0 gain:0 " + B, renormalised=A + "c.weight:1", args=(False,), name="StandardizedWeight", sizes=(9,))
@pattern(
    "c.weight:0 gain:0 " + B, renormalised=A + "c.weight:1", args=(True,), name="StandardizedByBatchNorm", sizes=(9,)
)
class Standardized(Net):
    """NFNet's and BiT's convolution, each filter standardised over its inputs, by hand or as timm writes it."""

    def __init__(self, batch_norm: bool) -> None:
        super().__init__(9)
        self.batch_norm = batch_norm
        self.c, self.gain = nn.Conv2d(12, 9, 3, padding=1), nn.Parameter(torch.ones(9, 1, 1, 1))

    def middle(self, x: Tensor) -> Any:
        w = self.c.weight
        if self.batch_norm:
            rows, gain = w.reshape(1, self.c.out_channels, -1), (self.gain * 0.1).view(-1)
            w = F.batch_norm(rows, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6).reshape_as(w)
        else:
            mean, var = w.mean((1, 2, 3), keepdim=True), w.var((1, 2, 3), keepdim=True)
            w = self.gain * (w - mean) / (var + 1e-4).sqrt()
        return F.conv2d(x, w, self.c.bias, padding=1).relu()


@pattern(
    "weight:1 b.weight:1",
    inputs=image_and_style,
    either="a.weight:0 weight:2 style.weight:0",
    renormalised_sizes=(9, 12),
)
class Modulated(nn.Module):
    """StyleGAN2: one weight per example, the batch as convolution groups, demodulated over its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.style = nn.Conv2d(7, 12, 1), nn.Conv2d(9, 5, 1), nn.Linear(8, 12)
        self.out_channel = 9
        self.weight = nn.Parameter(torch.randn(1, 9, 12, 3, 3))

    def forward(self, x: Tensor, style: Tensor) -> Any:
        x = self.a(x)
        n, c, h, w = x.shape
        weight = self.weight * self.style(style).view(n, 1, c, 1, 1)
        demodulation = torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8)
        weight = (weight * demodulation.view(n, self.out_channel, 1, 1, 1)).view(n * self.out_channel, c, 3, 3)
        x = F.conv2d(x.view(1, n * c, h, w), weight, padding=1, groups=n)
        return self.b(F.leaky_relu(x.view(n, self.out_channel, h, w), 0.2))


# --- attention

OUT = "proj.weight:01 "
SEPARATE = "q.weight:01 k.weight:01 v.weight:01 " + OUT


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    n, length, width = x.shape
    return x.view(n, length, num_heads, width // num_heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


@pattern(
    A + B + "qkv.weight:01 qkv.bias:0 " + OUT, inputs=tokens, args=("timm",), name="PackedAttention", sizes=(3, 4, 12)
)
@pattern(A + B + "qkv.weight:01 qkv.bias:0 " + OUT, inputs=tokens, args=("sdpa",), name="PackedSdpa", sizes=(3, 4, 12))
@pattern(
    A + B + "qkv.weight:01 qkv.bias:0 " + OUT,
    inputs=tokens,
    args=("chunk",),
    name="ChunkedAttention",
    sizes=(3, 4, 12),
)
class PackedAttention(Block):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.num_heads, self.head_dim, self.scale = how, 3, 4, 0.5
        self.qkv, self.proj = nn.Linear(12, 36), nn.Linear(12, 12)

    def mix(self, x: Tensor) -> Any:
        n, length, width = x.shape
        if self.how == "chunk":
            q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, dim=-1))
        else:
            qkv = self.qkv(x).reshape(n, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
        if self.how == "sdpa":
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).reshape(n, length, width))


@pattern(A + B + SEPARATE, inputs=tokens, args=("matmul",), name="SeparateAttention", sizes=(3, 4, 4, 12))
@pattern(A + B + SEPARATE, inputs=tokens, args=("sdpa",), name="SeparateSdpa", sizes=(3, 4, 4, 12))
@pattern(A + B + SEPARATE, inputs=tokens, args=("causal",), name="CausalAttention", sizes=(3, 4, 4, 12))
@pattern(A + B + SEPARATE, inputs=tokens, args=("mask",), name="MaskedSdpa", sizes=(3, 4, 4, 12))
@pattern(A + B + SEPARATE + "cos:1 sin:1", inputs=tokens, args=("rotary",), name="Rotary", sizes=(2, 3, 4, 12))
@pattern(
    A + B + "q.weight:01 k.weight:01 v.weight:01 scale:0 " + OUT,
    inputs=tokens,
    args=("cosine",),
    name="CosineAttention",
    renormalised_sizes=(3, 4, 4, 12),
)
@pattern(A + B + SEPARATE + "table:1", inputs=tokens, args=("table",), name="RelativePositionBias", sizes=(3, 4, 4, 12))
@pattern(A + B + SEPARATE, inputs=tokens, args=("einsum",), name="EinsumAttention", sizes=(3, 4, 4, 12))
@pattern(A + B + SEPARATE, inputs=tokens, args=("bmm",), name="BmmAttention", sizes=(3, 4, 4, 12))
class SeparateAttention(Block):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.num_heads = how, 3
        self.q, self.k, self.v, self.proj = (nn.Linear(12, 12) for _ in range(4))
        if how == "rotary":
            angles = torch.arange(10.0)[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
            self.cos, self.sin = nn.Buffer(angles.cos()), nn.Buffer(angles.sin())
        if how == "cosine":
            self.scale = nn.Parameter(torch.ones(3, 1, 1))
        if how in ("causal", "mask"):
            self.visible = nn.Buffer(torch.ones(10, 10, dtype=torch.bool).tril())
        if how == "table":
            self.table = nn.Parameter(torch.zeros(19, 3))
            self.index = nn.Buffer(torch.arange(10)[:, None] - torch.arange(10) + 9)

    def rotate(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * self.cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * self.sin

    def scores(self, q: Tensor, k: Tensor) -> Any:
        if self.how == "rotary":
            q, k = self.rotate(q), self.rotate(k)
        if self.how == "cosine":
            return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.scale.clamp(max=4.6).exp()
        scores = 0.5 * q @ k.transpose(-2, -1)
        if self.how == "table":
            bias = self.table[self.index.view(-1)].view(10, 10, -1)
            return scores + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        return scores.masked_fill(~self.visible, float("-inf")) if self.how == "causal" else scores

    def mix(self, x: Tensor) -> Any:
        q, k, v = (split_heads(layer(x), self.num_heads) for layer in (self.q, self.k, self.v))
        if self.how == "sdpa":
            return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))
        if self.how == "mask":
            return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=self.visible)))
        if self.how == "einsum":
            weights = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
            return self.proj(torch.einsum("bhqk,bhkd->bqhd", weights, v).flatten(2))
        if self.how == "bmm":
            q, k, v = (part.reshape(-1, *part.shape[2:]) for part in (q, k, v))
            y = torch.bmm(torch.softmax(torch.bmm(q, k.mT), -1), v)
            return self.proj(merge_heads(y.view(len(x), self.num_heads, *y.shape[1:])))
        return self.proj(merge_heads(self.scores(q, k).softmax(-1) @ v))


@pattern(A + B + SEPARATE, inputs=tokens, args=("interleave",), name="GroupedKvRepeated")
@pattern(A + B + SEPARATE, inputs=tokens, args=("expand",), name="GroupedKvExpanded")
@pattern(A + B + SEPARATE, inputs=tokens, args=("sdpa",), name="GroupedKvSdpa")
class GroupedKv(Block):
    """Six query heads, two for each of three key and value heads."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.q, self.k, self.v, self.proj = nn.Linear(12, 24), nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(24, 12)

    def mix(self, x: Tensor) -> Any:
        q, k, v = split_heads(self.q(x), 6), split_heads(self.k(x), 3), split_heads(self.v(x), 3)
        if self.how == "sdpa":
            return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))
        if self.how == "interleave":
            k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        else:
            k, v = (part[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for part in (k, v))
        return self.proj(merge_heads((q @ k.mT / 2).softmax(-1) @ v))


@pattern(A + B + SEPARATE, inputs=tokens)
class MultiQuery(Block):
    """Three query heads share one key and value head, which attention repeats by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = nn.Linear(12, 12), nn.Linear(12, 4), nn.Linear(12, 4), nn.Linear(12, 12)

    def mix(self, x: Tensor) -> Any:
        q, k, v = split_heads(self.q(x), 3), self.k(x)[:, None], self.v(x)[:, None]
        return self.proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))


@pattern(A + B + SEPARATE, inputs=tokens)
class RotaryInterleaved(Block):
    """Pairs of neighbours are rotated, the angles computed in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(12, 12) for _ in range(4))

    def rotate(self, x: Tensor) -> Tensor:
        even, odd = x[..., ::2], x[..., 1::2]
        angles = torch.outer(torch.arange(x.shape[2], device=x.device), 10 ** -torch.arange(2.0, device=x.device))
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)

    def mix(self, x: Tensor) -> Any:
        q, k, v = (split_heads(layer(x), 3) for layer in (self.q, self.k, self.v))
        return self.proj(merge_heads((self.rotate(q) @ self.rotate(k).mT).softmax(-1) @ v))


IN_PROJ = "attn.in_proj_weight:01 attn.in_proj_bias:0 attn.out_proj.weight:01 "


@pattern(A + B + IN_PROJ, inputs=tokens, sizes=(3, 4, 12))
class MultiheadAttention(Block):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3, batch_first=True)

    def mix(self, x: Tensor) -> Any:
        return self.attn(x, x, x, need_weights=False)[0]


@pattern(A + B + IN_PROJ, inputs=tokens, sizes=(3, 4, 12))
class MultiheadAttentionWeights(Block):
    """Sequence first, the attention weights asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(12, 3)

    def mix(self, x: Tensor) -> Any:
        x = x.transpose(0, 1)
        return self.attn(x, x, x)[0].transpose(0, 1)


LAYER = "layer.linear1.weight:0 layer.linear2.weight:1 "
ATTENTION = "layer.self_attn.in_proj_weight:0 layer.self_attn.out_proj.weight:1 "


@pattern(
    LAYER + ATTENTION,
    inputs=tokens,
    renormalised=A + B + "layer.linear1.weight:1 layer.norm1.weight:0 layer.self_attn.in_proj_weight:1",
    sizes=(3, 4, 18),
    renormalised_sizes=(3, 4, 12, 18),
)
class TransformerLayer(Block):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(12, 3, 18, batch_first=True)

    def mix(self, x: Tensor) -> Any:
        return self.layer(x)


@pattern(
    MLP + "qkv.weight:0 proj.weight:1",
    renormalised=A
    + B
    + "qkv.weight:1 proj.weight:0 fc1.weight:1 fc2.weight:0 norm1.weight:0 norm2.weight:0 cls:2 pos:2",
    sizes=(3, 4, 18),
    renormalised_sizes=(3, 4, 12, 18),
)
class VisionTransformer(nn.Module):
    """Patches, class token, positions, one block, the class token alone goes to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(7, 12, 2, 2)
        self.cls, self.pos = nn.Parameter(torch.zeros(1, 1, 12)), nn.Parameter(torch.zeros(1, 16, 12))
        self.norm1, self.norm2, self.norm = nn.LayerNorm(12), nn.LayerNorm(12), nn.LayerNorm(12)
        self.qkv, self.proj, self.num_heads = nn.Linear(12, 36), nn.Linear(12, 12), 3
        self.fc1, self.fc2, self.b = nn.Linear(12, 18), nn.Linear(18, 12), nn.Linear(12, 5)

    def attend(self, x: Tensor) -> Any:
        n, length, width = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        return self.proj(x.transpose(1, 2).reshape(n, length, width))

    def forward(self, x: Tensor) -> Any:
        x = self.a(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), dim=1) + self.pos
        x = x + self.attend(self.norm1(x))
        x = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return self.b(self.norm(x)[:, 0])


@pattern(A + B + "qkv.weight:01 proj.weight:01 table:1", sizes=(3, 4, 12))
class ShiftedWindows(Net):
    """Swin: roll, windows of 5 x 3, attention with a position table, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.num_heads = nn.Linear(12, 36), nn.Linear(12, 12), 3
        self.table, self.index = nn.Parameter(torch.zeros(45, 3)), nn.Buffer(torch.randint(45, (15, 15)))

    def attend(self, x: Tensor) -> Any:
        n, length, c = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.flatten()].view(length, length, -1).permute(2, 0, 1)
        scores = qkv[0] * 0.5 @ qkv[1].transpose(-2, -1) + bias
        return self.proj((scores.softmax(-1) @ qkv[2]).transpose(1, 2).reshape(n, length, c))

    def middle(self, x: Tensor) -> Any:
        x = x.permute(0, 2, 3, 1)
        n, h, w, c = x.shape
        y = torch.roll(x, shifts=(-2, -1), dims=(1, 2)).view(n, h // 5, 5, w // 3, 3, c)
        y = self.attend(y.permute(0, 1, 3, 2, 4, 5).reshape(-1, 15, c))
        y = y.view(-1, h // 5, w // 3, 5, 3, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return (x + torch.roll(y, shifts=(2, 1), dims=(1, 2))).permute(0, 3, 1, 2)


@pattern(A + B + "query.weight:01 key.weight:01 value.weight:01", sizes=(3, 12))
class SelfAttentionGan(Net):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Conv2d(12, 3, 1), nn.Conv2d(12, 3, 1), nn.Conv2d(12, 12, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def middle(self, x: Tensor) -> Any:
        n, c, h, w = x.size()
        query = self.query(x).view(n, -1, h * w).permute(0, 2, 1)
        attention = torch.bmm(query, self.key(x).view(n, -1, h * w)).softmax(dim=-1)
        out = torch.bmm(self.value(x).view(n, -1, h * w), attention.permute(0, 2, 1))
        return self.gamma * out.view(n, c, h, w) + x


@pattern(A + B + "temperature:0 qkv.weight:01 c.weight:01", sizes=(3, 12), renormalised_sizes=(3, 4, 12))
class ChannelAttention(Net):
    """Restormer and XCiT: attention among channels. Queries are the stream's, the softmax runs over the keys'."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.c, self.temperature = (
            nn.Conv2d(12, 36, 1),
            nn.Conv2d(12, 12, 1),
            nn.Parameter(torch.ones(3, 1, 1)),
        )

    def middle(self, x: Tensor) -> Any:
        n, _, h, w = x.shape
        q, k, v = (part.reshape(n, 3, -1, h * w) for part in self.qkv(x).chunk(3, dim=1))
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        return self.c(x + (scores.softmax(-1) @ v).reshape(n, -1, h, w)).relu()


@pattern(A + B + "c.weight:01 c.bias:0 d:01", args=("nchw,oc->nohw",), name="EinsumPointwise", sizes=(9, 12))
@pattern(A + B + "c.weight:01 c.bias:0 d:01", args=("nc...,oc->no...",), name="EinsumEllipsis", sizes=(9, 12))
class Einsum(Net):
    def __init__(self, formula: str) -> None:
        super().__init__(9)
        self.formula, self.c, self.d = formula, nn.Conv2d(12, 9, 1), nn.Parameter(torch.zeros(9, 12))

    def middle(self, x: Tensor) -> Any:
        gate = torch.einsum("nchw,nchw->nc", x, x).mean(0)
        y = torch.einsum(self.formula, torch.einsum("nchw,c->nchw", x, gate), self.d)
        return y + self.c(x).relu()


# --- residual branches, training, sequences


@pattern(A + B + "c.weight:01 gamma:0", args=((12, 1, 1),), name="LayerScale2d", sizes=(12,))
@pattern(A + B + "c.weight:01 gamma:1", args=((1, 12, 1, 1),), name="LayerScale4d", sizes=(12,))
class LayerScale(Net):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.c, self.gamma = nn.Conv2d(12, 12, 1), nn.Parameter(1e-5 * torch.ones(shape))

    def middle(self, x: Tensor) -> Any:
        return x + self.gamma * self.c(x).relu()


@pattern(A + B + "c.weight:01 d.weight:01", sizes=(9, 12))
class DropPath(Net):
    """Stochastic depth as timm and as torchvision write it, and channel dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.c, self.d = nn.Conv2d(12, 9, 1), nn.Conv2d(9, 12, 1)
        self.depth, self.dropout = torchvision.ops.StochasticDepth(0.5, "row"), nn.Dropout2d(0.3)

    def drop(self, x: Tensor) -> Any:
        if not self.training:
            return x
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.5).div_(0.5)

    def middle(self, x: Tensor) -> Any:
        return x + self.drop(self.d(self.dropout(self.c(x)).relu())) + self.depth(x.sin())


@pattern(A + B + "c.weight:01 aux.weight:1 deep.weight:01", sizes=(8, 9, 12))
class AuxiliaryHead(Net):
    def __init__(self) -> None:
        super().__init__(9)
        self.c, self.aux, self.deep = nn.Conv2d(12, 9, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(12, 8, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.a(x).relu()
        y = self.b(self.c(x).relu())
        return (y, self.aux(self.deep(x).relu())) if self.training else y


@pattern(A + B + "c.weight:01 slope.weight:0", sizes=(9, 12))
class Activations(Net):
    def __init__(self) -> None:
        super().__init__(9)
        self.c, self.slope, self.one = nn.Conv2d(12, 9, 1), nn.PReLU(12), nn.PReLU()

    def middle(self, x: Tensor) -> Any:
        x = F.hardswish(F.mish(self.slope(x - 1))) + F.softplus(x) * F.elu(x).clamp(-1, 2)
        return F.logsigmoid(self.one(self.c(x)) - 0.3) ** 2


@pattern(A + "norm.weight:0 norm.running_var:0 b.weight:1", inputs=tokens, sizes=(12,))
class BatchNormOverTokens(Block):
    """LeViT: a linear layer, then BatchNorm1d over flattened tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(12)

    def mix(self, x: Tensor) -> Any:
        return self.norm(x.flatten(0, 1)).reshape_as(x)


def _recurrent(kind: Callable[..., nn.Module], name: str, *, bidirectional: bool) -> None:
    both = "rnn.weight_ih_l0:01 rnn.weight_hh_l0:01 " + "rnn.weight_ih_l0_reverse:01 " * bidirectional

    @pattern(
        "fc.weight:0 d.weight:1",
        inputs=tokens,
        optional=A + both + "fc.weight:1",
        refused="gru|lstm|rnn|no rule",
        name=name + "Bidirectional" * bidirectional,
    )
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.rnn = nn.Linear(7, 12), kind(12, 9, batch_first=True, bidirectional=bidirectional)
            self.fc, self.d = nn.Linear(9 + 9 * bidirectional, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Any:
            return self.d(self.fc(self.rnn(self.a(x).relu())[0]).relu())


for _bidirectional in (False, True):
    _recurrent(nn.GRU, "GRU", bidirectional=_bidirectional)
    _recurrent(nn.LSTM, "LSTM", bidirectional=_bidirectional)


@pattern("embed.weight:1 position.weight:1 fc.weight:01 b.weight:1", inputs=words, sizes=(9, 12))
class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(17, 12), nn.Embedding(10, 12)
        self.fc, self.b = nn.Linear(12, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Any:
        x = self.embed(x) + self.position(torch.arange(x.shape[1], device=x.device))
        return self.b(self.fc(x).relu().mean(1))


@pattern("embed.weight:1 fc.weight:01", inputs=words, optional="embed.weight:0", refused="embedding", sizes=(12,))
class TiedEmbedding(nn.Module):
    """A language model whose output layer is its embedding: 17 words stay, the 12 dimensions may go."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(17, 12), nn.Linear(12, 12), nn.Linear(12, 17, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Any:
        return self.head(self.fc(self.embed(x)).relu())


# --- what is refused

REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "CumsumOverChannels": (lambda x: x.cumsum(1), "cumsum"),
    "SortOverChannels": (lambda x: x.sort(1)[0], "sort"),
    "TopkOverChannels": (lambda x: x.topk(12, 1)[0], "topk"),
    "FftOverChannels": (lambda x: torch.fft.fft(x, dim=1).abs(), "fft"),
    "FftOverChannelsAndSpace": (lambda x: torch.fft.fftn(x, dim=(1, 2, 3)).real, "fft"),
    "KthOverChannels": (lambda x: x * x.kthvalue(4, dim=1, keepdim=True)[0], "kthvalue"),
    "ProductOverChannels": (lambda x: x + (1 + x).prod(1, keepdim=True).tanh(), "prod"),
    "ChannelsAsSpace": (lambda x: F.avg_pool2d(x.transpose(1, 3), 3, 1, 1).transpose(1, 3), "avg_pool"),
    "ShiftOverChannels": (lambda x: x + torch.roll(x, 1, 1), "roll"),
    "GatherOverChannels": (lambda x: x.gather(1, x.argsort(1)), "gather|sort"),
}


def _refused(name: str, function: Callable[[Tensor], Tensor], reason: str) -> None:
    @pattern("c.weight:0 c.bias:0 b.weight:1", refused=reason, sizes=(9,), name=name)
    class Refused(Net):
        def __init__(self) -> None:
            super().__init__(9)
            self.c = nn.Conv2d(12, 9, 1)

        def middle(self, x: Tensor) -> Any:
            return self.c(function(x)).relu()


for _name, (_function, _reason) in REFUSED.items():
    _refused(_name, _function, _reason)


@pattern("c.weight:0 c.bias:0 b.weight:1", optional=A + "c.weight:1", refused="fft")
class FftOverSpace(Net):
    """Along space every channel is by itself; GFNet and FFC do so."""

    def __init__(self) -> None:
        super().__init__(9)
        self.c, self.filter = nn.Conv2d(12, 9, 1), nn.Parameter(torch.randn(10, 4, 12, 2))

    def middle(self, x: Tensor) -> Any:
        spectrum = torch.fft.rfft2(x.permute(0, 2, 3, 1), dim=(1, 2), norm="ortho") * torch.view_as_complex(self.filter)
        return self.c(torch.fft.irfft2(spectrum, s=(10, 6), dim=(1, 2), norm="ortho").permute(0, 3, 1, 2)).relu()


@pattern("c.weight:0 c.bias:0 b.weight:1", optional=A + "c.weight:1", refused="index|nonzero|mask")
class BooleanIndex(Net):
    """Only the pixels of a fixed mask go through the second layer."""

    def __init__(self) -> None:
        super().__init__(9)
        self.inside = nn.Buffer(torch.rand(10, 6) > 0.4)
        self.c = nn.Conv1d(12, 9, 1)

    def middle(self, x: Tensor) -> Any:
        return self.c(x[:, :, self.inside]).relu().unsqueeze(-1)
