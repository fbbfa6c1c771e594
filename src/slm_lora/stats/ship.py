"""Whether a setting meets conditions: met, violated or undecided, each with its interval.

Every condition has an interval whose lower and upper end have one-sided errors of their own. A
condition is met if the whole interval is on the required side of its bound, violated if it is on
the other side, else undecided.

*Ship* needs all conditions met. If one is not fulfilled in truth, a false "ship" takes a false
"met" of that very condition, so each is tested at the full 5 %, one-sided, whatever their number
(intersection-union test, Berger 1982). *Do not ship* takes a single violated condition, and each of
m may be found violated by chance, so each is tested at 5 % / m (Bonferroni; Holm's procedure begins
with the same level, and one violation is enough). Either error is at most 5 %.

A setting that was recommended out of k by the same test rows looks better than it is: both levels
are then divided by k too, which holds whichever was recommended.

Shares, metrics whose rows are all 0 or 1, have no t interval near 0 and 1: with all rows alike its
width is zero. Their intervals are the wider, on each side, of the usual one and of Clopper and
Pearson's (1934) with the effective number of groups as sample size (Korn and Graubard 1998). A
difference of two shares is that of the share of rows gained and of rows lost, each at half of the
error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import betaincinv

from slm_lora.config.conditions import Condition
from slm_lora.config.forgetting import DRIFT
from slm_lora.errors import UsageError
from slm_lora.runs.metrics import FORGETTING, METRICS, Metric, row_value
from slm_lora.runs.scored_run import ScoredRun, has_metric
from slm_lora.stats.clustered import effective_groups
from slm_lora.stats.comparisons import ALPHA
from slm_lora.stats.estimates import Paired
from slm_lora.stats.inference import LEAST_GROUPS
from slm_lora.stats.power import Needed, needed_beyond
from slm_lora.stats.regret import NO_REGRET, Regret
from slm_lora.stats.selection_regret import own_best_interval
from slm_lora.stats.settings import Setting, pair_runs, sample_of, values_of

State = Literal["met", "violated", "undecided"]
Decision = Literal["ship", "do not ship", "not enough evidence"]
GAIN = "gain"
"""The measurement of the base's cost minus the setting's: above zero the setting is better."""
MOST_ROWS = 10_000_000
"""A plan for more is no plan."""

Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class Measurement:
    """A metric of a setting, or its gain over the base.

    Attributes:
        sample: values by unit and group.
        first, second: regrets of tuned values, of the two sides of a gain.
        rows: test rows that have the metric.
        unit: of a value.
        limits: least and largest value of a share or of a difference of two; else None.
        noun: of its rows.
    """

    sample: Paired
    first: Regret
    second: Regret
    rows: int
    unit: str
    limits: Interval | None
    noun: str = "test rows"

    @property
    def groups(self) -> int:
        """Groups of rows."""
        return self.sample.groups

    def interval(self, error: float) -> Interval:
        """Lower and upper end, each with a one-sided error."""
        if self.sample.groups < 2:
            return -math.inf, math.inf
        low, high = own_best_interval(self.sample, 1 - 2 * error, self.first, self.second)
        if self.limits is not None:
            exact_low, exact_high = self.exact(error)
            least, most = self.limits
            return max(least, min(low, exact_low)), min(most, max(high, exact_high))
        if low == high and 0.5**self.sample.groups > error:
            return -math.inf, math.inf  # no variation seen: as rare as all signs alike
        return low, high

    def exact(self, error: float, times: float = 1.0) -> Interval:
        """Of a share, or of a difference of two: the part of the interval that needs no variation.

        Args:
            error: one-sided, of each end.
            times: sample size in multiples of the observed.
        """
        size = times * effective_groups(self.sample.tokens)
        total = self.sample.tokens.sum()
        if self.limits == (0.0, 1.0):
            return _clopper_pearson(self.sample.value, size, error)
        # By unit and group, so that gained and lost rows of two seeds do not cancel.
        gained, lost = (
            float(np.maximum(part, 0.0).mean(0).sum() / total)
            for part in (self.sample.nats, -self.sample.nats)
        )
        most, least = (_clopper_pearson(share, size, error / 2) for share in (gained, lost))
        return most[0] - least[1], most[1] - least[0]


@dataclass(frozen=True, eq=False)
class Largest(Measurement):
    """The largest of several measurements; sample and rows are those of the largest value.

    Its upper end is the largest of theirs: the true largest lies below its own with the error of
    one. Its lower end is the largest of theirs at an equal part of the error each (Bonferroni).
    """

    parts: tuple[Measurement, ...] = ()

    @property
    def groups(self) -> int:
        """Of the set with the fewest."""
        return min(part.groups for part in self.parts)

    def interval(self, error: float) -> Interval:
        """Lower and upper end, each with a one-sided error."""
        lows = [part.interval(error / len(self.parts))[0] for part in self.parts]
        return max(lows), max(part.interval(error)[1] for part in self.parts)


def _clopper_pearson(share: float, size: float, error: float) -> Interval:
    """Exact interval of a binomial share, each end at a one-sided error; a sample size need not be
    whole."""
    successes, failures = share * size, (1 - share) * size
    least = 1e-9 * size
    low = 0.0 if successes <= least else float(betaincinv(successes, failures + 1, error))
    high = 1.0 if failures <= least else float(betaincinv(successes + 1, failures, 1 - error))
    return low, high


@dataclass(frozen=True)
class Judged:
    """A condition with what was measured.

    Attributes:
        condition: that is judged.
        measurement: of the setting.
        state: met, violated or undecided.
        low, high: interval; infinite from one group.
        error_met: one-sided error of the end that shows the condition met.
        error_violated: of the other end.
        needed: test rows and seeds of an experiment that decides, if the measured value is the
            true one; None if decided, and where no practical number does.
    """

    condition: Condition
    measurement: Measurement
    state: State
    low: float
    high: float
    error_met: float
    error_violated: float
    needed: Needed | None

    @property
    def value(self) -> float:
        """As measured: mean over seeds."""
        return self.measurement.sample.value

    def hint(self) -> str:
        """What would decide; empty if decided."""
        sample, plan, noun = self.measurement.sample, self.needed, self.measurement.noun
        if self.state != "undecided":
            return ""
        if self.measurement.groups < LEAST_GROUPS:
            return f"needs {LEAST_GROUPS} groups of {noun}, has {self.measurement.groups}"
        if self.value == self.condition.bound:
            return "the value is the bound: no number of rows decides"
        if plan is None:
            seeds = sample.unit == "seed"
            return "no practical number of rows decides" if seeds else "needs more data seeds"
        if plan.seeds is not None and plan.seeds > sample.units:
            return f"needs about {plan.rows:,} {noun} and {plan.seeds} seeds"
        if plan.rows <= self.measurement.rows:
            return "needs more validation rows: the tuned value is uncertain"
        return f"needs about {plan.rows:,} {noun}"


def judge(
    setting: Setting, base: Setting | None, conditions: Sequence[Condition], candidates: int = 1
) -> list[Judged]:
    """Every condition, judged on one setting.

    Args:
        setting: that is to be shipped.
        base: its base model; None: gains are not measured.
        conditions: all that must be met.
        candidates: settings from which it was chosen by its test rows; 1 if it was named before.

    Raises:
        UsageError: a condition names what was not measured.
        IntegrityError: runs were not scored on the same tokens of the same rows.
    """
    error_met = ALPHA / candidates
    error_violated = error_met / max(1, len(conditions))
    return [
        _judged(condition, measure(setting, base, condition.measurement), error_met, error_violated)
        for condition in conditions
    ]


def decision(judged: Sequence[Judged]) -> Decision:
    """One violated condition decides against; all met for."""
    states = {each.state for each in judged}
    if "violated" in states:
        return "do not ship"
    return "not enough evidence" if "undecided" in states else "ship"


def _judged(
    condition: Condition, measurement: Measurement, error_met: float, error_violated: float
) -> Judged:
    errors = (error_met, error_violated)
    low_error, high_error = errors if condition.is_lower_bound else errors[::-1]
    low, high = measurement.interval(low_error)[0], measurement.interval(high_error)[1]
    holds = [condition.holds(end) for end in (low, high)]
    state: State = "undecided"
    if measurement.groups >= LEAST_GROUPS and all(holds) == any(holds):
        state = "met" if all(holds) else "violated"
    needed = _needed(condition, measurement, errors) if state == "undecided" else None
    return Judged(condition, measurement, state, low, high, *errors, needed)


def _needed(
    condition: Condition, measurement: Measurement, errors: tuple[float, float]
) -> Needed | None:
    """What decides, if the measured value is the true one."""
    sample = measurement.sample
    holds = condition.holds(sample.value)
    error = errors[0] if holds else errors[1]
    plan = needed_beyond(sample, measurement.rows, abs(sample.value - condition.bound), error)
    if plan is not None and measurement.limits is not None:
        end = 0 if condition.is_lower_bound == holds else 1
        times = _least(lambda times: condition.holds(measurement.exact(error, times)[end]) == holds)
        plan = Needed(max(plan.rows, math.ceil(times * measurement.rows)), plan.seeds)
    return plan if plan is not None and plan.rows <= MOST_ROWS else None


def _least(decides: Callable[[float], bool]) -> float:
    """The least multiple, to a thousandth, from which on something is decided; at least 1."""
    low = high = 1.0
    while not decides(high):
        low, high = high, 2 * high
        if high > MOST_ROWS:
            return high
    while high - low > 1e-3 * low:
        middle = (low + high) / 2
        low, high = (low, middle) if decides(middle) else (middle, high)
    return high


def measure(setting: Setting, base: Setting | None, name: str) -> Measurement:
    """A measurement by its name: a metric, ``gain`` in the headline, ``gain:<metric>``, or
    ``forgetting``, the largest over all further sets.

    Raises:
        UsageError: it was not measured.
        IntegrityError: runs were not scored on the same tokens of the same rows.
    """
    if name == FORGETTING:
        return _largest(setting, base)
    if name == GAIN or name.startswith(f"{GAIN}:"):
        metric = _metrics(setting).get(name.partition(":")[2] or setting.metric.name)
        if metric is None or metric.own_rows or base is None or metric.name not in _metrics(base):
            raise _unknown(name, setting, base)
        sides = (base, setting) if metric.higher_is_better else (setting, base)
        runs: list[ScoredRun] = [*setting.runs, *base.runs]
        limits: Interval | None = (-1.0, 1.0)
        sample = sample_of(pair_runs(*sides), metric)
        first, second = (
            side.regret if metric.name == setting.metric.name else NO_REGRET for side in sides
        )
    else:
        metric = _metrics(setting).get(name)
        if metric is None:
            raise _unknown(name, setting, base)
        runs, limits = list(setting.runs), (0.0, 1.0)
        sample = values_of(setting, metric)
        first = second = NO_REGRET
    rows = sum(1 for score in setting.first_run.scores_of(metric) if metric.parts(score)[1])
    is_share = not metric.own_rows and all(_is_share(run, metric) for run in runs)
    limits = limits if is_share else None
    return Measurement(sample, first, second, rows, metric.unit, limits, _noun(metric))


def _largest(setting: Setting, base: Setting | None) -> Largest:
    names = [name for name in _metrics(setting) if name.startswith(f"{FORGETTING}:")]
    if not names:
        raise _unknown(FORGETTING, setting, base)
    parts = tuple(measure(setting, base, name) for name in names)
    top = max(parts, key=lambda part: part.sample.value)
    return Largest(top.sample, NO_REGRET, NO_REGRET, top.rows, top.unit, None, top.noun, parts)


def _noun(metric: Metric) -> str:
    if metric.task:
        return f"documents of {metric.task}"
    if not metric.own_rows:
        return "test rows"
    return "prompts" if metric.name == DRIFT else f"rows of {metric.name.partition(':')[2]}"


def _is_share(run: ScoredRun, metric: Metric) -> bool:
    parts = (metric.parts(score) for score in run.scores_of(metric))
    return all(numerator in (0.0, denominator) for numerator, denominator in parts)


def _metrics(setting: Setting) -> dict[str, Metric]:
    """Metrics that all runs of a setting have; values of rows that no registered metric has are
    measured under their own names."""
    names = {name for run in setting.runs for score in run.scores for name in score.values}
    plain = {
        name: Metric(name, name, name, "", row_value(name)) for name in sorted(names - set(METRICS))
    }
    return {
        name: metric
        for name, metric in {**METRICS, **plain}.items()
        if all(has_metric(run, metric) for run in setting.runs)
    }


def _unknown(name: str, setting: Setting, base: Setting | None) -> UsageError:
    measured = list(_metrics(setting))
    own = [key for key, metric in _metrics(setting).items() if metric.own_rows]
    gains = [key for key in measured if key in _metrics(base) and key not in own] if base else []
    measured = [*([FORGETTING] if any(key != DRIFT for key in own) else []), *measured]
    names = [GAIN, *measured, *(f"{GAIN}:{key}" for key in gains)] if gains else measured
    return UsageError(
        f"{name}: no such measurement in these runs; what is measured: {', '.join(names)}"
    )
