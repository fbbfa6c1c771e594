"""Metrics of held-out rows: sums of a numerator over sums of a denominator.

Every estimate, interval, comparison and table works on any of them. A new metric is one entry of
`METRICS`; where it needs a value that rows do not have yet, scoring puts it into
`RowScore.values` under a name of its own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from slm_lora.config.forgetting import DRIFT
from slm_lora.records import RowScore

Parts = Callable[[RowScore], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Metric:
    """A ratio of sums over rows.

    Attributes:
        name: key in recipes and JSON files.
        title: heading of a column.
        scope: what it is computed over, in a sentence.
        unit: of a value.
        parts: numerator and denominator of a row; a denominator of 0 leaves the row out.
        higher_is_better: direction; a loss is better when lower.
        has_perplexity: whether its exponential is a perplexity.
        margin: of equivalence, in the metric's unit; 0: equivalence is not tested; None: the
            recipe's, which is in nats per token.
        compared: whether reports compare settings in it even where it is not the headline; forms
            of one loss are compared once.
        own_rows: whether its rows are not the test rows but a set of its own, and its values are
            changes from the base (`runs.forgetting`).
        task: whose documents are its rows; empty: the test rows.
    """

    name: str
    title: str
    scope: str
    unit: str
    parts: Parts
    higher_is_better: bool = False
    has_perplexity: bool = False
    margin: float | None = 0.0
    compared: bool = True
    own_rows: bool = False
    task: str = ""

    def cost(self, value: float) -> float:
        """The value, or its negative, so that lower is better."""
        return -value if self.higher_is_better else value

    def is_better(self, difference: float) -> bool:
        """Whether a difference (other minus reference) is an improvement."""
        return self.cost(difference) < 0


def row_value(name: str) -> Parts:
    """Parts of a value that scoring stored in `RowScore.values`; rows without it are left out."""
    return lambda row: row.values.get(name, (0.0, 0.0))


_SHARE = "share of rows"
OF_REPLIES = "replies to test rows"
"""Scope of metrics that a section `replies` measures."""
BY_JUDGE = "replies to test rows, each compared with the base's by a judge"
"""Scope of the win rate; 0.5 for the base."""

_ALL = Metric(
    name="all",
    title="Loss",
    scope="the whole text",
    unit="nats per token",
    parts=lambda row: (row.nll_all, row.tokens_all),
    has_perplexity=True,
    margin=None,
    compared=False,
)

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        _ALL,
        Metric(
            name="response",
            title="Response loss",
            scope="the response",
            unit="nats per token",
            parts=lambda row: (row.nll_response, row.tokens_response),
            has_perplexity=True,
            margin=None,
            compared=False,
        ),
        Metric(
            name="bits_per_byte",
            title="Bits per byte",
            scope="the whole text",
            unit="bits per UTF-8 byte",
            parts=lambda row: (row.nll_all / math.log(2), row.bytes_all),
            compared=False,
        ),
        Metric(
            name="response_bits_per_byte",
            title="Response bits per byte",
            scope="the response",
            unit="bits per UTF-8 byte",
            parts=lambda row: (row.nll_response / math.log(2), row.bytes_response),
            compared=False,
        ),
        *(
            Metric(
                name=name,
                title=title,
                scope=OF_REPLIES,
                unit=unit,
                parts=row_value(name),
                higher_is_better=True,
            )
            for name, title, unit in (
                ("exact_match", "Exact match", _SHARE),
                ("token_f1", "Token F1", "0 to 1"),
                ("rouge_l", "ROUGE-L", "0 to 1"),
                ("chrf", "chrF", "0 to 1"),
                ("number", "Number equal", _SHARE),
                ("valid_json", "Valid JSON", _SHARE),
                ("label", "Label accuracy", _SHARE),
                ("pattern", "Pattern found", _SHARE),
                ("json_schema", "JSON of the schema", _SHARE),
            )
        ),
        Metric(
            name="win_rate",
            title="Win rate",
            scope=BY_JUDGE,
            unit="0 to 1",
            parts=row_value("win_rate"),
            higher_is_better=True,
        ),
        Metric(
            name="ended",
            title="Ended by itself",
            scope=OF_REPLIES,
            unit=_SHARE,
            parts=row_value("ended"),
            higher_is_better=True,
            compared=False,
        ),
        Metric(
            name="reply_tokens",
            title="Length of a reply",
            scope=OF_REPLIES,
            unit="tokens",
            parts=row_value("reply_tokens"),
            compared=False,
        ),
    )
}
"""All metrics, by name; the recipe's headline is one of ``all`` and ``response``."""


def add_own_metric(name: str) -> None:
    """Add a metric of the user's own, a mean over rows of `RowScore.values`, if it is new."""
    METRICS.setdefault(
        name,
        Metric(
            name=name,
            title=name,
            scope=OF_REPLIES,
            unit="mean over rows",
            parts=row_value(name),
            higher_is_better=True,
        ),
    )


FORGETTING = "forgetting"


def add_row_set_metric(measure: str) -> Metric:
    """The metric of ``drift``, or of forgetting on a further set; added where it is new.

    Its margin is the run's: the recipe has one for every set.
    """
    is_drift = measure == DRIFT
    name = DRIFT if is_drift else f"{FORGETTING}:{measure}"
    metric = Metric(
        name=name,
        title="Drift" if is_drift else f"Forgetting of {measure}",
        scope=(
            "replies of the base to general prompts: KL(base ‖ tuned) per token"
            if is_drift
            else f"the rows of {measure}: loss minus that of the base"
        ),
        unit="nats per token",
        parts=row_value(name),
        margin=None,
        own_rows=True,
    )
    return METRICS.setdefault(name, metric)


def task_metric_name(task: str, metric: str) -> str:
    """Name of a task's metric; no other metric has a dot in its name."""
    return f"{task}.{metric}"


def add_task_metric(task: str, metric: str, higher_is_better: bool, unit: str) -> None:
    """Add a metric of a task, a ratio of sums over its documents, if it is new."""
    name = task_metric_name(task, metric)
    METRICS.setdefault(
        name,
        Metric(
            name=name,
            title=name,
            scope=f"the documents of {task}",
            unit=unit,
            parts=row_value(name),
            higher_is_better=higher_is_better,
            task=task,
        ),
    )


@functools.cache
def mean_over_rows(metric: Metric) -> Metric:
    """The mean of the rows' own values, where a long row counts as much as a short one."""

    def own(row: RowScore) -> tuple[float, float]:
        numerator, denominator = metric.parts(row)
        return (numerator / denominator, 1.0) if denominator else (0.0, 0.0)

    return replace(metric, title=f"{metric.title}, mean over rows", parts=own)
