"""Images from a generator in an ONNX file, whose inputs the file itself tells."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sparsekit.errors import ExportError, UsageError
from sparsekit.onnx_network import OnnxInput, OnnxNetwork

_INTEGERS = {"int64": torch.int64, "int32": torch.int32}
_MAX_CLASSES = 2**16


@dataclass(frozen=True, eq=False)
class OnnxGenerator:
    """A generator, from `open_generator`.

    Attributes:
        input_shape: of what one image is made of: noise (z,) or (z, 1, 1), or another image (C, H, W).
        image_shape: of one image, (C, H, W).
        labels: where among the inputs class indices stand, and their type; None where there are none.
        batch_size: the only one that the file takes; None where it takes any.
    """

    network: OnnxNetwork
    input_shape: tuple[int, ...]
    image_shape: tuple[int, ...]
    labels: tuple[int, torch.dtype] | None
    batch_size: int | None

    @property
    def from_images(self) -> bool:
        """Whether it translates images; others start from noise."""
        return len(self.input_shape) == 3 and self.input_shape[1:] != (1, 1)

    def images(self, inputs: Tensor, labels: Tensor | None = None, *, batch_size: int = 64) -> Tensor:
        """An image [N, C, H, W] for each of `inputs`, [N, *input_shape].

        Args:
            labels: class indices, int64 [N]; for a file that takes them.
            batch_size: images at once, where the file does not say.

        Raises:
            ExportError: the file does not run on them, as when it knows fewer classes.
        """
        size = self.batch_size or batch_size
        made = []
        for start in range(0, len(inputs), size):
            part = inputs[start : start + size]
            # A file with a fixed batch gets a full one.
            index = torch.arange(self.batch_size or len(part)).clamp(max=len(part) - 1)
            values = [part[index]]
            if self.labels and labels is not None:
                place, dtype = self.labels
                values.insert(place, labels[start : start + size][index].to(dtype))
            made.append(self.network.run(*values)[0][: len(part)])
        return torch.cat(made)

    def num_classes(self) -> int:
        """How many class indices it takes, from 0 on, found by trying; 0 where it takes none.

        Raises:
            ExportError: there is no end to them.
        """
        if not self.labels:
            return 0
        first_bad = 1
        while self.takes(first_bad):
            first_bad *= 2
            if first_bad > _MAX_CLASSES:
                raise ExportError(f"{self.network.name}: takes every class index; say which classes")
        last_good = first_bad // 2
        while first_bad - last_good > 1:
            middle = (first_bad + last_good) // 2
            first_bad, last_good = (first_bad, middle) if self.takes(middle) else (middle, last_good)
        return first_bad

    def takes(self, label: int) -> bool:
        """Whether it knows a class of this index."""
        try:
            self.images(torch.zeros(1, *self.input_shape), torch.tensor([label]))
        except ExportError:  # no other way to ask: a file does not tell the range of its inputs
            return False
        return True


def open_generator(path: Path) -> OnnxGenerator:
    """The generator in an ONNX file: noise [N, Z] or [N, Z, 1, 1], or images, and class indices [N] or none.

    Raises:
        ExportError: the file does not load.
        UsageError: it takes or makes something else, such as a classifier or a discriminator.
    """
    network = OnnxNetwork(path)
    floats = [wanted for wanted in network.inputs if wanted.dtype == "float"]
    labels = [place for place, wanted in enumerate(network.inputs) if wanted.dtype in _INTEGERS]
    shape = floats[0].shape[1:] if floats else ()
    sizes = tuple(size for size in shape if size is not None)
    known = len(sizes) == len(shape) and len(sizes) in (1, 3)
    if (len(floats), len(network.inputs)) != (1, 1 + len(labels)) or len(labels) > 1 or not known:
        takes = ", ".join(map(_text, network.inputs)) or "nothing"
        raise UsageError(
            f"{path}: no generator: takes {takes}; expected noise [N, Z] or images of one size [N, C, H, W], "
            "and class indices [N] or nothing"
        )
    kind = (labels[0], _INTEGERS[network.inputs[labels[0]].dtype]) if labels else None
    generator = OnnxGenerator(network, sizes, (), kind, floats[0].shape[0])
    made = generator.images(torch.zeros(1, *sizes), torch.zeros(1, dtype=torch.int64))
    if made.dim() != 4 or made.shape[1] not in (1, 3) or not made.is_floating_point():
        text = ", ".join(map(str, ("N", *made.shape[1:])))
        raise UsageError(f"{path}: no generator: makes [{text}] of {_text(floats[0])}; expected [N, 1 or 3, H, W]")
    return replace(generator, image_shape=tuple(made.shape[1:]))


def noise(num: int, generator: OnnxGenerator, *, seed: int) -> Tensor:
    """Standard normal inputs, [num, *input_shape]; the first of more are the same."""
    rng = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randn(generator.input_shape, generator=rng) for _ in range(num)])


def strip(start: Tensor, end: Tensor, num_steps: int) -> Tensor:
    """Noise on the way from `start` to `end`, both included: [num_steps, ...], `num_steps` at least 2.

    Along the great circle, since straight lines pass where no noise lies: at half the way, nearer to 0 than any.

    Source: Shoemake 1985, "Animating rotation with quaternion curves" (spherical linear interpolation).

    >>> strip(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), 3)[1].tolist()
    [0.7071067690849304, 0.7071067690849304]
    """
    share_T = torch.linspace(0, 1, num_steps, dtype=torch.float64).reshape(-1, *[1] * start.dim())
    a, b = start.double(), end.double()
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = cosine.clamp(-1, 1).acos()
    if angle.sin() < 1e-6:  # the same direction, or opposite ones, between which no circle is the shortest
        return torch.lerp(a, b, share_T).float()
    between: Tensor = (((1 - share_T) * angle).sin() * a + (share_T * angle).sin() * b) / angle.sin()
    return between.float()


def strips(ends: Tensor, num_steps: int) -> Tensor:
    """A `strip` for every two of `ends`, [2 S, ...], one behind the other: [S * num_steps, ...]."""
    return torch.cat([strip(start, end, num_steps) for start, end in zip(ends[::2], ends[1::2], strict=True)])


def _text(value: OnnxInput) -> str:
    sizes = ", ".join("N" if size is None else str(size) for size in value.shape)
    return f"{value.name} [{sizes}] ({value.dtype})"
