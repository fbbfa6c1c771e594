"""The tuning phase by workers: the same choice and the same runs as in a single process."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slm_lora.cli import experiment_run
from slm_lora.errors import StorageError
from slm_lora.experiment import candidates
from slm_lora.experiment.job import Job
from slm_lora.launch.command import LOST, Command, CommandResult

from ..support.lab import Lab, command

TUNED = (
    "grid.cells=[]", "grid.axes=[{adapter.r: [2, 4]}]", "data.size=40", "seeds=[1]",
    "data.validation_rows=20", "training.num_train_epochs=1",
)  # fmt: skip


def tuned(*changes: str) -> tuple[str, ...]:
    """Overrides of the lab's recipe, in which the rate of two ranks is tuned."""
    tuning = ("values=[1e-3, 1e-2]", "seeds=[1000, 1001]", "refine=1", "extend=1")
    return (*TUNED, *(f"tuning.{setting}" for setting in (*tuning, *changes)))


class Workers:
    """An engine that runs commands in this process, those submitted last first."""

    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.ran: list[tuple[str, ...]] = []
        self.lose_first = False

    def submit(self, command: Command) -> None:
        self.commands.append(command)

    def wait(self, seconds: float) -> list[CommandResult]:
        todo = self.commands.pop()
        if self.lose_first:
            self.lose_first = False
            return [CommandResult(todo.name, LOST)]
        self.ran.append(todo.args)
        code = command(*todo.args)
        return [CommandResult(todo.name, code, "" if code == 0 else f"exit code {code}")]

    def stop(self) -> None:
        self.commands.clear()

    def close(self) -> None:
        pass


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    """In place of a cluster."""
    started = Workers()

    @contextlib.contextmanager
    def engine(*_: Any) -> Iterator[Workers]:
        yield started

    monkeypatch.setattr(experiment_run, "engine", engine)
    return started


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("here"), tiny_folder)
    assert lab.run(*tuned()) == 0
    return lab


def beside(undisturbed: Lab, folder: Path, tiny_folder: Path) -> Lab:
    """Another place for the results of the same rows and model."""
    lab = Lab(folder, tiny_folder)
    lab.recipe, lab.rows = undisturbed.recipe, undisturbed.rows
    return lab


def choice(lab: Lab) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((lab.results / "tuning.json").read_text())
    return found


def scores(lab: Lab) -> dict[str, bytes]:
    """Scores of every run of both phases."""
    return {
        file.relative_to(lab.results).as_posix(): file.read_bytes()
        for file in lab.results.glob("**/runs/*/scores.parquet")
    }


def test_workers_make_the_same_choice(
    undisturbed: Lab, tmp_path: Path, tiny_folder: Path, workers: Workers
) -> None:
    lab = beside(undisturbed, tmp_path / "workers", tiny_folder)
    workers.lose_first = True
    assert lab.run(*tuned(), "--executor", "slurm") == 0
    assert choice(lab) == choice(undisturbed)
    assert scores(lab) == scores(undisturbed)
    # Base on validation, the candidates, base on test, and the final runs.
    candidates = [words for words in workers.ran if "--at" in words]
    assert len(workers.ran) == len(candidates) + 2 + 2
    assert sum("--validation" in words for words in workers.ran) == 1
    assert len(candidates) == len(list((lab.results / "tuning" / "runs").glob("r*")))
    assert not list(lab.results.glob("**/checkpoints/*.log"))
    # Again: everything is finished.
    workers.ran.clear()
    assert lab.run(*tuned(), "--executor", "slurm") == 0
    assert not workers.ran


def test_race_of_workers_is_that_of_one_process(
    tmp_path: Path, tiny_folder: Path, workers: Workers
) -> None:
    """A candidate that diverges, and one that is stopped: outcomes, recorded alike."""
    race = tuned("values=[1e-4, 1e-2, 1e38]", "refine=0", "extend=0")
    race = (*race, "training.max_grad_norm=1e9", "training.num_train_epochs=2", "data.size=80")
    here = Lab(tmp_path / "here", tiny_folder)
    assert here.run(*race) == 0
    there = beside(here, tmp_path / "there", tiny_folder)
    assert there.run(*race, "--executor", "slurm") == 0
    assert choice(there) == choice(here)
    stopped = [
        {path.name: path.read_bytes() for path in lab.results.glob("tuning/stopped/*/stopped.json")}
        for lab in (here, there)
    ]
    assert stopped[0] == stopped[1] != {}
    assert not list(there.results.glob("**/checkpoints/*.log"))


