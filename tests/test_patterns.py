"""The laws over every pattern of `tests/patterns.py`: found, cut exactly, refused by name, trainable, exportable."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sparsekit.baking import bake_all
from sparsekit.compaction import certify, compact
from sparsekit.coupling import Coupling
from sparsekit.export import export_onnx
from sparsekit.gates import GatedNetwork
from sparsekit.graph import ChannelGraph, trace
from sparsekit.plan import PruningPlan
from sparsekit.record import record
from sparsekit.selection import keep_top
from sparsekit.surgery import copied, mask
from sparsekit.survey import living
from tests.patterns import PATTERNS, Inputs, Place, make

CASES = [(name, renormalise) for name, pattern in PATTERNS.items() for renormalise in pattern.modes]
IDS = [f"{name}-renormalised" if renormalise else name for name, renormalise in CASES]
every_case = pytest.mark.parametrize(("name", "renormalise"), CASES, ids=IDS)


@cache
def traced(name: str, renormalise: bool) -> tuple[ChannelGraph, Inputs]:
    network, inputs = make(name)
    return trace(network, inputs, renormalise=renormalise), inputs


def random_plan(graph: ChannelGraph, *, drop: int, seed: int) -> PruningPlan:
    """Drop one channel in `drop` of every group, at random, at least one, and never the last."""
    generator = torch.Generator().manual_seed(seed)
    scores = {group: torch.rand(group.size, generator=generator) for group in graph.groups}
    return keep_top(scores, {group: group.size - max(1, group.size // drop) for group in graph.groups})


def places(graph: ChannelGraph, *, exact_only: bool = False) -> set[Place]:
    groups = [group for group in graph.groups if group.exact or not exact_only]
    return {(slot.tensor, slot.dim) for group in groups for slot in group.slots}


def reasons(graph: ChannelGraph) -> list[str]:
    return [f"{refusal.op}: {refusal.reason} ({refusal.source})" for refusal in graph.refusals]


def tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@every_case
def test_the_ops_that_run_on_the_cpu_have_the_groups_of_those_on_meta(name: str, renormalise: bool) -> None:
    graph, inputs = traced(name, renormalise)
    plan = random_plan(graph, drop=2, seed=0)
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    living([record(mask(graph.model, plan).double(), inputs)], plan, Coupling())  # raises where it has no such group


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_has_the_groups_an_expert_would_cut(name: str) -> None:
    pattern = PATTERNS[name]
    graph, _ = traced(name, False)
    found = places(graph)
    assert pattern.exact <= found, (sorted(pattern.exact - found), reasons(graph))
    assert not pattern.renormalised & found, sorted(pattern.renormalised & found)
    assert all(group.exact for group in graph.groups)
    if pattern.sizes is not None:
        assert sorted(group.size for group in graph.groups) == sorted(pattern.sizes), (graph.groups, reasons(graph))


@pytest.mark.parametrize("name", [name for name, pattern in PATTERNS.items() if True in pattern.modes])
def test_what_is_normalised_together_is_prunable_on_request_and_marked(name: str) -> None:
    pattern = PATTERNS[name]
    graph, _ = traced(name, True)
    wanted = pattern.exact | pattern.renormalised | pattern.either
    assert wanted <= places(graph), (sorted(wanted - places(graph)), reasons(graph))
    assert not pattern.renormalised & places(graph, exact_only=True)
    if pattern.renormalised_sizes is not None:
        sizes = sorted(group.size for group in graph.groups)
        assert sizes == sorted(pattern.renormalised_sizes), (graph.groups, reasons(graph))


@pytest.mark.parametrize("name", [name for name, pattern in PATTERNS.items() if pattern.refused])
def test_what_is_refused_says_why_and_where(name: str) -> None:
    pattern = PATTERNS[name]
    graph, _ = traced(name, False)
    if pattern.optional and pattern.optional <= places(graph):
        return
    named = [r for r in graph.refusals if re.search(pattern.refused, f"{r.op} {r.reason}")]
    assert named, reasons(graph)
    assert all(re.match(r".+\.py:\d+$", refusal.source) for refusal in named), reasons(graph)
    assert all(refusal.macs_share > 0 for refusal in named), reasons(graph)


@pytest.mark.parametrize("name", [name for name, pattern in PATTERNS.items() if not pattern.refused])
def test_nothing_but_input_and_output_is_refused_where_all_can_be_cut(name: str) -> None:
    graph, _ = traced(name, PATTERNS[name].modes[-1])
    # A factor that is normalised together is named, also where another factor of the same dimension can be cut.
    lost = [row for row in graph.refusals if row.macs_share > 0 or "renormalise=True" not in row.reason]
    assert lost == [], reasons(graph)


@pytest.mark.parametrize("drop", [2, 3])
@every_case
def test_the_compact_network_computes_the_masked_one_at_any_batch(name: str, renormalise: bool, drop: int) -> None:
    graph, inputs = traced(name, renormalise)
    states = {key: value.clone() for key, value in graph.model.state_dict().items()}
    modes = [module.training for module in graph.model.modules()]
    plan = random_plan(graph, drop=drop, seed=drop)
    assert plan.keep or not graph.groups
    small = compact(graph.model, plan, inputs)
    others = [] if PATTERNS[name].fixed_batch else [PATTERNS[name].inputs(3), PATTERNS[name].inputs(1)]
    for example in (inputs, *others):
        certificate = certify(graph.model, plan, small, example)
        assert certificate.holds, certificate
    assert num_params(small) < num_params(graph.model) or not plan.keep
    assert all(torch.equal(value, states[key]) for key, value in graph.model.state_dict().items())
    assert modes == [module.training for module in graph.model.modules()]
    fresh, _ = make(name)
    assert difference(graph.model, fresh, inputs, training=False) == 0


@every_case
def test_every_group_matters_to_the_output_so_that_no_comparison_is_vacuous(name: str, renormalise: bool) -> None:
    graph, inputs = traced(name, renormalise)
    dense = compact(graph.model, PruningPlan(), inputs)
    for group, keep in random_plan(graph, drop=2, seed=5).keep.items():
        small = compact(graph.model, PruningPlan({group: keep}), inputs)
        # Auxiliary heads show in training mode alone.
        assert max(difference(small, dense, inputs, training=mode) for mode in (False, True)) > 1e-5, group


def difference(small: nn.Module, dense: nn.Module, inputs: Inputs, *, training: bool) -> float:
    outputs = []
    for network in (small, dense):
        torch.manual_seed(1)
        with torch.no_grad():
            outputs.append(tensors(network.train(training)(*inputs)))
    return max(float((a - b).abs().max()) for a, b in zip(*outputs, strict=True))


@every_case
def test_the_compact_network_takes_a_training_step_that_reaches_what_was_cut(name: str, renormalise: bool) -> None:
    graph, inputs = traced(name, renormalise)
    plan = random_plan(graph, drop=2, seed=7)
    small = compact(graph.model, plan, inputs).train()
    dense = {key: value.shape for key, value in graph.model.named_parameters()}
    outputs, expected = tensors(small(*inputs)), tensors(make(name)[0].train()(*inputs))
    assert [out.shape for out in outputs] == [out.shape for out in expected]
    loss = torch.stack([(out * torch.randn_like(out)).sum() for out in outputs]).sum()
    loss.backward()
    cut = {key: value for key, value in small.named_parameters() if value.shape != dense.get(key)}
    assert cut or not plan.keep
    missing = [key for key, value in cut.items() if value.grad is None or not value.grad.isfinite().all()]
    assert not missing
    before = {key: value.detach().clone() for key, value in small.named_parameters()}
    torch.optim.SGD(small.parameters(), lr=0.1).step()
    assert any(not torch.equal(value, before[key]) for key, value in small.named_parameters())
    assert all(out.isfinite().all() for out in tensors(small(*inputs)))


EXPORTED = """
    Transposed PixelShuffle ChannelShuffle C2fSplit PartialConv ZeroPadLiteral ViewLiteral PackedAttention SeparateSdpa
    Rotary GroupedKvExpanded MultiheadAttention VisionTransformer ShiftedWindows SelfAttentionGan ConditionalBatchNorm
