"""The tuning phase through the command: chosen on validation rows, sealed, resumed, reported."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from slm_lora.experiment import candidates
from slm_lora.runs.folder import list_runs, read_run, run_folders
from slm_lora.runs.scores import read_scores
from slm_lora.runtime.signals import StopRequested

from ..support.lab import Lab, command

ONE_RANK = (
    "grid.cells=[{adapter.r: 2}]", "data.size=40", "keep_adapters=false", "data.validation_rows=20",
)  # fmt: skip
TUNED = (
    "grid.cells=[{adapter.r: 2}, {adapter.r: 4}]",
    "data.size=40",
    "keep_adapters=false",
    "seeds=[0, 1]",
    "data.validation_rows=20",  # ten are one group of near duplicates
    "tuning.values=[1e-3, 1e-2]",
    "tuning.refine=1",
    "tuning.extend=1",
)


@pytest.fixture(scope="module")
def tuned(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("tuned") / "lab", tiny_folder)
    assert lab.run(*TUNED) == 0
    return lab


def choice(lab: Lab) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((lab.results / "tuning.json").read_text())
    return document


def row_ids(folder: Path) -> set[str]:
    return {score.row_id for score in read_scores(folder / "scores.parquet")}


def test_tuning_runs_are_scored_on_validation_rows_and_final_runs_on_test_rows(tuned: Lab) -> None:
    tuning = run_folders(tuned.results / "tuning" / "runs")
    final = run_folders(tuned.results / "runs")
    validation = set().union(*map(row_ids, tuning))
    test = set().union(*map(row_ids, final))
    assert (len(validation), len(test)) == (20, 20)
    assert not validation & test
    assert {read_run(folder).record.evaluation.split for folder in tuning} == {"validation"}


def test_tuning_runs_have_seeds_and_rows_of_their_own(tuned: Lab) -> None:
    tuning, final = (
        [read_run(folder).record for folder in run_folders(tuned.results / where / "runs")]
        for where in ("tuning", ".")
    )
    assert {record.recipe.seed for record in tuning if record.adapter} == {1000}
    assert {record.recipe.data_seed for record in tuning if record.adapter} == {1000}
    assert {record.recipe.seed for record in final if record.adapter} == {0, 1}
    assert not {record.data.train_sha256 for record in tuning} & {
        record.data.train_sha256 for record in final
    }


def test_every_setting_is_trained_at_its_lowest_value(tuned: Lab) -> None:
    arms = {arm["name"]: arm for arm in choice(tuned)["arms"]}
    assert set(arms) == {"r2", "r4"}
    for name, arm in arms.items():
        losses = {}
        for folder in run_folders(tuned.results / "tuning" / "runs"):
            record = read_run(folder).record
            if record.cell.startswith(f"{name}-"):
                losses[record.recipe.training.learning_rate] = record.evaluation.all.loss
        best = min(losses, key=lambda rate: losses[rate])
        assert arm["chosen"] == {"training.learning_rate": best}
        for folder in run_folders(tuned.results / "runs"):
            record = read_run(folder).record
            if record.cell.startswith(f"{name}-"):
                assert record.recipe.training.learning_rate == best
                assert record.settings["training.learning_rate"] == best


def test_tuning_run_is_the_same_training_as_an_ordinary_run(tuned: Lab, tmp_path: Path) -> None:
    """An ordinary experiment that validates after its last step has the same validation loss."""
    run = read_run(
        next(
            folder
            for folder in run_folders(tuned.results / "tuning" / "runs")
            if folder.name.startswith("r2-lr0.01-seed1000")
        )
    )
    steps = run.record.trained.steps
    recipe = yaml.safe_load(tuned.recipe.read_text())
    recipe |= {"name": "plain", "seed": 1000, "data_seed": 1000}
    recipe["grid"] = {"cells": [{"adapter.r": 2}]}
    recipe["data"] |= {"size": 40, "validation_rows": 20}
    recipe["training"]["eval_steps"] = steps
    path = tmp_path / "plain.yaml"
    path.write_text(yaml.safe_dump(recipe))
    where = ("--results", tmp_path / "results", "--adapters", tmp_path / "adapter")
    assert command("experiment", path, *where) == 0
    plain = next(run for run in list_runs(tmp_path / "results" / "plain") if run.cell != "base")
    assert plain.steps()[-1]["validation_loss"] == pytest.approx(
        run.record.evaluation.all.loss, abs=1e-6
    )
    assert [step["loss"] for step in plain.steps()] == [step["loss"] for step in run.steps()]


def test_finished_experiment_runs_nothing_again(
    tuned: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = choice(tuned)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("a run was trained again")

    monkeypatch.setattr("slm_lora.experiment.runner.train_cell", refuse)
    assert tuned.run(*TUNED) == 0
    assert choice(tuned) == before


def test_replaced_value_of_the_recipe_is_named(
    tuned: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tuned.run(*TUNED) == 0
    assert "note: training.learning_rate = 0.01 is replaced: tuning" in capsys.readouterr().err


def test_choice_is_made_again_from_the_runs_without_training(
    tuned: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = choice(tuned)
    moved = tmp_path / "tuning.json"
    shutil.move(tuned.results / "tuning.json", moved)
    monkeypatch.setattr("slm_lora.experiment.runner.train_cell", None)
    assert tuned.run(*TUNED) == 0
    assert choice(tuned) == before


def test_changed_choice_is_refused(tuned: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    path = tuned.results / "tuning.json"
    intact = path.read_text()
    path.write_text(intact.replace('"edges"', '"Edges"', 1))
    try:
        assert tuned.run(*TUNED) == 4
        assert "does not match its seal" in capsys.readouterr().err
        assert command("report", tuned.results) == 4
    finally:
        path.write_text(intact)


def test_interrupted_tuning_ends_with_the_same_choice(
    tuned: Lab, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after every tuning run, and begun again each time."""
    lab = Lab(tmp_path / "lab", tiny_folder)
    trained = candidates.run_cell
    done = []

    def run_one(*arguments: Any) -> None:
        trained(*arguments)
        done.append(arguments[0].name)
        raise StopRequested

    monkeypatch.setattr(candidates, "run_cell", run_one)
    for _ in range(40):
        if lab.run(*TUNED) == 0:
            break
    else:
        raise AssertionError("the tuning does not end")
    assert len(done) == len(set(done)) >= 4
    for arm, straight in zip(choice(lab)["arms"], choice(tuned)["arms"], strict=True):
        assert arm["chosen"] == straight["chosen"]
        assert [c["values"] for c in arm["candidates"]] == [
            c["values"] for c in straight["candidates"]
        ]
        assert [c["loss"] for c in arm["candidates"]] == [c["loss"] for c in straight["candidates"]]


