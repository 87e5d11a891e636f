"""The training loop: repeatable, resumable, and polite to what the caller owns."""

import itertools
import math
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsekit.errors import DataError, QualityError, SparsekitError, UsageError
from sparsekit.task import Batch, Record, Schedule, Task
from sparsekit.training import fit, lr_factor

SCHEDULE = Schedule(epochs=4, lr=0.05, seed=3)
NUM_BATCHES = 3


class Killed(BaseException):
    """What the operating system does to a run."""


def network(num_classes: int = 3) -> nn.Sequential:
    """Convolution, BatchNorm and dropout: weights, buffers and randomness."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(4 * 16, num_classes),
        )


def batches(epoch: int) -> Iterator[Batch]:
    """Three batches of seven images, another order every epoch; the label is which third is brightest."""
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(NUM_BATCHES):
        images = torch.randn(7, 2, 4, 4, generator=generator)
        yield images, images.flatten(1)[:, :30].view(7, 3, 10).sum(2).argmax(1)


def cross_entropy(output: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    return nn.functional.cross_entropy(output, targets, label_smoothing=smoothing)


def make_task(
    of_epoch: Callable[[int], Iterable[Batch]] = batches,
    num_batches: int = NUM_BATCHES,
    loss: Callable[[Tensor, Tensor, float], Tensor] = cross_entropy,
) -> Task:
    return Task((torch.zeros(2, 2, 4, 4),), of_epoch, num_batches, loss, lambda model: 0.0, fit)


TASK = make_task()


def assert_same_state(left: nn.Module, right: nn.Module) -> None:
    """Bit-equal parameters and buffers."""
    states = left.state_dict(), right.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def strides(model: nn.Module) -> list[tuple[int, ...]]:
    return [parameter.stride() for parameter in model.parameters()]


def untimed(history: list[Record]) -> list[Record]:
    return [{name: value for name, value in record.items() if name != "seconds"} for record in history]


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[nn.Module, list[Record]]:
    model = network()
    return model, fit(model, TASK, SCHEDULE, stage="dense")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_learns(optimizer: str) -> None:
    schedule = Schedule(epochs=30, lr=0.05 if optimizer == "sgd" else 0.01, optimizer=optimizer)
    history = fit(network(), TASK, schedule, stage="dense")
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    assert history[-1]["train_accuracy"] > history[0]["train_accuracy"]


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(
    uninterrupted: tuple[nn.Module, list[Record]],
) -> None:
    again, other = network(), network()
    assert untimed(fit(again, TASK, SCHEDULE, stage="again")) == untimed(uninterrupted[1])
    assert_same_state(again, uninterrupted[0])
    fit(other, TASK, replace(SCHEDULE, seed=4), stage="dense")
    assert not torch.equal(other.get_parameter("0.weight"), again.get_parameter("0.weight"))


def test_dropout_differs_from_epoch_to_epoch() -> None:
    task = make_task(lambda epoch: batches(0))
    history = fit(network(), task, replace(SCHEDULE, lr=0.0), stage="dense")
    assert len({record["loss"] for record in history}) == SCHEDULE.epochs


def test_the_callers_random_state_is_neither_read_nor_changed(
    uninterrupted: tuple[nn.Module, list[Record]],
) -> None:
    torch.manual_seed(99)
    before, model = torch.get_rng_state(), network()
    fit(model, TASK, SCHEDULE, stage="dense")
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_state(model, uninterrupted[0])


def forget(module: nn.Module) -> None:
    for value in module.state_dict().values():
        value.zero_()


def kill_at_step(step: int) -> Callable[[str, int, int, Record], None]:
    def progress(stage: str, num_done: int, num_steps: int, record: Record) -> None:
        if num_done == step:
            raise Killed

    return progress


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("step", [2, 5, 6, 11, 12])
def test_a_killed_run_resumes_to_the_same_weights_and_history(tmp_path: Path, optimizer: str, step: int) -> None:
    schedule = replace(SCHEDULE, optimizer=optimizer, warmup_epochs=0.5)
    whole, resumed = network(), network()
    history = fit(whole, TASK, schedule, stage="dense")
    with pytest.raises(Killed):
        fit(
            network(),
            TASK,
            schedule,
            stage="dense",
            checkpoint_dir=tmp_path,
            progress=kill_at_step(step),
        )
    if step > NUM_BATCHES:
        resumed.apply(forget)  # the checkpoint says it all
    assert untimed(fit(resumed, TASK, schedule, stage="dense", checkpoint_dir=tmp_path)) == untimed(history)
    assert_same_state(resumed, whole)


def test_a_run_killed_while_observing_repeats_that_epoch(
    tmp_path: Path, uninterrupted: tuple[nn.Module, list[Record]]
) -> None:
    calls = itertools.count(1)

    def observe() -> Record:
        if next(calls) == 2 * NUM_BATCHES:  # the last look at the second epoch
            raise Killed
        return {}

    with pytest.raises(Killed):
        fit(network(), TASK, SCHEDULE, stage="dense", checkpoint_dir=tmp_path, observe=observe)
    steps: list[int] = []
    model = network()
    fit(
        model,
        TASK,
        SCHEDULE,
        stage="dense",
        checkpoint_dir=tmp_path,
        progress=lambda stage, done, total, record: steps.append(done),
    )
    assert steps[:2] == [3, 4]
    assert_same_state(model, uninterrupted[0])


def test_a_kill_while_writing_leaves_the_last_complete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uninterrupted: tuple[nn.Module, list[Record]]
) -> None:
    save, calls = torch.save, itertools.count(1)

    def half_save(value: object, file: object) -> None:
        if next(calls) == 2:
            file.write(b"half")  # type: ignore[attr-defined]
            raise Killed
        save(value, file)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "save", half_save)
    with pytest.raises(Killed):
        fit(network(), TASK, SCHEDULE, stage="dense", checkpoint_dir=tmp_path)
    model = network()
    history = fit(model, TASK, SCHEDULE, stage="dense", checkpoint_dir=tmp_path)
    assert untimed(history) == untimed(uninterrupted[1])
    assert_same_state(model, uninterrupted[0])
    assert [path.name for path in tmp_path.iterdir()] == ["dense.ckpt"]


def test_a_finished_stage_returns_its_weights_without_training(
    tmp_path: Path, uninterrupted: tuple[nn.Module, list[Record]]
) -> None:
    def no_batches(epoch: int) -> Iterable[Batch]:
        raise Killed

    history = fit(network(), TASK, SCHEDULE, stage="dense", checkpoint_dir=tmp_path)
    model = network()
    assert fit(model, make_task(no_batches), SCHEDULE, stage="dense", checkpoint_dir=tmp_path) == history
    assert_same_state(model, uninterrupted[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda: (network(), replace(SCHEDULE, lr=0.1), TASK),
        lambda: (network(num_classes=4), SCHEDULE, TASK),
        lambda: (nn.Sequential(*network(), nn.BatchNorm1d(3)), SCHEDULE, TASK),
        lambda: (network(), SCHEDULE, make_task(num_batches=5)),
    ],
    ids=["schedule", "shapes", "names", "batches"],
)
def test_a_checkpoint_of_another_run_is_refused_with_advice(
    tmp_path: Path, change: Callable[[], tuple[nn.Module, Schedule, Task]]
) -> None:
    fit(network(), TASK, SCHEDULE, stage="dense", checkpoint_dir=tmp_path)
    model, schedule, task = change()
    with pytest.raises(DataError, match=r"dense\.ckpt: .*another run.*delete it or use another output folder"):
        fit(model, task, schedule, stage="dense", checkpoint_dir=tmp_path)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    """One bit of one weight."""
    weight = network().get_parameter("1.weight")  # ones: unmistakable in the file as long as nothing trained them
    where = data.index(weight.detach().numpy().tobytes())
    return data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :]


@pytest.mark.parametrize("damage", [cut, flip, lambda data: b"", lambda data: b"no checkpoint at all"])
def test_a_damaged_checkpoint_is_refused_with_advice(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    schedule, path = replace(SCHEDULE, lr=0.0), tmp_path / "dense.ckpt"
    fit(network(), TASK, schedule, stage="dense", checkpoint_dir=tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"dense\.ckpt: damaged checkpoint; delete it or use another"):
        fit(network(), TASK, schedule, stage="dense", checkpoint_dir=tmp_path)


def test_a_checkpoint_from_elsewhere_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(2)}, tmp_path / "dense.ckpt")
    with pytest.raises(DataError, match=r"dense\.ckpt: damaged checkpoint"):
        fit(network(), TASK, SCHEDULE, stage="dense", checkpoint_dir=tmp_path)


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"dense\.ckpt: the checkpoint cannot be written"):
        fit(network(), TASK, SCHEDULE, stage="dense", checkpoint_dir=tmp_path / "file" / "folder")


def test_modes_layout_gradients_and_frozen_weights_are_left_alone() -> None:
    model = network().eval()
    model[3].train()
    frozen, trained = model.get_parameter("0.bias").requires_grad_(False), model.get_parameter("0.weight")
    before = frozen.clone(), trained.clone()
    fit(model, TASK, SCHEDULE, stage="dense")
    assert [module.training for module in model.modules()] == [False] * 4 + [True] + [False] * 2
    assert all(parameter.grad is None for parameter in model.parameters())
    assert strides(model) == strides(network())
    assert torch.equal(frozen, before[0])
    assert not torch.equal(trained, before[1])


def test_modes_are_restored_after_a_failure_too() -> None:
    model = network().eval()
    with pytest.raises(Killed):
        fit(model, TASK, SCHEDULE, stage="dense", progress=kill_at_step(2))
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert strides(model) == strides(network())


def test_every_epoch_trains_in_train_mode_whatever_observe_does() -> None:
    model, flags = network(), []
    model[0].register_forward_pre_hook(lambda module, inputs: flags.append(module.training))

    def observe() -> Record:
        model.eval()
        return {}

    fit(model, TASK, SCHEDULE, stage="dense", observe=observe)
    assert flags == [True] * SCHEDULE.epochs * NUM_BATCHES


@pytest.mark.parametrize("bad_step", [1, 5])
def test_a_loss_that_is_no_number_stops_the_run_and_says_where(bad_step: int) -> None:
    calls = itertools.count(1)

    def loss(output: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        return cross_entropy(output, targets, smoothing) * (math.nan if next(calls) == bad_step else 1.0)

    epoch, step = divmod(bad_step - 1, NUM_BATCHES)
    where = rf"^prune: the loss became nan in epoch {epoch + 1}, step {step + 1}\b"
    with pytest.raises(QualityError, match=where):
        fit(network(), make_task(loss=loss), SCHEDULE, stage="prune")


def test_a_long_epoch_stops_soon_after_the_loss_explodes() -> None:
    batch, calls = next(batches(0)), itertools.count(1)

    def loss(output: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        return cross_entropy(output, targets, smoothing) * (math.inf if next(calls) == 2 else 1.0)

    task = make_task(lambda epoch: [batch] * 200, 200, loss)
    with pytest.raises(QualityError, match="the loss became inf in epoch 1, step 2;"):
        fit(network(), task, SCHEDULE, stage="dense")
    assert next(calls) <= 60


def test_records_hold_what_an_epoch_measured() -> None:
    """Learning rate 0: mean loss and accuracy can be computed beside the loop."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
    sizes = [7, 3, 1]
    rows = [(images[:size], labels[:size]) for (images, labels), size in zip(batches(0), sizes, strict=True)]
    task, schedule = make_task(lambda epoch: rows), Schedule(epochs=2, lr=0.0, label_smoothing=0.1)
    history = fit(model, task, schedule, stage="dense", observe=lambda: {"mask_hardness": 0.25})
    inputs, targets = (torch.cat(column) for column in zip(*rows, strict=True))
    output = model(inputs).detach()
    assert [(record["step"], record.get("epoch")) for record in history] == [(1, None), (2, None), (3, 1)] + [
        *[(4, None), (5, None), (6, 2)]
    ]
    assert history[0] == {"step": 1, "mask_hardness": 0.25}
    for record in (record for record in history if "epoch" in record):
        assert record["loss"] == pytest.approx(float(cross_entropy(output, targets, 0.1)), rel=1e-6)
        assert record["train_accuracy"] == float((output.argmax(1) == targets).sum()) / 11
        assert record["mask_hardness"] == 0.25
        assert record["seconds"] > 0


