"""Smaller stock networks of the same family, timed beside the small network: would one have done as well?

A family is the names that differ in nothing but digits and words of size: torchvision's resnet18 and resnet50,
timm's vit_tiny_patch16_224 and vit_base_patch16_224.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sparsekit.errors import ExportError
from sparsekit.export import export_onnx
from sparsekit.latency import Ratio, measure_latency
from sparsekit.models import MODELS
from sparsekit.networks import build_network
from sparsekit.targets import Target, parse_target

Progress = Callable[[str], None]

_SIZE_WORDS = frozenset(
    "atto femto pico nano zepto tiny mini small medium base large xlarge xxlarge huge giant gigantic "
    "xxs xs s m b l h g n t mf gf".split()
)
# What networks raise whose sizes do not go with the inputs'.
_UNFIT = (RuntimeError, AssertionError, ValueError)


@dataclass(frozen=True)
class Stock:
    """A network that anyone can have by its name.

    Attributes:
        name: as `build_network` takes it.
        num_params: with the user's number of classes.
        num_macs: of one example of the user's size.
        accuracy: published top-1, in [0, 1]; None where the library that has the network names none.
        data: what that was measured on.
    """

    name: str
    num_params: int
    num_macs: int
    accuracy: float | None = None
    data: str | None = None


@dataclass(frozen=True)
class StockRow:
    """A stock network timed beside the dense and the small network.

    Attributes:
        latency_ratio: its latency over the dense network's; None where it was not timed.
        to_compact: its latency over the small network's, with the interval.
        note: why it was not timed.
    """

    stock: Stock
    latency_ratio: float | None = None
    to_compact: Ratio | None = None
    note: str = ""

    def to_json(self, dense_macs: int) -> dict[str, Any]:
        """Plain values for a report."""
        return {
            "name": self.stock.name,
            "num_macs": self.stock.num_macs,
            "num_params": self.stock.num_params,
            "macs_ratio": self.stock.num_macs / dense_macs,
            "latency_ratio": self.latency_ratio,
            "accuracy": self.stock.accuracy,
            "data": self.stock.data,
            "note": self.note,
        }


def siblings(model: str, inputs: tuple[Tensor, ...], *, num_classes: int) -> tuple[Stock, ...]:
    """The networks of `model`'s family with fewer MACs or parameters, ascending in MACs.

    Those that cannot take `inputs` are left out. Nothing is downloaded, and no weights are made.

    Args:
        model: as `build_network` takes it; a user's own file has no family.
        inputs: one forward's positional inputs, batch first, [N, C, ...] for the first.
    """
    known = [name for name in _names(model) if _family(name) == _family(model)]
    if model not in known:
        return ()
    sized = {name: _sizes(name, inputs, num_classes) for name in known}
    own = sized.pop(model)
    if own is None:
        return ()
    smaller = [
        Stock(name, *sizes, *_published(name))
        for name, sizes in sized.items()
        if sizes and (sizes[0] < own[0] or sizes[1] < own[1])
    ]
    return tuple(sorted(smaller, key=lambda stock: stock.num_macs))


def compare_stock(
    stocks: Sequence[Stock],
    dense: Path,
    compact: Path,
    compact_macs: int,
    inputs: tuple[Tensor, ...],
    *,
    num_classes: int,
    target: Target | str = "onnxruntime",
    threads: int = 1,
    batch_size: int = 1,
    max_stocks: int = 3,
    max_seconds: float = 120.0,
    progress: Progress | None = None,
) -> tuple[StockRow, ...]:
    """Time the stock networks nearest to the small one, with random weights, side by side with it and the dense one.

    Args:
        dense: the dense network's file, as the target runs it; so is `compact`.
        compact_macs: of the small network; those nearest to it in MACs are taken.
        max_stocks: how many.
        max_seconds: half of it for building and exporting, after which no other is begun; half for timing.
        progress: called with each network's name.

    Raises:
        MeasurementError: as `measure_latency`.
    """
    target = parse_target(target) if isinstance(target, str) else target
    nearest = sorted(stocks, key=lambda stock: abs(math.log(stock.num_macs / compact_macs)))[:max_stocks]
    start, files, notes = time.monotonic(), dict[str, Path](), dict[str, str]()
    with TemporaryDirectory(prefix="sparsekit-stock-") as folder:
        for number, stock in enumerate(nearest):
            if time.monotonic() - start > max_seconds / 2:
                notes[stock.name] = "not timed: out of time"
                continue
            if progress:
                progress(stock.name)
            try:
                path = Path(folder, f"{number}.onnx")
                files[stock.name] = _export(stock.name, inputs, path, target, num_classes)
            except ExportError as error:
                notes[stock.name] = f"not timed: {error}"
        rows = [StockRow(stock, note=notes[stock.name]) for stock in nearest if stock.name in notes]
        if files:
            paths = [compact, dense, *files.values()]
            timed = measure_latency(
                paths, target=target, threads=threads, batch_size=batch_size, max_seconds=max_seconds / 2
            )
            dense_ratio, *ratios = timed.ratios
            for stock, ratio in zip([stock for stock in nearest if stock.name in files], ratios, strict=True):
                rows.append(StockRow(stock, ratio.value / dense_ratio.value, ratio))
    return tuple(sorted(rows, key=lambda row: row.stock.num_macs))


def dominating(rows: Sequence[StockRow], accuracy: float | None, data: str | None) -> tuple[StockRow, ...]:
    """Stock networks no slower than the small one, as far as could be measured, and at least as accurate.

    None whose accuracy was measured on other data than `data`: numbers of two tasks do not compare.

    Args:
        accuracy: of the small network, in [0, 1]; None where unknown.
        data: what it was measured on, as in `Stock.data`.

    >>> stock = Stock("torchvision:resnet18", 11_689_512, 1_814_073_344, accuracy=0.698, data="ImageNet-1K")
    >>> row = StockRow(stock, 0.45, Ratio(0.9, 0.88, 0.92, True))
    >>> len(dominating([row], 0.69, "ImageNet-1K")), len(dominating([row], 0.71, "ImageNet-1K"))
    (1, 0)
    >>> dominating([row], 0.10, "cifar10")
    ()
    """
    return tuple(
        row
        for row in _as_fast(rows)
        if row.stock.accuracy is not None
        and accuracy is not None
        and row.stock.data == data
        and row.stock.accuracy >= accuracy
    )


def verdict(rows: Sequence[StockRow], accuracy: float | None, data: str | None) -> str:
    """One line: does a stock network dominate the small one, and where that cannot be told, why.

    Args:
        accuracy: as for `dominating`, like `data`.

    >>> verdict([], 0.9, "cifar10")
    'stock: the family has no smaller network'
    >>> row = StockRow(Stock("resnet32", 464_154, 69_124_736), 0.45, Ratio(0.9, 0.88, 0.92, True))
    >>> verdict([row], 0.9, "cifar10")
    'stock: resnet32 is as fast (0.90x the small network); no accuracy is published: train it on your data to know'
    """
    if not rows:
        return "stock: the family has no smaller network"
    timed = [row for row in rows if row.to_compact]
    if not timed:
        return f"stock: none of {len(rows)} was timed ({rows[0].stock.name}: {rows[0].note})"
    winners = dominating(rows, accuracy, data)
    if winners:
        best = max(winners, key=lambda row: row.stock.accuracy or 0.0)
        return f"stock: {best.stock.name} dominates the small network: {_speed(best)}, {best.stock.accuracy:.1%} right"
    fast = _as_fast(timed)
    if not fast:
        return f"stock: none of {len(timed)} timed is as fast as the small network"
    unknown = [row for row in fast if accuracy is None or row.stock.accuracy is None or row.stock.data != data]
    if not unknown:
        return f"stock: none of {len(timed)} timed is both as fast as the small network and as accurate"
    row = max(unknown, key=lambda row: row.stock.num_macs)
    published = "no accuracy is published"
    if row.stock.accuracy is not None:
        published = f"its {row.stock.accuracy:.1%} are of {row.stock.data}"
    return f"stock: {row.stock.name} is as fast ({_speed(row)}); {published}: train it on your data to know"


def _as_fast(rows: Sequence[StockRow]) -> list[StockRow]:
    return [row for row in rows if row.to_compact and row.to_compact.low <= 1]


def _speed(row: StockRow) -> str:
    return f"{row.to_compact.value:.2f}x the small network" if row.to_compact else ""


def _names(model: str) -> list[str]:
    """Everything that comes from where `model` does, as `build_network` takes it."""
    source, colon, _ = model.partition(":")
    if source == "torchvision" and colon:
        from torchvision import models

        return [f"torchvision:{name}" for name in models.list_models(module=models)]
    if source == "timm" and colon:
        import timm  # not missing, since `model` came from there

        return [f"timm:{name}" for name in timm.list_models()]
    return list(MODELS)


def _family(name: str) -> tuple[str, ...]:
    """What is left of a name without digits and words of size; of built-in ones `_b`, say, is no size.

    >>> _family("torchvision:wide_resnet50_2"), _family("timm:vit_small_patch16_224"), _family("resnet20_b")
    (('wide', 'resnet'), ('vit', 'patch'), ('resnet', 'b'))
    """
    _, colon, inner = name.rpartition(":")
    sizes = _SIZE_WORDS if colon else frozenset[str]()
    words = re.sub(r"\d+", "", inner).split("_")
    return tuple(word for word in words if word and word not in sizes)


def _sizes(name: str, inputs: tuple[Tensor, ...], num_classes: int) -> tuple[int, int] | None:
    """Parameters, and MACs per example; None for a network that cannot take `inputs`."""
    try:
        with torch.device("meta"):
            network = build_network(name, num_classes=num_classes, in_channels=inputs[0].shape[1])
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(*(x.to("meta") for x in inputs))
    except _UNFIT:
        return None
    num_macs = counter.get_total_flops() // 2 // len(inputs[0])
    return sum(parameter.numel() for parameter in network.parameters()), num_macs


def _published(name: str) -> tuple[float | None, str | None]:
    """Top-1 accuracy of torchvision's best weights at the network's usual image size, and on what data."""
    source, colon, inner = name.partition(":")
    if source != "torchvision" or not colon:
        return None, None
    from torchvision import models

    entries = [weights.meta for weights in models.get_model_weights(inner)]
    usual = min((meta["_ops"] for meta in entries), default=0.0)
    scores = [
        (metrics["acc@1"] / 100, data)
        for meta in entries
        if meta["_ops"] == usual
        for data, metrics in meta["_metrics"].items()
    ]
    return max(scores, default=(None, None))


def _export(name: str, inputs: tuple[Tensor, ...], path: Path, target: Target, num_classes: int) -> Path:
    """The file of a freshly initialised network that `target` runs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network(name, num_classes=num_classes, in_channels=inputs[0].shape[1])
        for weight in network.parameters():
            if weight.dim() > 1 and not weight.any():  # a head that starts at zero proves nothing of its file
                nn.init.normal_(weight, std=0.02)
    export_onnx(network, inputs, path)
    return target.prepare(network, inputs, path, path.parent)
