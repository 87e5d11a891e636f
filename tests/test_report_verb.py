"""sparsekit report: the page of a finished run, made anew from its numbers."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsekit import fitting
from sparsekit.cli import main
from sparsekit.report import Report
from tests import tiny

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with transport."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    names = (
        "--model",
        f"{tiny.FILE}:network",
        "--data",
        f"{tiny.FILE}:task",
        "--dense-epochs",
        "1",
        "--epochs",
        "2",
        "--allow-slower",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "measure_latency", tiny.quick_latency)
        patch.setattr(
            sys, "argv", ["sparsekit", "compress", *names, "--dense-epochs", "1", "--epochs", "2", "--out", str(folder)]
        )
        main()
    return folder


@pytest.fixture
def out(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished run, as `out` in the current folder."""
    shutil.copytree(finished, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    return Path("out")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`sparsekit report <arguments>`: exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sparsekit", "report", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as exit:
            code = exit.code
        assert isinstance(code, int)
        return code, *capsys.readouterr()

    return call


def test_the_page_is_made_anew_and_is_the_one_that_the_run_wrote(cli: Cli, out: Path) -> None:
    page = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    code, stdout, stderr = cli(out)
    assert (code, stderr) == (0, "")
    assert stdout == f"out/report.html   {Report.read(out / 'report.json').headline}\n"
    assert (out / "report.html").read_bytes() == page


def test_masks_scores_and_norms_of_three_channels_are_drawn(out: Path) -> None:
    page = (out / "report.html").read_text(encoding="utf-8")
    for quantity in ("mask", "score", "norm"):
        chart = page.split(f"<title>{quantity} in conv2</title>")[1].split("</svg>")[0]
        assert chart.count("<polyline") == 3
    assert "<title>mask/" not in page


def test_json_prints_every_report_and_writes_nothing(cli: Cli, out: Path) -> None:
    shutil.copytree(out, "again")
    (out / "report.html").unlink()
    code, stdout, _ = cli(out, "again", "--json")
    document = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert code == 0
    assert json.loads(stdout) == {"out": document, "again": document}
    assert not (out / "report.html").exists()


def test_a_folder_without_a_report_is_named_before_any_page_is_written(cli: Cli, out: Path) -> None:
    Path("empty").mkdir()
    (out / "report.html").unlink()
    code, stdout, stderr = cli(out, "empty")
    assert (code, stdout, stderr) == (2, "", "error: empty/report.json: No such file or directory\n")
    assert not (out / "report.html").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [("{", "damaged: Expecting property name"), ("[]", "schema_version must be 1"), ("{}", "schema_version must be 1")],
)
def test_a_damaged_report_is_named(cli: Cli, out: Path, text: str, reason: str) -> None:
    (out / "report.json").write_text(text, encoding="utf-8")
    code, _, stderr = cli(out)
    assert code == 2
    assert stderr.startswith("error: out/report.json: ")
    assert reason in stderr
    assert stderr.count("\n") == 1


def test_several_runs_get_a_page_that_compares_them(cli: Cli, out: Path) -> None:
    shutil.copytree(out, "again")
    (out / "report.html").unlink()
    code, stdout, stderr = cli(out, "again")
    assert (code, stderr) == (0, "")
    assert stdout.splitlines()[-1].startswith("pareto.html   2 runs, beaten by nothing else: ")
    page = Path("pareto.html").read_text(encoding="utf-8")
    assert 'href="out/report.html"' in page
    assert 'href="again/report.html"' in page
    assert (out / "report.html").exists()


def test_the_page_that_compares_goes_where_it_is_told_and_links_from_there(cli: Cli, out: Path) -> None:
    shutil.copytree(out, "again")
    Path("pages").mkdir()
    code, _, _ = cli(out, "again", "--out", "pages/all.html")
    assert code == 0
    assert 'href="../out/report.html"' in Path("pages/all.html").read_text(encoding="utf-8")
    assert not Path("pareto.html").exists()


@pytest.mark.parametrize("arguments", [("out", "--out", "p.html"), ("out", "out", "--json", "--out", "p.html")])
def test_a_page_of_nothing_to_compare_is_refused(cli: Cli, out: Path, arguments: tuple[str, ...]) -> None:
    code, stdout, stderr = cli(*arguments)
    assert (code, stdout) == (2, "")
    assert stderr == "error: --out p.html: compares runs of sparsekit compress; give two or more, and not --json\n"


def test_one_run_alone_writes_its_own_page_only(cli: Cli, out: Path) -> None:
    assert cli(out)[0] == 0
    assert not Path("pareto.html").exists()


def test_the_page_of_last_time_among_the_folders_is_no_run(cli: Cli, out: Path) -> None:
    shutil.copytree(out, "runs/a")
    shutil.copytree(out, "runs/b")
    first = cli(*sorted(Path("runs").iterdir()), "--out", "runs/pareto.html")
    again = cli(*sorted(Path("runs").iterdir()), "--out", "runs/pareto.html")
    assert Path("runs/pareto.html") in Path("runs").iterdir()
    assert first == again
    assert first[0] == 0
