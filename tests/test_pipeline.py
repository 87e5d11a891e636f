"""compress and run: what goes in stays as it was, what comes out is complete, what fails leaves nothing behind."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from torch import nn

from sparsekit import fitting, pipeline
from sparsekit.artifact import FILES, Artifact
from sparsekit.compaction import compact
from sparsekit.cost import Cost, Costs, Counts
from sparsekit.errors import (
    BudgetError,
    DataError,
    PlanError,
    QualityError,
    SparsekitError,
    TraceError,
    UsageError,
)
from sparsekit.graph import ChannelGraph
from sparsekit.ingredients import build, build_pruner, build_task
from sparsekit.latency import LatencyComparison, Ratio
from sparsekit.pipeline import compress, run
from sparsekit.plan import PruningPlan
from sparsekit.pruners.magnitude import Magnitude
from sparsekit.pruners.transport import Transport
from sparsekit.recipe import Recipe
from sparsekit.task import Record, Schedule, Task
from sparsekit.training import fit
from tests import tiny

QUICK = Recipe(
    model=f"{tiny.FILE}:network",
    data=f"{tiny.FILE}:task",
    dense_epochs=2,
    epochs=1,
    finetune_lr=0.02,
    seed=3,
    allow_slower=True,  # networks this small take what ONNX Runtime itself takes
)
DATA_FREE = dataclasses.replace(QUICK, method="magnitude", data=None)
INPUTS = (torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)),)


@pytest.fixture(autouse=True)
def quick_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "measure_latency", tiny.quick_latency)


class OwnFit:
    """A user's own training loop, which notes what it is asked to do."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Schedule]] = []

    def __call__(
        self,
        model: nn.Module,
        task: Task,
        schedule: Schedule,
        *,
        stage: str,
        observe: Callable[[], Record] | None = None,
    ) -> list[Record]:
        self.asked.append((stage, schedule))
        return fit(model, task, schedule, stage=stage, observe=observe)


def network() -> tiny.Net:
    torch.manual_seed(0)
    return tiny.Net()


class Session(NamedTuple):
    """One call of `compress` and all that it could have touched."""

    model: nn.Module
    before: nn.Module
    task: Task
    fit: OwnFit
    artifact: Artifact
    steps: list[tuple[str, int, int]]
    left_behind: list[str]


@pytest.fixture(scope="module")
def session() -> Session:
    model, own_fit = network(), OwnFit()
    model.bn1.eval()  # flags that are not all alike
    before = copy.deepcopy(model)
    task = dataclasses.replace(tiny.task(), fit=own_fit)
    recipe = dataclasses.replace(QUICK, weights="mine.pt", options={"epsilon": 0.5})
    steps: list[tuple[str, int, int]] = []
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(fitting, "measure_latency", tiny.quick_latency)
        patch.setattr(tempfile, "tempdir", folder)
        artifact = compress(model, recipe, task, progress=lambda stage, *n: steps.append((stage, n[0], n[1])))
        left_behind = [path.name for path in Path(folder).rglob("*")]
    return Session(model, before, task, own_fit, artifact, steps, left_behind)


def test_the_model_is_untouched(session: Session) -> None:
    expected = session.before.state_dict()
    assert list(session.model.state_dict()) == list(expected)
    assert all(value.equal(expected[name]) for name, value in session.model.state_dict().items())
    flags = [[module.training for module in model.modules()] for model in (session.model, session.before)]
    assert flags[0] == flags[1]
    assert all(parameter.grad is None for parameter in session.model.parameters())


def test_the_users_own_loop_trains_every_stage(session: Session) -> None:
    assert [stage for stage, _ in session.fit.asked] == ["prune", "finetune"]
    assert [schedule.lr for _, schedule in session.fit.asked] == [QUICK.lr, QUICK.finetune_lr]
    assert {schedule.epochs for _, schedule in session.fit.asked} == {QUICK.epochs}
    assert {schedule.seed for _, schedule in session.fit.asked} == {QUICK.seed}
    assert {schedule.weight_decay for _, schedule in session.fit.asked} == {QUICK.weight_decay}
    assert list(session.artifact.report.history) == ["prune", "finetune"]


