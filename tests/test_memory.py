"""How far memory rises: by what a network holds, not by how often its layers run or how many there are."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.models import VisionTransformer

from sparsekit.compaction import certify, compact
from sparsekit.graph import trace
from sparsekit.selection import keep_top
from sparsekit.survey import survey


def test_tracing_many_steps_of_a_network_with_many_channels() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step, self.wide, self.head = nn.Linear(8, 8), nn.Linear(8, 60_000), nn.Linear(60_000, 2)

        def forward(self, x: Tensor) -> Any:
            for _ in range(400):
                x = torch.tanh(self.step(x))
            return self.head(self.wide(x).sort(1).values)

    model, x = Recurrent().eval(), torch.randn(2, 8)
    tracemalloc.start()
    try:
        graph = trace(model, x)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert {refusal.op for refusal in graph.refusals} == {"sort"}
    assert peak < 8 * 402 * 60_000  # calls x channels


class Living(TorchDispatchMode):
    """Counts the results of ops that are still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = 0
        self._results: list[weakref.ref[Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._results = [known for known in self._results if known() is not None]
        self._results += [weakref.ref(leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.most = max(self.most, len(self._results))
        return result


def test_certifying_a_deep_network_keeps_no_activation_longer_than_it_is_read() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(2, 8), nn.LayerNorm(8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Any:
            x = self.norm(self.first(x))
            for _ in range(100):
                x = x.tanh()
            return self.last(x)

    model, x = Deep().eval(), torch.randn(3, 2)
    graph = trace(model, x, renormalise=True)
    plan = keep_top({group: torch.rand(group.size) for group in graph.groups}, {graph.groups[0]: 4})
    small = compact(model, plan, x)
    assert not graph.groups[0].exact
    with Living() as living:
        assert certify(model, plan, small, x).holds
    assert living.most < 60


def test_a_network_that_needs_values_and_keeps_some_is_copied_once() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Any:
            self.kept = self.first(x)
            return self.last(self.kept if bool(x.sum() > 9) else self.kept.relu())

    model, x = Keeping().eval(), torch.randn(3, 2)
    found = survey(model, (x,), renormalise=False)
    assert not hasattr(model, "kept")
    recorded = next(op.owner for op in found.recordings[0].ops if isinstance(op.owner, nn.Linear))
    weight = found.twin.get_parameter("first.weight")
    assert weight.data_ptr() == recorded.get_parameter("weight").data_ptr() != model.first.weight.data_ptr()


def test_tracing_leaves_nothing_to_the_collector() -> None:
    model, x = VisionTransformer(16, 4, 2, 3, 24, 48).eval(), torch.randn(1, 3, 16, 16)
    trace(model, x, renormalise=True)  # what torch makes once
    gc.collect()
    gc.disable()
    try:
        graph = trace(model, x, renormalise=True)
        assert gc.collect() < 200  # objects; a pass that failed holds thousands
    finally:
        gc.enable()
    assert graph.groups