def test_report_shows_each_setting_at_its_own_value(tuned: Lab) -> None:
    report = (tuned.results / "report.md").read_text()
    assert "Learning rate of each setting" in report
    assert "each setting's own" in report
    assert "figures/tuning.svg" in report
    metrics = tuned.metrics()
    between = [pair for pair in metrics["contrasts"] if pair["key"] != "base"]
    # One comparison of the two ranks, although their learning rates may differ.
    assert [pair["key"] for pair in between] == ["adapter.r"]
    assert set(metrics["tuning"]["chosen"]) == {"r2", "r4"}


def test_candidate_that_diverges_is_an_outcome_of_the_search(
    tiny_folder: Path, tmp_path: Path
) -> None:
    lab = Lab(tmp_path / "lab", tiny_folder)
    assert (
        lab.run(
            *ONE_RANK,
            "training.max_grad_norm=1e9",
            "tuning.values=[1e-2, 1e38]",
            "tuning.refine=0",
            "tuning.extend=0",
        )
        == 0
    )
    (arm,) = choice(lab)["arms"]
    stopped = {c["values"]["training.learning_rate"]: c["stopped"] for c in arm["candidates"]}
    assert stopped[1e-2] == ""
    assert stopped[1e38]
    assert arm["chosen"] == {"training.learning_rate": 1e-2}


def test_tuning_without_any_value_that_trains_is_refused_in_one_line(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = Lab(tmp_path / "lab", tiny_folder)
    code = lab.run(
        *ONE_RANK,
        "training.max_grad_norm=1e9",
        "tuning.values=[1e37, 1e38]",
        "tuning.refine=0",
        "tuning.extend=0",
    )
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert "no value of training.learning_rate trains r2" in last
    assert not (lab.results / "tuning.json").exists()


def test_kept_values_hold_the_chosen_one(tuned: Lab) -> None:
    for arm in choice(tuned)["arms"]:
        kept = [c for c in arm["candidates"] if c["kept"]]
        assert arm["chosen"] in [c["values"] for c in kept]
        for candidate in arm["candidates"]:
            if candidate["above_lowest"] is not None:
                value, low, high = candidate["above_lowest"]
                assert low <= value <= high
                assert math.isclose(
                    value,
                    candidate["loss"] - min(c["loss"] for c in arm["candidates"] if c["loss"]),
                    abs_tol=1e-9,
                )
