"""Options that select where the cells of an experiment run: here, on Ray or on Slurm."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slm_lora.errors import UsageError
from slm_lora.runtime import distributed

if TYPE_CHECKING:
    from slm_lora.experiment.paths import ExperimentPaths
    from slm_lora.launch.command import Engine


class Executor(StrEnum):
    """Where cells run."""

    local = "local"
    ray = "ray"
    slurm = "slurm"


ExecutorName = Annotated[
    Executor,
    typer.Option(
        "--executor",
        help="Where cells run: in this process one after the other, on a Ray cluster, or as Slurm "
        "jobs. All machines need the same file system.",
    ),
]
Address = Annotated[
    str,
    typer.Option(
        "--address", help="Ray cluster: HOST:PORT or auto. Default: start one on this machine."
    ),
]
ExecutorOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--executor-option",
        metavar="KEY=VALUE",
        help="Option of each cell's Ray task or Slurm job, e.g. num_gpus=1 (Ray), or "
        "slurm_partition=gpu, timeout_min=240 (Slurm, names of submitit). Repeatable.",
    ),
]


def check_executor(executor: Executor, address: str, options: Sequence[str]) -> None:
    """Check the executor options.

    Raises:
        UsageError: options contradict each other or are malformed.
    """
    if address and executor is not Executor.ray:
        raise UsageError("--address: only for Ray; add --executor ray")
    if executor is Executor.local:
        if options:
            raise UsageError("--executor-option: needs --executor ray or slurm")
        return
    if distributed.is_launched():
        raise UsageError(
            f"--executor {executor}: runs each cell in one process; leave --processes out"
        )
    _parsed(options)


def _parsed(options: Sequence[str]) -> dict[str, Any]:
    import yaml

    parsed: dict[str, Any] = {}
    for option in options:
        key, separator, value = option.partition("=")
        if not separator or not key:
            raise UsageError(f"--executor-option {option}: must be KEY=VALUE")
        try:
            parsed[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(f"--executor-option {option}: the value is not valid YAML") from None
    return parsed


@contextmanager
def engine(
    executor: Executor, address: str, options: Sequence[str], paths: ExperimentPaths, gpus: int
) -> Iterator[Engine]:
    """Start the engine of an executor, and close it at the end.

    Args:
        executor: ``ray`` or ``slurm``.
        address: address of the Ray cluster.
        options: options of the form ``KEY=VALUE``.
        paths: paths of the experiment.
        gpus: GPUs per cell.

    Raises:
        UsageError: the library is not installed, or rejects an option.
        StorageError: the cluster is not reachable.
    """
    from slm_lora.launch.ray import RayEngine
    from slm_lora.launch.slurm import SlurmEngine

    submitit_folder = paths.checkpoints / "slurm"
    started: Engine
    if executor is Executor.ray:
        started = RayEngine(address, _parsed(options), gpus)
    else:
        started = SlurmEngine(submitit_folder, {"gpus_per_node": gpus, **_parsed(options)})
    with contextlib.closing(started):
        yield started
    # Only on success: after an error submitit's files help to find the cause.
    shutil.rmtree(submitit_folder, ignore_errors=True)
