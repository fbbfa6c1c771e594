"""Stops, kills, locks and full disks: files remain intact, and the run can be resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from slm_lora.errors import IntegrityError, StorageError
from slm_lora.evaluation import scoring
from slm_lora.experiment import cell, runner
from slm_lora.runtime import lock, storage
from slm_lora.runtime.lock import exclusive_lock
from slm_lora.runtime.signals import StopRequested, graceful_stop
from slm_lora.training import step
from slm_lora.training.checkpoint import generations

from ..support.lab import Lab

posix = pytest.mark.skipif(os.name == "nt", reason="signals and locks of POSIX")


# --- the signal --------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_requests_a_stop_and_second_stops_at_once(which: signal.Signals) -> None:
    before = signal.getsignal(which)

    def signalled(times: int) -> None:
        with graceful_stop() as stop:
            for _ in range(times):
                assert not stop.requested or times > 1
                signal.raise_signal(which)
                assert stop.requested

    with pytest.raises(StopRequested):
        signalled(1)
    with pytest.raises(KeyboardInterrupt) as caught:
        signalled(2)
    assert not isinstance(caught.value, StopRequested)
    assert signal.getsignal(which) is before


@posix
def test_unchecked_stop_request_takes_effect_at_the_end() -> None:
    with pytest.raises(StopRequested), graceful_stop():
        signal.raise_signal(signal.SIGINT)
    with graceful_stop() as stop:
        stop.check()


@posix
def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with graceful_stop() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_graceful_stop_works_outside_the_main_thread() -> None:
    requested: list[bool] = []

    def work() -> None:
        with graceful_stop() as stop:
            requested.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert requested == [False]


# --- the lock ----------------------------------------------------------------------------------

HOLD_LOCK = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from slm_lora.runtime.lock import exclusive_lock\n"
    "with exclusive_lock(Path(sys.argv[1])):\n"
    "    print('held', flush=True)\n"
    "    time.sleep(60)\n"
)


@posix
def test_lock_is_released_when_its_process_dies(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, tmp_path], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    with (
        pytest.raises(IntegrityError, match="another process is working on this"),
        exclusive_lock(tmp_path),
    ):
        pass
    holder.kill()
    holder.wait()
    with exclusive_lock(tmp_path):
        assert (tmp_path / lock.LOCK_FILE).exists()
    assert not list(tmp_path.iterdir())


# --- folders whose writer was killed -----------------------------------------------------------


def write(target: Path, text: str) -> None:
    with storage.atomic_folder(target) as folder:
        (folder / "a").write_text(text)


DIE_AT_RENAME = (
    "import os, signal, sys\n"
    "from pathlib import Path\n"
    "from slm_lora.runtime import storage\n"
    "target, renames = Path(sys.argv[1]), int(sys.argv[2])\n"
    "replace, done = Path.replace, []\n"
    "def rename(path, to):\n"
    "    if len(done) == renames: os.kill(os.getpid(), signal.SIGKILL)\n"
    "    done.append(path)\n"
    "    return replace(path, to)\n"
    "Path.replace = rename\n"
    "if renames == 2: storage.shutil.rmtree = lambda *_, **__: rename(0, 0)\n"
    "with storage.atomic_folder(target) as folder:\n"
    "    (folder / 'a').write_text('new')\n"
)


@posix
@pytest.mark.parametrize(("renames", "left"), [(0, "old"), (1, "new"), (2, "new")])
def test_folder_is_whole_after_a_kill_while_it_is_replaced(
    tmp_path: Path, renames: int, left: str
) -> None:
    """Before the first rename, between the two, and before the old folder is removed."""
    target = tmp_path / "run"
    write(target, "old")
    died = subprocess.run([sys.executable, "-c", DIE_AT_RENAME, target, str(renames)], check=False)
    assert died.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".run.*"))) == 1
    assert target.exists() == (renames != 1)
    storage.recover_all(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (target / "a").read_text() == left


def test_concurrent_writers_leave_the_folder_of_the_last(tmp_path: Path) -> None:
    with storage.atomic_folder(tmp_path / "model") as slower:
        (slower / "a").write_text("slower")
        write(tmp_path / "model", "faster")
        assert (slower / "a").read_text() == "slower"
    assert (tmp_path / "model" / "a").read_text() == "slower"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_recover_removes_only_its_own_temporary_files(tmp_path: Path) -> None:
    for name in (".run.abcdefgh", ".run.short", ".run.2.abcdefgh", ".git", ".other.abcdefgh"):
        (tmp_path / name).mkdir()
    storage.recover(tmp_path / "run")
    assert not (tmp_path / ".run.abcdefgh").exists()
    assert len(list(tmp_path.iterdir())) == 4


# --- the disk ----------------------------------------------------------------------------------


def test_too_little_space_is_reported_before_training(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(cell, "train", None)
    assert Lab(tmp_path, tiny_folder).run("grid.cells=[{data.size: 40}]") == 6
    assert "MB free; make room" in capsys.readouterr().err


def test_full_disk_is_reported_in_one_line(tmp_path: Path) -> None:
    full = "No space left on device"
    for error in (OSError(28, full), SafetensorError(f"I/O error: {full} (os error 28)")):
        with (
            pytest.raises(StorageError, match=f"cannot write .*run: .*{full}"),
            storage.atomic_folder(tmp_path / "run"),
        ):
            raise error
    assert not list(tmp_path.iterdir())


# --- whole experiments -------------------------------------------------------------------------

ONE_CELL = "grid.cells=[{data.size: 40, adapter.r: 2}]"


def trained_results(lab: Lab) -> tuple[bytes, object, list[float]]:
    run = next((lab.results / "runs").glob("r2-40-*"))
    record = json.loads((run / "run.json").read_text())
    steps = [json.loads(line)["loss"] for line in (run / "steps.jsonl").read_text().splitlines()]
    weights = next(lab.adapters.rglob("adapter_model.safetensors")).read_bytes()
    return weights, record["evaluation"]["all"]["loss"], steps


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path
) -> tuple[bytes, object, list[float]]:
    lab = Lab(tmp_path_factory.mktemp("straight"), tiny_folder)
    assert lab.run(ONE_CELL) == 0
    return trained_results(lab)


@posix
@pytest.mark.parametrize("moment", ["in a step", "in scoring"])
def test_stopped_and_resumed_experiment_has_the_same_bits(
    tmp_path: Path, tiny_folder: Path, moment: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    lab, uninterrupted = (Lab(tmp_path / name, tiny_folder) for name in ("made", "whole"))
    # Small micro-batches, so that a step and a scoring have many.
    small = ("training.micro_batch_tokens=60", "evaluation.micro_batch_tokens=200", ONE_CELL)
    calls = {"in a step": 0, "in scoring": 0}

    def counted(key: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            trained = bool(list(lab.results.glob("checkpoints/*/step-000010")))
            calls[key] += key == "in a step" or trained
            if key == moment and calls[key] == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return function(*arguments)

        return call

    monkeypatch.setattr(step, "batch_nll", counted("in a step", step.batch_nll))
    monkeypatch.setattr(scoring, "score_documents", counted("in scoring", scoring.score_documents))
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    assert lab.run(*small) == 75
    signal.signal(signal.SIGTERM, before)
    assert "the same command continues" in capsys.readouterr().err
    assert not list(lab.results.glob("runs/r2-40-*"))
    (folder,) = (lab.results / "checkpoints").iterdir()
    (left,) = generations(folder)
    assert left.name == ("step-000001" if moment == "in a step" else "step-000010")
    if moment == "in scoring":
        assert calls["in scoring"] == 3
    done = calls["in a step"]
    assert lab.run(*small) == 0
    if moment == "in scoring":
        assert calls["in a step"] == done, "trained again"
    assert uninterrupted.run(*small) == 0
    assert trained_results(lab) == trained_results(uninterrupted)


@posix
def test_changed_recipe_beside_an_unfinished_training_is_refused(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    lab = Lab(tmp_path, tiny_folder)

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner.adapter_io, "save", stopped)
        assert lab.run(ONE_CELL) == 75
    capsys.readouterr()
    assert lab.run(ONE_CELL, "training.learning_rate=2e-2") == 4
    output = capsys.readouterr().err
    assert "training.learning_rate: 0.01 → 0.02: go back" in output and "(step 10)" in output
    lines = lab.rows.read_text().splitlines()
    fewer_rows = lab.rows.with_name("rows2.jsonl")
    fewer_rows.write_text("\n".join(lines[:110]))
    assert lab.run(ONE_CELL, f"data.name={fewer_rows}") == 4
    output = capsys.readouterr().err
    assert "data.name: rows.jsonl → rows2.jsonl; " in output
    assert "training rows: " in output and "learning_rate" not in output
    monkeypatch.setattr(cell, "train", None)
    with pytest.raises(TypeError):  # the changed recipe is trained from the beginning
        lab.run(ONE_CELL, "training.learning_rate=2e-2", "--discard-checkpoints")
    assert not (lab.results / "checkpoints").exists() or not list(
        (lab.results / "checkpoints").iterdir()
    )


@posix
def test_killed_experiment_resumes_with_the_same_bits(
    tmp_path: Path, tiny_folder: Path, undisturbed: tuple[bytes, object, list[float]]
) -> None:
    lab = Lab(tmp_path, tiny_folder)
    words = [
        sys.executable, "-c", "import torch; torch.set_num_threads(1)\n"
        "from slm_lora.cli import main; main()", "experiment", str(lab.recipe), ONE_CELL,
        "checkpoint_seconds=0", "--results", str(lab.results.parent),
        "--adapters", str(lab.adapters),
    ]  # fmt: skip
    killed = subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list(lab.results.glob("checkpoints/*/step-*")) and time.monotonic() < until:
        time.sleep(0.005)
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    assert not list(lab.results.glob("runs/r2-40*"))
    assert lab.run(ONE_CELL) == 0
    assert trained_results(lab) == undisturbed
    assert not list(lab.results.rglob(".*")) and not list(lab.adapters.rglob(".*"))