def test_a_trained_network_is_not_trained_again_before_pruning(session: Session) -> None:
    assert session.artifact.report.accuracies["dense"] == session.task.evaluate(session.before)


def test_no_file_is_left_behind(session: Session) -> None:
    assert session.left_behind == []


def test_progress_names_every_step_in_order(session: Session) -> None:
    before = ["evaluate dense", "tidy", "export dense", "prune", "evaluate pruned"]
    after = ["evaluate compact", "export", "latency"]
    assert list(dict.fromkeys(stage for stage, *_ in session.steps)) == [*before, "finetune", *after]
    assert session.steps[-1] == ("latency", 2, 2)


def test_the_report_measures_both_networks(session: Session) -> None:
    report = session.artifact.report
    assert report.compact.accuracy == session.task.evaluate(session.artifact.model) == report.accuracies["compact"]
    assert report.compact.num_params == sum(p.numel() for p in session.artifact.model.parameters())
    assert report.dense.num_params == sum(p.numel() for p in session.model.parameters())
    assert report.compact.num_macs <= 0.5 * report.dense.num_macs
    assert report.compact.size_bytes == len(session.artifact.onnx) < report.dense.size_bytes
    assert all(isinstance(side.latency_ms, float) for side in (report.dense, report.compact))
    assert report.certificate["holds"]
    assert report.certificate["onnx_max_relative_error"] is not None
    assert {width.layer: width.kept for width in report.widths} == session.artifact.plan.kept


def test_report_json_has_what_was_asked_for(session: Session) -> None:
    document = session.artifact.report.to_json()
    wanted = {"accuracy", "num_params", "num_macs", "size_bytes", "latency_ms"}
    for side in ("dense", "compact", "ratio"):
        assert wanted <= set(document[side])
        assert all(isinstance(document[side][key], (int, float)) for key in wanted)
    assert document["recipe"]["options"] == {"epsilon": 0.5}
    assert len(document["recipe_hash"]) == 64
    assert {row["path"] for row in document["latency"]["latencies"]} == {"dense.onnx", "model.onnx"}


def test_neither_report_tells_where_on_the_machine_it_was_made(session: Session) -> None:
    report = session.artifact.report
    for recipe in ({}, report.recipe):  # without what the user typed, and with it
        text = json.dumps(dataclasses.replace(report, recipe=recipe).to_json())
        html = dataclasses.replace(report, recipe=recipe).html()
        places = {tempfile.gettempdir(), str(Path.home()), os.getcwd(), os.uname().nodename}
        typed = json.dumps(recipe)
        assert [place for place in places - {"/"} if place in text + html and place not in typed] == []


def test_without_a_task_a_data_free_method_works_and_says_nothing_of_accuracy() -> None:
    artifact = compress(network(), DATA_FREE, None, example_inputs=INPUTS)
    report = artifact.report
    assert report.dense.accuracy is report.compact.accuracy is report.ratio["accuracy"] is None
    assert report.history == {}
    assert report.accuracies == {}
    assert report.ratio["num_macs"] is not None
    assert report.ratio["num_macs"] <= 0.5


def test_a_method_that_needs_data_says_so_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"transport: .* needs data") as caught:
        compress(network(), dataclasses.replace(QUICK, data=None), None, example_inputs=INPUTS)
    assert "\n" not in str(caught.value)


def test_without_task_and_example_there_is_nothing_to_trace() -> None:
    with pytest.raises(UsageError, match="example_inputs must be given"):
        compress(network(), DATA_FREE, None)


def test_an_impossible_budget_fails_before_any_training() -> None:
    own_fit = OwnFit()
    task = dataclasses.replace(tiny.task(), fit=own_fit)
    with pytest.raises(BudgetError, match="below the floor"):
        compress(network(), dataclasses.replace(QUICK, budget="macs<=0.001x"), task)
    assert own_fit.asked == []


