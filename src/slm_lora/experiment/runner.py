"""Run the jobs of an experiment: the base once, every cell that is not finished yet."""

from __future__ import annotations

import functools
import gc
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slm_lora import machine, processes
from slm_lora.errors import IntegrityError, UsageError
from slm_lora.evaluation.perplexity import held_out_loss, score, write_scores
from slm_lora.experiment.jobs import Job
from slm_lora.experiment.places import BASE, Places, at_work, finished, require_room
from slm_lora.experiment.run_record import (
    about_adapter,
    common_record,
    setting_of,
    training_record,
)
from slm_lora.experiment.trackers import Tracked, Trackers, tracking
from slm_lora.experiment.unfinished import made_of, setting
from slm_lora.model import adapter, flash, fusion, native
from slm_lora.model.base import Base
from slm_lora.model.load import load_base
from slm_lora.model.source import resolve
from slm_lora.progress import Reporter
from slm_lora.recipe.schema import ModelSection
from slm_lora.records import Example, LossOn, RowScore, Step
from slm_lora.runs import SCORES_FILE, STEPS_FILE, Run, find_run, new_run, write_lines
from slm_lora.stopping import gentle_stop
from slm_lora.storage import sha256_file
from slm_lora.training.checkpoint import Checkpointer
from slm_lora.training.loop import TrainingResult, total_steps, train


