"""Data-parallel runs: same results as one process, one log, joint exit, no orphans."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from slm_lora.runtime import distributed
from slm_lora.training.checkpoint import generations

from ..support.lab import Lab, command
from ..support.processes import wait_until
from ..support.tensors import relative_error

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
slow = pytest.mark.slow
REPOSITORY = Path(__file__).parents[2]
SLM_LORA = (sys.executable, "-m", "slm_lora")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **more}


# --- shares ------------------------------------------------------------------------------------


@given(costs=st.lists(st.integers(1, 500), max_size=40), n_processes=st.integers(1, 6))
def test_partition_is_complete_and_balanced(costs: list[int], n_processes: int) -> None:
    items = list(enumerate(costs))
    shares = distributed.partition(items, lambda item: item[1], n_processes)
    assert len(shares) == n_processes
    assert sorted(item for share in shares for item in share) == items
    loads = [sum(cost for _, cost in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)


# --- the same numbers --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """Gradients and scores of 1, 2 and 4 processes."""
    out = tmp_path_factory.mktemp("ranks")
    words = [sys.executable, "-m", "tests.support.ranks", tiny_folder, out]
    subprocess.run(words, cwd=REPOSITORY, env=environment(), check=True, timeout=120)
    return out


@pytest.mark.parametrize(
    ("precision", "bound"), [("double", 1e-12), ("single", 1e-5), ("sharded", 1e-5)]
)
def test_gradients_and_scores_of_2_and_4_processes_equal_one_process(
    ranks: Path, precision: str, bound: float
) -> None:
    """With dropout, whose masks must not depend on the process of a row."""
    results = [load_file(ranks / f"{precision}-{n}.safetensors") for n in (1, 2, 4)]
    for result in results[1:]:
        for name, expected in results[0].items():
            distance = relative_error(result[name], expected)
            assert distance < (bound if name != "nll" else 1e-6), name
            assert expected.norm() > 0


def loss_and_adapter(lab: Lab) -> tuple[list[float], dict[str, torch.Tensor]]:
    steps = next(lab.results.rglob("steps.jsonl")).read_text().splitlines()
    adapters = load_file(next(lab.adapters.rglob("adapter_model.safetensors")))
    return [json.loads(line)["loss"] for line in steps], adapters


def train(lab: Lab, *options: object, cell: str = "r4-40") -> list[str]:
    words = (lab.recipe, *lab.folders, "--cell", cell, *options)
    return [*SLM_LORA, "train", *map(str, words)]


def train_here(lab: Lab, *options: object) -> int:
    """The same command in this process, which has its imports already."""
    return command(*train(lab, *options)[len(SLM_LORA) :])


def assert_same_results(expected: Lab, actual: Lab) -> None:
    losses, adapters = zip(loss_and_adapter(expected), loss_and_adapter(actual), strict=True)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, tensor in adapters[0].items():
        assert relative_error(adapters[1][name], tensor) < 1e-4


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Lab:
    """One process, never stopped."""
    lab = Lab(tmp_path_factory.mktemp("straight"), tiny_folder)
    assert train_here(lab) == 0
    return lab


def test_training_in_two_processes_equals_one_process(
    undisturbed: Lab, tmp_path: Path, tiny_folder: Path
) -> None:
    lab = Lab(tmp_path / "two", tiny_folder)
    completed = subprocess.run(
        train(lab, "--processes", 2), env=environment(), capture_output=True, text=True
    )
    assert completed.returncode == 0, completed.stderr
    assert completed.stderr.count("trained 10 steps") == 1, "logged by one process"
    assert_same_results(undisturbed, lab)
    run = json.loads(next(lab.results.rglob("run.json")).read_text())
    assert run["machine"]["processes"] == 2
    expected = json.loads(next(undisturbed.results.rglob("run.json")).read_text())
    assert run["evaluation"]["all"]["rows"] == 20
    assert run["evaluation"]["all"]["loss"] == pytest.approx(
        expected["evaluation"]["all"]["loss"], rel=1e-6
    )


@slow
def test_sharded_base_trains_to_the_same_adapter(
    undisturbed: Lab, tmp_path: Path, tiny_folder: Path
) -> None:
    lab = Lab(tmp_path / "sharded", tiny_folder)
    words = train(lab, "--processes", 2, "training.fsdp=true")
    done = subprocess.run(words, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_results(undisturbed, lab)


@slow
def test_training_under_torchrun_equals_one_process(
    undisturbed: Lab, tmp_path: Path, tiny_folder: Path
) -> None:
    lab = Lab(tmp_path / "torchrun", tiny_folder)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words = [*torchrun, "--nproc-per-node", "2", *train(lab)[1:]]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert_same_results(undisturbed, lab)


# --- stops, deaths and mistakes ----------------------------------------------------------------


LONG_STEPS = 150
LONG = (
    "training.num_train_epochs=30", "training.learning_rate=1e-4", "training.compile=false",
    "checkpoint_seconds=0",
)  # fmt: skip


def workers_of(starter: int) -> list[int]:
    """Ids of the two worker processes."""
    listing = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", f"{starter}"], capture_output=True, text=True, check=False
    )
    pids = [int(word) for word in listing.stdout.split()]
    assert len(pids) == 2
    return pids


def all_exited(pids: list[int]) -> bool:
    def is_gone(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    return all(is_gone(pid) for pid in pids)


@pytest.fixture
def running_training(
    tmp_path: Path, tiny_folder: Path
) -> Iterator[tuple[Lab, subprocess.Popen[str]]]:
    """A long training in two processes that has saved a checkpoint."""
    lab = Lab(tmp_path / "under-way", tiny_folder)
    started = subprocess.Popen(
        train(lab, "--processes", 2, *LONG), env=environment(), stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: newest_step(lab) >= 10)
    yield lab, started
    if started.poll() is None:
        pids = workers_of(started.pid)
        started.kill()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)


def newest_step(lab: Lab) -> int:
    folders = (lab.results / "checkpoints").glob("r4-40-*")
    saved = [path for folder in folders for path in generations(folder)]
    return int(saved[-1].name.removeprefix("step-")) if saved else 0


@pytest.fixture(scope="module")
def undisturbed_long(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Lab:
    """The result of `running_training` in one process."""
    lab = Lab(tmp_path_factory.mktemp("long-straight"), tiny_folder)
    assert train_here(lab, *LONG[:-1]) == 0
    return lab


@slow
@pytest.mark.parametrize("whom", ["starter", "a worker"])
def test_stopped_run_of_two_processes_resumes_in_one(
    running_training: tuple[Lab, subprocess.Popen[str]],
    whom: str,
    undisturbed_long: Lab,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lab, started = running_training
    pids = workers_of(started.pid)
    os.kill(started.pid if whom == "starter" else max(pids), signal.SIGTERM)
    assert started.wait(timeout=60) == 75
    wait_until(lambda: all_exited(pids))
    stopped = newest_step(lab)
    assert 10 <= stopped < LONG_STEPS
    assert train_here(lab, *LONG) == 0
    log = capsys.readouterr().err
    assert f"going on from step-{stopped:06d}" in log
    assert "processes 2 → 1" in log
    losses, wanted = loss_and_adapter(lab)[0], loss_and_adapter(undisturbed_long)[0]
    assert losses == pytest.approx(wanted, rel=1e-4)


@slow
def test_killed_worker_is_reported_as_the_cause(
    running_training: tuple[Lab, subprocess.Popen[str]],
) -> None:
    lab, started = running_training
    pids = workers_of(started.pid)
    os.kill(max(pids), signal.SIGKILL)
    assert started.wait(timeout=60) == 128 + signal.SIGKILL
    assert started.stderr is not None
    assert "process 2 of 2 was ended by SIGKILL" in started.stderr.read()
    wait_until(lambda: all_exited(pids))
    assert newest_step(lab) >= 10


@slow
def test_workers_stop_when_the_launcher_dies(
    running_training: tuple[Lab, subprocess.Popen[str]],
) -> None:
    lab, started = running_training
    pids = workers_of(started.pid)
    started.kill()
    wait_until(lambda: all_exited(pids))
    assert newest_step(lab) >= 10


SPOILT = """
import os
if os.environ.get("RANK", "") in os.environ["SPOILT"]:
    from slm_lora.errors import DataError
    from slm_lora.experiment import cell
    def fail(*_, **__):
        raise DataError("rows.jsonl:7: response is empty")
    cell.train = fail
