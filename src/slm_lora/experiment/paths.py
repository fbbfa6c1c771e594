"""Where an experiment's files lie, which of its cells are finished, and room for the others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slm_lora.adapters import io as adapter_io
from slm_lora.adapters.methods import method_of
from slm_lora.config.schema import TrackerName
from slm_lora.errors import IntegrityError
from slm_lora.experiment.job import Job
from slm_lora.experiment.resume import check_unfinished
from slm_lora.runs.folder import Run, find_run, run_folder
from slm_lora.runtime.checksums import sha256_file
from slm_lora.runtime.lock import after_other_processes, only_process
from slm_lora.runtime.progress import Reporter
from slm_lora.runtime.storage import recover, recover_all, require_space
from slm_lora.training.checkpoint import space_needed
from slm_lora.training.loop import total_steps


@dataclass(frozen=True, slots=True)
class ExperimentPaths:
    """Where an experiment's results and adapters go.

    Attributes:
        experiment: its name.
        results: folder of tables and run folders.
        adapters: folder that adapter folders are put into.
        keep_adapters: whether they stay there; else scores are all that a finished cell needs.
        checkpoint_seconds: least time between two checkpoints of a training.
        report_to: trackers that are told of its trainings.
    """

    experiment: str
    results: Path
    adapters: Path
    keep_adapters: bool = True
    checkpoint_seconds: float = 60.0
    report_to: tuple[TrackerName, ...] = ()

    def adapter(self, cell: str, identity: str) -> Path:
        """Folder that the adapter of a run is written to: ``<experiment>-<cell>``, or
        ``<experiment>-<cell>-<hash8>`` where another run's adapter, or anything else, has that.

        Raises:
            IntegrityError: both are taken.
        """
        if not self.keep_adapters:
            # Never among those that are kept: it goes once it is scored.
            return self.checkpoint(cell, identity) / "adapter"
        plain, own = self.adapter_names(cell, identity)
        if adapter_io.run_of(own) == identity:
            return own
        for folder in (plain, own):
            if _is_free(folder) or adapter_io.run_of(folder) == identity:
                return folder
        raise IntegrityError(
            f"{plain} and {own} hold something else than this run's adapter, and nothing finished "
            "is replaced: move one of them away, or choose another folder (--adapters)"
        )

    def adapter_of(self, run: Run) -> Path | None:
        """Folder with the very adapter of a finished run, if it is here.

        Results are shared without adapters, and a folder may have been changed since.
        """
        for folder in self.adapter_names(run.cell, run.record["hash"]):
            weights = adapter_io.weights_file(folder)
            if weights is not None and sha256_file(weights) == run.record["adapter"]["sha256"]:
                return folder
        return None

    def adapter_name(self, cell: str) -> str:
        """Name of the folder that the first adapter of a cell gets."""
        return f"{self.experiment}-{cell}"

    def adapter_names(self, cell: str, identity: str) -> tuple[Path, Path]:
        """The two folders that the adapter of a run may lie in, the usual one first."""
        plain = self.adapters / self.adapter_name(cell)
        return plain, plain.with_name(f"{plain.name}-{identity[:8]}")

    @property
    def checkpoints(self) -> Path:
        """Folder of all unfinished cells."""
        return self.results / "checkpoints"

    def checkpoint(self, cell: str, identity: str) -> Path:
        """Folder of one unfinished cell's checkpoints."""
        return self.checkpoints / f"{cell}-{identity[:8]}"


def _is_free(folder: Path) -> bool:
    """Whether nothing lies there: not even a link that leads nowhere."""
    if folder.is_dir() and not folder.is_symlink():
        return not any(folder.iterdir())
    return not os.path.lexists(folder)


BASE = "base"
"""Name of the base model's cell."""


@contextmanager
def at_work(jobs: Sequence[Job], places: ExperimentPaths, discard: bool) -> Iterator[None]:
    """The experiment to ourselves: its tables, and which cells are run when.

    Raises:
        IntegrityError: another process is at work on it, or an unfinished training of a cell
            was made of something else, and ``discard`` does not remove it.
    """
    with only_process(places.results):
        recover_all(places.results)
        check_none_in_the_way(jobs, places, discard)
        yield


def check_none_in_the_way(jobs: Sequence[Job], places: ExperimentPaths, discard: bool) -> None:
    """No unfinished training of these cells was made of something else, see `check_unfinished`."""
    unfinished = [job for job in jobs if finished(job, places) is None]
    check_unfinished(unfinished, places.checkpoints, discard)


@contextmanager
def cell_at_work(
    cell: str, identity: str, places: ExperimentPaths, reporter: Reporter
) -> Iterator[None]:
    """A cell to ourselves, rid of what killed processes left; waits for another that has it.

    Cells have a lock of their own, as an experiment's may be run by processes of many machines.
    """
    lock = places.checkpoints / f".{cell}.lock"
    waiting = f"  {cell}  another process is at work on it; waiting for that one"
    with after_other_processes(lock, lambda: reporter.info(waiting)):
        recover(run_folder(places.results, cell, identity))
        for folder in places.adapter_names(cell, identity):
            recover(folder)
        yield


def finished(job: Job, places: ExperimentPaths) -> Run | None:
    """The run of a cell that need not be trained."""
    run = find_run(places.results, job.cell.name, job.identity)
    if run is None or (places.keep_adapters and places.adapter_of(run) is None):
        return None
    return run


def require_room(job: Job, places: ExperimentPaths, parameters: int) -> None:
    """Room for checkpoints, adapter and scores, before any training.

    Raises:
        StorageError: there is none, or the folders cannot be written.
    """
    cell = job.cell.recipe
    saved = 4 * parameters * method_of(cell.adapter).saved_rank + 1_000_000
    steps = total_steps(len(job.prepared.train), cell.training)
    points = space_needed(parameters, cell.training.eval_steps is not None, steps)
    held = places.checkpoint(job.cell.name, job.identity)
    there = sum(path.stat().st_size for path in held.rglob("*") if path.is_file())
    scores = 500 * len(job.prepared.test) + 400 * steps
    if places.keep_adapters:
        require_space(places.adapters, saved, "the adapter")
    require_space(
        places.results, max(0, points - there) + saved + scores, "checkpoints, adapter and scores"
    )
