"""Torch-Pruning beside ours: what it kept, as a plan, is the same network."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torch_pruning", reason="the benchmark measures Torch-Pruning beside sparsekit")
pytest.importorskip("timm", reason="the benchmark's ViT is timm's")

from benchmarks.recovery_networks import SUBJECTS
from benchmarks.recovery_torch_pruning import torch_pruned
from sparsekit import Budget, compact, trace
from sparsekit.selection import allocate

SHAPES = {"cifar10": (2, 3, 32, 32), "fashion-mnist": (2, 1, 28, 28)}


@pytest.mark.parametrize("name", SUBJECTS)
def test_what_torch_pruning_kept_is_a_plan_whose_network_is_its_own(name: str) -> None:
    torch.manual_seed(0)
    subject = SUBJECTS[name]
    dense, inputs = subject.build().double().eval(), (torch.randn(SHAPES[subject.data], dtype=torch.float64),)
    graph = trace(dense, inputs)
    counts = allocate(graph, Budget(keep=tuple((pattern, 0.3) for pattern in subject.layers)))
    theirs, plan = torch_pruned(graph, inputs, counts)
    assert plan.kept == {group.name: count for group, count in counts.items() if count < group.size}
    with torch.no_grad():
        torch.testing.assert_close(theirs(*inputs), compact(dense, plan)(*inputs), rtol=1e-9, atol=1e-12)
        assert not torch.allclose(theirs(*inputs), dense(*inputs))