"""


@slow
def test_error_of_a_worker_is_reported_once_with_its_exit_code(
    tmp_path: Path, tiny_folder: Path
) -> None:
    """The first waits for the second in vain; the reason is the second's, and so is the exit code.
    Where all have the same, the first tells it."""
    lab = Lab(tmp_path / "spoilt", tiny_folder)
    (tmp_path / "sitecustomize.py").write_text(SPOILT)
    last_lines = {
        "1": "process 2 of 2: rows.jsonl:7: response is empty",
        "0 1": "rows.jsonl:7: response is empty",
    }
    for spoilt, last in last_lines.items():
        done = subprocess.run(
            train(lab, "--processes", 2), capture_output=True, text=True, timeout=120,
            env=environment(PYTHONPATH=str(tmp_path), SPOILT=spoilt),
        )  # fmt: skip
        assert done.returncode == 3, done.stderr
        assert done.stderr.splitlines()[-1] == last
        assert done.stderr.count("response is empty") == 1
        assert "Traceback" not in done.stderr


@slow
def test_signal_to_all_processes_is_one_request(
    running_training: tuple[Lab, subprocess.Popen[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A scheduler signals launcher and workers, and the launcher forwards the signal."""
    lab, started = running_training
    for pid in (*workers_of(started.pid), started.pid):
        os.kill(pid, signal.SIGTERM)
    assert started.wait(timeout=60) == 75
    assert started.stderr is not None
    output = started.stderr.read()
    assert "a second signal stops at once" in output and "Traceback" not in output
    stopped = newest_step(lab)
    assert train_here(lab, *LONG) == 0
    log = capsys.readouterr().err
    assert f"going on from step-{stopped:06d}" in log
    assert "passed over" not in log