def test_the_learning_rate_of_an_epochs_last_step_is_recorded() -> None:
    history = fit(network(), TASK, SCHEDULE, stage="dense")
    factors = [lr_factor(step, SCHEDULE, num_batches=NUM_BATCHES) for step in (2, 5, 8, 11)]
    assert [record["lr"] for record in history] == [SCHEDULE.lr * factor for factor in factors]


def test_float_targets_have_no_accuracy() -> None:
    rows = [(images, images.flatten(1)[:, :3]) for images, _ in batches(0)]

    def loss(output: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        return nn.functional.mse_loss(output, targets)

    history = fit(network(), make_task(lambda epoch: rows, loss=loss), SCHEDULE, stage="dense")
    assert "train_accuracy" not in history[0]


def test_a_batch_of_one_is_skipped_where_there_is_batch_norm() -> None:
    images, labels = next(batches(0))
    single = make_task(lambda epoch: [(images, labels), (images[:1], labels[:1])], num_batches=2)
    alone = make_task(lambda epoch: [(images, labels)], num_batches=1)
    schedule = Schedule(epochs=1, decay="multistep")
    model, reference = network(), network()
    history = fit(model, single, schedule, stage="dense")
    expected = fit(reference, alone, schedule, stage="dense")
    assert untimed(history) == [record | {"step": 2} for record in untimed(expected)]
    assert_same_state(model, reference)
    only_ones = make_task(lambda epoch: [(images[:1], labels[:1])], num_batches=1)
    with pytest.raises(DataError, match="dense: no batch has the 2 samples"):
        fit(network(), only_ones, schedule, stage="dense")


def test_a_batch_of_one_trains_where_nothing_normalises() -> None:
    images, labels = next(batches(0))
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3))
    before = model.get_parameter("1.weight").clone()
    task = make_task(lambda epoch: [(images[:1], labels[:1])], num_batches=1)
    fit(model, task, Schedule(epochs=1), stage="dense")
    assert not torch.equal(model.get_parameter("1.weight"), before)