def test_a_cut_that_is_not_the_plan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(model: nn.Module, plan: PruningPlan, inputs: object) -> nn.Module:
        small = compact(model, plan, inputs)
        with torch.no_grad():
            next(small.parameters()).add_(1e-3)
        return small

    monkeypatch.setattr(pipeline, "compact", wrong)
    with pytest.raises(PlanError, match="certificate: mask and compact differ by"):
        compress(network(), DATA_FREE, None, example_inputs=INPUTS)


def timed_as(value: float, low: float, high: float) -> Callable[..., LatencyComparison]:
    """Times for real, and says otherwise."""

    def measure(paths: Any, **options: Any) -> LatencyComparison:
        timed = tiny.quick_latency(paths, **options)
        return dataclasses.replace(timed, ratios=(Ratio(value, low, high, resolved=True),), busy=True)

    return measure


@pytest.mark.parametrize("ratio", [(1.2, 1.1, 1.3), (0.97, 0.93, 1.01)], ids=["slower", "within the noise"])
def test_a_network_that_becomes_no_faster_is_not_written(
    ratio: tuple[float, float, float],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fitting, "measure_latency", timed_as(*ratio))
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    recipe = dataclasses.replace(QUICK, method="magnitude", allow_slower=False, dense_epochs=0, epochs=0)
    with pytest.raises(QualityError, match=rf"takes {ratio[0]:.2f}x .* not written: .* ms, bound by .*--allow-slower"):
        run(recipe, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    warnings = run(dataclasses.replace(recipe, allow_slower=True), tmp_path / "out").warnings
    assert any(f"not clearly faster: latency ratio {ratio[0]:.2f}" in warning for warning in warnings)
    assert any("machine was busy" in warning for warning in warnings)


def test_a_network_that_is_faster_by_more_than_the_noise_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "measure_latency", timed_as(0.9, 0.85, 0.99))
    run(dataclasses.replace(QUICK, method="magnitude", allow_slower=False, dense_epochs=0, epochs=0), tmp_path / "out")


def test_zeros_alone_are_not_expected_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "measure_latency", timed_as(1.0, 0.9, 1.1))
    recipe = dataclasses.replace(
        QUICK, method="magnitude_unstructured", budget="nonzero<=0.5x", epochs=0, allow_slower=False
    )
    compress(network(), recipe, tiny.task())


