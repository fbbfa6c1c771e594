"""A run together with its per-row scores: what statistics and reports work on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from slm_lora.config.grid import setting_of
from slm_lora.config.schema import LATER_KEYS
from slm_lora.errors import IntegrityError
from slm_lora.records import RowScore
from slm_lora.runs.folder import AGAIN, RUN_FILE, SCORES_FILE, Run
from slm_lora.runs.forgetting import RowSetScores, read_row_sets, without_stale
from slm_lora.runs.judge import with_win_rate
from slm_lora.runs.metrics import METRICS, Metric
from slm_lora.runs.replies import replies_file, with_reply_values
from slm_lora.runs.scores import read_scores
from slm_lora.runs.tasks import read_documents


@dataclass(frozen=True)
class ScoredRun:
    """A run with its scores.

    Attributes:
        run: its record.
        scores: of the test rows.
        headline: name of the metric behind the tables.
        tuned: keys whose value was chosen for each setting, so that settings which differ in them
            alone are one.
        row_sets: scores on other rows, by the name of their metric.
        documents: of standard tasks, by task.
    """

    run: Run
    scores: tuple[RowScore, ...]
    headline: str = "all"
    tuned: tuple[str, ...] = ()
    row_sets: Mapping[str, RowSetScores] = field(default_factory=dict)
    documents: Mapping[str, tuple[RowScore, ...]] = field(default_factory=dict)

    def scores_of(self, metric: Metric) -> tuple[RowScore, ...]:
        """The rows of a metric: the test rows, the documents of a task, or a set of its own; empty
        if not measured."""
        if metric.task:
            return self.documents.get(metric.task, ())
        if not metric.own_rows:
            return self.scores
        row_set = self.row_sets.get(metric.name)
        return row_set.scores if row_set else ()

    @property
    def metric(self) -> Metric:
        """The headline."""
        return METRICS[self.headline]

    @property
    def is_base(self) -> bool:
        """Whether this is the base model without an adapter."""
        return self.run.record.adapter is None

    @property
    def resolved(self) -> Mapping[str, Any]:
        """The resolved recipe of the run."""
        recipe = self.run.raw["recipe"]
        return {**recipe, **{name: {**keys, **recipe[name]} for name, keys in LATER_KEYS.items()}}

    def setting(self, key: str) -> Any:
        """The value at a dotted key of the resolved recipe."""
        return setting_of(self.resolved, key)


def has_metric(run: ScoredRun, metric: Metric) -> bool:
    """Whether any row of a run has a metric."""
    return any(metric.parts(score)[1] for score in run.scores_of(metric))


def read_scored_run(run: Run) -> ScoredRun:
    """A run with its scores, the values of its replies, its drift and losses on further sets, and
    its results in tasks, if there are any.

    Raises:
        IntegrityError: a file of these is broken.
    """
    scores = tuple(read_scores(run.scores_path))
    _check_losses(run, scores)
    scores = with_reply_values(scores, replies_file(run.folder), run.record.hash)
    scores = with_win_rate(scores, run.folder, run.record.hash)
    return ScoredRun(
        run,
        scores,
        run.record.evaluation.headline,
        row_sets=read_row_sets(run.folder, run.record.hash),
        documents=read_documents(run.folder, run.record.hash),
    )


def _check_losses(run: Run, scores: Sequence[RowScore]) -> None:
    """Raise IntegrityError where run.json has another loss than its rows."""
    for name in ("all", "response"):
        recorded = run.record.evaluation.loss(name)
        if recorded is None:
            continue
        parts = [METRICS[name].parts(score) for score in scores]
        nats, tokens = (sum(values) for values in zip(*parts, strict=True))
        same = tokens == recorded.tokens and math.isclose(
            nats, recorded.loss * recorded.tokens, rel_tol=1e-6, abs_tol=1e-6
        )
        if not same:
            shown = f"{nats / tokens:.6f}" if tokens else "none"
            raise IntegrityError(
                f"{run.folder / RUN_FILE}: evaluation.{name} has loss {recorded.loss:.6f} over "
                f"{recorded.tokens} tokens, the rows in {SCORES_FILE} have {shown} over "
                f"{tokens:.0f}; {AGAIN}"
            )


def read_scored_runs(
    runs: Sequence[Run], headline: str | None = None, tuned: Sequence[str] = ()
) -> list[ScoredRun]:
    """Runs with their scores: base first, then by seed, data size, rank and name.

    All have one headline: the given, or that of the first run.
    """

    def order(line: ScoredRun) -> tuple[Any, ...]:
        recipe = line.resolved
        size = recipe["data"]["size"] or 0
        return (
            not line.is_base, recipe["seed"], recipe["data_seed"], size, recipe["adapter"]["r"],
            line.run.cell,
        )  # fmt: skip

    lines = _with_common_values(sorted(map(read_scored_run, runs), key=order))
    headline = headline or lines[0].headline
    of_bases = [line.row_sets for line in lines if line.is_base]
    return [
        replace(
            line,
            headline=headline,
            tuned=tuple(tuned),
            row_sets=line.row_sets if line.is_base else without_stale(line.row_sets, of_bases),
        )
        for line in lines
    ]


def _with_common_values(runs: Sequence[ScoredRun]) -> list[ScoredRun]:
    """Runs without values of rows for which another run lacks them: a function of the user's own
    may fail on the reply of one run only, and runs compare on the same rows."""
    partial: dict[str, set[str]] = {}
    for name in {name for run in runs for score in run.scores for name in score.values}:
        own = [{score.row_id for score in run.scores if name in score.values} for run in runs]
        own = [rows for rows in own if rows]
        if missing := set[str]().union(*own) - own[0].intersection(*own[1:]):
            partial[name] = missing
    if not partial:
        return [*runs]

    def common(score: RowScore) -> RowScore:
        values = {
            name: value
            for name, value in score.values.items()
            if score.row_id not in partial.get(name, ())
        }
        return replace(score, values=values)

    return [replace(run, scores=tuple(map(common, run.scores))) for run in runs]