class _LoadedBase:
    """One base in memory at a time: cells in a row nearly always share it."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._base: Base | None = None

    def drop(self) -> None:
        """Forget it: a training altered it."""
        self._base = None

    def for_job(self, job: Job) -> Base:
        quantization = job.cell.recipe.model.quantization
        sharded = job.cell.recipe.training.fsdp and not processes.alone()
        wanted = (job.source, job.precision, job.device, quantization, sharded)
        base = self._base
        if base is None or _as_loaded(base) != wanted:
            self._base = None
            gc.collect()  # layers that are `fused` refer to themselves
            self._reporter.say(
                f"  loading {job.source.name} in {quantization or job.precision} "
                f"on {job.device.type}"
            )
            base = load_base(
                job.source,
                device=job.device,
                precision=job.precision,
                quantization=quantization,
                sharded=sharded,
            )
            if base.why_plain:
                self._reporter.say(f"  note: {base.why_plain}")
            self._base = base
        return base


def _as_loaded(base: Base) -> tuple[object, ...]:
    return base.source, base.precision, base.device, base.quantization, base.sharded


def run_jobs(
    jobs: Sequence[Job], places: Places, reporter: Reporter, discard: bool = False
) -> list[Run]:
    """Run what is not finished; return all runs, the base first (in the first process).

    Finished runs are known by their identity and are read, not run again, so the same call
    continues an experiment that was interrupted.

    Args:
        jobs: the cells.
        places: where everything goes.
        reporter: told how it goes.
        discard: remove unfinished trainings of these cells that were made of something else.

    Several processes call it alike: they share the work, and the first writes.

    Raises:
        UsageError: more processes than a step has examples.
        IntegrityError: another process is at work there, or such a training is in the way.
        StopRequested: a signal asked for it; the same call continues.
    """
    with _together(jobs, places, discard):
        loaded = _LoadedBase(reporter)
        runs: dict[str, Run | None] = {}
        for job in jobs:
            if job.base_identity not in runs:
                done = functools.partial(find_run, places.results, BASE, job.base_identity)
                if _to_do(done):
                    _run_base(job, loaded.for_job(job), places, reporter)
                else:
                    reporter.say(f"  {BASE}  finished earlier")
                runs[job.base_identity] = done()
        bases = [run for run in runs.values() if run is not None]
        return [*bases, *_run_cells(jobs, places, reporter, loaded)]


def run_cells(
    jobs: Sequence[Job], places: Places, reporter: Reporter, discard: bool = False
) -> list[Run]:
    """As `run_jobs`, without the base."""
    with _together(jobs, places, discard):
        return _run_cells(jobs, places, reporter, _LoadedBase(reporter))


@contextmanager
def _together(jobs: Sequence[Job], places: Places, discard: bool) -> Iterator[None]:
    """At work on an experiment: the first of several processes for all, who do the same."""
    several = processes.size()
    for job in jobs:
        batch = job.cell.recipe.training.effective_batch_size
        if several > batch:
            raise UsageError(
                f"{several} processes, but a step of {job.cell.name} has {batch} examples "
                "(training.effective_batch_size): start at most so many"
            )
        if job.device.type == "cuda" and processes.local() >= torch.cuda.device_count():
            raise UsageError(
                f"process {processes.local() + 1} of this machine has no GPU of its own; it has "
                f"{torch.cuda.device_count()}: start at most so many, or training.device=cpu"
            )
    told = processes.gather([job.identity for job in jobs])
    if any(each != told[0] for each in told):
        raise IntegrityError(
            "the processes were given different recipes, rows or bases: start all with the same"
        )
    with at_work(jobs, places, discard) if processes.is_first() else nullcontext():
        processes.wait()
        yield


def _to_do(done: Callable[[], Run | None]) -> bool:
    """Whether a run is still to be done, as the first of several processes finds: another may see
    the folder late."""
    return bool(processes.from_first(lambda: done() is None))


def _run_cells(
    jobs: Sequence[Job], places: Places, reporter: Reporter, loaded: _LoadedBase
) -> list[Run]:
    runs = []
    for job in jobs:
        done = functools.partial(finished, job, places)
        if _to_do(done):
            _run_cell(job, loaded, places, reporter)
        elif processes.is_first():
            # A process may have died between recording the run and this.
            shutil.rmtree(places.checkpoint(job.cell.name, job.identity), ignore_errors=True)
            reporter.say(f"  {job.cell.name}  finished earlier")
        if processes.is_first():
            runs.append(_found(places, job.cell.name, job.identity))
    return runs


def evaluate_adapter(
    job: Job, folder: Path | None, reporter: Reporter
) -> tuple[list[RowScore], dict[str, Any]]:
    """Score a saved adapter, or fully trained model (None: the base), on the job's test rows.

    Raises:
        IntegrityError: the adapter does not belong to this base.
    """
    loaded = _LoadedBase(reporter)
    base = loaded.for_job(job) if folder is None else _with_saved(folder, job, loaded)
    if folder is not None and not adapter.is_sealed(folder):
        reporter.say(
            f"  warning: {folder} does not say the SHA-256 of its files ({adapter.ABOUT}): only "
            "the shapes of its tensors were checked"
        )
    elif folder is not None:
        trained, now = adapter.quantization(folder), job.cell.recipe.model.quantization
        if trained != now:
            reporter.say(
                f"  warning: {folder} was trained on a base in {trained or 'full precision'}, and "
                f"is scored on one in {now or 'full precision'} (model.quantization)"
            )
    return _evaluate(base, job, BASE if folder is None else folder.name, reporter)


def _with_saved(folder: Path, job: Job, loaded: _LoadedBase) -> Base:
    """The base with a saved adapter, or the model that full fine-tuning saved."""
    if (folder / adapter.MODEL_WEIGHTS).is_file():
        if not (folder / adapter.ABOUT).is_file():
            raise UsageError(
                f"{folder}: a model, but without {adapter.ABOUT}, which says what it was trained "
                "from; to score any model, name it in model.name"
            )
        adapter.check_base(job.source, folder)
        source = resolve(ModelSection(name=str(folder)))
        return load_base(source, device=job.device, precision=job.precision)
    base = loaded.for_job(job)
    adapter.load(base, folder)
    return base


def _run_base(job: Job, base: Base, places: Places, reporter: Reporter) -> None:
    machine.reset_peak_memory(job.device.type)
    scores, evaluation = _evaluate(base, job, BASE, reporter)
    record = {**common_record(job, base, places), "settings": {}, "evaluation": evaluation}
    if processes.is_first():
        with new_run(places.results, BASE, job.base_identity, record) as folder:
            write_scores(scores, folder / SCORES_FILE)
    processes.wait()


def _run_cell(job: Job, loaded: _LoadedBase, places: Places, reporter: Reporter) -> None:
    name, section, folder = job.cell.name, job.cell.recipe.adapter, places.adapter(job.cell.name)
    base = loaded.for_job(job)
    machine.reset_peak_memory(job.device.type)
    adapted = adapter.attach(base, section, job.cell.recipe.seed)
    stack = ExitStack()
    try:
        checkpointer = Checkpointer(
            places.checkpoint(name, job.identity),
            job.identity,
            places.checkpoint_seconds,
            made_of(job),
            setting(job),
            reporter.say,
            writes=processes.is_first(),
        )
        if processes.is_first():
            require_room(job, places, adapter.count_parameters(adapted).trainable)
        trackers = stack.enter_context(_tracking(job, places, reporter))
        result = _train(job, base, adapted, checkpointer, reporter, trackers)
        peak = machine.peak_memory_bytes(job.device.type)
        parameters = adapter.count_parameters(adapted)
        if processes.is_first():
            adapter.save(
                base, adapted, folder, about_adapter(job, places), job.prepared.chat_template
            )
        processes.wait()
        if adapter.alters_base(section):
            # What is scored is what was saved, on the base as it was.
            loaded.drop()
            base = _with_saved(folder, job, loaded)
        scores, evaluation = _evaluate(base, job, name, reporter)
        headline = evaluation[evaluation["headline"]]
        trackers.scored(headline["loss"], headline["perplexity"], len(result.history))
    finally:
        stack.close()
        if adapter.alters_base(section):
            loaded.drop()
        else:
            adapter.detach(adapted)
    if processes.is_first():
        weights = adapter.weights_file(folder)
        assert weights is not None
        record = {
            **common_record(job, base, places),
            "settings": {key: setting_of(job.recipe, key) for key in job.cell.settings},
            "adapter": {
                "folder": folder.name,
                "sha256": sha256_file(weights),
                "bytes": weights.stat().st_size,
                "trainable_parameters": parameters.trainable,
                "all_parameters": parameters.total,
                "percent": parameters.percent,
            },
            "training": training_record(result, peak),
            "evaluation": evaluation,
        }
        with new_run(places.results, name, job.identity, record) as run:
            write_scores(scores, run / SCORES_FILE)
            write_lines(run / STEPS_FILE, [asdict(step) for step in result.history])
        checkpointer.remove()
    processes.wait()
    if not places.keep_adapters and processes.is_first():
        shutil.rmtree(folder)


def _tracking(job: Job, places: Places, reporter: Reporter) -> AbstractContextManager[Trackers]:
    """The recipe's trackers of one training; only the first of several processes has any."""
    names = places.report_to if processes.is_first() else ()
    run = Tracked(
        places.experiment, f"{job.cell.name}-{job.identity[:8]}", job.recipe, places.results
    )
    return tracking(names, run, reporter.say)