def test_a_network_below_the_budgets_accuracy_is_not_written(tmp_path: Path) -> None:
    recipe = dataclasses.replace(QUICK, method="magnitude", budget="macs<=0.3x and accuracy>=99.9%")
    with pytest.raises(QualityError, match=r"accuracy>=99.9%: the small network reaches .*, needed 99.90% \(dense"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(BudgetError, match=r"accuracy>=99\.9%: needs data to measure it on"):
        compress(network(), recipe, None, example_inputs=INPUTS)


# latency as the budget; the machine is one whose time follows the widths


class Machine:
    """Times files by their bytes, which follow the number of weights; knows how often it was asked."""

    def __init__(self) -> None:
        self.num_compared = 0
        self.timed: LatencyComparison | None = None

    def measure(self, paths: Sequence[Path], **options: Any) -> LatencyComparison:
        self.num_compared += len(paths) > 1
        sizes = [path.stat().st_size for path in paths]
        self.timed = timed = self.timed or tiny.quick_latency(paths[:1], **options)
        latencies = tuple(
            dataclasses.replace(timed.latencies[0], path=path, p50_ms=size / 1e4, cpu_ms=size / 1e4)
            for path, size in zip(paths, sizes, strict=True)
        )
        shares = [size / sizes[0] for size in sizes[1:]]
        ratios = tuple(Ratio(share, 0.99 * share, 1.01 * share, resolved=True) for share in shares)
        return dataclasses.replace(timed, latencies=latencies, ratios=ratios, busy=False)


class MacsAsTime(Cost):
    """Tables of a machine that takes a nanosecond per MAC, and know nothing of what else it does."""

    def __init__(self, graph: ChannelGraph) -> None:
        dense = Costs(graph).dense
        super().__init__(graph.macs, dense)
        self._layers = [Cost((term,), dense) for term in graph.timed]

    def per_layer(self, counts: Counts) -> list[float]:
        return [layer(counts) * 1e-6 for layer in self._layers]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr(fitting, "measure_latency", machine.measure)
    monkeypatch.setattr(fitting.Bench, "latencies", lambda bench, graph: MacsAsTime(graph))
    return machine


def wide() -> tiny.Net:
    torch.manual_seed(0)
    return tiny.Net(width=96)


@pytest.mark.parametrize("method", ["magnitude", "transport", "neuron_merging"])
def test_the_file_takes_what_the_budget_allows_whatever_the_method(method: str, machine: Machine) -> None:
    recipe = dataclasses.replace(QUICK, method=method, budget="latency<=0.6x", epochs=1)
    report = compress(wide(), recipe, tiny.task()).report
    ratio = report.ratio["latency_ms"]
    assert ratio is not None
    assert 0.95 * 0.6 <= ratio <= 0.6
    assert report.search[-1].in_band


def test_milliseconds_bytes_and_macs_all_hold(machine: Machine) -> None:
    dense = compress(wide(), dataclasses.replace(DATA_FREE, budget="keep=1"), None, example_inputs=INPUTS).report.dense
    assert dense.latency_ms is not None
    budget = f"latency<={0.7 * dense.latency_ms:.4f}ms and size<=0.5x and macs<=0.6x"
    report = compress(wide(), dataclasses.replace(DATA_FREE, budget=budget), None, example_inputs=INPUTS).report
    assert report.ratio["size_bytes"] is not None
    assert 0.475 <= report.ratio["size_bytes"] <= 0.5
    assert report.compact.num_macs <= 0.6 * dense.num_macs
    assert report.compact.latency_ms is not None
    assert report.compact.latency_ms <= 0.7 * dense.latency_ms


def test_a_keep_pattern_holds_beside_milliseconds(machine: Machine) -> None:
    budget = "latency<=0.6x and conv1=0.75"
    report = compress(wide(), dataclasses.replace(DATA_FREE, budget=budget), None, example_inputs=INPUTS).report
    assert {width.layer: width.kept for width in report.widths}["conv1"] == 72


def test_a_run_that_goes_on_keeps_the_widths_that_it_found(
    tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise SparsekitError("stop here")

    recipe = dataclasses.replace(QUICK, budget="latency<=0.8x")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "_check_accuracy", crash)
        with pytest.raises(SparsekitError, match="stop here"):
            run(recipe, tmp_path / "out")
    num_compared = machine.num_compared
    report = run(recipe, tmp_path / "out", resume=True)
    assert machine.num_compared == num_compared + 1
    assert len(report.search) == num_compared


# run: from names to a folder


def test_a_run_trains_the_dense_network_where_no_weights_are_named(tmp_path: Path) -> None:
    report = run(QUICK, tmp_path / "out")
    assert list(report.history) == ["dense", "prune", "finetune"]
    assert [records[-1]["epoch"] for records in report.history.values()] == [2, 1, 1]
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"budget": "macs<=0.001x"}, BudgetError, "below the floor"),
        ({"data": None, "model": "resnet20"}, UsageError, "transport: .* needs data"),
        ({"model": "torchvision:resnet18"}, TraceError, "forward fails on the example inputs"),
        ({"dense_lr": 1e30}, SparsekitError, "dense: the loss became"),
    ],
    ids=["budget", "data", "model", "diverges"],
)
def test_a_run_that_fails_before_its_first_epoch_leaves_nothing(
    change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        run(dataclasses.replace(QUICK, **change), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_later_keeps_the_old_folder_and_its_epochs_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    out, partial = tmp_path / "out", tmp_path / "out.partial"
    out.mkdir()
    (out / "notes.txt").write_text("of the old run")
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "measure_latency", crash)
        with pytest.raises(OSError, match="No space left on device"):
            run(QUICK, out, overwrite=True)
    assert {path.name for path in partial.iterdir()} >= {"dense.ckpt", "prune.ckpt", "finetune.ckpt"}
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    with pytest.raises(UsageError, match=r"out.partial: was made with budget = 'macs<=0.5x', now 'macs<=0.6x'"):
        run(dataclasses.replace(QUICK, budget="macs<=0.6x", seed=4), out, resume=True)
    steps: list[tuple[str, int, int]] = []
    report = run(QUICK, out, resume=True, progress=lambda stage, *n: steps.append((stage, n[0], n[1])))
    assert next(step for step in steps if step[0] == "dense" and step[2]) == ("dense", 8, 8)
    assert list(report.history) == ["dense", "prune", "finetune"]
    assert {path.name for path in out.iterdir()} == set(FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_work_to_resume_must_be_of_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object, **__: object) -> None:
        raise SparsekitError("stop here")

    weights = tmp_path / "w.pt"
    torch.save(network().state_dict(), weights)
    recipe = dataclasses.replace(QUICK, weights=str(weights))
    monkeypatch.setattr(fitting, "measure_latency", crash)
    with pytest.raises(SparsekitError, match="stop here"):
        run(recipe, tmp_path / "out")
    torch.save(tiny.Net().state_dict(), weights)
    with pytest.raises(UsageError, match=r"was made with other contents of .*w.pt; --overwrite starts anew"):
        run(recipe, tmp_path / "out", resume=True)


@pytest.mark.parametrize("out", [".", "..", "/", "../here"])
def test_the_current_folder_and_those_around_it_are_never_replaced(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageError, match="holds the current folder"):
        run(QUICK, out, overwrite=True)


def test_a_file_in_the_way_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UsageError, match="out: is a file, expected a folder"):
        run(QUICK, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").read_text() == "mine"


def test_overwriting_and_resuming_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="overwrite and resume: choose one"):
        run(QUICK, tmp_path / "out", overwrite=True, resume=True)


