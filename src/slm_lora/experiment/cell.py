"""Train one cell and score its test rows, with what a user sees meanwhile and how it stops."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from slm_lora.adapters.methods import trains_all
from slm_lora.evaluation.scoring import held_out_loss, score
from slm_lora.experiment.job import Job, capped
from slm_lora.experiment.tracking import Trackers
from slm_lora.model.base import Base
from slm_lora.ops import attention_flash, compilation
from slm_lora.ops.kernels import build
from slm_lora.records import Example, LossOn, RowScore, Step
from slm_lora.runtime import distributed
from slm_lora.runtime.progress import Reporter
from slm_lora.runtime.signals import graceful_stop
from slm_lora.training.checkpoint import Checkpointer
from slm_lora.training.loop import TrainingResult, train
from slm_lora.training.schedule import total_steps, training_tokens, usable_examples

Watch = Callable[[Sequence[Step]], None]


def train_cell(
    job: Job,
    base: Base,
    peft_model: nn.Module,
    checkpointer: Checkpointer,
    reporter: Reporter,
    trackers: Trackers,
    watch: Watch | None = None,
) -> TrainingResult:
    """Train an adapter that was attached, from where its checkpoints end.

    Args:
        job: the cell.
        base: with the adapter on it.
        peft_model: the same as PEFT has it.
        checkpointer: saves and resumes.
        reporter: for progress.
        trackers: of the recipe.
        watch: sees all steps so far after each, and may raise to end the training.

    Raises:
        StopRequested: a signal asked for it; what is done is saved.
    """
    section = job.config.training
    compile_validation = scoring_compiles(job, job.data.validation)

    def validate() -> float:
        scores = score(
            base,
            job.data.validation,
            "validation",
            job.config.evaluation.micro_batch_tokens,
            compile_validation,
            on_tokens=lambda done: stop.check(),
        )
        return held_out_loss(scores, section.loss_on).loss

    total = total_steps(len(job.data.train), section)
    shown = 0
    steps: list[Step] = []
    if notice := capped(job):
        reporter.info_once(f"  note: {notice}")
    with (
        graceful_stop() as stop,
        reporter.task(job.name, total, "steps", training_cost(job)) as task,
    ):

        def on_step(step: Step) -> None:
            nonlocal shown
            note = f"loss {step.loss:.3f}"
            if step.validation_loss is not None:
                note += f"  validation {step.validation_loss:.3f}"
            # The first step of a resumed run also counts the steps before it.
            task.advance(1, step.tokens, note, earlier=step.step - shown - 1)
            shown = step.step
            trackers.step(step)
            steps.append(step)
            if watch is not None:
                watch(steps)

        result = train(
            base,
            peft_model,
            job.data.train,
            section,
            job.config.seed,
            validate=validate,
            on_step=on_step,
            on_resume=steps.extend,
            checkpointer=checkpointer,
            stop=stop,
        )
        task.close(
            f"trained {len(result.history)} steps  loss {result.history[-1].loss:.3f}  "
            f"{result.tokens_per_s:.0f} tok/s"
        )
    _say_fallbacks(reporter)
    if skipped := sum(step.skipped for step in result.history):
        reporter.info(f"  note: {skipped} steps were skipped, as their fp16 gradient overflowed")
    if result.rows_without_labels:
        reporter.info(f"  note: {result.rows_without_labels} training rows had no label token")
    return result


def evaluate(
    base: Base, job: Job, label: str, reporter: Reporter
) -> tuple[list[RowScore], dict[str, Any]]:
    """Score the held-out rows of a job; the scores, and the record of them.

    Raises:
        StopRequested: a signal asked for it.
    """
    nn.Module.eval(base.model)
    examples = job.scored_rows
    tokens = sum(example.length for example in examples)
    compiled = scoring_compiles(job, examples)
    began = time.perf_counter()

    def on_tokens(done: int) -> None:
        # Longest rows come first, so tokens, not rows, tell how far it is.
        # The others are about as far.
        task.advance(done * distributed.world_size(), done * distributed.world_size())
        stop.check()

    with (
        graceful_stop() as stop,
        reporter.task(label, tokens, f"{job.scored_set} tokens", scoring_cost(job)) as task,
    ):
        scores = score(
            base,
            examples,
            job.scored_set,
            job.config.evaluation.micro_batch_tokens,
            compiled,
            on_tokens=on_tokens,
        )
        seconds = time.perf_counter() - began
        losses = {kind: held_out_loss(scores, kind) for kind in _kinds(scores)}
        shown = losses[job.config.evaluation.headline]
        task.close(
            f"scored {len(examples)} {job.scored_set} rows  loss {shown.loss:.4f}  "
            f"perplexity {shown.perplexity:.3f}  {tokens / seconds:.0f} tok/s"
        )
    _say_fallbacks(reporter)
    record: dict[str, Any] = {kind: asdict(loss) for kind, loss in losses.items()}
    return scores, record | {
        "headline": job.config.evaluation.headline,
        **({"split": job.scored_set} if job.scored_set != "test" else {}),
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "compiled": compiled and not compilation.failure(),
    }


def training_cost(job: Job) -> float:
    """Floating-point operations of a training, per parameter of the model: forward, and backward
    without the weights' gradients where these are frozen."""
    section = job.config.training
    usable = usable_examples(job.data.train, section)
    tokens = training_tokens(usable, section) if usable else 0
    return (6.0 if trains_all(job.config.adapter) else 4.0) * tokens


def scoring_cost(job: Job) -> float:
    """The same of scoring the held-out rows: forward only."""
    return 2.0 * sum(example.length for example in job.scored_rows)


def scoring_compiles(job: Job, examples: Sequence[Example]) -> bool:
    """Whether scoring these examples compiles."""
    tokens = sum(example.length for example in examples)
    setting = job.config.training.compile
    return compilation.should_compile(setting, tokens, job.device, job.low_precision, job.sharded)


def _say_fallbacks(reporter: Reporter) -> None:
    if compilation.failure():
        reporter.info_once(f"  note: computed without compiling ({compilation.failure()})")
    if failure := build.failure():
        reporter.info_once(f"  note: computed without C++ kernels ({failure})")
    if failure := attention_flash.failure():
        reporter.info_once(f"  note: attention by matrix products ({failure})")


def _kinds(scores: Sequence[RowScore]) -> tuple[LossOn, ...]:
    # Truncation may leave a set without any response token; the whole text is always there.
    return ("all", "response") if any(s.tokens_response for s in scores) else ("all",)
