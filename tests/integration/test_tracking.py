"""Trackers get every step, and a failing one does not stop a run."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
from pathlib import Path

import pytest

from slm_lora.experiment import tracking
from slm_lora.experiment.tracking import Tracked, open_trackers
from slm_lora.records import Step

from ..support.lab import Lab, command


def needs(name: str) -> pytest.MarkDecorator:
    installed = importlib.util.find_spec(name) is not None
    return pytest.mark.skipif(not installed, reason=f"{name} is not installed (make test-all)")


def train(lab: Lab, names: str) -> int:
    return command("train", lab.recipe, *lab.folders, "--cell", "r2-40", f"report_to=[{names}]")


def steps(lab: Lab) -> list[float]:
    lines = next(lab.results.rglob("steps.jsonl")).read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@needs("tensorboard")
def test_tensorboard_gets_every_step_and_the_test_loss(lab: Lab) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train(lab, "tensorboard") == 0
    folder = next((lab.results / "tensorboard").iterdir())
    assert folder.name == next((lab.results / "runs").iterdir()).name
    events = EventAccumulator(str(folder))
    events.Reload()
    logged = events.Scalars("train/loss")
    assert [event.step for event in logged] == list(range(1, 11))
    assert [event.value for event in logged] == pytest.approx(steps(lab), rel=1e-6)
    assert events.Scalars("test/loss")[0].step == 10


@needs("wandb")
def test_wandb_offline_run_gets_the_training_loss(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert train(lab, "wandb") == 0
    written = list((lab.results / "wandb").glob("offline-run-*/*.wandb"))
    assert len(written) == 1
    assert b"train/loss" in written[0].read_bytes()
    assert len(steps(lab)) == 10


@needs("trackio")
def test_trackio_gets_every_step(lab: Lab, tmp_path: Path) -> None:
    """In a process of its own: it asks the environment where to write when it is imported."""
    import os
    import subprocess
    import sys

    store = tmp_path / "trackio"
    words = ["train", lab.recipe, *lab.folders, "--cell", "r2-40", "report_to=[trackio]"]
    environment = {**os.environ, "TRACKIO_DIR": str(store), "HF_HUB_OFFLINE": "1"}
    completed = subprocess.run(
        [sys.executable, "-m", "slm_lora", *map(str, words)],
        env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    assert "is left out" not in completed.stderr
    database = sqlite3.connect(next(store.glob("*.db")))
    logged = [json.loads(row[0]) for row in database.execute("select metrics from metrics")]
    losses = [entry["train/loss"] for entry in logged if "train/loss" in entry]
    assert losses == pytest.approx(steps(lab), rel=1e-6)


def test_missing_tracker_is_refused_before_any_work(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    assert train(lab, "wandb") == 2
    error = capsys.readouterr().err
    assert "report_to: wandb is not installed; pip install '.[trackers]' in a checkout" in error
    assert not lab.results.exists()


STEP = Step(
    step=1, total_steps=2, epoch=0.5, loss=3.0, learning_rate=1e-3, grad_norm=1.0,
    skipped=False, examples=8, tokens=100, label_tokens=90, seconds=1.0,
)  # fmt: skip


@pytest.mark.parametrize("failing", ["begin", "log", "finish"])
def test_failing_tracker_is_noted_once_and_others_continue(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failing: str
) -> None:
    calls: list[str] = []

    class Good:
        def __init__(self, run: Tracked) -> None:
            calls.append("begin")

        def log(self, numbers: tracking.Numbers, step: int) -> None:
            calls.append("log")

        def finish(self) -> None:
            calls.append("finish")

    class Bad:
        def __init__(self, run: Tracked) -> None:
            self.fail("begin")

        def fail(self, call: str) -> None:
            if call == failing:
                raise OSError("the server\nis gone")

        def log(self, numbers: tracking.Numbers, step: int) -> None:
            self.fail("log")

        def finish(self) -> None:
            self.fail("finish")

    monkeypatch.setattr(tracking, "_KINDS", {"wandb": Bad, "trackio": Good})
    notes: list[str] = []
    run = Tracked("tiny", "r2", {}, tmp_path)
    with open_trackers(("wandb", "trackio"), run, notes.append) as trackers:
        trackers.step(STEP)
        trackers.step(STEP)
        trackers.scored(2.0, 7.4, 2)
    assert calls == ["begin", "log", "log", "log", "finish"]
    assert notes == ["  note: wandb failed and is left out (the server)"]
