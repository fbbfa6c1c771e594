"""Run the jobs of an experiment: the base once, every cell that is not finished yet."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import torch

from slm_lora.adapters import attach
from slm_lora.adapters import io as adapter_io
from slm_lora.adapters.methods import method_of, trains_all, trial_section
from slm_lora.config.grid import setting_of
from slm_lora.errors import IntegrityError, UsageError
from slm_lora.experiment.base_cache import LoadedBase, with_saved
from slm_lora.experiment.cell import Watch, evaluate, scoring_cost, train_cell, training_cost
from slm_lora.experiment.job import Job
from slm_lora.experiment.paths import BASE, ExperimentPaths
from slm_lora.experiment.preflight import require_room
from slm_lora.experiment.provenance import about_adapter, common_record, training_record
from slm_lora.experiment.resume import (
    check_unfinished,
    differences,
    finished,
    lock_cell,
    lock_experiment,
    made_of,
    setting,
)
from slm_lora.experiment.reuse import reuse_runs
from slm_lora.experiment.saved_adapter import Evaluated, warnings_on
from slm_lora.experiment.tracking import Tracked, Trackers, open_trackers
from slm_lora.model.base import Base
from slm_lora.model.model_folder import MODEL_WEIGHTS
from slm_lora.runs.folder import SCORES_FILE, STEPS_FILE, Run, find_run, new_run, write_lines
from slm_lora.runs.progress import CellProgress, cell_progress
from slm_lora.runs.scores import write_scores
from slm_lora.runtime import distributed, hardware
from slm_lora.runtime.checksums import read_sealed, sha256_file
from slm_lora.runtime.progress import Overall, Reporter
from slm_lora.training.checkpoint import Checkpointer


def run_jobs(
    jobs: Sequence[Job], paths: ExperimentPaths, reporter: Reporter, discard: bool = False
) -> list[Run]:
    """Run what is not finished; return all runs, the base first (in the first process).

    Finished runs are known by their identity and are read, not run again, so the same call
    continues an experiment that was interrupted.

    Args:
        jobs: the cells.
        paths: where everything goes.
        reporter: told how it goes.
        discard: remove unfinished trainings of these cells that were made of something else.

    Several processes call it alike: they share the work, and the first writes.

    Raises:
        UsageError: more processes than a step has examples.
        IntegrityError: another process is at work there, or such a training is in the way.
        StopRequested: a signal asked for it; the same call continues.
    """
    with together(jobs), first_only(lambda: lock_experiment(jobs, paths, discard)):
        distributed.run_on_main(lambda: reuse_runs(jobs, paths, reporter))
        loaded = LoadedBase(reporter)
        try_adapters(jobs, paths, reporter, loaded)
        reporter.overall = Overall(_cost(jobs, paths))
        return [
            *_run_bases(jobs, paths, reporter, loaded),
            *_run_cells(jobs, paths, reporter, loaded),
        ]


def _cost(jobs: Sequence[Job], paths: ExperimentPaths) -> float:
    """Of all cells and bases that are not finished."""
    bases = {job.base_identity: job for job in jobs}
    open_bases = [
        job for identity, job in bases.items() if find_run(paths.results, BASE, identity) is None
    ]
    open_jobs = [job for job in jobs if finished(job, paths) is None]
    return sum(map(scoring_cost, open_bases)) + sum(
        training_cost(job) + scoring_cost(job) for job in open_jobs
    )


def run_bases(
    jobs: Sequence[Job],
    paths: ExperimentPaths,
    reporter: Reporter,
    loaded: LoadedBase | None = None,
) -> list[Run]:
    """As `run_jobs`, but the bases of these cells alone, while others may run cells."""
    with together(jobs):
        return _run_bases(jobs, paths, reporter, loaded or LoadedBase(reporter))


def run_cells(
    jobs: Sequence[Job], paths: ExperimentPaths, reporter: Reporter, discard: bool = False
) -> list[Run]:
    """As `run_jobs`, but these cells alone, while others may run others."""
    with together(jobs):
        distributed.run_on_main(lambda: check_unfinished(jobs, paths, discard))
        loaded = LoadedBase(reporter)
        try_adapters(jobs, paths, reporter, loaded)
        return _run_cells(jobs, paths, reporter, loaded)


@contextmanager
def together(jobs: Sequence[Job]) -> Iterator[None]:
    """Several processes, that all do the same."""
    several = distributed.world_size()
    for job in jobs:
        batch = job.config.training.effective_batch_size
        if several > batch:
            raise UsageError(
                f"{several} processes, but a step of {job.name} has {batch} examples "
                "(training.effective_batch_size): start at most so many"
            )
        if job.device.type == "cuda" and distributed.local_rank() >= torch.cuda.device_count():
            raise UsageError(
                f"process {distributed.local_rank() + 1} of this machine has no GPU of its own; "
                f"it has {torch.cuda.device_count()}: start at most so many, or training.device=cpu"
            )
    identities = distributed.all_gather([job.identity for job in jobs])
    if any(other != identities[0] for other in identities):
        raise IntegrityError(
            "the processes were given different recipes, rows or bases: start all with the same"
        )
    yield


@contextmanager
def first_only(to_ourselves: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Within what only the first of several processes holds, for all of them."""
    with to_ourselves() if distributed.is_main() else nullcontext():
        distributed.barrier()
        yield