def _train(
    job: Job,
    base: Base,
    adapted: nn.Module,
    checkpointer: Checkpointer,
    reporter: Reporter,
    trackers: Trackers,
) -> TrainingResult:
    section = job.cell.recipe.training
    compile_validation = _compiles(job, job.prepared.validation, base)

    def validate() -> float:
        scores = score(
            base,
            job.prepared.validation,
            "validation",
            job.cell.recipe.evaluation.micro_batch_tokens,
            compile_validation,
            on_tokens=lambda done: stop.check(),
        )
        return held_out_loss(scores, section.loss_on).loss

    total = total_steps(len(job.prepared.train), section)
    shown = 0
    with gentle_stop() as stop, reporter.task(job.cell.name, total, "steps") as task:

        def on_step(step: Step) -> None:
            nonlocal shown
            note = f"loss {step.loss:.3f}"
            if step.validation_loss is not None:
                note += f"  validation {step.validation_loss:.3f}"
            # The first step of a later sitting brings those of the earlier ones along.
            task.advance(step.step - shown, step.tokens, note)
            shown = step.step
            trackers.step(step)

        result = train(
            base,
            adapted,
            job.prepared.train,
            section,
            job.cell.recipe.seed,
            validate=validate,
            on_step=on_step,
            checkpointer=checkpointer,
            stop=stop,
        )
        task.close(
            f"trained {len(result.history)} steps  loss {result.history[-1].loss:.3f}  "
            f"{result.tokens_per_s:.0f} tok/s"
        )
    _say_fallbacks(reporter)
    if skipped := sum(step.skipped for step in result.history):
        reporter.say(f"  note: {skipped} steps were skipped, as their fp16 gradient overflowed")
    if result.rows_without_labels:
        reporter.say(f"  note: {result.rows_without_labels} training rows had no label token")
    return result


def _evaluate(
    base: Base, job: Job, label: str, reporter: Reporter
) -> tuple[list[RowScore], dict[str, Any]]:
    nn.Module.eval(base.causal)
    examples = job.prepared.test
    tokens = sum(example.length for example in examples)
    compiled = _compiles(job, examples, base)
    began = time.perf_counter()

    def on_tokens(done: int) -> None:
        # Longest rows come first, so tokens, not rows, tell how far it is.
        # The others are about as far.
        task.advance(done * processes.size(), done * processes.size())
        stop.check()

    with gentle_stop() as stop, reporter.task(label, tokens, "test tokens") as task:
        scores = score(
            base,
            examples,
            "test",
            job.cell.recipe.evaluation.micro_batch_tokens,
            compiled,
            on_tokens=on_tokens,
        )
        seconds = time.perf_counter() - began
        losses = {kind: held_out_loss(scores, kind) for kind in _kinds(scores)}
        shown = losses[job.cell.recipe.evaluation.headline]
        task.close(
            f"scored {len(examples)} test rows  loss {shown.loss:.4f}  "
            f"perplexity {shown.perplexity:.3f}  {tokens / seconds:.0f} tok/s"
        )
    _say_fallbacks(reporter)
    record: dict[str, Any] = {kind: asdict(loss) for kind, loss in losses.items()}
    return scores, record | {
        "headline": job.cell.recipe.evaluation.headline,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "compiled": compiled and not fusion.failure(),
    }


def _compiles(job: Job, examples: Sequence[Example], base: Base) -> bool:
    tokens = sum(example.length for example in examples)
    return not base.sharded and fusion.wanted(
        job.cell.recipe.training.compile, tokens, base.device, base.half
    )


def _say_fallbacks(reporter: Reporter) -> None:
    if fusion.failure():
        reporter.say_once(f"  note: computed without compiling ({fusion.failure()})")
    if failure := native.failure() or flash.failure():
        reporter.say_once(f"  note: attention by matrix products ({failure})")


def _kinds(scores: Sequence[RowScore]) -> tuple[LossOn, ...]:
    # Truncation may leave a set without any response token; the whole text is always there.
    return ("all", "response") if any(s.tokens_response for s in scores) else ("all",)


def _found(places: Places, cell: str, identity: str) -> Run:
    run = find_run(places.results, cell, identity)
    assert run is not None
    return run
