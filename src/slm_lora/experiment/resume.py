"""What is finished, what is unfinished, and the locks of an experiment and of its cells."""

from __future__ import annotations

import contextlib
import glob
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slm_lora.config.schema import LATER_KEYS
from slm_lora.errors import IntegrityError
from slm_lora.experiment.job import Job
from slm_lora.experiment.paths import ExperimentPaths
from slm_lora.model.resolve import hash_config
from slm_lora.runs.folder import Run, find_run, run_folder
from slm_lora.runtime import distributed, hardware
from slm_lora.runtime.lock import exclusive_lock, wait_for_lock
from slm_lora.runtime.progress import Reporter
from slm_lora.runtime.storage import recover, recover_all
from slm_lora.training.checkpoint import generations, read_manifest


def made_of(job: Job) -> dict[str, Any]:
    """What a training is made of: kept with its checkpoints, to say what changed."""
    return {
        "recipe": job.resolved,
        "training rows": job.data.train_hash,
        "test or validation rows": job.data.held_out_hash,
        "weights of the base": job.source.sha256,
        "configuration of the base": hash_config(job.source.path),
    }


def setting(job: Job) -> dict[str, str]:
    """What the bits of a result depend on beside its identity: see docs/reliability.md."""
    facts = hardware.describe(job.device.type)
    kept = {
        key: str(facts[key]) for key in ("processor", "threads", "system", "gpu") if key in facts
    }
    return kept | {"processes": str(distributed.world_size())} | hardware.versions()


def check_unfinished(jobs: Sequence[Job], paths: ExperimentPaths, discard: bool) -> None:
    """Refuse to restart a cell beside an unfinished training of the same name.

    Args:
        jobs: the cells; finished ones are not checked.
        paths: of the experiment.
        discard: remove them instead.

    Raises:
        IntegrityError: there is one, of another recipe, other rows or another base; says which.
    """
    refused = []
    for job in jobs:
        if finished(job, paths) is not None:
            continue
        for folder, about in _others(job, paths):
            if discard:
                shutil.rmtree(folder)
                continue
            changed = differences(about["made_of"], made_of(job))
            refused.append(
                f"{folder}: an unfinished training of this cell (step {about['step']}), but "
                f"{'; '.join(changed) or 'of another version of slm-lora'}: go back to that to "
                "continue it, or start over with --discard-checkpoints"
            )
    if refused:
        raise IntegrityError("\n".join(refused))


def _others(job: Job, paths: ExperimentPaths) -> list[tuple[Path, dict[str, Any]]]:
    others = []
    for folder in sorted(paths.checkpoints.glob(f"{glob.escape(job.name)}-{'?' * 8}")):
        manifest = _latest_manifest(folder)
        if manifest is None or manifest["identity"] == job.identity:
            continue
        of_this_cell = folder == paths.checkpoint(job.name, manifest["identity"])
        # A process may have died between recording a run and removing its checkpoints.
        if of_this_cell and not run_folder(paths.results, job.name, manifest["identity"]).exists():
            others.append((folder, manifest))
    return others


def _latest_manifest(folder: Path) -> dict[str, Any] | None:
    for generation in reversed(generations(folder)):
        with contextlib.suppress(IntegrityError):
            return read_manifest(generation)
    return None


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What changed, one phrase each: keys of the recipe with both values, rows, base."""
    before = _flat(LATER_KEYS) | _flat(then.get("recipe", {}))
    after = _flat(now["recipe"])
    changed = [
        f"{key}: {before.get(key, 'unset')} → {after.get(key, 'unset')}"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    ]
    for name, value in now.items():
        if name != "recipe" and then.get(name) != value:
            changed.append(f"{name}: {str(then.get(name))[:8]}… → {value[:8]}…")
    return changed


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            # As JSON has it: a tuple is a list there.
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat


@contextmanager
def lock_experiment(jobs: Sequence[Job], paths: ExperimentPaths, discard: bool) -> Iterator[None]:
    """Hold the experiment's lock: its tables, and the order of its cells.

    Raises:
        IntegrityError: another process holds it, or an unfinished training of a cell was made
            of something else, and ``discard`` does not remove it.
    """
    with exclusive_lock(paths.results):
        recover_all(paths.results)
        check_unfinished(jobs, paths, discard)
        yield


@contextmanager
def lock_cell(
    cell: str, identity: str, paths: ExperimentPaths, reporter: Reporter
) -> Iterator[None]:
    """Hold a cell's lock, and remove what killed processes left; waits while another has it.

    A lock for each cell, as several machines may run cells of one experiment.
    """
    lock = paths.checkpoints / f".{cell}.lock"
    waiting = f"  {cell}  another process is at work on it; waiting for that one"
    with wait_for_lock(lock, lambda: reporter.info(waiting)):
        recover(run_folder(paths.results, cell, identity))
        for folder in paths.adapter_names(cell, identity):
            recover(folder)
        yield


def finished(job: Job, paths: ExperimentPaths) -> Run | None:
    """The run of a cell that need not be trained."""
    run = find_run(paths.results, job.name, job.identity)
    if run is None or (job.options.keep_adapters and paths.adapter_of(run) is None):
        return None
    return run
