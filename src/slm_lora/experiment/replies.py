"""Replies of finished runs to test rows: generated once, kept beside the runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_lora.adapters.multi import AdapterSet
from slm_lora.config.replies import RepliesSection
from slm_lora.data.prompts import Prompt, prompts_from_rows
from slm_lora.errors import DataError, UsageError
from slm_lora.evaluation.batched_generation import Reply, generate_replies
from slm_lora.evaluation.generation import Sampling, prompt_ids
from slm_lora.evaluation.reply_metrics import ReplyMetric, reply_metrics
from slm_lora.experiment.finished import load_finished, with_jobs
from slm_lora.experiment.job import Job
from slm_lora.experiment.paths import ExperimentPaths
from slm_lora.runs.folder import Run
from slm_lora.runs.replies import RowReply, read_replies, replies_file, write_replies
from slm_lora.runtime.progress import Reporter
from slm_lora.runtime.signals import graceful_stop


@dataclass(frozen=True)
class ReplyScorer:
    """Generates and measures the replies of an experiment's runs.

    Attributes:
        section: of the recipe.
        metrics: by name.
        prompts: by the id of their test row, in the order of a seeded hash.
    """

    section: RepliesSection
    metrics: Mapping[str, ReplyMetric]
    prompts: Mapping[str, Prompt]

    def run(
        self, jobs: Sequence[Job], runs: Sequence[Run], paths: ExperimentPaths, reporter: Reporter
    ) -> None:
        """Reply for every run that has no replies of these settings yet.

        Args:
            jobs: the cells.
            runs: their finished runs and those of their bases.
            paths: of the experiment.
            reporter: for progress.

        Raises:
            DataError: a function of the user's own raised.
            StopRequested: a signal asked for it; finished replies are kept.
        """
        reporter.overall = None  # counts trainings and scorings
        for run, job in with_jobs(jobs, runs):
            path = replies_file(run.folder)
            if self._is_done(path):
                reporter.info(f"  {run.cell}  replied earlier")
                continue
            variants, name = load_finished(job, run, paths)
            replies = self._replies(variants, name, run.cell, reporter)
            write_replies(path, run.record.hash, self._settings(), list(self.metrics), replies)

    def _settings(self) -> dict[str, Any]:
        return self.section.model_dump(mode="json", exclude={"on_bad_row"})

    def _is_done(self, path: Path) -> bool:
        there = read_replies(path)
        return there is not None and there[0].settings == self._settings()

    def _replies(
        self, variants: AdapterSet, name: str, label: str, reporter: Reporter
    ) -> list[RowReply]:
        limit = variants.max_length - self.section.max_new_tokens
        ids = {row: prompt_ids(variants, name, prompt) for row, prompt in self.prompts.items()}
        short = {row: own for row, own in ids.items() if len(own) < limit}
        if left_out := len(ids) - len(short):
            reporter.info_once(
                f"  note: {left_out} test rows have no room for a reply of "
                f"{self.section.max_new_tokens} tokens; left out of the replies"
            )
        with graceful_stop() as stop, reporter.task(label, len(short), "replies") as task:

            def on_reply(reply: Reply) -> None:
                task.advance(1, len(reply.ids))
                stop.check()

            sampling = Sampling(self.section.max_new_tokens)
            replies = generate_replies(variants, name, list(short.values()), sampling, on_reply)
            rows = [
                self._measure(row, reply, reporter)
                for row, reply in zip(short, replies, strict=True)
            ]
            task.close(f"replied to {len(rows)} test rows  {_summary(rows, list(self.metrics))}")
        return rows

    def _measure(self, row: str, reply: Reply, reporter: Reporter) -> RowReply:
        prompt = self.prompts[row]
        text = reply.text.strip()
        values: dict[str, float] = {}
        for name, metric in self.metrics.items():
            try:
                value = metric(prompt.turns[-1].content, text, prompt.reference)
            except Exception as error:  # of the user's own function
                reason = (str(error) or type(error).__name__).splitlines()[0]
                message = f"replies.functions.{name}: {prompt.source}: {reason}"
                if self.section.on_bad_row == "fail":
                    raise DataError(f"{message} (or replies.on_bad_row: skip)") from error
                reporter.info(f"  note: {message}; left out")
                continue
            if value is not None:
                values[name] = value
        return RowReply(row, text, len(reply.ids), reply.finished, values)


def reply_scorer(section: RepliesSection, jobs: Sequence[Job]) -> ReplyScorer:
    """What replies to the test rows of an experiment; call it before anything is trained.

    Raises:
        UsageError: adapters are not kept, a metric cannot be loaded, or no reference has a label.
        DataError: the test rows have no prompts.
    """
    if not jobs[0].options.keep_adapters:
        raise UsageError("replies: needs the adapters: leave out keep_adapters: false")
    tests = [frozenset(example.row_id for example in job.data.test) for job in jobs]
    if len({*tests}) > 1:
        raise UsageError("replies: the cells of the grid have different test rows")
    test = tests[0]
    rows = [row for row in jobs[0].rows.rows if row.row_id in test]
    prompts = prompts_from_rows(rows, section.rows or len(rows))
    if not prompts:
        raise DataError("replies: the test rows have no prompt and response (plain text)")
    by_row = {prompt.as_row.row_id: prompt for prompt in prompts}
    metrics = reply_metrics(section)
    _require_values(metrics, "label", by_row, "replies.labels: no test row's response is one of")
    _require_values(
        metrics, "number", by_row, "replies.metrics: number: no test row's response has"
    )
    return ReplyScorer(section, metrics, by_row)


def _require_values(
    metrics: Mapping[str, ReplyMetric], name: str, prompts: Mapping[str, Prompt], message: str
) -> None:
    metric: Callable[[str, str, str], float | None] | None = metrics.get(name)
    if metric and all(metric("", "", prompt.reference) is None for prompt in prompts.values()):
        wanted = {"label": "them", "number": "a number"}[name]
        raise UsageError(f"{message} {wanted}")


def _summary(rows: Sequence[RowReply], metrics: Sequence[str]) -> str:
    """Mean of each metric over the rows that have it."""
    means = []
    for name in metrics:
        values = [row.values[name] for row in rows if name in row.values]
        if values:
            means.append(f"{name} {sum(values) / len(values):.3f}")
    return "  ".join(means)