def try_adapters(
    jobs: Sequence[Job], paths: ExperimentPaths, reporter: Reporter, loaded: LoadedBase
) -> None:
    """Put every kind of adapter on its base and take it off again, before any work is done.

    Raises:
        UsageError: PEFT refuses one, or it would not be computed as PEFT does.
    """
    tried = set()
    for job in jobs:
        section = job.config.adapter
        if trains_all(section) or not to_do(functools.partial(finished, job, paths)):
            continue
        trial = trial_section(section, rank=min(section.r, 4))
        if (job.source, job.precision, job.device, trial) in tried:
            continue
        tried.add((job.source, job.precision, job.device, trial))
        peft_model = attach.attach(loaded.for_job(job), trial, 0)
        if note := attach.unadapted_note(peft_model):
            reporter.info_once(f"  note: {note}")
        attach.detach(peft_model)


def to_do(done: Callable[[], Run | None]) -> bool:
    """Whether a run is still to be done, as the first of several processes finds: another may see
    the folder late."""
    return bool(distributed.run_on_main(lambda: done() is None))


def _run_bases(
    jobs: Sequence[Job], paths: ExperimentPaths, reporter: Reporter, loaded: LoadedBase
) -> list[Run]:
    runs: dict[str, Run | None] = {}
    for job in jobs:
        if job.base_identity in runs:
            continue
        done = functools.partial(find_run, paths.results, BASE, job.base_identity)
        alone = functools.partial(lock_cell, BASE, job.base_identity, paths, reporter)
        with first_only(alone):
            if to_do(done):
                _run_base(job, loaded.for_job(job), paths, reporter)
            else:
                reporter.info(f"  {BASE}  finished earlier")
        runs[job.base_identity] = done()
    return [run for run in runs.values() if run is not None]


def _run_cells(
    jobs: Sequence[Job], paths: ExperimentPaths, reporter: Reporter, loaded: LoadedBase
) -> list[Run]:
    runs = []
    for job in jobs:
        name = job.name
        done = functools.partial(finished, job, paths)
        with first_only(functools.partial(lock_cell, name, job.identity, paths, reporter)):
            if to_do(done):
                run_cell(job, loaded, paths, reporter)
            else:
                # A process may have died between recording the run and this.
                left = paths.checkpoint(name, job.identity)
                distributed.run_on_main(functools.partial(shutil.rmtree, left, ignore_errors=True))
                reporter.info(f"  {name}  finished earlier")
        if distributed.is_main():
            runs.append(_found(paths, name, job.identity))
    return runs


def evaluate_adapter(
    job: Job, folder: Path | None, reporter: Reporter, with_base: bool = True
) -> Evaluated:
    """Score a saved adapter, or fully trained model (None: the base), on the job's test rows.

    Args:
        job: says base and rows.
        folder: of the adapter.
        reporter: for progress, and for warnings where the score says little of the adapter.
        with_base: score the base, too.

    Raises:
        IntegrityError: the adapter does not belong to this base.
    """
    loaded = LoadedBase(reporter)
    if folder is None:
        return Evaluated(*evaluate(loaded.for_job(job), job, BASE, reporter))
    peft_model = None
    if (folder / MODEL_WEIGHTS).is_file():
        base = with_saved(folder, job, loaded)
    else:
        base = loaded.for_job(job)
        peft_model = adapter_io.load(base, folder)
    for warning in warnings_on(folder, job):
        reporter.info(f"  warning: {warning}")
    if not adapter_io.is_sealed(folder):
        reporter.info(
            f"  warning: {folder} does not say the SHA-256 of its files ({adapter_io.ABOUT}): "
            "only the shapes of its tensors were checked"
        )
    else:
        trained, now = adapter_io.quantization(folder), job.config.model.quantization
        if trained != now:
            reporter.info(
                f"  warning: {folder} was trained on a base in {trained or 'full precision'}, and "
                f"is scored on one in {now or 'full precision'} (model.quantization)"
            )
    scores, record = evaluate(base, job, folder.name, reporter)
    if not with_base:
        return Evaluated(scores, record)
    if peft_model is not None:
        attach.detach(peft_model)
    del base, peft_model  # a whole model makes room for the base
    return Evaluated(scores, record, *evaluate(loaded.for_job(job), job, BASE, reporter))


def _run_base(job: Job, base: Base, paths: ExperimentPaths, reporter: Reporter) -> None:
    hardware.reset_peak_memory(job.device.type)
    with _progress(BASE, job.base_identity, paths, reporter) as progress:
        progress.scoring()
        scores, evaluation = evaluate(base, job, BASE, reporter)
    record = {**common_record(job, base, paths), "settings": {}, "evaluation": evaluation}

    def write() -> None:
        with new_run(paths.results, BASE, job.base_identity, record) as folder:
            write_scores(scores, folder / SCORES_FILE)

    distributed.run_on_main(write)