@pytest.mark.parametrize("content", [None, "{", "{}", "[]"], ids=["missing", "cut", "empty", "list"])
def test_a_folder_without_a_readable_report_cannot_be_resumed(content: str | None, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    if content is not None:
        (tmp_path / "out" / "report.json").write_text(content)
    with pytest.raises(UsageError, match=r"out: exists and holds no report|report.json: damaged|report: ") as caught:
        run(QUICK, tmp_path / "out", resume=True)
    assert "\n" not in str(caught.value)


# What a recipe names


def test_recipe_keys_reach_the_method_and_options_go_on_top() -> None:
    recipe = Recipe(epochs=3, lr=0.2, seed=5, round_to=8, weight_decay=0.1, options={"epsilon": 2, "solver": "exact"})
    expected = {"epochs": 3, "lr": 0.2, "seed": 5, "round_to": 8, "weight_decay": 0.1, "epsilon": 2, "solver": "exact"}
    pruner = build_pruner(recipe)
    assert isinstance(pruner, Transport)
    assert expected.items() <= dataclasses.asdict(pruner).items()
    assert build_pruner(Recipe(method="magnitude", options={"norm": "l2"})) == Magnitude(norm="l2")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("transprot", {}, "method 'transprot': unknown; did you mean transport"),
        ("transport", {"epsilom": 1.0}, "transport: unknown option 'epsilom'; did you mean epsilon"),
        ("transport", {"epochs": 1}, "transport: unknown option 'epochs'; "),
        ("random", {"p": 1}, "random: unknown option 'p'; it has none"),
        ("transport", {"epsilon": "soft"}, "transport: option epsilon must be float, got 'soft'"),
        ("transport", {"epsilon": True}, "transport: option epsilon must be float, got True"),
        ("transport", {"epsilon": -1}, "transport: epsilon must be above 0"),
        ("transport", {"solver": "exactt"}, "transport: unknown solver 'exactt'; did you mean exact"),
        ("magnitude", {"norm": "l3"}, "magnitude: norm must be one of l1, l2, got 'l3'"),
    ],
)
def test_a_method_or_option_that_is_none_is_named(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_pruner(Recipe(method=method, options=options))


def test_a_named_network_fits_the_data() -> None:
    model, task, inputs = build(Recipe(model="resnet20", data="digits"))
    assert task is not None
    assert inputs == task.example_inputs
    assert model(inputs[0]).shape == (2, 10)


@pytest.mark.parametrize(
    ("recipe", "shape", "num_classes"),
    [
        (Recipe(model="resnet20", data=None), (2, 3, 32, 32), 10),
        (Recipe(model="resnet20", data=None, image_size=48), (2, 3, 48, 48), 10),
        (Recipe(model="torchvision:squeezenet1_1", data=None), (2, 3, 224, 224), 1000),
    ],
    ids=["small", "given", "large"],
)
def test_without_data_the_example_has_the_usual_size(recipe: Recipe, shape: tuple[int, ...], num_classes: int) -> None:
    model, task, (inputs,) = build(recipe)
    assert task is None
    assert inputs.shape == shape
    assert model(inputs).shape == (2, num_classes)


def test_building_twice_gives_equal_weights_and_leaves_the_callers_random_state() -> None:
    state = torch.random.get_rng_state()
    first, second = (build(DATA_FREE)[0].state_dict() for _ in range(2))
    other = build(dataclasses.replace(DATA_FREE, seed=4))[0].state_dict()
    assert all(value.equal(second[name]) for name, value in first.items())
    assert not first["conv1.weight"].equal(other["conv1.weight"])
    assert torch.random.get_rng_state().equal(state)


def test_decoding_a_folder_of_images_reports_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "cache"))
    for number, half in enumerate(("train", "test")):
        for name in ("cat", "dog"):
            (tmp_path / half / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / half / name / "0.png")
    steps: list[tuple[str, int, int]] = []
    recipe = Recipe(data=f"imagefolder:{tmp_path}")
    task, sizes = build_task(recipe, progress=lambda stage, done, total, _: steps.append((stage, done, total)))
    assert task is not None
    assert sizes == {"num_classes": 2, "in_channels": 3}
    assert steps[-1] == ("decode images", 4, 4)


