"""Cells run by engines on other machines: the same results, and nothing lost with a node or the
driver. Ray is a real cluster of several nodes on this machine, Slurm is submitit's local jobs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from ..support.lab import Lab, command
from ..support.processes import wait_until

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
slow = pytest.mark.slow
LONG = (
    "training.num_train_epochs=60", "training.compile=false", "checkpoint_seconds=0.2",
    "grid.cells=[{data.size: 40, adapter.r: 2}, {data.size: 40, adapter.r: 4}]",
)  # fmt: skip
"""So that there is a middle of a training to kill something in."""
SLURM = ("--executor", "slurm", "--executor-option", "cluster=local")


def arguments(lab: Lab, *options: object) -> list[str]:
    experiment = (lab.recipe, *lab.folders, *options)
    return [sys.executable, "-m", "slm_lora", "experiment", *map(str, experiment)]


def start(lab: Lab, *options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments(lab, *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_exit(process: subprocess.Popen[str], code: int) -> str:
    try:
        output, _ = process.communicate(timeout=240)
    except BaseException:
        process.kill()
        raise
    assert process.returncode == code, output
    return output


def run_results(lab: Lab) -> dict[str, Any]:
    """Hash, scores and losses of every run."""
    return {
        folder.name: (
            json.loads((folder / "run.json").read_text())["hash"],
            (folder / "scores.parquet").read_bytes(),
            [json.loads(line)["loss"] for line in steps.read_text().splitlines()]
            if (steps := folder / "steps.jsonl").exists()
            else None,
        )
        for folder in (lab.results / "runs").iterdir()
    }


def checkpoints(lab: Lab) -> list[Path]:
    return list(lab.results.glob("checkpoints/*/step-*"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Lab:
    """By this process, which has its imports already."""
    lab = Lab(tmp_path_factory.mktemp("straight"), tiny_folder)
    assert lab.run(*LONG) == 0
    return lab


def copy_of(undisturbed: Lab, folder: Path, tiny_folder: Path) -> Lab:
    """Another place for the results of the same rows and model."""
    lab = Lab(folder, tiny_folder)
    lab.recipe, lab.rows = undisturbed.recipe, undisturbed.rows
    return lab


# --- Slurm -------------------------------------------------------------------------------------


@slow
def test_slurm_jobs_equal_one_process_and_outlive_the_driver(
    undisturbed: Lab, tmp_path: Path, tiny_folder: Path
) -> None:
    pytest.importorskip("submitit")
    lab = copy_of(undisturbed, tmp_path / "slurm", tiny_folder)
    driver = start(lab, *LONG, *SLURM)
    wait_until(lambda: checkpoints(lab))
    driver.kill()
    driver.wait()
    # Those that are still at work are waited for, not run twice. (The next driver is this
    # process: it begins before they end.)
    assert lab.run(*LONG, *SLURM) == 0
    assert run_results(lab) == run_results(undisturbed)
    assert not list((lab.results / "checkpoints").iterdir())


@slow
def test_stop_reaches_slurm_jobs_and_the_same_command_resumes(
    undisturbed: Lab, tmp_path: Path, tiny_folder: Path
) -> None:
    pytest.importorskip("submitit")
    lab = copy_of(undisturbed, tmp_path / "stopped", tiny_folder)
    driver = start(lab, *LONG, *SLURM)
    wait_until(lambda: checkpoints(lab))
    driver.send_signal(signal.SIGINT)
    assert "stopped; the same command continues" in wait_for_exit(driver, 75)
    assert checkpoints(lab)
    assert lab.run(*LONG) == 0  # by this process alone: an engine is no part of a run
    assert run_results(lab) == run_results(undisturbed)


@slow
def test_failed_slurm_cell_is_reported_and_others_run(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("submitit")
    lab = Lab(tmp_path / "failing", tiny_folder)
    cells = "[{data.size: 40, training.learning_rate: 1e38}, {data.size: 40, adapter.r: 4}]"
    assert lab.run(f"grid.cells={cells}", *SLURM) == 5
    log = capsys.readouterr().err
    assert log.splitlines()[-1].startswith("40-lr1e+38: step 1 of 10")
    assert sorted(name[:-9] for name in run_results(lab)) == ["base", "r4-40"], log


# --- Ray ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    """A Ray cluster on this machine: two nodes with a core each, and a head without."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    try:
        yield cluster, nodes
    finally:
        cluster.shutdown()