""".split()


@pytest.mark.parametrize("name", EXPORTED)
def test_the_compact_network_exports_to_onnx(name: str, tmp_path: Path) -> None:
    graph, inputs = traced(name, PATTERNS[name].modes[-1])
    small = compact(graph.model, random_plan(graph, drop=2, seed=2), inputs)
    assert export_onnx(small, inputs, tmp_path / "small.onnx").max_relative_error < 1e-4


def num_params(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", PATTERNS)
def test_hard_gates_compute_what_the_plan_says_twice_in_a_row(name: str) -> None:
    """Channels in two groups at once (heads x head dims), attention scores, modules under two names."""
    network, inputs = make(name)
    graph = trace(network, inputs)
    if not graph.groups:
        pytest.skip("nothing to gate")
    plan = random_plan(graph, drop=2, seed=1)
    gated = GatedNetwork(bake_all(copied(network)).eval().double(), graph.groups)
    gates_GC = gated.valid.double()
    for row, group in zip(gates_GC, graph.groups, strict=True):
        row[: group.size] = plan.keep.get(group, torch.ones(group.size))
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    with torch.no_grad():
        expected = tensors(mask(network, plan).double().eval()(*wide))
        for _ in range(2):
            torch.testing.assert_close(tensors(gated(gates_GC, *wide)), expected)
