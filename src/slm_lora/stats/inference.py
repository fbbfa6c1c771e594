"""How sure a paired difference is: interval, test, equivalence, and what the next seed will show.

Two sources of chance: the choice of test rows, and the training (seed, draw of training rows). With
one training an interval covers the rows alone. With several it is the wider of two:

- Student's t over the trainings, with the few degrees of freedom of few trainings;
- Student's t for the sum of both variances (two-way clustering, Cameron, Gelbach and Miller 2011,
  without the subtraction of the common part), with Satterthwaite's degrees of freedom.

p-values are those of the same t statistics, the larger one, so a p below 5 % and a 95 % interval
without zero are the same statement. Equivalence is two one-sided tests (Schuirmann 1987).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from scipy.special import stdtr, stdtrit

from slm_lora.stats.clustered import effective_groups
from slm_lora.stats.estimates import Paired, UnitName

Covers = Literal[
    "rows", "rows and seeds", "rows and training rows", "rows, seeds and training rows"
]
"""Sources of chance in an interval."""
LEAST_GROUPS = 10
"""Fewer groups show no equivalence, and a category of fewer has no interval."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired difference and its uncertainty.

    Attributes:
        value: second setting minus first, in the metric's unit.
        low: lower end of the 95 % interval of the mean.
        high: upper end.
        p: two-sided, of no difference.
        p_equivalence: of a difference of the margin or more, the larger of two one-sided tests.
        margin: of equivalence, in the metric's unit.
        covers: sources of chance in interval and p.
        units: independent repetitions, of which ``unit`` is the name.
        unit: a seed, or a draw of training rows with all of its seeds.
        agreeing: units whose difference has the sign of the mean.
        smallest: least difference of a unit.
        largest: largest difference of a unit.
        next_low: lower end of the 95 % prediction interval for one more seed on the same test
            rows; None for one seed, and for draws of training rows.
        next_high: upper end.
        groups: of test rows.
        effective_groups: as many equal groups would be as sure.
    """

    value: float
    low: float
    high: float
    p: float
    p_equivalence: float
    margin: float
    covers: Covers
    units: int
    unit: UnitName
    agreeing: int
    smallest: float
    largest: float
    next_low: float | None
    next_high: float | None
    groups: int
    effective_groups: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def difference(sample: Paired, margin: float) -> Difference:
    """Interval, tests and prediction of a paired difference.

    Args:
        sample: from `paired`.
        margin: largest difference that counts as none, in the metric's unit.
    """
    low, high = interval(sample, 0.95)
    by_unit = sample.by_unit
    following = _next_unit(sample)
    return Difference(
        value=sample.value,
        low=low,
        high=high,
        p=p_value(sample),
        p_equivalence=p_equivalence(sample, margin),
        margin=margin,
        covers=(
            "rows"
            if sample.units < 2
            else "rows and seeds"
            if sample.unit == "seed"
            else "rows, seeds and training rows"
            if sample.several_seeds
            else "rows and training rows"
        ),
        units=sample.units,
        unit=sample.unit,
        agreeing=int((by_unit * sample.value > 0).sum()),
        smallest=float(by_unit.min()),
        largest=float(by_unit.max()),
        next_low=following[0] if following else None,
        next_high=following[1] if following else None,
        groups=sample.groups,
        effective_groups=effective_groups(sample.tokens),
    )


class Error(NamedTuple):
    """A standard error of the mean difference with its degrees of freedom."""

    size: float
    freedom: float


def errors(sample: Paired) -> list[Error]:
    """Standard errors of a mean difference: over rows for one unit; over units, and over rows and
    units, for several.

    Rows and units interact, and both variances hold the interaction: the sum is a little too large.
    """
    rows = Error(sample.row_error, sample.over_rows.freedom)
    if sample.units < 2:
        return [rows]
    trainings = Error(sample.unit_deviation / math.sqrt(sample.units), sample.units - 1)
    if sample.crossed is not None:
        seeds = len(sample.crossed)
        crossed = Error(float(sample.crossed.std(ddof=1)) / math.sqrt(seeds), seeds - 1)
        both = [trainings, crossed]
        return [*both, _sum(both), _sum([*both, rows])]
    return [trainings, _sum([trainings, rows])]


def _sum(parts: Sequence[Error]) -> Error:
    """Error of a sum of independent parts (Satterthwaite 1946)."""
    size = math.hypot(*(part.size for part in parts))
    if size == 0 or not math.isfinite(size):
        return Error(size, parts[0].freedom)
    return Error(size, 1 / sum((part.size / size) ** 4 / part.freedom for part in parts))


def interval(sample: Paired, confidence: float) -> tuple[float, float]:
    """Confidence interval of the mean difference; infinite for one group."""
    if sample.groups < 2:
        return -math.inf, math.inf
    tail = (1 - confidence) / 2
    half = max(float(-stdtrit(error.freedom, tail)) * error.size for error in errors(sample))
    return sample.value - half, sample.value + half


def p_value(sample: Paired) -> float:
    """Two-sided p of no difference."""
    return min(1.0, 2 * p_below(sample, abs(sample.value)))


def p_equivalence(sample: Paired, margin: float) -> float:
    """p of a difference of ``margin`` or more; 1 from fewer than `LEAST_GROUPS` groups."""
    if sample.groups < LEAST_GROUPS:
        return 1.0
    return p_below(sample, margin - abs(sample.value))


def p_below(sample: Paired, distance: float) -> float:
    """One-sided p of a mean difference that lies ``distance`` from a bound on the allowed side."""
    if sample.groups < 2:
        return 1.0

    def tail(error: Error) -> float:
        if error.size == 0:
            # No variation seen: as rare as all signs alike (one seed), or none at all in seeds.
            least = 0.5**sample.groups if sample.units == 1 and sample.value else 0.0
            return least if distance > 0 else 0.5 if distance == 0 else 1.0
        return float(stdtr(error.freedom, -distance / error.size))

    return max(tail(error) for error in errors(sample))


def _next_unit(sample: Paired) -> tuple[float, float] | None:
    """95 % prediction interval of one more seed's difference on the same rows."""
    if sample.units < 2 or sample.unit != "seed":  # draws are means over their seeds
        return None
    quantile = float(stdtrit(sample.units - 1, 0.975))
    half = quantile * sample.unit_deviation * math.sqrt(1 + 1 / sample.units)
    return sample.value - half, sample.value + half


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for a family of comparisons (Holm 1979)."""
    corrected = [0.0] * len(p_values)
    largest = 0.0
    # Step down: each p by the number of hypotheses that are left, never below an earlier one.
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