def at_work_on(checkpoint: str, nodes: list[Any]) -> Any:
    """The node whose worker trains the cell with this folder of checkpoints."""
    cell = checkpoint.rpartition("-")[0]
    command_line = ("-m", "slm_lora", "train")
    (process,) = (
        process
        for process in psutil.process_iter(["cmdline"])
        if (words := process.info["cmdline"] or [])[1:4] == [*command_line] and cell in words
    )
    above = {parent.pid for parent in process.parents()}
    (node,) = (n for n in nodes if n.all_processes["raylet"][0].process.pid in above)
    return node


@slow
def test_ray_cluster_without_the_resources_of_a_cell_is_refused(
    tmp_path: Path, tiny_folder: Path, two_nodes: Any
) -> None:
    cluster, _ = two_nodes
    lab = Lab(tmp_path / "none", tiny_folder)
    ray = ("--executor", "ray", "--address", cluster.address)
    output = wait_for_exit(start(lab, *ray, "--executor-option", "num_gpus=1"), 6)
    assert "no node with a CPU and 1 GPUs" in output
    output = wait_for_exit(start(lab, *ray, "--executor-option", "colour=red"), 2)
    assert "--executor-option" in output and "colour" in output


@slow
def test_lost_ray_node_loses_no_results(
    undisturbed: Lab, tmp_path: Path, tiny_folder: Path, two_nodes: Any
) -> None:
    cluster, nodes = two_nodes
    lab = copy_of(undisturbed, tmp_path / "ray", tiny_folder)
    driver = start(lab, *LONG, "--executor", "ray", "--address", cluster.address)
    wait_until(lambda: checkpoints(lab))
    cluster.remove_node(at_work_on(checkpoints(lab)[0].parent.name, nodes), allow_graceful=False)
    output = wait_for_exit(driver, 0)
    assert "again from its last checkpoint" in output
    assert run_results(lab) == run_results(undisturbed)


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        (("--address", "auto"), 2, "add --executor ray"),
        (("--executor-option", "num_gpus=1"), 2, "needs --executor ray or slurm"),
        (("--executor", "slurm", "--executor-option", "cluster"), 2, "must be KEY=VALUE"),
        (("--executor", "ray", "--address", "here:there"), 2, "must be HOST:PORT"),
        (("--executor", "ray", "training.device=cuda"), 2, "name bf16, fp16 or fp32"),
    ],
)
def test_conflicting_launcher_options_are_refused(
    lab: Lab, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], code: int, part: str
) -> None:
    lab.recipe.write_text(lab.recipe.read_text().replace("precision: fp32", "precision: auto"))
    if "here:there" in options:
        pytest.importorskip("ray")
    assert lab.run(*options) == code
    assert part in capsys.readouterr().err
    assert not (lab.results / "runs").exists()


def test_unreachable_ray_cluster_is_reported(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    assert lab.run("--executor", "ray", "--address", address) == 6
    assert f"--address {address}: no Ray cluster answers" in capsys.readouterr().err


@pytest.mark.parametrize(("engine", "library"), [("ray", "ray"), ("slurm", "submitit")])
def test_missing_launcher_library_names_its_extra(
    lab: Lab,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    engine: str,
    library: str,
) -> None:
    monkeypatch.setitem(sys.modules, library, None)  # its import fails
    assert lab.run("--executor", engine) == 2
    assert f"pip install '.[{engine}]'" in capsys.readouterr().err


def test_machine_without_slurm_is_refused(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit")
    assert lab.run("--executor", "slurm") == 2
    assert "--executor slurm:" in capsys.readouterr().err


# --- by hand -----------------------------------------------------------------------------------


def test_train_command_runs_the_base_alone(lab: Lab) -> None:
    assert command("train", lab.recipe, "--cell", "base", *lab.folders) == 0
    (base,) = run_results(lab)
    assert base.startswith("base-")


def test_train_waits_for_a_cell_locked_by_another_process(lab: Lab) -> None:
    holder = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from slm_lora.runtime.lock import wait_for_lock\n"
        "with wait_for_lock(Path(sys.argv[1]), lambda: None):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    lock = lab.results / "checkpoints" / ".r4-40.lock"
    with subprocess.Popen(
        [sys.executable, "-c", holder, lock],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as lock_holder:
        assert lock_holder.stdout is not None and lock_holder.stdout.readline() == "held\n"
        line = arguments(lab, "--cell", "r4-40")
        line[3] = "train"
        with subprocess.Popen(line, stderr=subprocess.PIPE, text=True) as waiting:
            assert waiting.stderr is not None
            output = next(line for line in waiting.stderr if "waiting for that one" in line)
            assert "r4-40" in output
            time.sleep(1.5)
            assert not has_any_run(lab)
            lock_holder.communicate()  # lets go
            waiting.communicate()
        assert waiting.returncode == 0
    assert has_any_run(lab)


def has_any_run(lab: Lab) -> bool:
    return any(lab.results.glob("runs/r4-40-*"))