def test_more_processes_than_examples_per_step_are_refused(
    tmp_path: Path, tiny_folder: Path
) -> None:
    lab = Lab(tmp_path / "many", tiny_folder)
    words = train(lab, "--processes", 2, "training.effective_batch_size=1")
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "2 processes, but a step of r4-40 has 1 examples" in done.stderr
    none = subprocess.run(
        train(lab, "--processes", 0), env=environment(), capture_output=True, text=True
    )
    assert none.returncode == 2 and "--processes 0: must be 1 or more" in none.stderr


def test_processes_with_unequal_recipes_are_refused(tmp_path: Path, tiny_folder: Path) -> None:
    lab, store = Lab(tmp_path / "unequal", tiny_folder), tmp_path / "store"
    started = [
        subprocess.Popen(
            train(lab, f"training.learning_rate=1e-{2 + n}"),
            env=environment(RANK=f"{n}", WORLD_SIZE="2", **{distributed.STORE: f"{store}"}),
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    for process in started:
        _, output = process.communicate(timeout=120)
        assert process.returncode == 4
        assert "the processes were given different recipes, rows or bases" in output


def test_master_port_in_use_is_reported(tmp_path: Path, tiny_folder: Path) -> None:
    lab = Lab(tmp_path / "port", tiny_folder)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = subprocess.run(
            train(lab), capture_output=True, text=True, timeout=120,
            env=environment(
                RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                MASTER_PORT=f"{taken.getsockname()[1]}",
            ),
        )  # fmt: skip
    assert done.returncode == 6
    assert "process 1 of 2 cannot reach the others" in done.stderr
    assert "Traceback" not in done.stderr
