"""Drift and forgetting of finished runs: measured once, kept beside the runs."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_lora.adapters.multi import BASE
from slm_lora.config.forgetting import DRIFT, ForgettingSection
from slm_lora.data.further_sets import FurtherSet, read_further_set
from slm_lora.errors import UsageError
from slm_lora.evaluation.batched_generation import Reply
from slm_lora.evaluation.forgetting import (
    Variant,
    divergences,
    general_prompts,
    reply_example,
    sample_from_base,
    token_losses,
)
from slm_lora.experiment.finished import load_finished, load_job_base, with_jobs
from slm_lora.experiment.job import Job
from slm_lora.experiment.paths import ExperimentPaths
from slm_lora.model.loading import load_tokenizer
from slm_lora.records import PIECE, Example, LossOn, Row, Turn
from slm_lora.runs.folder import Run
from slm_lora.runs.forgetting import (
    REPLIES,
    BaseReply,
    ForgettingHeader,
    RowChange,
    forgetting_file,
    read_forgetting,
    write_forgetting,
)
from slm_lora.runtime.checksums import content_hash
from slm_lora.runtime.progress import Reporter
from slm_lora.runtime.signals import graceful_stop


@dataclass(frozen=True)
class ForgettingScorer:
    """Measures drift and forgetting of an experiment's runs.

    Attributes:
        section: of the recipe.
        sets: further held-out sets, by name.
        loss_on: tokens of the loss on these: those of the headline.
    """

    section: ForgettingSection
    sets: Mapping[str, FurtherSet]
    loss_on: LossOn

    @property
    def measures(self) -> tuple[str, ...]:
        """``drift``, and the names of the sets."""
        return (*([DRIFT] if self.section.drift else []), *self.sets)

    def notes(self) -> list[str]:
        """On what the sets hold, one line each."""
        return [note for own in self.sets.values() for note in own.notes]

    def run(
        self, jobs: Sequence[Job], runs: Sequence[Run], paths: ExperimentPaths, reporter: Reporter
    ) -> None:
        """Measure every run that was not measured with these settings yet, bases first.

        Args:
            jobs: the cells.
            runs: their finished runs and those of their bases.
            paths: of the experiment.
            reporter: for progress.

        Raises:
            StopRequested: a signal asked for it; finished measures are kept.
            IntegrityError: a file of an earlier measurement is broken.
        """
        reporter.overall = None  # counts trainings and scorings
        bases = {run.record.hash: run for run in runs if run.record.adapter is None}
        tuned = [run for run in runs if run.record.adapter is not None]
        for run, job in with_jobs(jobs, [*bases.values(), *tuned]):
            base = run if run.record.adapter is None else bases[job.base_identity]
            _RunMeasurement(self, job, run, base, paths, reporter).make_missing()


@dataclass(frozen=True)
class _RunMeasurement:
    """One run, with all of its measures."""

    scorer: ForgettingScorer
    job: Job
    run: Run
    base: Run
    paths: ExperimentPaths
    reporter: Reporter

    def make_missing(self) -> None:
        if self.is_base and self.scorer.section.drift:
            self._sample_replies()
        measures = self.scorer.measures
        missing = [measure for measure in measures if not self._is_done(measure)]
        for measure in missing:
            self._make(measure)
        if not missing:
            self.reporter.info(f"  {self.run.cell}  {', '.join(measures)}: measured earlier")

    @property
    def is_base(self) -> bool:
        return self.run is self.base

    @functools.cached_property
    def variant(self) -> Variant:
        """The run's model."""
        return Variant(*load_finished(self.job, self.run, self.paths))

    @functools.cached_property
    def reference(self) -> Variant:
        """Its base: the same weights without the adapter, or another model in memory."""
        if len(self.variant.variants.names) > 1:
            return Variant(self.variant.variants, BASE)
        return Variant(load_job_base(self.job), BASE)

    @property
    def micro_batch_tokens(self) -> int:
        return self.job.config.evaluation.micro_batch_tokens

    def _settings(self, measure: str) -> dict[str, Any]:
        section = self.scorer.section
        if measure not in (DRIFT, REPLIES):
            own = self.scorer.sets[measure]
            return {
                "rows": len(own.examples),
                "origin": own.origin,
                "template": own.template,
                "loss_on": self.scorer.loss_on,
            }
        prompts = general_prompts(section.prompts)
        return {
            "prompts": len(prompts),
            "prompts_sha256": content_hash(prompts),
            "template": self.job.data.template.kind,
            "max_new_tokens": section.max_new_tokens,
            "temperature": 1.0,
        }

    def _source(self, measure: str) -> str:
        """SHA-256 of what is scored; of a tuned run on a set, with the losses of its base."""
        if measure == REPLIES:
            return ""
        if measure == DRIFT:
            return self._replies()[0].sha256
        if self.is_base:
            return self.scorer.sets[measure].digest
        return self._base_lines(measure)[0].sha256

    def _margin(self, measure: str) -> float:
        return self.scorer.section.also[measure].margin if measure in self.scorer.sets else 0.0

    def _path(self, measure: str) -> Path:
        return forgetting_file(self.run.folder, measure)

    def _base_lines(self, measure: str) -> tuple[ForgettingHeader, list[RowChange]]:
        there = read_forgetting(forgetting_file(self.base.folder, measure), RowChange)
        assert there is not None, "bases are measured first"
        return there

    def _replies(self) -> tuple[ForgettingHeader, list[BaseReply]]:
        there = read_forgetting(forgetting_file(self.base.folder, REPLIES), BaseReply)
        assert there is not None, "sampled before anything is scored"
        return there

    def _is_current(self, header: ForgettingHeader, measure: str) -> bool:
        return (
            header.run == self.run.record.hash
            and header.settings == self._settings(measure)
            and header.source == self._source(measure)
        )

    def _is_done(self, measure: str) -> bool:
        """Whether a measure is finished; another margin alone is written into its file."""
        there = read_forgetting(self._path(measure), RowChange)
        if there is None or not self._is_current(there[0], measure):
            return False
        if there[0].margin != self._margin(measure):
            self._write(measure, there[1])
        return True

    def _write(self, measure: str, lines: Sequence[RowChange] | Sequence[BaseReply]) -> None:
        write_forgetting(
            self._path(measure),
            self.run.record.hash,
            self._settings(measure),
            self._source(measure),
            lines,
            self._margin(measure),
        )

    def _sample_replies(self) -> None:
        path = self._path(REPLIES)
        there = read_forgetting(path, BaseReply)
        if there is not None and self._is_current(there[0], REPLIES):
            return
        variants, section = self.variant.variants, self.scorer.section
        prompts = {
            f"{number:03d}": prompt
            for number, prompt in enumerate(general_prompts(section.prompts), start=1)
        }
        tokenizer = variants.row_tokenizers[BASE]
        ids = {row: tokenizer.prompt([Turn("user", prompt)]) for row, prompt in prompts.items()}
        limit = variants.max_length - section.max_new_tokens
        short = {row: own for row, own in ids.items() if len(own) < limit}
        if not short:
            raise UsageError(
                f"forgetting.max_new_tokens = {section.max_new_tokens}: no room for a prompt "
                f"within the {variants.max_length} tokens of {self.job.source.name}"
            )
        if left_out := len(ids) - len(short):
            self.reporter.info(
                f"  note: {left_out} general prompts have no room for a reply of "
                f"{section.max_new_tokens} tokens; left out of the drift"
            )
        with (
            graceful_stop() as stop,
            self.reporter.task(self.run.cell, len(short), "replies") as task,
        ):

            def on_reply(reply: Reply) -> None:
                task.advance(1, len(reply.ids))
                stop.check()

            replies = sample_from_base(
                variants, list(short.values()), section.max_new_tokens, on_reply
            )
            task.close(f"sampled replies to {len(replies)} general prompts")
        self._write(
            REPLIES,
            [
                BaseReply(row, prompts[row], reply.text, short[row], list(reply.ids))
                for row, reply in zip(short, replies, strict=True)
            ],
        )

    def _make(self, measure: str) -> None:
        if measure == DRIFT:
            examples = [
                reply_example(reply.row, reply.prompt_ids, reply.ids)
                for reply in self._replies()[1]
            ]
        else:
            examples = list(self.scorer.sets[measure].examples)
        tokens = sum(example.length for example in examples)
        with graceful_stop() as stop, self.reporter.task(self.run.cell, tokens, "tokens") as task:

            def on_tokens(count: int) -> None:
                task.advance(count, count)
                stop.check()

            if measure == DRIFT:
                lines = self._drift(examples, on_tokens)
            else:
                lines = self._losses(measure, examples, on_tokens)
            self._write(measure, lines)
            task.close(f"{measure} {_summary(measure, lines, self.is_base)}")

    def _drift(self, examples: Sequence[Example], on_tokens: Any) -> list[RowChange]:
        sums = (
            {}
            if self.is_base  # zero by definition
            else divergences(
                self.reference, self.variant, examples, self.micro_batch_tokens, on_tokens
            )
        )
        return [
            RowChange(own.row_id, own.row_id, int(own.response.sum()), sums.get(own.row_id, 0.0), 0)
            for own in examples
        ]

    def _losses(self, measure: str, examples: Sequence[Example], on_tokens: Any) -> list[RowChange]:
        losses = token_losses(
            self.variant, examples, self.scorer.loss_on, self.micro_batch_tokens, on_tokens
        )
        before = {row: loss.nats for row, loss in losses.items()}
        if not self.is_base:
            before = {line.row: line.nats for line in self._base_lines(measure)[1]}
        return [
            RowChange(
                own.row_id,
                own.group_id,
                losses[own.row_id].tokens,
                losses[own.row_id].nats,
                before[own.row_id],
            )
            for own in examples
        ]