def test_worker_that_fails_is_reported_and_others_run(
    undisturbed: Lab,
    tmp_path: Path,
    tiny_folder: Path,
    workers: Workers,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lab = beside(undisturbed, tmp_path / "failing", tiny_folder)
    trained = candidates.run_cell

    def run_cell(job: Job, *arguments: Any) -> None:
        if job.config.adapter.r == 4:
            raise StorageError(f"{lab.results}: no room")
        trained(job, *arguments)

    monkeypatch.setattr(candidates, "run_cell", run_cell)
    assert lab.run(*tuned(), "--executor", "slurm") == 6
    errors = capsys.readouterr().err
    assert "r4-lr0.01-seed1000  failed: " in errors
    finished = {folder.name for folder in lab.results.glob("tuning/runs/r*")}
    assert {name.rsplit("-", 1)[0] for name in finished} == {
        "r2-lr0.01-seed1000", "r2-lr0.01-seed1001",
    }  # fmt: skip
    assert not (lab.results / "tuning.json").exists()
    # The same command goes on.
    monkeypatch.setattr(candidates, "run_cell", trained)
    assert lab.run(*tuned(), "--executor", "slurm") == 0
    assert choice(lab) == choice(undisturbed)


def train(lab: Lab, *words: object) -> int:
    where = ("--results", lab.results.parent, "--adapters", lab.adapters)
    return command("train", lab.recipe, *tuned(), *words, *where)


def test_by_hand(
    undisturbed: Lab, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = beside(undisturbed, tmp_path / "by-hand", tiny_folder)
    # A final cell has no values yet.
    assert train(lab, "--cell", "r2-seed1") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "training.learning_rate" in last and f"run slm-lora experiment {lab.recipe}" in last
    assert train(lab, "--cell", "base", "--validation") == 0
    at = ("--cell", "r2-seed1000", "--at", "training.learning_rate=0.01")
    assert train(lab, *at) == 0
    (folder,) = lab.results.glob("tuning/runs/r2-lr0.01-seed1000-*")
    assert str(folder) in capsys.readouterr().out
    expected = undisturbed.results / "tuning" / "runs" / folder.name / "scores.parquet"
    assert (folder / "scores.parquet").read_bytes() == expected.read_bytes()
    # With the choice, a final cell is the experiment's own.
    shutil.copy(undisturbed.results / "tuning.json", lab.results)
    assert train(lab, "--cell", "r2-seed1") == 0
    (run,) = lab.results.glob("runs/r2-seed1-*")
    expected = undisturbed.results / "runs" / run.name / "scores.parquet"
    assert (run / "scores.parquet").read_bytes() == expected.read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--cell", "r2-seed1", "--at", "training.learning_rate=0.01"), "no tuning cell; they are "
         "r2-seed1000, r2-seed1001, r4-seed1000, r4-seed1001"),
        (("--cell", "r2-seed1000"), "--cell r2-seed1000: not in the recipe"),
        (("--cell", "r2-seed1000", "--at", "adapter.r=4"), "each of training.learning_rate"),
        (("--cell", "r2-seed1000", "--at", "training.learning_rate=fast"), "must be KEY=NUMBER"),
        (("--cell", "r2-seed1000", "--at", "training.learning_rate=nan"), "must be KEY=NUMBER"),
        (("--cell", "r2-seed1000", "--at", "training.learning_rate=-1"), "beyond the limits"),
        (("--at", "training.learning_rate=1"), "--at: needs --cell"),
        (("--cell", "base", "--at", "training.learning_rate=1"), "--at: needs --cell"),
        (("--cell", "r2-seed1", "--validation"), "--validation: only with --cell base"),
    ],
)  # fmt: skip
def test_conflicting_options(
    undisturbed: Lab, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert train(undisturbed, *words) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_recipe_without_tuning_has_no_tuning_runs(
    undisturbed: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ("--cell", "r2-40", "--at", "training.learning_rate=1e-3")
    assert command("train", undisturbed.recipe, *at) == 2
    assert command("train", undisturbed.recipe, "--cell", "base", "--validation") == 2
    assert capsys.readouterr().err.count("the recipe has no tuning section") == 2


@pytest.mark.slow
@pytest.mark.timeout(900)  # some twenty processes, each importing torch
def test_slurm_jobs_make_the_same_choice(
    undisturbed: Lab, tmp_path: Path, tiny_folder: Path
) -> None:
    pytest.importorskip("submitit")
    lab = beside(undisturbed, tmp_path / "slurm", tiny_folder)
    slurm = ("--executor", "slurm", "--executor-option", "cluster=local")
    assert lab.run(*tuned(), *slurm) == 0
    for arm, other in zip(choice(lab)["arms"], choice(undisturbed)["arms"], strict=True):
        assert arm == other
    assert scores(lab) == scores(undisturbed)
    assert not list((lab.results / "tuning" / "checkpoints").glob("*.log"))
