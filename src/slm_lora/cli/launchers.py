"""Which engine runs an experiment's cells, from the command line."""

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
    """Where cells are run."""

    local = "local"
    ray = "ray"
    slurm = "slurm"


ExecutorName = Annotated[
    Executor,
    typer.Option(
        "--executor",
        help="Who runs the cells: this process, one after the other; a Ray cluster; Slurm. All "
        "machines must see the same folders.",
    ),
]
Address = Annotated[
    str,
    typer.Option(
        "--address", help="Ray cluster to join: HOST:PORT, or auto. Unset: one is started here."
    ),
]
ExecutorOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--executor-option",
        metavar="KEY=VALUE",
        help="Resources of every cell's task or job, e.g. num_gpus=1 (Ray), slurm_partition=gpu, "
        "timeout_min=240 (Slurm, by submitit's names). May be repeated.",
    ),
]


def check_executor(executor: Executor, address: str, options: Sequence[str]) -> None:
    """Refuse what does not go together.

    Raises:
        UsageError: it does not.
    """
    if address and executor is not Executor.ray:
        raise UsageError("--address: is of a Ray cluster; add --executor ray")
    if executor is Executor.local:
        if options:
            raise UsageError("--executor-option: needs --executor ray or slurm")
        return
    if distributed.is_launched():
        raise UsageError(
            f"--executor {executor}: leave --processes out; each cell is run by one process"
        )
    _parsed(options)


def _parsed(options: Sequence[str]) -> dict[str, Any]:
    import yaml

    parsed: dict[str, Any] = {}
    for option in options:
        key, found, value = option.partition("=")
        if not found or not key:
            raise UsageError(f"--executor-option {option}: must be KEY=VALUE")
        try:
            parsed[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UsageError(f"--executor-option {option}: not a value") from None
    return parsed


@contextmanager
def engine(
    executor: Executor, address: str, options: Sequence[str], paths: ExperimentPaths, gpus: int
) -> Iterator[Engine]:
    """The engine, ready; left at the end.

    Args:
        executor: not local.
        address: of a Ray cluster.
        options: ``KEY=VALUE`` each.
        paths: where the experiment lies.
        gpus: that a cell takes.

    Raises:
        UsageError: it is not installed, or takes no such option.
        StorageError: the cluster does not answer.
    """
    from slm_lora.launch.ray import RayEngine
    from slm_lora.launch.slurm import SlurmEngine

    files = paths.checkpoints / "slurm"
    chosen: Engine
    if executor is Executor.ray:
        chosen = RayEngine(address, _parsed(options), gpus)
    else:
        chosen = SlurmEngine(files, {"gpus_per_node": gpus, **_parsed(options)})
    with contextlib.closing(chosen):
        yield chosen
    # Where something failed, submitit's files stay: they may say why.
    shutil.rmtree(files, ignore_errors=True)