def run_cell(
    job: Job,
    loaded: LoadedBase,
    paths: ExperimentPaths,
    reporter: Reporter,
    watch: Watch | None = None,
) -> None:
    """Train a cell, score it and record its run; ``watch`` as for `train_cell`."""
    name, section = job.name, job.config.adapter
    base = loaded.for_job(job)
    hardware.reset_peak_memory(job.device.type)
    peft_model = attach.attach(base, section, job.config.seed)
    if note := attach.unadapted_note(peft_model):
        reporter.info_once(f"  note: {note}")
    stack = ExitStack()
    try:
        checkpointer = Checkpointer(
            paths.checkpoint(name, job.identity),
            job.identity,
            job.options.checkpoint_seconds,
            made_of(job),
            setting(job),
            reporter.info,
            writes=distributed.is_main(),
        )
        distributed.run_on_main(functools.partial(_check_folders, job, paths, peft_model, reporter))
        trackers = stack.enter_context(_tracking(job, paths, reporter))
        progress = stack.enter_context(_progress(name, job.identity, paths, reporter))
        watch = progress.recording(watch)
        result = train_cell(job, base, peft_model, checkpointer, reporter, trackers, watch)
        progress.scoring()
        parameters = attach.count_parameters(peft_model)
        folder = Path(
            distributed.run_on_main(functools.partial(_save, job, base, peft_model, paths))
        )
        if method_of(section).modifies_base:
            # What is scored is what was saved, on the base as it was.
            loaded.drop()
            base = with_saved(folder, job, loaded)
        scores, evaluation = evaluate(base, job, name, reporter)
        headline = evaluation[evaluation["headline"]]
        trackers.scored(headline["loss"], headline["perplexity"], len(result.history))
    finally:
        stack.close()
        if method_of(section).modifies_base:
            loaded.drop()
        else:
            attach.detach(peft_model)

    def write() -> None:
        weights = adapter_io.weights_file(folder)
        assert weights is not None
        kept_as = folder.name if job.options.keep_adapters else paths.adapter_name(name)
        record = {
            **common_record(job, base, paths),
            "settings": {key: setting_of(job.resolved, key) for key in job.settings},
            "adapter": {
                "folder": kept_as,
                "sha256": sha256_file(weights),
                "bytes": weights.stat().st_size,
                "trainable_parameters": parameters.trainable,
                "all_parameters": parameters.total,
                "percent": parameters.percent,
            },
            "training": training_record(result),
            "evaluation": evaluation,
        }
        with new_run(paths.results, name, job.identity, record) as run:
            write_scores(scores, run / SCORES_FILE)
            write_lines(run / STEPS_FILE, [asdict(step) for step in result.history])
        checkpointer.remove()

    distributed.run_on_main(write)


def _check_folders(
    job: Job, paths: ExperimentPaths, peft_model: torch.nn.Module, reporter: Reporter
) -> None:
    """Before a training: room on the disk, and a note where another adapter has its folder."""
    require_room(job, paths, attach.count_parameters(peft_model).trainable)
    if not job.options.keep_adapters:
        return
    usual = paths.adapters / paths.adapter_name(job.name)
    folder = paths.adapter(job.name, job.identity)
    if folder == usual:
        return
    try:
        about = read_sealed(usual / adapter_io.ABOUT)
        changed = differences({"recipe": about["recipe"]}, {"recipe": job.resolved})
    except (FileNotFoundError, IntegrityError, KeyError, TypeError, AttributeError):
        content = "something else"
    else:
        named = f" ({'; '.join(changed[:3])}{'; …' * (len(changed) > 3)})" * bool(changed)
        content = f"the adapter of another run{named}"
    reporter.info(f"  note: {usual} holds {content} and stays; this one goes to {folder}")


def _save(job: Job, base: Base, peft_model: torch.nn.Module, paths: ExperimentPaths) -> str:
    """Write the adapter; its folder, chosen only now, as another experiment may have taken one."""
    choose = paths.adapter if job.options.keep_adapters else paths.temporary_adapter
    folder = choose(job.name, job.identity)
    adapter_io.save(base, peft_model, folder, about_adapter(job, paths), job.data.chat_template)
    return str(folder)


def _tracking(
    job: Job, paths: ExperimentPaths, reporter: Reporter
) -> AbstractContextManager[Trackers]:
    """The recipe's trackers of one training; only the first of several processes has any."""
    names = job.options.report_to if distributed.is_main() else ()
    run = Tracked(paths.experiment, f"{job.name}-{job.identity[:8]}", job.resolved, paths.results)
    return open_trackers(names, run, reporter.info)


def _progress(
    name: str, identity: str, paths: ExperimentPaths, reporter: Reporter
) -> AbstractContextManager[CellProgress]:
    """The record of a cell at work, by the first of several processes."""
    main = distributed.is_main()
    return cell_progress(paths.results, name, identity, reporter.info_once, writes=main)


def _found(paths: ExperimentPaths, cell: str, identity: str) -> Run:
    run = find_run(paths.results, cell, identity)
    assert run is not None
    return run
