"""What a setting lost against its base: drift, and forgetting on further sets with its margin."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from slm_lora.config.forgetting import DRIFT
from slm_lora.runs.metrics import METRICS, Metric
from slm_lora.runs.scored_run import ScoredRun, has_metric
from slm_lora.stats.inference import LEAST_GROUPS, interval
from slm_lora.stats.settings import Setting, values_of

State = Literal["shown", "not shown", "violated"]
"""Of the statement that less than the margin is forgotten."""


@dataclass(frozen=True)
class Change:
    """Drift of a setting, or its forgetting on one set.

    Attributes:
        metric: ``drift``, or ``forgetting:<set>``.
        value: mean over seeds, nats per token.
        low, high: 95 % interval over rows (or prompts) and seeds; infinite from one group.
        margin: of non-inferiority; 0 for drift.
        loss, base_loss: on the set, means over seeds.
        rows: of the set, or prompts.
        groups: of related rows.
        seeds: of the setting.
    """

    metric: Metric
    value: float
    low: float
    high: float
    margin: float
    loss: float
    base_loss: float
    rows: int
    groups: int
    seeds: int

    @property
    def is_drift(self) -> bool:
        """Whether it is no set's."""
        return self.metric.name == DRIFT

    @property
    def name(self) -> str:
        """Of the set, or ``drift``."""
        return self.metric.name.rpartition(":")[2]

    @property
    def state(self) -> State:
        """By the ends of the interval; ten groups of rows at least show something."""
        if self.groups >= LEAST_GROUPS and self.high < self.margin:
            return "shown"
        return "violated" if self.groups >= LEAST_GROUPS and self.low > self.margin else "not shown"

    def record(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        known = math.isfinite(self.low + self.high)
        record = {
            "value": self.value,
            "low": self.low if known else None,
            "high": self.high if known else None,
            "rows": self.rows,
            "groups": self.groups,
            "seeds": self.seeds,
        }
        if self.is_drift:
            return record
        return {
            **record,
            "loss": self.loss,
            "base_loss": self.base_loss,
            "margin": self.margin,
            "less_than_margin": self.state,
        }


def measured(runs: Sequence[ScoredRun]) -> list[Metric]:
    """Metrics of changes from the base that all runs have, drift first."""
    metrics = [
        metric
        for metric in METRICS.values()
        if metric.own_rows and runs and all(has_metric(run, metric) for run in runs)
    ]
    return sorted(metrics, key=lambda metric: metric.name != DRIFT)


def changes(setting: Setting) -> list[Change]:
    """All that was measured of a setting in all of its runs."""
    return [_change(setting, metric) for metric in measured(setting.runs)]


def _change(setting: Setting, metric: Metric) -> Change:
    sample = values_of(setting, metric)
    low, high = interval(sample, 0.95)
    row_sets = [run.row_sets[metric.name] for run in setting.runs]
    return Change(
        metric,
        sample.value,
        low,
        high,
        row_sets[0].margin,
        sum(own.loss for own in row_sets) / len(row_sets),
        sum(own.base_loss for own in row_sets) / len(row_sets),
        len(row_sets[0].scores),
        sample.groups,
        len(setting.runs),
    )
