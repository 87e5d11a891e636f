"""Transportation pruning: the solvers against their oracles, and the pruner on a small network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparsekit.budget import Budget
from sparsekit.compaction import compact
from sparsekit.errors import UsageError
from sparsekit.graph import ChannelGraph, trace
from sparsekit.plan import ChannelGroup, PruningPlan, Slot
from sparsekit.pruner import channel_norms
from sparsekit.pruners.transport import MaskedNetwork, Transport
from sparsekit.selection import allocate
from sparsekit.soft_topk import SoftMasks, Solver, exact_mask, sinkhorn_step
from sparsekit.surgery import mask
from sparsekit.task import Batch, Fit, Record, Schedule, Task


def all_valid(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape, dtype=torch.bool)


def iterate(
    scores: Tensor, counts: Tensor, valid: Tensor, *, epsilon: float, num_steps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`num_steps` proximal steps with still scores, in the scores' dtype."""
    log_odds, potential = uniform_plan(scores)
    for _ in range(num_steps):
        mask, log_odds, potential = sinkhorn_step(scores, counts, log_odds, potential, valid, epsilon=epsilon)
    return mask, log_odds, potential


def uniform_plan(scores: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(scores), scores.new_zeros(len(scores))


def algorithm_1(
    scores: Tensor, count: int, plan: Tensor, g: Tensor, *, epsilon: float, num_iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The paper's lines as they stand there, but g / epsilon in place of g: the mask, P and g, from s, P and g."""
    num_channels = len(scores)
    a = torch.full_like(scores, 1 / num_channels)
    b = scores.new_tensor([1 - count / num_channels, count / num_channels])
    cost = torch.stack([scores**2, (scores - 1) ** 2], 1)
    kernel = torch.exp(-cost / epsilon) * plan
    for _ in range(num_iterations):
        f = a.log() - torch.log(kernel @ g.exp())
        g = b.log() - torch.log(kernel.T @ f.exp())
    plan = f.exp()[:, None] * kernel * g.exp()
    return num_channels * plan[:, 1], plan, g


@pytest.mark.parametrize("inner_steps", [1, 2, 7])
def test_log_odds_say_what_the_papers_plan_says_while_scores_drift(inner_steps: int) -> None:
    """25 steps: by then entries of the plan, which is not kept in logarithms, are about 1e-80."""
    torch.manual_seed(0)
    scores, count, epsilon = torch.rand(1, 16, dtype=torch.float64), 5, 0.5
    valid, counts = all_valid(scores), torch.tensor([count])
    log_odds, potential = uniform_plan(scores)
    plan, g = torch.full((16, 2), 1 / 16, dtype=torch.float64), torch.full((2,), 1 / epsilon, dtype=torch.float64)
    for _ in range(25):
        scores = (scores + 0.05 * torch.randn_like(scores)).detach().requires_grad_()
        mask, log_odds, potential = sinkhorn_step(
            scores, counts, log_odds, potential, valid, epsilon=epsilon, inner_steps=inner_steps
        )
        expected, plan, g = algorithm_1(scores[0], count, plan, g, epsilon=epsilon, num_iterations=inner_steps)
        direction = torch.randn(16, dtype=torch.float64)
        gradients = [torch.autograd.grad(m @ direction, scores)[0] for m in (mask[0], expected)]
        plan, g = plan.detach(), g.detach()
        torch.testing.assert_close(mask[0], expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(log_odds[0], (plan[:, 1] / plan[:, 0]).log(), rtol=1e-10, atol=1e-10)


def test_mask_sums_to_the_count_at_every_step_of_drifting_scores() -> None:
    torch.manual_seed(0)
    scores = torch.rand(3, 40) * 3
    valid, counts = all_valid(scores), torch.tensor([1, 17, 39])
    log_odds, potential = uniform_plan(scores)
    for _ in range(200):
        scores = scores + 0.05 * torch.randn_like(scores)
        mask, log_odds, potential = sinkhorn_step(scores, counts, log_odds, potential, valid, epsilon=0.25)
        assert torch.allclose(mask.sum(1), counts.float(), rtol=1e-6, atol=0)
        assert (mask >= 0).all()


def test_ten_thousand_float32_steps_stay_finite_and_end_in_the_hard_top_k() -> None:
    torch.manual_seed(0)
    scores = torch.rand(2, 8).requires_grad_()
    valid, counts = all_valid(scores), torch.tensor([2, 7])
    mask, log_odds, potential = iterate(scores, counts, valid, epsilon=0.05, num_steps=10_000)
    (gradient,) = torch.autograd.grad((mask * torch.randn(2, 8)).sum(), scores)
    assert all(value.isfinite().all() for value in (mask, log_odds, potential, gradient))
    assert log_odds.min() < -10_000  # exponentiating it would underflow
    for row, count in enumerate(counts.tolist()):
        hard = torch.zeros(8).index_fill(0, scores[row].topk(count).indices, 1.0)
        assert torch.allclose(mask[row], hard, atol=1e-5)


def test_mask_may_exceed_one_before_the_plan_settles() -> None:
    scores = torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    valid, counts = all_valid(scores), torch.tensor([5])
    first, *_ = iterate(scores, counts, valid, epsilon=0.25, num_steps=1)
    assert first.max() > 1.6
    settled, *_ = iterate(scores, counts, valid, epsilon=0.25, num_steps=100)
    assert settled.max() < 1 + 1e-3


def train_toy(*, lr: float) -> Tensor:
    """Figure 2 of the paper: three channels, one stays, and the loss is what the kept one costs."""
    prices = torch.tensor([[2.0, 1.0, 3.0]], dtype=torch.float64)
    scores = torch.tensor([[0.2, 0.1, 0.3]], dtype=torch.float64)
    valid, counts = all_valid(scores), torch.tensor([1])
    log_odds, potential = uniform_plan(scores)
    for _ in range(1000):
        scores = scores.detach().requires_grad_()
        mask, log_odds, potential = sinkhorn_step(scores, counts, log_odds, potential, valid, epsilon=10.0)
        (gradient,) = torch.autograd.grad((prices * mask).sum(), scores)
        scores = scores - lr * gradient
    return mask.detach()[0]


@pytest.mark.parametrize(
    ("lr", "kept"), [(0.1, 1), (0.05, 1), (0.01, 0)], ids=["fast", "medium", "too slow to overtake"]
)
def test_the_papers_toy_finds_the_cheapest_unless_the_plan_hardens_first(lr: float, kept: int) -> None:
    mask = train_toy(lr=lr)
    assert mask.argmax() == kept
    assert mask.max() > 0.99


@pytest.mark.parametrize("epsilon", [0.05, 0.25, 1.0, 10.0])
def test_exact_mask_is_where_many_sinkhorn_iterations_lead(epsilon: float) -> None:
    torch.manual_seed(0)
    scores = torch.rand(2, 12, dtype=torch.float64)
    valid, counts = all_valid(scores), torch.tensor([3, 8])
    kernel, potential = uniform_plan(scores)
    for _ in range(20_000 if epsilon < 0.1 else 2_000):  # the plan stays put: iterations of one problem
        mask, _, potential = sinkhorn_step(scores, counts, kernel, potential, valid, epsilon=epsilon)
    assert torch.allclose(exact_mask(scores, counts, valid, epsilon=epsilon), mask, atol=1e-8)


@pytest.mark.parametrize("epsilon", [0.002, 0.02, 0.25, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_mask_meets_its_count_for_every_softness_and_spread(epsilon: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    counts = torch.tensor([1, 9, 90, 450, 890, 899])
    # float32: the sum of 899 ones has a spacing of 6e-5; float64: NEWTON_STEPS reach rounding
    tolerance = 3e-4 if dtype == torch.float32 else 1e-9
    for spread in (0.1, 1.0, 10.0):
        scores = spread * torch.rand(6, 900, dtype=dtype)
        scores[:, :50] = scores[:, :1]  # ties
        mask = exact_mask(scores, counts, all_valid(scores), epsilon=epsilon)
        assert (mask.sum(1) - counts).abs().max() < tolerance
        assert ((mask >= 0) & (mask <= 1)).all()


def test_exact_mask_has_the_right_gradient() -> None:
    torch.manual_seed(0)
    scores = torch.rand(3, 7, dtype=torch.float64, requires_grad=True)
    valid = torch.arange(7) < torch.tensor([[7], [5], [4]])
    counts = torch.tensor([2.0, 4.0, 1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, k: exact_mask(s, k, valid, epsilon=0.3), (scores, counts))


def test_sinkhorn_mask_has_the_right_gradient() -> None:
    torch.manual_seed(0)
    scores = torch.rand(3, 7, dtype=torch.float64, requires_grad=True)
    valid = torch.arange(7) < torch.tensor([[7], [5], [4]])
    counts = torch.tensor([2.0, 4.0, 1.0], dtype=torch.float64, requires_grad=True)
    _, log_odds, potential = iterate(scores.detach(), counts.detach(), valid, epsilon=0.3, num_steps=2)
    state = log_odds, potential
    for inner_steps in (1, 3):
        assert torch.autograd.gradcheck(
            lambda s, k: sinkhorn_step(s, k, *state, valid, epsilon=0.3, inner_steps=inner_steps)[0],  # noqa: B023
            (scores, counts),
        )


def test_a_row_that_keeps_everything_is_all_ones_without_gradient() -> None:
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.0]], requires_grad=True)
    valid = torch.tensor([[True, True, True], [True, True, False]])
    mask = exact_mask(scores, torch.tensor([3, 2]), valid, epsilon=0.1)
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    (gradient,) = torch.autograd.grad(mask.sum(), scores)
    assert not gradient.any()


def test_padding_changes_nothing() -> None:
    torch.manual_seed(0)
    narrow = torch.rand(1, 6, dtype=torch.float64)
    padded = torch.cat([narrow, torch.full((1, 3), 1e4, dtype=torch.float64)], 1).requires_grad_()
    valid, counts = (torch.arange(9) < 6)[None], torch.tensor([2])
    alone, *_ = iterate(narrow, counts, all_valid(narrow), epsilon=0.3, num_steps=30)
    beside, *_ = iterate(padded, counts, valid, epsilon=0.3, num_steps=30)
    exact = exact_mask(padded, counts, valid, epsilon=0.3)
    assert torch.allclose(beside[:, :6], alone, atol=1e-14)
    exact_alone = exact_mask(narrow, counts, all_valid(narrow), epsilon=0.3)
    assert torch.allclose(exact[:, :6], exact_alone, atol=1e-14)
    for soft in (beside, exact):
        assert not soft[:, 6:].any()
        (gradient,) = torch.autograd.grad((soft * torch.rand(9)).sum(), padded, retain_graph=True)
        assert gradient.isfinite().all()
        assert not gradient[:, 6:].any()


class Branches(nn.Module):
    """What a gate can meet: BatchNorm, a depthwise layer, a bias, sigmoid, two producers of one concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.depthwise_norm = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 6, 1)
        self.right = nn.Conv2d(8, 5, 1)
        self.head = nn.Linear(11 * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        x = torch.relu(self.depthwise_norm(self.depthwise(x)))
        x = torch.cat([torch.sigmoid(self.left(x)), torch.relu(self.right(x))], 1)
        out: Tensor = self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))
        return out


@pytest.fixture
def graph() -> ChannelGraph:
    torch.manual_seed(0)
    return trace(Branches(), torch.randn(2, 3, 6, 6))


def batches(epoch: int) -> list[Batch]:
    """The class is the sign of the mean of the first colour."""
    generator = torch.Generator().manual_seed(epoch)
    inputs = torch.randn(8, 16, 3, 6, 6, generator=generator)
    return [(x, (x[:, 0].mean((1, 2)) > 0).long()) for x in inputs]


def fit(
    model: nn.Module,
    task: Task,
    schedule: Schedule,
    *,
    stage: str,
    observe: Callable[[], Record] | None = None,
) -> list[Record]:
    optimizer = torch.optim.SGD(model.parameters(), schedule.lr, 0.9, weight_decay=schedule.weight_decay)
    records = []
    for epoch in range(schedule.epochs):
        model.train()
        for inputs, targets in task.batches(epoch):
            optimizer.zero_grad()
            torch.autograd.backward(task.loss(model(inputs), targets, 0.0))
            optimizer.step()
        model.eval()
        records.append({"epoch": float(epoch)} | (observe() if observe else {}))
    HISTORY[stage] = records
    return records


HISTORY: dict[str, list[Record]] = {}
TASK = Task(
    example_inputs=(torch.zeros(2, 3, 6, 6),),
    batches=batches,
    num_batches=8,
    loss=lambda output, targets, smoothing: nn.functional.cross_entropy(output, targets, label_smoothing=smoothing),
    evaluate=lambda model: 0.0,
    fit=fit,
)


def half(graph: ChannelGraph) -> dict[ChannelGroup, int]:
    return {group: group.size // 2 for group in graph.groups}


def gated(graph: ChannelGraph, **options: object) -> MaskedNetwork:
    norms = channel_norms(graph, p=2)
    start = {group: (norms[group], count) for group, count in half(graph).items()}
    return MaskedNetwork(copy.deepcopy(graph.model), start, method=Transport(**options))  # type: ignore[arg-type]


def test_an_open_gate_changes_nothing(graph: ChannelGraph) -> None:
    network, x = gated(graph).double().eval(), torch.randn(4, 3, 6, 6).double()
    assert torch.equal(network(x), network.gated.network(x))


def test_a_hard_gate_computes_what_the_plan_says(graph: ChannelGraph) -> None:
    network = gated(graph).double().eval()
    network.masks.mask.copy_(network.kept)
    keep = {group: row[: group.size] for group, row in zip(graph.groups, network.kept, strict=True)}
    x = torch.randn(4, 3, 6, 6).double()
    expected = mask(network.gated.network, PruningPlan(keep))(x)
    assert not torch.allclose(expected, network.gated.network(x))
    assert torch.allclose(network(x), expected, rtol=1e-12)


def test_the_gate_acts_through_batchnorm_and_a_gate_on_the_filter_does_not(graph: ChannelGraph) -> None:
    """A filter in front of train-mode BatchNorm may be scaled freely: its gate would never learn."""
    network = gated(graph).double().train()
    (inputs, targets), *_ = batches(0)
    open_gate = network.gated.valid.double().requires_grad_()

    def gradient(weights: dict[str, Tensor]) -> Tensor:
        output = functional_call(network.gated.network, weights, inputs.double())
        loss = nn.functional.cross_entropy(output, targets)
        return torch.autograd.grad(loss, open_gate)[0][0, :8].abs().mean()

    stem = network.gated.network.get_parameter("stem.weight")
    on_readers = gradient(network.gated.weights(open_gate))
    on_filter = gradient({"stem.weight": stem * open_gate[0, :8, None, None, None]})
    assert on_readers > 1e-3
    assert on_filter < 1e-3 * on_readers


def test_a_gate_on_the_filter_scales_what_makes_the_channel_and_nothing_else(graph: ChannelGraph) -> None:
    network = gated(graph, gate="filter").gated
    made = {
        "stem.weight",
        "depthwise.weight",
        "depthwise.bias",
        "left.weight",
        "left.bias",
        "right.weight",
        "right.bias",
    }
    factors = torch.rand(network.valid.shape)
    weights = network.weights(factors)
    assert weights.keys() == made
    for name in ("left.weight", "left.bias"):
        row = [group.name for group in graph.groups].index("left")
        original = network.network.get_parameter(name)
        torch.testing.assert_close(weights[name], original * factors[row, :6].view(-1, *[1] * (original.dim() - 1)))


def test_behind_batchnorm_the_filters_gate_never_learns_and_the_readers_does(graph: ChannelGraph) -> None:
    """The control at work: what the scores of a channel with BatchNorm are told by one batch."""
    told = {}
    for gate in ("reads", "filter"):
        network = gated(graph, gate=gate).double().train()
        (inputs, targets), *_ = batches(0)
        loss = nn.functional.cross_entropy(network(inputs.double()), targets)
        (gradient,) = torch.autograd.grad(loss, network.masks.scaled_scores)
        told[gate] = gradient[[group.name for group in graph.groups].index("stem")].abs().sum()
    assert told["filter"] < 1e-2 * told["reads"]  # not 0: BatchNorm adds 1e-5 to the variance


def advance(masks: SoftMasks, num_steps: int) -> Tensor:
    """The mask after so many steps of still scores."""
    for _ in range(num_steps):
        mask: Tensor = masks(masks.keep_counts)
    return mask.detach()


def soft_masks(**options: object) -> SoftMasks:
    torch.manual_seed(0)
    scores = torch.rand(2, 8)
    return SoftMasks(scores, torch.tensor([3, 5]), all_valid(scores), epsilon=1.0, **options)  # type: ignore[arg-type]


def test_a_plan_advanced_every_third_batch_is_as_hard_after_three_times_as_many() -> None:
    """With inner steps enough to solve each proximal step, it does not matter in which batch they are spent."""
    often, seldom = soft_masks(inner_steps=200), soft_masks(inner_steps=200, plan_every=3)
    assert not torch.allclose(advance(often, 4), advance(seldom, 4), atol=1e-2)
    assert torch.allclose(often.mask, advance(seldom, 8), atol=1e-4)


def test_clipped_log_odds_let_a_channel_come_back_as_fast_after_a_thousand_steps_as_after_two_hundred() -> None:
    def num_steps_to_return(masks: SoftMasks, num_before: int) -> int:
        advance(masks, num_before)
        before = masks.top_k(masks.keep_counts)
        masks.scaled_scores.data.neg_().add_(1)  # the order of the channels turns round
        for step in range(10 * num_before):
            advance(masks, 1)
            if not (masks.top_k(masks.keep_counts) & before)[0].any():
                return step
        raise AssertionError("the channels never came back")

    clipped = [num_steps_to_return(soft_masks(logodds_clip=4.0), num_before) for num_before in (200, 1000)]
    free = [num_steps_to_return(soft_masks(), num_before) for num_before in (200, 1000)]
    assert clipped[0] == clipped[1] < free[0]
    assert free[1] > 4 * free[0]


def test_initial_scores_are_what_the_option_says(graph: ChannelGraph) -> None:
    weight = graph.model.get_parameter("left.weight").detach().flatten(1)
    expected = {"l2": weight.norm(dim=1), "l1": weight.abs().sum(1), "ones": torch.ones(6)}
    for option, scores in expected.items():
        first: list[Record] = []
        method = Transport(epochs=1, score_init=option, lr=1e-9, score_lr=1e-9)  # type: ignore[arg-type]
        method(graph, Budget.parse("left=0.5"), replace(TASK, fit=watching(first)))
        seen = {key.split("/")[2]: value for key, value in first[0].items() if key.startswith("score/left/")}
        assert seen == pytest.approx({channel: float(scores[int(channel)]) for channel in seen}, rel=1e-4)


def watching(records: list[Record]) -> Fit:
    """A training loop that does nothing but look."""

    def look(
        model: nn.Module,
        task: Task,
        schedule: Schedule,
        *,
        stage: str,
        observe: Callable[[], Record] | None = None,
    ) -> list[Record]:
        assert observe
        records.append(observe())
        return records

    return look


@pytest.mark.parametrize("decay_scores", [True, False])
def test_weight_decay_falls_on_the_scores_only_if_it_shall(graph: ChannelGraph, decay_scores: bool) -> None:
    network = gated(graph, weight_decay=0.1, decay_scores=decay_scores, lr=0.01, score_lr=0.01)
    before = network.masks.scores.detach().clone()
    loss = network.penalty() + 0.0 * network.masks.scores.sum()
    assert loss == 0
    loss.backward()
    torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1).step()
    kept = 1 - 0.5 * 0.1 if decay_scores else 1.0
    torch.testing.assert_close(network.masks.scores.detach(), kept * before)


def test_three_channels_of_the_widest_group_can_be_drawn_over_training(graph: ChannelGraph) -> None:
    network = gated(graph)
    norms = channel_norms(graph, p=2)[graph.groups[0]]
    order = norms.argsort(descending=True).tolist()
    three = [order[0], order[3], order[-1]]  # 4 of 8 are kept
    records = fit(network, TASK, Schedule(epochs=2), stage="prune", observe=network.measure)
    row = network.gated.network.get_parameter("stem.weight").detach()
    depthwise = network.gated.network.get_parameter("depthwise.weight").detach()
    for channel in three:
        assert records[-1][f"mask/stem/{channel}"] == network.masks.mask[0, channel]
        assert records[-1][f"score/stem/{channel}"] == network.masks.scores[0, channel]
        norm = float(row[channel].abs().sum() + depthwise[channel].abs().sum())
        assert records[-1][f"norm/stem/{channel}"] == pytest.approx(norm)
    assert sum("/" in key for key in records[0]) == 9


def test_equal_masks_are_ranked_by_their_scores(graph: ChannelGraph) -> None:
    network = gated(graph)
    for group, norms, kept in zip(
        graph.groups, channel_norms(graph).values(), network.masks.top_k(network.masks.keep_counts), strict=True
    ):
        strongest = norms.topk(group.size // 2).indices
        assert kept.nonzero().flatten().tolist() == strongest.sort().values.tolist()


def test_padding_is_never_kept_even_where_all_masks_are_zero(graph: ChannelGraph) -> None:
    network = gated(graph)
    network.masks.mask.zero_()
    network.masks.scaled_scores.data.neg_()
    kept = network.masks.top_k(network.masks.keep_counts)
    assert not (kept & ~network.gated.valid).any()
    assert kept.sum(1).tolist() == network.masks.keep_counts.tolist()


def test_flips_count_the_channels_swapped_in_since_the_last_report(graph: ChannelGraph) -> None:
    network = gated(graph)
    assert network.measure()["mask_flips"] == 0
    network.masks.scaled_scores.data.neg_()  # the weakest half of 8, 6 and 5 channels takes over: 4 + 3 + 2
    assert [network.measure()["mask_flips"] for _ in range(2)] == [9, 0]


def test_a_weight_read_along_two_dims_is_scaled_along_both() -> None:
    index = torch.arange(2)[:, None]
    groups = [ChannelGroup(f"input{dim}", 2, (Slot("weight", dim, 2, index, read=True),)) for dim in (1, 2)]
    scores = {group: (torch.tensor([1.0, 2.0]), 1) for group in groups}
    network = MaskedNetwork(nn.Bilinear(2, 2, 3), scores, method=Transport())
    factors = torch.tensor([[0.5, 2.0], [3.0, 5.0]])
    expected = network.gated.network.get_parameter("weight") * factors[0][:, None] * factors[1]
    assert torch.allclose(network.gated.weights(factors)["weight"], expected)


def test_a_half_precision_network_keeps_its_dtype_and_the_mask_float32(graph: ChannelGraph) -> None:
    network = gated(graph).train()
    network.gated.network.bfloat16()
    output = network(torch.randn(4, 3, 6, 6, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16
    assert network.masks.mask.dtype == torch.float32


def test_only_training_advances_the_mask(graph: ChannelGraph) -> None:
    network, x = gated(graph), torch.randn(4, 3, 6, 6)
    network.train()(x)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    network.eval()(x)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    network.train()(x)
    assert not torch.equal(network.masks.log_odds, state["masks.log_odds"])
    assert torch.allclose(network.masks.mask.sum(1), network.masks.keep_counts)


def test_a_gated_network_goes_on_from_its_state_dict(graph: ChannelGraph) -> None:
    schedule = Schedule(epochs=1, lr=0.1)
    first, second = gated(graph), gated(graph)
    fit(first, TASK, schedule, stage="prune", observe=first.measure)
    second.load_state_dict(first.state_dict())
    for network in (first, second):
        fit(network, TASK, schedule, stage="prune", observe=network.measure)
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("solver", ["sinkhorn", "exact"])
def test_plan_has_exact_counts_and_trained_weights_and_leaves_the_model_alone(
    graph: ChannelGraph, solver: Solver
) -> None:
    before = copy.deepcopy(graph.model.state_dict())
    budget = Budget.parse("keep=0.5 and right=1")
    plan = Transport(epochs=2, solver=solver)(graph, budget, TASK)
    assert plan.kept == {group.name: count for group, count in allocate(graph, budget).items() if count < group.size}
    assert plan.kept.keys() == {"stem", "left"}
    assert all(torch.equal(value, before[name]) for name, value in graph.model.state_dict().items())
    assert plan.weights.keys() == before.keys()
    assert not torch.equal(plan.weights["stem.weight"], before["stem.weight"])
    assert plan.weights["stem_norm.num_batches_tracked"] == 16
    small = compact(graph.model, plan).eval()
    x = torch.randn(4, 3, 6, 6)
    assert torch.allclose(small(x), mask(graph.model, plan).eval()(x), atol=1e-6)


def test_the_plans_weights_are_the_network_that_was_trained(graph: ChannelGraph) -> None:
    network = gated(graph, epsilon=10.0)  # still soft after one epoch, so that folding matters
    fit(network, TASK, Schedule(epochs=1), stage="prune")
    assert network.measure()["mask_hardness"] > 0.05
    refilled = mask(graph.model, PruningPlan(weights=network.plan(half(graph)).weights)).eval()
    x = torch.randn(4, 3, 6, 6)
    assert torch.allclose(refilled(x), network(x), atol=1e-6)


def test_each_epoch_reports_how_the_mask_hardens(graph: ChannelGraph) -> None:
    Transport(epochs=4)(graph, Budget.parse("keep=0.5"), TASK)
    history = HISTORY["prune"]
    hardness = [record["mask_hardness"] for record in history]
    assert hardness == sorted(hardness, reverse=True)
    assert hardness[-1] < 0.5 * hardness[0]
    assert all(record["mask_sum_error"] < 1e-5 for record in history)
    assert all(record["mask_flips"] == int(record["mask_flips"]) >= 0 for record in history)


@pytest.mark.parametrize(("solver", "epsilon"), [("sinkhorn", 1.0), ("exact", 0.25)])
def test_training_keeps_the_channel_the_task_needs_although_its_norm_is_least(solver: Solver, epsilon: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 2))
    conv, head = model[0], model[4]
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[0, 1.0, 0], [0.9, 0, 0], [0, 0, 1.0], [0, 0.8, 0.8]])[..., None, None])
        head.weight.zero_()
        head.weight[:, 36:72] = torch.tensor([[-0.1], [0.1]])  # only channel 1 sees the first colour
    graph = trace(model, torch.zeros(2, 3, 6, 6))
    plan = Transport(epochs=6, solver=solver, epsilon=epsilon)(graph, Budget.parse("keep=0.25"), TASK)
    (kept,) = plan.keep.values()
    assert kept.tolist() == [False, True, False, False]
    assert sum(record["mask_flips"] for record in HISTORY["prune"]) >= 1


def test_nothing_to_prune_is_an_empty_plan(graph: ChannelGraph) -> None:
    plan = Transport()(graph, Budget.parse("keep=1"), TASK)
    assert not plan.keep
    assert not plan.weights


def test_transport_without_a_task_says_that_it_needs_data(graph: ChannelGraph) -> None:
    with pytest.raises(UsageError, match="transport: trains its masks and needs data"):
        Transport()(graph, Budget.parse("keep=0.5"), None)


def test_impossible_options_are_refused_by_name() -> None:
    with pytest.raises(UsageError, match="epsilon must be above 0, got 0"):
        Transport(epsilon=0)
    with pytest.raises(UsageError, match="'exakt'; did you mean exact"):
        Transport(solver="exakt")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="unknown gate 'filters'; did you mean filter"):
        Transport(gate="filters")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="inner_steps must be above 0, got 0"):
        Transport(inner_steps=0)
    with pytest.raises(UsageError, match="solver 'exact' has no inner_steps"):
        Transport(solver="exact", plan_every=2)


def test_scores_move_at_their_own_learning_rate_under_a_common_one(graph: ChannelGraph) -> None:
    network = gated(graph, lr=0.01, score_lr=0.1)
    before = network.masks.scores.detach().clone()
    gradient = torch.arange(float(before.numel())).view_as(before)
    (network.masks.scores * gradient).sum().backward()
    torch.optim.SGD(network.parameters(), lr=0.01).step()
    torch.testing.assert_close(network.masks.scores.detach(), before - 0.1 * gradient)
