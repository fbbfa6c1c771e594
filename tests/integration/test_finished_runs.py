"""Finished adapters, full models and runs are neither replaced nor removed, nor foreign files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from slm_lora.adapters import io as adapter_io
from slm_lora.runtime.checksums import sha256_file

from ..support.lab import Lab, command
from ..support.rows import make_rows, write_jsonl

ONE_CELL = "grid.cells=[{data.size: 40, adapter.r: 2}]"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, Lab]:
    """Labs with `ONE` cell, and with the whole grid; tests change copies."""
    labs = {}
    for name, overrides in (("one", (ONE_CELL,)), ("grid", ())):
        labs[name] = Lab(tmp_path_factory.mktemp("finished") / name, tiny_folder)
        assert labs[name].run(*overrides) == 0
    return labs


def fill(lab: Lab, source: Lab) -> None:
    """Results and adapters as if made in this lab, by the same recipe."""
    lab.recipe, lab.rows = source.recipe, source.rows
    shutil.copytree(source.results, lab.results)
    shutil.copytree(source.adapters, lab.adapters)


@pytest.fixture
def one_finished(lab: Lab, finished: dict[str, Lab]) -> None:
    fill(lab, finished["one"])


@pytest.fixture
def grid_finished(lab: Lab, finished: dict[str, Lab]) -> None:
    fill(lab, finished["grid"])


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder."""
    return {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_output(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    captured = capsys.readouterr()
    return captured.out, captured.err


@pytest.mark.usefixtures("grid_finished")
def test_another_grid_of_the_same_name_replaces_no_run_or_adapter(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    first, runs = contents(lab.adapters), contents(lab.results / "runs")
    table = (lab.results / "experiment_table.md").read_text()
    assert "other finished run" not in table
    capsys.readouterr()

    assert lab.run(ONE_CELL, "training.learning_rate=5e-3") == 0
    out, err = read_output(capsys)
    names = {folder.name for folder in lab.adapters.iterdir()}
    (new,) = names - {"tiny-r2-40", "tiny-r4-40", "tiny-r4-80"}
    about = json.loads((lab.adapters / new / adapter_io.ABOUT).read_text())
    assert new == f"tiny-r2-40-{about['run'][:8]}"
    assert about["recipe"]["training"]["learning_rate"] == 5e-3
    after = contents(lab.adapters)
    assert {name: after[name] for name in first} == first
    assert f"{lab.adapters / 'tiny-r2-40'} holds the adapter of another run" in err
    assert "(training.learning_rate: 0.01 → 0.005) and stays" in err
    assert f"adapter    {lab.adapters / new}" in out

    # The report covers the requested cells and lists the other runs.
    all_runs = contents(lab.results / "runs")
    assert {name: all_runs[name] for name in runs} == runs
    others = sorted(path.name for path in (lab.results / "runs").glob("r*"))
    others = [name for name in others if not name.endswith(about["run"][:8])]
    line = f"3 other finished runs in tiny/runs, not in this table: {', '.join(others)}."
    for text in (out, (lab.results / "experiment_table.md").read_text(),
                 (lab.results / "report.md").read_text()):  # fmt: skip
        assert line in text
    assert "3 other finished runs" in (lab.results / "report.html").read_text()
    assert command("report", lab.results) == 0
    assert line in capsys.readouterr().out

    # The first command makes its report again, and trains nothing.
    assert lab.run() == 0
    out, err = read_output(capsys)
    assert err.count("finished earlier") == 4 and "trained" not in err
    assert contents(lab.adapters) == after
    shown = (lab.results / "experiment_table.md").read_text()
    assert shown.startswith(table.rstrip()) and "1 other finished run in tiny/runs" in shown
    # So does the second.
    assert lab.run(ONE_CELL, "training.learning_rate=5e-3") == 0
    assert "trained" not in read_output(capsys)[1] and contents(lab.adapters) == after


def test_finished_full_models_are_not_replaced(lab: Lab) -> None:
    full = ("adapter.kind=full", "grid.cells=[]", "data.size=40", "training.max_steps=2")
    assert lab.run(*full) == 0
    first = contents(lab.adapters)
    assert any(name.endswith(adapter_io.MODEL_WEIGHTS) for name in first)
    # The same name again, as another whole model and as an adapter.
    for overrides in (("seed=1",), ("adapter.kind=lora",)):
        assert lab.run(*full, *overrides) == 0
        after = contents(lab.adapters)
        assert {name: after[name] for name in first} == first
        assert len(after) > len(first)
        first = after


@pytest.mark.usefixtures("one_finished")
def test_keep_adapters_false_removes_no_kept_adapter(lab: Lab) -> None:
    first = contents(lab.adapters)
    assert lab.run(ONE_CELL, "keep_adapters=false", "training.learning_rate=5e-3") == 0
    assert contents(lab.adapters) == first
    # Nor that of the very same run, of which another results folder knows nothing.
    elsewhere = ("--results", lab.folder / "other", "--adapters", lab.adapters)
    assert command("experiment", lab.recipe, ONE_CELL, "keep_adapters=false", *elsewhere) == 0
    assert contents(lab.adapters) == first
    assert not list((lab.folder / "other").rglob("*.safetensors"))


@pytest.mark.parametrize("kind", ["folder", "file", "link", "foreign"])
def test_foreign_files_at_the_adapter_path_stay(
    lab: Lab, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.adapters.mkdir()
    place = lab.adapters / "tiny-r2-40"
    if kind == "file":
        place.write_text("mine")
    elif kind == "link":
        place.symlink_to(lab.folder / "nowhere")
    else:
        place.mkdir()
        (place / "notes.txt").write_text("mine")
        if kind == "foreign":
            (place / "adapter_config.json").write_text("{}")
            (place / adapter_io.WEIGHTS).write_bytes(b"theirs")
    before = contents(lab.adapters)
    assert lab.run(ONE_CELL) == 0
    assert place.is_symlink() == (kind == "link")
    after = contents(lab.adapters)
    assert {name: after[name] for name in before} == before
    assert f"{place} holds something else and stays" in capsys.readouterr().err
    (ours,) = lab.adapters.glob("tiny-r2-40-*")
    # Both names taken: refused, with the way out.
    weights = ours / adapter_io.WEIGHTS
    (ours / adapter_io.ABOUT).unlink()
    weights.write_bytes(b"changed")
    assert lab.run(ONE_CELL) == 4
    assert "move one of them away" in capsys.readouterr().err
    assert weights.read_bytes() == b"changed"


def test_empty_folder_at_the_adapter_path_is_used(lab: Lab) -> None:
    (lab.adapters / "tiny-r2-40").mkdir(parents=True)
    assert lab.run(ONE_CELL) == 0
    assert [path.name for path in lab.adapters.iterdir()] == ["tiny-r2-40"]


@pytest.mark.usefixtures("one_finished")
def test_adapter_without_run_id_is_matched_by_its_weights(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    # A folder that does not say its run is known by its weights.
    path = lab.adapters / "tiny-r2-40" / adapter_io.ABOUT
    about = json.loads(path.read_text())
    del about["run"], about["files"], about["seal"]
    path.write_text(json.dumps(about))
    before = contents(lab.adapters)
    capsys.readouterr()
    assert lab.run(ONE_CELL) == 0
    assert "r2-40  finished earlier" in capsys.readouterr().err
    assert contents(lab.adapters) == before


@pytest.mark.usefixtures("one_finished")
def test_report_answers_come_from_the_scored_adapter(
    lab: Lab, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lab.run(ONE_CELL, "training.learning_rate=5e-3") == 0
    words = ("--with-rows", lab.recipe, ONE_CELL, "--answers", "--adapters", lab.adapters)
    assert command("report", lab.results, *words) == 0
    (own,) = lab.adapters.glob("tiny-r2-40-*")
    assert f"answer of {own.name}" in (lab.results / "report-with-rows.html").read_text()
    (own / adapter_io.WEIGHTS).unlink()
    assert command("report", lab.results, *words) == 2
    assert "--answers: the adapter of r2-40-" in capsys.readouterr().err


def test_contexts_outside_the_prompt_are_not_shown(lab: Lab) -> None:
    rows = [
        {**row, "context": f"A note on {n}, {n * 7} and {n * 11}."}
        for n, row in enumerate(make_rows(120))
    ]
    write_jsonl(lab.rows, rows)
    without_context = (ONE_CELL, "data.include_context=false")
    assert command("experiment", lab.recipe, *without_context, "--with-rows", *lab.folders) == 0
    page = (lab.results / "report-with-rows.html").read_text()
    assert "A note on" not in page and "The context was not part of the text." in page
    with_context = (ONE_CELL, "data.include_context=true")
    assert command("experiment", lab.recipe, *with_context, "--with-rows", *lab.folders) == 0
    page = (lab.results / "report-with-rows.html").read_text()
    assert "A note on" in page and "The context was not part" not in page


@pytest.mark.usefixtures("one_finished")
def test_compare_and_report_describe_paths_that_are_no_run(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = lab.results / "runs"
    run = next(runs.glob("r2-40-*"))
    capsys.readouterr()
    (tmp_path / "empty").mkdir()
    for path, code, message in (
        (runs, 2, f"{runs}: all runs of an experiment, not one run; name one in {runs}: base-"),
        (lab.results.parent, 2, "the experiments tiny, not one run"),
        (lab.adapters / "tiny-r2-40", 2, "an adapter or a model, not a run"),
        (run / "run.json", 2, "a file; a run is a folder"),
        (tmp_path / "gone", 2, "no such folder"),
        (tmp_path / "empty", 4, "no run in it"),
    ):
        assert command("compare", path, run) == code
        assert message in (error := capsys.readouterr().err)
        assert "delete" not in error and "remove" not in error
    # An experiment of one setting stands for its runs.
    assert command("compare", f"{lab.results}:base", lab.results) == 0
    assert command("compare", f"{lab.results}:r3", run) == 2
    assert f"has no setting r3; name one: {lab.results}:r2-40, base" in capsys.readouterr().err
    assert command("report", run) == 2
    assert "one run, not an experiment" in capsys.readouterr().err
    # A run of the last table that is gone is not left out of the next silently.
    run.rename(tmp_path / "moved")
    assert command("report", lab.results) == 4
    assert f"without {run.name}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["run.json", "scores.parquet", "steps.jsonl"])
@pytest.mark.usefixtures("one_finished")
def test_broken_run_is_reported_and_left_unchanged(
    lab: Lab, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next((lab.results / "runs").glob("r2-40-*")) / name
    for text in ("{", None):
        if text is None:
            path.unlink()
        else:
            path.write_text(text)
        before = contents(lab.results / "runs")
        capsys.readouterr()
        assert lab.run(ONE_CELL) == 4
        error = capsys.readouterr().err
        assert path.parent.name in error and "delete" not in error
        assert "Traceback" not in error
        assert contents(lab.results / "runs") == before


@pytest.mark.usefixtures("grid_finished")
def test_best_adapter_is_the_one_with_the_lowest_loss_of_comparable_runs(
    lab: Lab, tmp_path: Path
) -> None:
    from slm_lora.cli.serving import best_adapter, last_experiment

    assert lab.run(ONE_CELL, "training.learning_rate=1e-5") == 0
    runs = [json.loads(path.read_text()) for path in lab.results.glob("runs/r*/run.json")]
    best = min(runs, key=lambda run: run["evaluation"]["all"]["loss"])
    adapters = last_experiment(lab.adapters)
    # In whatever order, and whatever the last table shows.
    for folders in (adapters, adapters[::-1]):
        assert best_adapter(folders, lab.results.parent) == best["adapter"]["folder"]
    assert best_adapter(adapters, tmp_path / "nowhere") is None
    assert best_adapter([lab.adapters / "gone"], lab.results.parent) is None
    # Losses of other rows cannot be compared.
    other_rows = ("name=other", "data.test_rows=10", ONE_CELL)
    assert lab.run(*other_rows) == 0
    assert best_adapter([*adapters, lab.adapters / "other-r2-40"], lab.results.parent) is None


@pytest.mark.usefixtures("grid_finished")
def test_model_card_has_losses_of_runs_outside_the_last_table(lab: Lab, tmp_path: Path) -> None:
    card = ("push", lab.adapters / "tiny-r2-40", "me/x", "--results", lab.results.parent)
    assert command(*card, "--dry-run", tmp_path / "before") == 0
    assert lab.run(ONE_CELL, "training.learning_rate=5e-3") == 0
    assert command(*card, "--dry-run", tmp_path / "after") == 0
    before, after = (
        [
            line.split("|")[2]
            for line in (tmp_path / name / "README.md").read_text().splitlines()
            if line.startswith(("| base |", "| this |"))
        ]
        for name in ("before", "after")
    )
    assert len(before) == 2 and before == after


@pytest.mark.usefixtures("one_finished")
def test_conditions_of_a_verdict_change_no_run(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(lab.results / "runs")
    assert lab.run(ONE_CELL, "ship.gain='> -9'", "ship.all='< 99'") == 0
    assert contents(lab.results / "runs") == before
    assert lab.metrics()["ship"] == {"gain": "> -9", "all": "< 99"}
    capsys.readouterr()
    assert command("verdict", lab.results) == 0
    out, _ = read_output(capsys)
    assert "gain > -9" in out and "meets 2 of 2 conditions (one seed)" in out
    assert lab.run(ONE_CELL) == 0
    assert "ship" not in lab.metrics()
