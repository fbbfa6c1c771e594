"""Where an experiment's files lie, which of its cells are finished, and room for the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from slm_lora.experiment.jobs import Job
from slm_lora.experiment.unfinished import check_unfinished
from slm_lora.lock import after_other_processes, only_process
from slm_lora.model import adapter_folder
from slm_lora.progress import Reporter
from slm_lora.recipe.schema import TrackerName
from slm_lora.runs import Run, find_run, run_folder
from slm_lora.storage import recover, recover_all, require_space, sha256_file
from slm_lora.training.checkpoint import space_needed
from slm_lora.training.loop import total_steps


@dataclass(frozen=True, slots=True)
class Places:
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

    def adapter(self, cell: str) -> Path:
        """Folder of one cell's adapter."""
        return self.adapters / f"{self.experiment}-{cell}"

    @property
    def checkpoints(self) -> Path:
        """Folder of all unfinished cells."""
        return self.results / "checkpoints"

    def checkpoint(self, cell: str, identity: str) -> Path:
        """Folder of one unfinished cell's checkpoints."""
        return self.checkpoints / f"{cell}-{identity[:8]}"


BASE = "base"
"""Name of the base model's cell."""


@contextmanager
def at_work(jobs: Sequence[Job], places: Places, discard: bool) -> Iterator[None]:
    """The experiment to ourselves: its tables, and which cells are run when.

    Raises:
        IntegrityError: another process is at work on it, or an unfinished training of a cell
            was made of something else, and ``discard`` does not remove it.
    """
    with only_process(places.results):
        recover_all(places.results)
        check_none_in_the_way(jobs, places, discard)
        yield


def check_none_in_the_way(jobs: Sequence[Job], places: Places, discard: bool) -> None:
    """No unfinished training of these cells was made of something else, see `check_unfinished`."""
    unfinished = [job for job in jobs if finished(job, places) is None]
    check_unfinished(unfinished, places.checkpoints, discard)


@contextmanager
def cell_at_work(cell: str, identity: str, places: Places, reporter: Reporter) -> Iterator[None]:
    """A cell to ourselves, rid of what killed processes left; waits for another that has it.

    Cells have a lock of their own, as an experiment's may be run by processes of many machines.
    """
    lock = places.checkpoints / f".{cell}.lock"
    waiting = f"  {cell}  another process is at work on it; waiting for that one"
    with after_other_processes(lock, lambda: reporter.say(waiting)):
        recover(run_folder(places.results, cell, identity))
        recover(places.adapter(cell))
        yield


def finished(job: Job, places: Places) -> Run | None:
    """The run of a cell that need not be trained."""
    run = find_run(places.results, job.cell.name, job.identity)
    if run is None or (places.keep_adapters and not _has_adapter(run, places)):
        return None
    return run


def _has_adapter(run: Run, places: Places) -> bool:
    """Whether the adapter of a finished cell is here, and is that very one.

    Results are shared without adapters, and another recipe's cell of the same name replaces
    the adapter; in both cases the cell is trained again.
    """
    weights = adapter_folder.weights_file(places.adapter(run.cell))
    return weights is not None and sha256_file(weights) == run.record["adapter"]["sha256"]


def require_room(job: Job, places: Places, parameters: int) -> None:
    """Room for checkpoints, adapter and scores, before any training.

    Raises:
        StorageError: there is none, or the folders cannot be written.
    """
    cell = job.cell.recipe
    # (PiSSA's adapter is saved at twice its rank.)
    saved = 4 * parameters * (2 if cell.adapter.kind == "pissa" else 1) + 1_000_000
    steps = total_steps(len(job.prepared.train), cell.training)
    points = space_needed(parameters, cell.training.eval_steps is not None, steps)
    held = places.checkpoint(job.cell.name, job.identity)
    there = sum(path.stat().st_size for path in held.rglob("*") if path.is_file())
    scores = 500 * len(job.prepared.test) + 400 * steps
    require_space(places.adapters, saved, "the adapter")
    require_space(
        places.results, max(0, points - there) + saved + scores, "checkpoints, adapter and scores"
    )
