"""What goes wrong with tuning: one line, the right exit code, nothing lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from slm_lora.experiment.job import Job
from slm_lora.runtime import hardware
from slm_lora.runtime.checksums import SEAL, content_hash

from ..support.lab import Lab, command

TUNED = (
    "grid.cells=[{adapter.r: 2}]", "data.size=40", "keep_adapters=false",
    "training.num_train_epochs=1", "tuning.values=[1e-3, 1e-2]", "tuning.refine=0",
    "tuning.extend=0", "tuning.race=false", "data.validation_rows=20",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("finished"), tiny_folder)
    assert lab.run(*TUNED) == 0
    return lab


@pytest.fixture
def lab(finished: Lab, tmp_path: Path, tiny_folder: Path) -> Lab:
    """A copy of the finished experiment."""
    copy = Lab(tmp_path / "lab", tiny_folder)
    copy.recipe, copy.rows = finished.recipe, finished.rows
    shutil.copytree(finished.results, copy.results)
    return copy


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cells that are trained."""
    from slm_lora.experiment import runner

    names: list[str] = []
    train = runner.train_cell

    def note(job: Job, *arguments: Any) -> Any:
        names.append(job.name)
        return train(job, *arguments)

    monkeypatch.setattr(runner, "train_cell", note)
    return names