def test_a_task_file_that_returns_no_task_is_named() -> None:
    with pytest.raises(DataError, match=r"tiny.py:network: expected the factory to return a sparsekit.Task, got Net"):
        build_task(dataclasses.replace(QUICK, data=QUICK.model))


def test_recovery_repairs_before_fine_tuning_and_reports_accuracy_after_each_step() -> None:
    recipe = dataclasses.replace(QUICK, method="magnitude", recover="lsq", num_images=32, epochs=0)
    report = compress(network(), recipe, tiny.task()).report
    assert [*report.accuracies] == ["dense", "pruned", "after bn", "after bias", "after lsq", "compact"]
    assert report.accuracies["compact"] == report.accuracies["after lsq"]  # nothing else moved it
    assert report.seconds["recover"] > 0


def test_recovery_without_data_makes_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr("sparsekit.stages.recover", lambda dense, small, plan, images, **_: seen.append(images))
    recipe = dataclasses.replace(DATA_FREE, recover="lsq", num_images=16)
    compress(network(), recipe, None, example_inputs=INPUTS)
    (images,) = seen
    assert images.shape == (16, 1, 8, 8)
    assert images.isfinite().all()


def test_images_given_are_those_recovered_with(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr("sparsekit.stages.recover", lambda dense, small, plan, images, **_: seen.append(images))
    images = torch.randn(16, 1, 8, 8)
    compress(network(), dataclasses.replace(DATA_FREE, recover="bn"), None, example_inputs=INPUTS, images=images)
    assert seen == [images]