@pytest.mark.parametrize(
    ("claimed", "message"), [(2, "more batches than task.num_batches = 2"), (4, "3 batches, .* says 4")]
)
def test_an_epoch_of_another_length_than_claimed_is_an_error(claimed: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        fit(network(), make_task(num_batches=claimed), SCHEDULE, stage="dense")


Outputs = namedtuple("Outputs", ["logits", "aux"])


class Wrapped(nn.Module):
    """A network with an auxiliary head, whose outputs come in some container."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.network, self.wrap = network(), wrap

    def forward(self, inputs: Tensor) -> object:
        output = self.network(inputs)
        return self.wrap(output, output * 2)


@pytest.mark.parametrize(
    "wrap",
    [Outputs, lambda first, aux: [first, aux], lambda first, aux: {"out": first, "aux": aux}],
    ids=["namedtuple", "list", "dict"],
)
def test_of_several_outputs_the_first_is_trained(
    wrap: Callable[[Tensor, Tensor], object], uninterrupted: tuple[nn.Module, list[Record]]
) -> None:
    model = Wrapped(wrap)
    fit(model, TASK, SCHEDULE, stage="dense")
    assert_same_state(model.network, uninterrupted[0])


def test_a_model_that_returns_no_tensor_is_a_clear_error() -> None:
    with pytest.raises(DataError, match="model: returned int, expected a tensor"):
        fit(Wrapped(lambda first, aux: 3), TASK, SCHEDULE, stage="dense")


def test_progress_counts_every_step_and_shows_the_latest_record() -> None:
    seen: list[tuple[str, int, int, Record]] = []
    history = fit(network(), TASK, Schedule(epochs=2), stage="prune", progress=lambda *call: seen.append(call))
    assert [done for _, done, _, _ in seen] == [0, 1, 2, 3, 3, 4, 5, 6, 6]
    assert {(stage, total) for stage, _, total, _ in seen} == {("prune", 6)}
    assert [record.get("epoch") for *_, record in seen] == [None] * 4 + [1] * 4 + [2]
    assert seen[-1][-1] == history[-1]


def test_cosine_falls_from_the_peak_towards_zero_over_all_steps() -> None:
    schedule = Schedule(epochs=2)
    factors = [lr_factor(step, schedule, num_batches=4) for step in range(8)]
    assert factors == pytest.approx([(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)])
    assert factors == sorted(factors, reverse=True)


def test_warm_up_rises_in_equal_steps_to_the_peak_and_the_cosine_takes_over_there() -> None:
    schedule = Schedule(epochs=3, warmup_epochs=1.0)
    factors = [lr_factor(step, schedule, num_batches=4) for step in range(12)]
    assert factors[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert factors[4:] == pytest.approx([(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)])


def test_a_fractional_warm_up_never_exceeds_the_peak() -> None:
    schedule = Schedule(epochs=2, warmup_epochs=0.6)
    assert [lr_factor(step, schedule, num_batches=4) for step in range(3)] == pytest.approx([1 / 2.4, 2 / 2.4, 1.0])
    assert max(lr_factor(step, schedule, num_batches=4) for step in range(8)) <= 1.0


def test_multistep_falls_at_the_first_step_of_each_milestone_epoch() -> None:
    schedule = Schedule(epochs=5, decay="multistep", milestones=(2, 4), gamma=0.1)
    factors = [lr_factor(step, schedule, num_batches=2) for step in range(10)]
    assert factors == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "sdg"}, "dense: unknown optimizer 'sdg'; did you mean sgd"),
        ({"decay": "cosin"}, "dense: unknown decay 'cosin'; did you mean cosine"),
        ({"precision": "bf16"}, "dense: unknown precision 'bf16'"),
        ({"warmup_epochs": 4.0}, r"dense: warmup_epochs must be in \[0, 4"),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit(network(), TASK, replace(SCHEDULE, **change), stage="dense")  # type: ignore[arg-type]


def test_nothing_to_train_is_an_error_and_no_epochs_is_not() -> None:
    model = network().requires_grad_(False)
    with pytest.raises(SparsekitError, match="dense: nothing to train"):
        fit(model, TASK, SCHEDULE, stage="dense")
    assert fit(model, TASK, Schedule(epochs=0), stage="dense") == []


def test_the_terminal_stays_clean(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    fit(network(), TASK, replace(SCHEDULE, precision="bf16-mixed"), stage="dense")
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
