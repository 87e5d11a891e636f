"""The command line as its users meet it: what it prints where, what it leaves behind, how it ends."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
import torch
from safetensors.torch import save_file

from sparsekit import fitting, pipeline
from sparsekit.artifact import FILES, load
from sparsekit.cli import commands, main
from sparsekit.errors import ExportError, MeasurementError, QualityError
from sparsekit.recipe import Recipe
from tests import tiny

ROOT = Path(__file__).parents[1]
VERBS = sorted(commands.commands)
# By their names, since `sparsekit.cli.bench` is the command, not its module.
bench_module, compress_module = (import_module(f"sparsekit.cli.{verb}") for verb in ("bench", "compress"))
# Enough dense epochs that a run can be caught in the middle.
NAMES = ("--model", f"{tiny.FILE}:network", "--data", f"{tiny.FILE}:task")
TINY = (*NAMES, "--dense-epochs", "60", "--epochs", "2", "--allow-slower")


class Result(NamedTuple):
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`sparsekit <arguments>`, run in this process."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["sparsekit", *map(str, arguments)])
        code: object = 0
        try:
            main()
        except SystemExit as exit:
            code = exit.code
        assert isinstance(code, int)
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture(autouse=True)
def quick_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "measure_latency", tiny.quick_latency)
    monkeypatch.setattr(bench_module, "measure_latency", tiny.quick_latency)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run; copy it before changing it."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "measure_latency", tiny.quick_latency)
        patch.setattr(sys, "argv", ["sparsekit", "compress", *TINY, "--out", str(folder)])
        main()
    return folder


@pytest.fixture
def out(finished: Path, here: Path) -> Path:
    """A copy of the finished run, as `out` in the current folder."""
    shutil.copytree(finished, here / "out")
    return Path("out")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_one_line(result: Result, *words: str) -> None:
    """Exit code 2, nothing on stdout, and one line on stderr that has all `words`."""
    assert result.code == 2, result
    assert result.out == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.err), result.err
    for word in words:
        assert word in result.err


# Names and values that are none


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "resnet65"], ["model 'resnet65'", "did you mean resnet56"]),
        (["--model", "torchvision:resnet5"], ["'torchvision:resnet5'", "resnet50"]),
        (["--model", "none.py:network"], ["none.py:network", "no Python file"]),
        (["--data", "digit"], ["data 'digit'", "did you mean digits"]),
        (["--data", "imagefolder:none"], ["none", "no such folder"]),
        (["--method", "transprot"], ["method 'transprot'", "did you mean transport"]),
        (["--budget", "mac<=0.5x"], ["'mac'", "did you mean macs"]),
        (["--budget", "macs<=1.5x"], ["macs<=1.5x", "(0, 1]"]),
        (["--budget", "fast"], ["'fast'", "METRIC<=LIMIT"]),
        (["--budget", "macs<=0.5x and convv1=0.5"], ["'convv1'", "did you mean conv1"]),
        (["-o", "epsilom=1"], ["transport", "'epsilom'", "did you mean epsilon"]),
        (["-o", "epsilon=soft"], ["epsilon must be float", "'soft'"]),
        (["-o", "epsilon"], ["'epsilon'", "NAME=VALUE"]),
        (["--precision", "bf16-mixd"], ["'bf16-mixd'", "did you mean bf16-mixed"]),
        (["--milestones", "60,x"], ["--milestones '60,x'", "expected epochs like 60,90"]),
        (["--recover-budget", "1h"], ["--recover-budget '1h'", "expected a time like 60s or 5m"]),
        (["--recover", "lsqr"], ["recover 'lsqr'", "did you mean lsq"]),
        (["--epochs", "-1"], ["epochs must be in [0, inf), got -1"]),
        (["--batch-size", "1"], ["batch_size must be in [2, inf), got 1"]),
        (["--threads", "0"], ["threads must be in [1, inf), got 0"]),
        (["--label-smoothing", "1"], ["label_smoothing must be in [0, 1), got 1.0"]),
        (["--lr", "nan"], ["lr must be in [0, inf), got nan"]),
        (["--no-data"], ["--no-data", "choose one"]),
        (["--pattern", "2:4", "--method", "gmp"], ["--pattern", "--method gmp", "choose one"]),
        (["--pattern", "2:4", "--budget", "macs<=0.5x"], ["--pattern", "--budget macs<=0.5x", "choose one"]),
        (["--density", "0.5"], ["--density", "--pattern", "block:128x16"]),
        (["--recipe", "none.toml"], ["recipe none.toml", "No such file"]),
        (["--overwrite", "--resume"], ["overwrite and resume", "choose one"]),
        (["--out", "."], [".: holds the current folder"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("-") else None,
)
def test_what_does_not_exist_is_named_beside_the_nearest_and_nothing_is_written(
    flags: list[str], words: list[str], cli: Cli, here: Path
) -> None:
    assert_one_line(cli("compress", *NAMES, *flags), *words)
    assert list(here.iterdir()) == []


def test_an_unknown_recipe_key_is_named_beside_the_nearest(cli: Cli, here: Path) -> None:
    Path("mine.toml").write_text('budgett = "macs<=0.5x"')
    assert_one_line(cli("compress", "--recipe", "mine.toml"), "recipe mine.toml", "'budgett'", "did you mean budget")
    assert [path.name for path in here.iterdir()] == ["mine.toml"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["compress", "--epochs", "many"],
        ["compress", "--lr", "fast"],
        ["compress", "--epoch", "1"],
        ["compres"],
        ["bench", "--threads", "0", __file__],
        ["bench", "none.onnx"],
        ["bench"],
        ["inspect"],
    ],
    ids=" ".join,
)
def test_malformed_command_lines_end_with_2(arguments: list[str], cli: Cli, here: Path) -> None:
    result = cli(*arguments)
    assert result.code == 2
    assert result.out == ""
    assert "Usage: " in result.err
    assert list(here.iterdir()) == []


def test_a_budget_below_the_floor_is_refused_before_any_training(cli: Cli, here: Path) -> None:
    assert_one_line(cli("compress", *TINY, "--budget", "macs<=0.001x"), "below the floor of", "of the dense network")
    assert list(here.iterdir()) == []


def test_transport_without_data_is_one_line(cli: Cli, here: Path) -> None:
    result = cli("compress", "--model", "resnet20", "--no-data")
    assert result.code == 2
    assert result.err.splitlines()[-1].startswith("error: transport: ")
    assert "Traceback" not in result.err
    assert list(here.iterdir()) == []


# Weights


def _wrong_keys(path: Path) -> None:
    save_file({f"net.{name}": value for name, value in tiny.Net().state_dict().items()}, path)


WEIGHTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "none.safetensors": (lambda path: None, ["No such file"]),
    "cut.safetensors": (lambda path: path.write_bytes(b"\x10\0\0\0\0\0\0\0{"), ["damaged"]),
    "cut.pt": (lambda path: path.write_bytes(b"\x80\x02}q\0"), ["damaged"]),
    "keys.safetensors": (_wrong_keys, ["'conv1.weight' is missing", "'bn1.weight' is missing", "more)"]),
    "shapes.safetensors": (
        lambda path: save_file(tiny.Net(width=4).state_dict(), path),
        ["'conv1.weight' is [4, 1, 3, 3], the network's is [8, 1, 3, 3]", "'bn1.bias' is [4]", "more)"],
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_do_not_fit_are_named_with_the_first_three_reasons(name: str, cli: Cli, here: Path) -> None:
    make, words = WEIGHTS[name]
    make(here / name)
    before = set(here.iterdir())
    result = cli("compress", *NAMES, "--weights", name)
    assert_one_line(result, f"weights {name}: ", *words)
    assert result.err.count(" is missing") + result.err.count("the network's is") in (0, 3)
    assert set(here.iterdir()) == before


# The output folder


def test_a_finished_folder_is_refused_and_stays(cli: Cli, out: Path) -> None:
    before = contents(out)
    assert_one_line(cli("compress", *TINY), "out: exists", "--overwrite")
    assert contents(out) == before


def test_unfinished_work_is_refused_and_stays(cli: Cli, here: Path) -> None:
    (here / "out.partial").mkdir()
    (here / "out.partial" / "dense.ckpt").write_text("an epoch")
    assert_one_line(cli("compress", *TINY), "out.partial", "--resume", "--overwrite")
    assert contents(here / "out.partial") == {"dense.ckpt": b"an epoch"}


def test_resuming_a_finished_run_prints_its_report_again_and_runs_nothing(
    cli: Cli, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(out)
    monkeypatch.setattr(pipeline, "build", None)
    monkeypatch.setattr(pipeline, "_compress", None)
    table, document = cli("compress", *TINY, "--resume"), cli("compress", *TINY, "--resume", "--json")
    assert table.code == document.code == 0
    assert "accuracy" in table.out
    assert json.loads(document.out) == json.loads(before["report.json"])
    assert contents(out) == before


def test_resuming_with_another_recipe_names_the_first_key_that_differs(cli: Cli, out: Path) -> None:
    result = cli("compress", *TINY, "--resume", "--seed", "4", "--lr", "0.3")
    assert_one_line(result, f"out: was made with lr = {Recipe().lr}, now 0.3", "--overwrite")


def test_overwriting_repeats_the_run_from_its_own_recipe_bit_for_bit(cli: Cli, out: Path) -> None:
    before = contents(out)
    shutil.copy(out / "recipe.toml", "again.toml")
    (out / "notes.txt").write_text("of the old run")
    result = cli("compress", "--recipe", "again.toml", "--overwrite", "--json")
    assert result.code == 0
    after = contents(out)
    assert set(after) == set(FILES)
    assert [after[name] == before[name] for name in ("weights.safetensors", "plan.json", "recipe.toml")] == [True] * 3
    first, second = json.loads(before["report.json"]), json.loads(after["report.json"])
    assert first["recipe_hash"] == second["recipe_hash"]
    assert first["accuracies"] == second["accuracies"]
    assert first["seconds"] != second["seconds"]
    assert json.loads(result.out) == second
    assert re.findall(r"^\[ +[\d.]+ s\] (.*)$", result.err, re.MULTILINE) == [
        *("dense", "evaluate dense", "tidy", "export dense", "prune", "evaluate pruned", "finetune"),
        *("evaluate compact", "export", "latency"),
    ]
    assert not Path("out.partial").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(cli: Cli, here: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # no file grows beyond that
    try:
        result = cli("compress", *NAMES, "--dense-epochs", "0", "--method", "random", "--epochs", "0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert result.code == 1
    assert result.out == ""
    assert result.err.splitlines()[-1] == "error: out.partial: File too large"
    assert list(here.iterdir()) == []


def test_no_report_names_the_folder_it_was_made_in(finished: Path) -> None:
    for name in ("report.json", "report.html"):
        text = (finished / name).read_text(encoding="utf-8").replace(str(tiny.FILE), "typed")
        assert [place for place in (str(finished.parent), str(ROOT), str(Path.home()) + "/") if place in text] == []


def test_the_folder_is_what_load_expects(finished: Path) -> None:
    assert load(finished, tiny.network)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


# Recipes and flags


def test_every_recipe_key_is_a_flag_and_every_flag_a_key() -> None:
    flags = {parameter.name for parameter in commands.commands["compress"].params}
    keys = {field.name for field in dataclasses.fields(Recipe)}
    about_the_run = {"recipe_path", "folder", "overwrite", "resume", "as_json", "no_data"}
    in_other_words = {"pattern", "density"}  # a method, its option and a budget
    assert flags - about_the_run - in_other_words == keys
    assert about_the_run | in_other_words <= flags


def test_flags_win_over_the_recipe_and_options_add_up(cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipes: list[Recipe] = []
    monkeypatch.setattr(compress_module, "run", lambda recipe, *_, **__: recipes.append(recipe))
    Path("mine.toml").write_text('lr = 0.3\nepochs = 9\n[options]\nepsilon = 0.5\nsolver = "exact"')
    flags = ("--epochs", "2", "-o", "epsilon=2.0", "--no-download", "--weights", "w.pt")
    with pytest.raises(AttributeError):  # there is no report to print
        cli("compress", "--recipe", "mine.toml", *flags)
    options = {"epsilon": 2.0, "solver": "exact"}
    assert recipes == [Recipe(lr=0.3, epochs=2, options=options, download=False, weights="w.pt")]


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (("--milestones", "60,90"), "milestones", (60, 90)),
        (("--finetune-milestones", " 3, 5,"), "finetune_milestones", (3, 5)),
        (("--dense-milestones", ""), "dense_milestones", ()),
        (("--recover-budget", "90s"), "recover_budget_s", 90.0),
        (("--recover-budget", "5m"), "recover_budget_s", 300.0),
        (("--recover-budget", "2.5"), "recover_budget_s", 2.5),
        (("--augment", "shift, cutmix"), "augment", ("shift", "cutmix")),
        (("--augment", ""), "augment", ()),
    ],
)
def test_what_stands_between_commas_is_a_list(
    flags: tuple[str, str], key: str, value: Any, cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes: list[Recipe] = []
    monkeypatch.setattr(compress_module, "run", lambda recipe, *_, **__: recipes.append(recipe))
    with pytest.raises(AttributeError):  # there is no report to print
        cli("compress", *flags)
    assert recipes == [dataclasses.replace(Recipe(), **{key: value})]


def test_another_method_leaves_the_options_of_the_recipes_own_behind(
    cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes: list[Recipe] = []
    monkeypatch.setattr(compress_module, "run", lambda recipe, *_, **__: recipes.append(recipe))
    Path("mine.toml").write_text('method = "transport"\n[options]\nepsilon = 0.5')
    for flags in ((), ("--method", "transport"), ("--method", "magnitude"), ("--method", "magnitude", "-o", "norm=l2")):
        with pytest.raises(AttributeError):  # there is no report to print
            cli("compress", "--recipe", "mine.toml", *flags)
    assert [recipe.options for recipe in recipes] == [{"epsilon": 0.5}, {"epsilon": 0.5}, {}, {"norm": "l2"}]


# Help, and the other verbs


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_has_an_example(verb: str, cli: Cli) -> None:
    result = cli(verb, "--help")
    assert result.code == 0
    assert re.search(rf"^ +sparsekit {verb}\b", result.out, re.MULTILINE)
    assert result.err == ""


def test_the_help_names_every_verb_and_exit_code(cli: Cli) -> None:
    result = cli("--help")
    assert result.code == 0
    assert VERBS == ["bench", "compress", "env", "export", "gan", "inspect", "report"]
    assert all(re.search(rf"^ +{verb} +\w[^.]*(\.|$)", result.out, re.MULTILINE) for verb in VERBS)
    assert all(f"{code} " in result.out for code in (0, 1, 2, 3, 4, 5, 130))


def test_without_a_verb_there_is_help(cli: Cli) -> None:
    result = cli()
    assert "Commands:" in result.out + result.err


def test_env_says_versions_and_hardware_and_no_names(cli: Cli) -> None:
    document = json.loads(cli("env", "--json").out)
    assert document["packages"]["torch"] == torch.__version__.split("+")[0]
    assert document["num_cores"] >= 1
    text = cli("env").out
    assert re.search(r"^torch +\d", text, re.MULTILINE)
    for secret in (os.uname().nodename, str(Path.home()) + "/"):
        assert secret not in text
        assert secret not in json.dumps(document)


def test_inspect_lists_groups_layers_and_refusals(cli: Cli) -> None:
    result = cli("inspect", NAMES[1], "--data", "digits", "--json")
    assert result.code == 0
    document = json.loads(result.out)
    assert document["groups"] == [
        {"name": "conv1", "size": 8, "exact": True, "residual": False, "fixed_by": ""},
        {"name": "conv2", "size": 16, "exact": True, "residual": False, "fixed_by": ""},
    ]
    macs = {"conv1": 8 * 9 * 64, "conv2": 8 * 16 * 9 * 64, "head": 160}
    assert {row["name"]: row["num_macs"] for row in document["layers"]} == macs
    assert document["num_macs"] == sum(macs.values())
    params = {name: sum(p.numel() for p in module.parameters()) for name, module in tiny.Net().named_children()}
    assert {row["name"]: row["num_params"] for row in document["layers"]} == {name: params[name] for name in macs}
    assert document["num_params"] == sum(parameter.numel() for parameter in tiny.Net().parameters())
    assert document["refusals"] == document["uncounted"] == []
    text = cli("inspect", NAMES[1], "--data", "digits").out
    assert "78,496 MACs, 1,442 parameters, 2 groups" in text


@pytest.mark.parametrize("verb", ["inspect", "export"])
def test_other_verbs_name_what_does_not_exist_too(verb: str, cli: Cli, here: Path) -> None:
    assert_one_line(cli(verb, "resnet65"), "model 'resnet65'", "did you mean resnet56")
    assert_one_line(cli(verb, "resnet20", "--weights", "none.pt"), "weights none.pt: no such file")
    assert_one_line(cli(verb, "resnet20", "--image-size", "0"), "image_size must be in [1, inf), got 0")
    assert list(here.iterdir()) == []


def test_export_writes_an_artifacts_network_again(cli: Cli, out: Path) -> None:
    result = cli("export", "out", "--out", "again.onnx", "--json")
    assert result.code == 0
    document = json.loads(result.out)
    assert document["path"] == "again.onnx"
    assert document["max_relative_error"] <= 1e-4
    assert Path("again.onnx").read_bytes() == (out / "model.onnx").read_bytes()
    assert document["size_bytes"] == Path("again.onnx").stat().st_size


def test_export_writes_a_named_network_and_bench_times_it(cli: Cli, out: Path) -> None:
    result = cli("export", NAMES[1], "--data", "digits", "--out", "dense.onnx")
    assert result.code == 0
    assert re.match(r"dense.onnx: 0.01 MB, \d+ nodes, opset \d+, max relative error [\d.e-]+", result.out)
    result = cli("bench", "dense.onnx", out / "model.onnx", "--json")
    assert result.code == 0
    document = json.loads(result.out)
    assert [row["path"] for row in document["latencies"]] == ["dense.onnx", "out/model.onnx"]
    assert len(document["ratios"]) == 1
    table = cli("bench", "dense.onnx", out / "model.onnx").out
    assert "dense.onnx" in table
    assert "out/model.onnx" in table


def test_export_into_no_folder_or_of_no_artifact_is_bad_usage(cli: Cli, here: Path) -> None:
    assert_one_line(cli("export", NAMES[1], "--out", "none/m.onnx"), "none/m.onnx", "the folder none does not exist")
    (here / "empty").mkdir()
    assert_one_line(cli("export", "empty"), "recipe empty/recipe.toml: No such file")
    assert [path.name for path in here.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (QualityError("accuracy 0.5: below 0.9"), 3, "error: accuracy 0.5: below 0.9"),
        (ExportError("m.onnx: differs"), 4, "error: m.onnx: differs"),
        (MeasurementError("m.onnx: no such file"), 5, "error: m.onnx: no such file"),
        (OSError(28, "No space left on device"), 1, "error: No space left on device"),
        (PermissionError(13, "Permission denied", "/secret"), 1, "error: /secret: Permission denied"),
        (KeyboardInterrupt(), 130, "error: interrupted; `sparsekit compress` continues with --resume"),
        (click.UsageError("no such thing"), 2, "Error: no such thing"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_failure_has_its_exit_code_and_one_line(
    error: BaseException, code: int, line: str, cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(compress_module, "run", fail)
    result = cli("compress", "--json")
    assert result.code == code
    assert result.out == ""
    assert result.err.splitlines()[-1] == line
    assert "Traceback" not in result.err


def test_a_bug_is_no_clean_failure(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compress_module, "run", None)
    with pytest.raises(TypeError):
        cli("compress")


# A process of its own

# A shell that starts a command in the background makes it ignore Ctrl-C; ours must not inherit that.
COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from sparsekit.cli import main
main()
"""


