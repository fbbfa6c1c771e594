"""The command `verdict` on planted experiments: exit codes, lines, JSON, conditions on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm_lora.report.write import write_report
from slm_lora.runs.folder import list_runs, run_folders
from slm_lora.runs.scored_run import ScoredRun

from ..support.lab import command
from ..support.planted import Floats, planted_run, write_runs

KEYS = {
    "experiment", "setting", "cells", "candidates", "seeds", "verdict", "exit_code", "conditions",
}  # fmt: skip
CONDITION_KEYS = {
    "condition", "measurement", "operator", "bound", "state", "value", "low", "high", "unit",
    "error_met", "error_violated", "rows", "groups", "repetitions", "hint", "needed_rows",
    "needed_seeds",
}  # fmt: skip


def planted(seeds: int = 1, rows: int = 60, ranks: tuple[int, ...] = (8,)) -> list[ScoredRun]:
    """A base and settings that are 0.1 better, and further 0.05 for each rank after the first."""
    rng = np.random.default_rng(0)
    base: Floats = 2.5 + rng.normal(0, 0.3, rows)
    fine = {"fine": [1.0] * rows}
    runs = [planted_run("base", base, fine)]
    for place, rank in enumerate(ranks):
        for seed in range(seeds):
            losses = base - 0.1 - 0.05 * place + 0.01 * seed + 0.05 * rng.standard_normal(rows)
            runs.append(planted_run(f"r{rank}-seed{seed}", losses, fine, seed=seed,
                                    adapter__r=rank))  # fmt: skip
    return runs


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_runs(planted(seeds=3, ranks=(4, 8)), tmp_path / "planted")


@pytest.mark.parametrize(
    ("bounds", "code", "end"),
    [
        (("gain > 0.02", "all < 9"), 0, "ship: r=8, recommended of 2 settings, meets 2 of 2"),
        (("gain > 0.02", "all < 1"), 10, "do not ship: r=8, recommended of 2 settings, violates 1"),
        (("gain > 0.02", "fine >= 0.98"), 11,
         "not enough evidence: r=8, recommended of 2 settings, leaves 1 of 2"),
        (("gain > 9", "fine >= 0.98"), 10, "do not ship: r=8"),
    ],
)  # fmt: skip
def test_exit_code_and_lines(
    results: Path,
    capsys: pytest.CaptureFixture[str],
    bounds: tuple[str, ...],
    code: int,
    end: str,
) -> None:
    options = [word for text in bounds for word in ("--require", text)]
    assert command("verdict", results, *options) == code
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(bounds) + 1
    assert all(len(line) <= 100 for line in lines)
    assert all(text in line for text, line in zip(bounds, lines, strict=False))
    assert lines[-1].startswith(end) and lines[-1].endswith("(3 seeds)")


def verdict_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    command("verdict", *words, "--json")
    record: dict[str, Any] = json.loads(capsys.readouterr().out)
    return record


def test_json_has_fixed_keys(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (results, "--require", "gain > 0.02", "--require", "fine >= 0.98")
    record = verdict_json(capsys, *words)
    assert set(record) == KEYS
    assert record["cells"] == ["r8-seed0", "r8-seed1", "r8-seed2"]
    assert (record["verdict"], record["exit_code"]) == ("not enough evidence", 11)
    gain, fine = record["conditions"]
    assert set(gain) == set(fine) == CONDITION_KEYS
    assert gain["state"] == "met" and gain["low"] > 0.02 and gain["needed_rows"] is None
    # 1 - 0.05 / 2 of 60 rows alike, of the better of two settings.
    assert fine["low"] == pytest.approx(0.025 ** (1 / 60))
    assert fine["needed_rows"] == int(np.ceil(np.log(0.025) / np.log(0.98)))
    assert fine["repetitions"] == record["seeds"] == 3


def test_json_of_one_row_has_no_infinity(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = write_runs(planted(rows=1), tmp_path / "planted")
    (gain,) = verdict_json(capsys, results, "--require", "gain > 0.02")["conditions"]
    assert gain["low"] is gain["high"] is None and gain["state"] == "undecided"
    command("verdict", results, "--require", "gain > 0.02")
    out = capsys.readouterr().out
    assert "(no interval) nats per token; needs 10 groups of test rows, has 1" in out


@pytest.mark.parametrize("name", ["r=4", "r4", "r4-seed1"])
def test_named_setting_is_judged_without_correction(
    results: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    record = verdict_json(capsys, results, "--require", "gain > 0.02", "--setting", name)
    assert record["setting"] == "r=4" and record["candidates"] == 1
    assert record["conditions"][0]["error_met"] == 0.05


def test_conditions_of_the_recipe_are_kept_with_the_report(
    results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = list_runs(results)
    write_report(runs, results, ship={"gain": "> 0.02", "all": "< 9"})
    assert command("verdict", results) == 0
    assert "gain > 0.02" in capsys.readouterr().out
    write_report(runs, results)  # `slm-lora report` knows no recipe
    assert command("verdict", results) == 0
    assert command("verdict", results, "--require", "gain > 9") == 10
    write_report(runs, results, ship={})
    assert "ship" not in json.loads((results / "metrics.json").read_text())
    assert command("verdict", results) == 2
    assert "no conditions; give --require 'gain > 0.02'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--require", "gain"], "--require 'gain': must be a name, one of > >= < <=, and a number"),
        (["--require", "forgetting < 1"], "forgetting: no such measurement in these runs; "),
        (["--require", "gain > 0", "--setting", "r=5"], "--setting r=5: no such setting; the "),
        ([], "no conditions; give --require"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    results: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert command("verdict", results, *words) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1


def test_broken_results_are_refused(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("verdict", results, "--require", "gain > 0")
    assert command("verdict", results.parent / "none", *words[2:]) == 2
    write_report(list_runs(results), results, ship={"gain": "> 0"})
    metrics = results / "metrics.json"
    text = metrics.read_text()
    metrics.write_text(text.replace('"> 0"', '"much"'))
    assert command(*words) == 4
    assert "metrics.json: broken" in capsys.readouterr().err
    metrics.write_text(text)
    scores = run_folders(results / "runs")[0] / "scores.parquet"
    scores.write_bytes(scores.read_bytes()[:100])
    assert command(*words) == 4
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_base_alone_has_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = write_runs(planted()[:1], tmp_path / "planted")
    assert command("verdict", results, "--require", "all < 9") == 2
    assert "only the base was scored" in capsys.readouterr().err


def test_long_lines_keep_to_100_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = write_runs(planted(), tmp_path / "planted")
    name = "gain:response_bits_per_byte"
    assert command("verdict", results, "--require", f"{name} >= 0.0722301234567") == 11
    *lines, last = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "needs about" in lines[1]
    assert all(len(line) <= 100 for line in [*lines, last])
    assert last.endswith("leaves 1 of 1 condition undecided (one seed)")
