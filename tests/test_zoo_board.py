"""The zoo's board says what its rows say: every cell, every failure in its place, nothing averaged away."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("timm", reason="the zoo is built of timm's and torchvision's networks")
pytest.importorskip("torch_pruning", reason="the zoo measures Torch-Pruning beside sparsekit")

from benchmarks import zoo, zoo_board, zoo_models

ENVIRONMENT = {
    "python": "3.11.7",
    "packages": {"torch": "2.15.0", "sparsekit": None},
    "os": "Linux 6",
    "cpu": "A CPU",
    "num_cores": 2,
}
BASE: dict[str, Any] = {
    "kind": "toys",
    "failures": {},
    "when": "2026-11-21T05:00:00Z",
    "commit": "abc",
    "timm": "1.0",
    "torch_pruning_version": "1.6",
    "environment": ENVIRONMENT,
}
GOOD = BASE | {
    "model": "toy:good",
    "groups": 12,
    "renormalised_groups": 3,
    "prunable_share": 0.98,
    "exact_prunable_share": 0.61,
    "params_kept": 0.26,
    "compacted_as": "module",
    "max_relative_error": 3e-15,
    "certified": True,
    "max_abs_output": 2.0,
    "onnx": "equal",
    "onnx_max_relative_error": 2e-6,
    "sparsekit_s": 0.25,
    "torch_pruning": "equal",
    "torch_pruning_params_kept": 0.27,
    "torch_pruning_s": 1.0,
    "dense_bytes": 500_000_000,
    "growth_bytes": 300_000_000,
    "refusals": [
        {"module": "a.b", "source": "x.py:7", "op": "fold", "reason": "no rule | for it", "macs_share": 0.02},
        {"module": "a.c", "source": "x.py:8", "op": "sort", "reason": "unseen", "macs_share": 0.01},
    ],
    "refused_ops": {"fold": 2, "sort": 1},
}
WRONG = GOOD | {
    "model": "toy:wrong",
    "certified": False,
    "max_relative_error": 0.5,
    "compacted_as": "Program",
    "renormalised_groups": 0,
    "onnx": "fails",
    "onnx_reason": "ExportError: no",
    "sparsekit_s": 2.0,
    "growth_bytes": 2_000_000_000,
}
BROKEN = BASE | {
    "model": "toy:broken",
    "failures": {"sparsekit": "ValueError: odd (rules.py:3)", "torch_pruning": "TimeoutError: late"},
}


def line(board: str, name: str) -> list[str]:
    found = next(text for text in board.splitlines() if text.startswith(f"| {name} |"))
    return [cell.strip() for cell in found.strip("|").split(" | ")]


def test_every_cell_of_a_measured_network_is_shown() -> None:
    cells = line(zoo_board.render([GOOD], "run it"), "good")
    assert cells == [
        *("good", "12", "98 % (61 %)", "26 %", "module", "3e-15", "3 of 12 re-normalised", "2e-06", "0.25"),
        *("equal, 27 % kept", "1.00"),
    ]


def test_a_failure_stands_in_its_cell_with_its_reason() -> None:
    board = zoo_board.render([GOOD, WRONG, BROKEN], "run it")
    wrong, broken = line(board, "wrong"), line(board, "broken")
    assert wrong[4:8] == ["Program", "**5e-01**", "exact", "**fails**: ExportError: no"]
    assert broken[1] == "**fails**: ValueError: odd (rules.py:3)"
    assert broken[9] == "**fails**: TimeoutError: late"
    assert "- `toy:wrong`, certificate: error 0.5, outputs up to 2.0" in board
    assert "- `toy:broken`, sparsekit: ValueError: odd (rules.py:3)" in board
    assert "`toy:good`," not in board


def test_the_summary_counts_what_the_rows_hold() -> None:
    board = zoo_board.render([GOOD, WRONG, BROKEN], "run it")
    assert "3 networks" in board
    assert "**Compacted**: 2 (1 module, 1 Program); **certified** to 1e-9: 1." in board
    assert "1 equal, 1 fails, 1 not reached" in board
    assert "2 run afterwards, 2 of them equal" in board
    assert "median ratio 1.12; slower on 1 (toy:wrong 2.00)" in board
    # (500 + 2000) / (2.2 * 500 + 500) MB, and (500 + 300) / 1600
    assert "median 103 %, at most 156 % (toy:wrong); 1 above" in board


def test_a_network_without_groups_counts_as_neither_compacted_nor_certified() -> None:
    board = zoo_board.render([GOOD, GOOD | {"model": "toy:solid", "compacted_as": "nothing to cut"}], "run it")
    assert "**Compacted**: 1 (1 module); **certified** to 1e-9: 1." in board
    assert "- `toy:solid`, compact: no group was found" in board


def test_refusals_are_counted_per_op_and_the_worst_of_each_network_is_named() -> None:
    board = zoo_board.render([GOOD, WRONG, BROKEN], "run it")
    assert line(board, "`fold`") == ["`fold`", "2", "4"]
    assert line(board, "`sort`") == ["`sort`", "2", "2"]
    assert "| toy:good | 2 % | `a.b` | `x.py:7` | `fold` | no rule \\| for it |" in board
    assert "unseen" not in board


def test_the_board_says_how_it_was_measured() -> None:
    board = zoo_board.render([GOOD, BROKEN | {"commit": "def"}], "run it")
    assert "`run it`" in board
    assert "Python 3.11.7, torch 2.15.0, timm 1.0, torch-pruning 1.6" in board
    assert "commits abc, def" in board


def test_a_process_that_died_fails_in_the_stage_it_was_in_and_keeps_its_cells() -> None:
    cells: list[dict[str, Any]] = [
        {"stage": "build"},
        {"num_params": 7},
        {"stage": "certify"},
        {"failures": {"forward": "odd"}},
        {"max_abs_output": float("nan")},
    ]
    row = zoo.gather(cells, "more than 9 s")
    assert row == {"num_params": 7, "max_abs_output": "nan", "failures": {"forward": "odd", "certify": "more than 9 s"}}


def test_the_zoo_holds_every_network_that_torchvision_lists_once() -> None:
    names = [case.name for case in zoo_models.cases()]
    assert len(set(names)) == len(names)
    assert sum(name.startswith("torchvision:") for name in names) >= 80 + 6 + 12 + 9 + 2
    assert {"timm:cait_xxs24_224", "own:unet", "torchvision:raft_large"} <= set(names)