def start(*arguments: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    assert path.exists(), process.communicate()


def test_a_run_interrupted_and_killed_resumes_to_the_same_weights(cli: Cli, here: Path, finished: Path) -> None:
    partial = here / "out.partial"
    with start("compress", *TINY) as process:
        wait_for(partial / "dense.ckpt", process)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate()
    assert process.returncode == 130
    assert output == ""
    lines = errors.strip().splitlines()
    assert re.fullmatch(r"\[ +[\d.]+ s\] dense", lines[0])
    assert [line for line in lines[1:] if line] == ["error: interrupted; `sparsekit compress` continues with --resume"]
    assert [path.name for path in here.iterdir()] == ["out.partial"]

    with start("compress", *TINY, "--resume") as process:
        wait_for(partial / "prune.ckpt", process)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in here.iterdir()] == ["out.partial"]

    result = cli("compress", *TINY, "--resume")
    assert result.code == 0
    assert [path.name for path in here.iterdir()] == ["out"]
    weights = contents(here / "out")["weights.safetensors"]
    assert weights == (finished / "weights.safetensors").read_bytes()


def test_a_process_keeps_stdout_for_the_answer(here: Path) -> None:
    with start("inspect", NAMES[1], "--data", "digits", "--json") as process:
        output, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert json.loads(output)["num_macs"] == 78496