def _summary(measure: str, lines: Sequence[RowChange], is_base: bool) -> str:
    tokens = max(1, sum(line.tokens for line in lines))
    loss = math.fsum(line.nats for line in lines) / tokens
    change = loss - math.fsum(line.base_nats for line in lines) / tokens
    if measure == DRIFT:
        return f"{loss:.4f} nats per token over {len(lines)} replies"
    added = "" if is_base else f", {change:+.4f} from the base"
    return f"loss {loss:.4f}{added}"


def forgetting_scorer(section: ForgettingSection, jobs: Sequence[Job]) -> ForgettingScorer:
    """What measures the runs of an experiment; call it before anything is trained.

    Raises:
        UsageError: adapters are not kept, or the bases have different tokenizers.
        SlmLoraError: a further set cannot be read, or has rows of the training set.
    """
    first = jobs[0]
    if not first.options.keep_adapters:
        raise UsageError("forgetting: needs the adapters: leave out keep_adapters: false")
    if len({job.data.held_out_hash for job in jobs}) > 1:
        raise UsageError(
            "forgetting: the bases of the grid have different tokenizers; run them as "
            "experiments of their own"
        )
    sets = {}
    if section.also:
        tokenizer, trained = load_tokenizer(first.source), list(_trained_rows(jobs))
        for name, own in section.also.items():
            sets[name] = read_further_set(
                name,
                own,
                trained,
                tokenizer,
                first.data.template,
                first.data.rule,
                first.config.data.max_length,
            )
    return ForgettingScorer(section, sets, first.config.evaluation.headline)


def _trained_rows(jobs: Sequence[Job]) -> Iterator[Row]:
    """Every row that any cell is trained on, once."""
    seen: set[str] = set()
    for job in jobs:
        ids = {example.row_id.split(PIECE)[0] for example in job.data.train} - seen
        seen |= ids
        yield from (row for row in job.rows.rows if row.row_id in ids)
