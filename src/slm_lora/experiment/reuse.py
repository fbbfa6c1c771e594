"""Reuse finished runs of an experiment that lie under the name of another cell.

A run's identity covers everything that its result depends on, but not its name: ``r16-seed0`` of a
grid over ranks is ``r16-375-seed0`` of one over ranks and sizes. Such a run is copied, and keeps
the facts of the machine that computed it. Run folders of other experiments can be put beside the
own.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from slm_lora.config.grid import setting_of
from slm_lora.experiment.job import Job
from slm_lora.experiment.paths import ExperimentPaths
from slm_lora.experiment.resume import finished
from slm_lora.runs.folder import SCORES_FILE, STEPS_FILE, Run, new_run, read_run
from slm_lora.runs.scored_run import read_scored_run
from slm_lora.runtime.progress import Reporter
from slm_lora.runtime.storage import atomic_folder


def reuse_runs(jobs: Sequence[Job], paths: ExperimentPaths, reporter: Reporter) -> None:
    """Copy finished runs of these cells that lie under other names.

    Call it in the first of several processes, within the experiment's lock.

    Args:
        jobs: the cells.
        paths: of the experiment, or of its tuning runs.
        reporter: says what was copied.

    Raises:
        IntegrityError: such a run is broken.
    """
    for job in jobs:
        if finished(job, paths) is None and (run := same_run(job, paths)) is not None:
            if job.options.keep_adapters:
                _copy_adapter(run, job, paths)
            _copy_run(run, job, paths)
            reporter.info(f"  {job.name}  reused from {run.folder}")


def same_run(job: Job, paths: ExperimentPaths) -> Run | None:
    """The finished run of a cell under another name, with its adapter if the cell keeps it.

    Raises:
        IntegrityError: it is broken.
    """
    for folder in sorted((paths.results / "runs").glob(f"*-{job.identity[:8]}")):
        run = read_run(folder)
        if run.record.hash != job.identity or run.cell == job.name:
            continue
        read_scored_run(run)  # checks the scores against the recorded losses
        if not job.options.keep_adapters or _adapter_of(run, paths) is not None:
            return run
    return None


def _copy_run(run: Run, job: Job, paths: ExperimentPaths) -> None:
    own = ("format", "cell", "hash")
    record = {key: value for key, value in run.raw.items() if key not in own}
    record |= {
        "experiment": paths.experiment,
        "settings": {key: setting_of(job.resolved, key) for key in job.settings},
        "adapter": {**run.raw["adapter"], "folder": paths.adapter_name(job.name)},
    }
    with new_run(paths.results, job.name, job.identity, record) as folder:
        for name in (SCORES_FILE, STEPS_FILE):
            shutil.copyfile(run.folder / name, folder / name)


def _adapter_of(run: Run, paths: ExperimentPaths) -> Path | None:
    return replace(paths, experiment=run.record.experiment).adapter_of(run)


def _copy_adapter(run: Run, job: Job, paths: ExperimentPaths) -> None:
    source = _adapter_of(run, paths)
    assert source is not None
    with atomic_folder(paths.adapter(job.name, job.identity)) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