def last_error(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


# --- validation set ----------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [(), ("--plan",)])
def test_validation_set_too_small_to_choose_by(
    finished: Lab,
    tmp_path: Path,
    tiny_folder: Path,
    capsys: pytest.CaptureFixture[str],
    trained: list[str],
    plan: tuple[str, ...],
) -> None:
    other = Lab(tmp_path / "small", tiny_folder)
    assert other.run(*TUNED, "data.validation_rows=9", *plan) == 3
    line = last_error(capsys)
    assert "9 validation rows in 9 groups are too few to choose by" in line
    assert "at least 10 groups" in line and "197 rows" in line and "data.validation_rows" in line
    assert not trained


def test_small_validation_set_is_noted(finished: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert finished.run(*TUNED) == 0
    # 0.05 × 2.80 / √11 = 0.042
    note = "20 validation rows in 11 groups tell values apart that differ by about 0.04 nats"
    assert note in capsys.readouterr().err


# --- tuning.json -------------------------------------------------------------------------------


def unsealed(text: str) -> str:
    document = json.loads(text)
    del document[SEAL]
    return json.dumps(document)


def of_a_later_format(text: str) -> str:
    document = json.loads(text)
    del document[SEAL]
    document["format"] = 99
    return json.dumps({**document, SEAL: content_hash(document)})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[: len(text) // 2], "broken"),
        (lambda text: "[]", "not an object"),
        (unsealed, "has no seal"),
        (lambda text: text.replace("0.01", "0.02"), "does not match its seal"),
        (of_a_later_format, "of another version"),
    ],
)
def test_broken_choice(
    lab: Lab, capsys: pytest.CaptureFixture[str], trained: list[str], damage: Any, reason: str
) -> None:
    path = lab.results / "tuning.json"
    intact = path.read_text()
    path.write_text(damage(intact))
    broken = path.read_text()
    assert lab.run(*TUNED) == 4
    line = last_error(capsys)
    assert str(path) in line and reason in line
    assert "restore it, or remove it" in line
    assert path.read_text() == broken and not trained
    # The way out that it names.
    path.unlink()
    assert lab.run(*TUNED) == 0
    assert path.read_text() == intact and not trained


def test_deleted_tuning_run_is_refused_before_any_work(
    lab: Lab, capsys: pytest.CaptureFixture[str], trained: list[str]
) -> None:
    (run,) = lab.results.glob("tuning/runs/r2-lr0.001-*")
    scores = (run / "scores.parquet").read_bytes()
    shutil.rmtree(run)
    before = (lab.results / "tuning.json").read_text()
    assert lab.run(*TUNED, "seeds=[7]") == 4  # its final run is not trained
    line = last_error(capsys)
    assert f"without {run.name}, which tuning.json was chosen by" in line
    assert (lab.results / "tuning.json").read_text() == before and not trained
    # The way out that it names.
    (lab.results / "tuning.json").unlink()
    assert lab.run(*TUNED) == 0
    assert trained == ["r2-lr0.001-seed1000"]
    assert (run / "scores.parquet").read_bytes() == scores
    assert (lab.results / "tuning.json").read_text() == before


def test_changed_section_keeps_the_earlier_choice(
    lab: Lab, capsys: pytest.CaptureFixture[str], trained: list[str]
) -> None:
    path = lab.results / "tuning.json"
    before = path.read_text()
    final = {folder.name for folder in (lab.results / "runs").iterdir()}
    assert lab.run(*TUNED, "tuning.values=[1e-3, 1e-2, 2e-2]") == 0
    kept = lab.results / f"tuning-{json.loads(before)['search'][:8]}.json"
    assert kept.read_text() == before
    err = capsys.readouterr().err
    assert "the earlier choice (tuning.values: [[0.001, 0.01]] → [[0.001, 0.01, 0.02]]) " in err
    assert f"is kept as {kept}" in err
    assert json.loads(path.read_text())["search"] != json.loads(before)["search"]
    # The first two values were not run again, and no final run was lost.
    assert [name for name in trained if "seed1000" in name] == ["r2-lr0.02-seed1000"]
    assert final <= {folder.name for folder in (lab.results / "runs").iterdir()}
    # Back again: the earlier choice is there, and nothing is trained.
    later = path.read_text()
    trained.clear()
    assert lab.run(*TUNED) == 0
    assert path.read_text() == before and not trained
    assert (lab.results / f"tuning-{json.loads(later)['search'][:8]}.json").read_text() == later
    assert not kept.exists()


# --- machines ----------------------------------------------------------------------------------


def test_other_machine_is_noted(
    lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    describe = hardware.describe
    monkeypatch.setattr(
        hardware, "describe", lambda device: {**describe(device), "processor": "Abacus"}
    )
    assert lab.run(*TUNED) == 0
    err = capsys.readouterr().err
    assert f"values were chosen on {hardware.processor()}" in err
    assert "this machine is Abacus" in err


def test_other_precision_is_refused(
    lab: Lab, capsys: pytest.CaptureFixture[str], trained: list[str]
) -> None:
    before = (lab.results / "tuning.json").read_text()
    assert lab.run(*TUNED, "training.precision=bf16") == 2
    line = last_error(capsys)
    assert "chosen on cpu in fp32, and this experiment is on cpu in bf16" in line
    assert "add training.device=cpu training.precision=fp32, or move the file away" in line
    assert (lab.results / "tuning.json").read_text() == before and not trained
    assert lab.run(*TUNED, "training.device=cpu", "training.precision=fp32") == 0


# --- candidates --------------------------------------------------------------------------------


def test_value_that_diverges_in_every_seed_is_no_failure(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = Lab(tmp_path / "diverging", tiny_folder)
    both = ("tuning.seeds=[1000, 1001]", "training.max_grad_norm=1e9")
    assert lab.run(*TUNED, *both, "tuning.values=[1e-2, 1e38]") == 0
    (arm,) = json.loads((lab.results / "tuning.json").read_text())["arms"]
    stopped = {c["values"]["training.learning_rate"]: c["stopped"] for c in arm["candidates"]}
    assert stopped[0.01] == "" and "diverged" in stopped[1e38]
    assert len(list(lab.results.glob("tuning/stopped/r2-lr1e+38-seed100*"))) == 2
    capsys.readouterr()
    # Stopped runs are not run again, and there is no choice if no value trains.
    assert lab.run(*TUNED, *both, "tuning.values=[1e37, 1e38]") == 2
    line = last_error(capsys)
    assert "no value of training.learning_rate trains r2: diverged" in line
    assert "try smaller values (tuning.values)" in line


# --- reports -----------------------------------------------------------------------------------


def test_tuning_runs_have_no_report(finished: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("report", finished.results / "tuning") == 2
    line = last_error(capsys)
    assert "runs that chose values of an experiment, scored on the validation set" in line
    assert str(finished.results) in line
    assert not (finished.results / "tuning" / "report.md").exists()


# --- plans -------------------------------------------------------------------------------------


def plan(lab: Lab, capsys: pytest.CaptureFixture[str], *overrides: str) -> str:
    capsys.readouterr()
    assert lab.run(*TUNED, *overrides, "--plan") == 0
    return " ".join(capsys.readouterr().out.split())


def test_plan_counts_both_phases(
    finished: Lab, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = Lab(tmp_path / "planned", tiny_folder)
    search = ("tuning.extend=1", "tuning.refine=1", "tuning.race=true", "seeds=[0, 1]")
    two = ("grid.cells=[{adapter.r: 2}, {adapter.r: 4}]", "tuning.seeds=[1000, 1001]")
    output = plan(lab, capsys, *search, *two)
    # Two values, one beyond either, then at most two between; two seeds; two settings.
    assert "Tuning of training.learning_rate, on the validation set, 2 seeds a value:" in output
    assert "r2 0.001, 0.01 6 to 10" in output
    assert "12 to 20 tuning runs are left" in output
    assert "the race saves depends on the losses, and is not counted" in output
    assert all(name in output for name in ("r2-seed0", "r2-seed1", "r4-seed0", "r4-seed1"))
    assert not lab.results.exists()


def test_plan_after_the_choice_has_final_runs_alone(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    output = plan(lab, capsys)
    assert "Tuning of" not in output
    assert output.count("finished") == 2  # the base and the cell
    (lab.results / "tuning.json").unlink()
    shutil.rmtree(next(lab.results.glob("tuning/runs/r2-lr0.01-*")))
    output = plan(lab, capsys)
    assert "r2 0.001, 0.01 1 (1 finished)" in output
