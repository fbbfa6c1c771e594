"""Rows and seeds of a new experiment that would decide.

Planned for a difference of the equivalence margin, not for the one observed: an observed difference
is a noisy guide to its own size. The spread of the seeds and the error over rows are taken at the
upper end of their one-sided 80 % intervals, as a pilot of few seeds may have seen little of it.

The plan is for a new experiment: adding seeds to one whose result was seen, and testing again,
calls more equal settings different than the test allows for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.special import betaincinv as btdtri
from scipy.special import chdtri, ndtri, stdtrit

from slm_lora.stats.estimates import Paired

ASSURANCE = 0.8
"""Chance that the true spread is no larger than the one planned with."""
MOST_SEEDS = 1_000
"""A plan for more is no plan."""


@dataclass(frozen=True, slots=True)
class Needed:
    """Sample size for 80 % power.

    Attributes:
        rows: of the test set.
        seeds: of every setting; None where one seed was observed, and the rows decide for one
            pair of trainings only.
    """

    rows: int
    seeds: int | None


@dataclass(frozen=True, slots=True)
class _Spread:
    """Upper bounds: standard deviation between units, standard error over rows, its freedom."""

    units: float
    rows: float
    freedom: float


def needed(sample: Paired, rows: int, margin: float, family: int = 1) -> Needed | None:
    """What decides: shows a difference of the margin, and equivalence where there is none.

    Args:
        sample: what was observed.
        rows: test rows of it.
        margin: of equivalence.
        family: comparisons that are corrected together, this one among them.

    Returns:
        Rows and seeds; None without a margin, from one group, for draws of training rows, and
            beyond `MOST_SEEDS`.
    """
    if sample.groups < 2 or not margin or sample.unit != "seed":
        return None
    plans = [
        _needed(sample, rows, margin, tails)
        for tails in ((0.025 / family, 0.2), (0.05 / family, 0.1))
    ]
    complete = [plan for plan in plans if plan is not None]
    if len(complete) < len(plans):
        return None
    seeds = [plan.seeds for plan in complete if plan.seeds is not None]
    return Needed(max(plan.rows for plan in complete), max(seeds) if seeds else None)


def needed_beyond(sample: Paired, rows: int, distance: float, error: float) -> Needed | None:
    """What shows, with 80 % power, that the mean is on one side of a bound.

    Args:
        sample: what was observed.
        rows: test rows of it.
        distance: of the true mean from the bound.
        error: chance of a false claim, one-sided.

    Returns:
        As `needed`.
    """
    if sample.groups < 2 or not distance or sample.unit != "seed":
        return None
    return _needed(sample, rows, distance, (error, 0.2))


def _upper(spread: float, freedom: float) -> float:
    """Upper end of the one-sided interval of a standard deviation."""
    return spread * math.sqrt(freedom / float(chdtri(freedom, ASSURANCE)))


def _needed(sample: Paired, rows: int, size: float, tails: tuple[float, float]) -> Needed | None:
    """Of all pairs that are enough, none fewer than now, the one that multiplies either least.

    ``tails`` are the chances of a false verdict, on one side, and of a missed one.
    """
    normal = float(-ndtri(tails).sum())
    freedom = sample.over_rows.freedom
    row_error = _upper(sample.row_error, freedom)
    if sample.units == 1:
        return Needed(max(rows, math.ceil(rows * (normal * row_error / size) ** 2)), None)
    spread = _Spread(_upper(sample.unit_deviation, sample.units - 1), row_error, freedom)
    # Fewer would not do even with all rows of the world.
    seeds = max(sample.units, math.floor((normal * spread.units / size) ** 2))
    best, growth = None, math.inf
    while seeds / sample.units < growth and seeds <= MOST_SEEDS:
        more = _times_the_rows(spread, seeds, size, tails)
        if max(more, seeds / sample.units) < growth:
            growth = max(more, seeds / sample.units)
            best = Needed(math.ceil(rows * more), seeds)
        seeds = max(seeds + 1, round(1.02 * seeds))
    return best


def _times_the_rows(spread: _Spread, seeds: int, size: float, tails: tuple[float, float]) -> float:
    """How many times the rows so many seeds ask for: one at least; infinity where none do."""
    of_seeds = spread.units / math.sqrt(seeds)

    def allowed(freedom: float) -> float:
        """The largest standard error that decides."""
        return size / float(-stdtrit(freedom, tails).sum())

    if of_seeds > allowed(seeds - 1):
        return math.inf
    more = 1.0
    for _ in range(100):  # the fewer the rows, the more they count for the freedom
        of_rows = spread.rows / math.sqrt(more)
        both = math.hypot(of_seeds, of_rows)
        if both == 0:
            break
        freedom = 1 / (
            (of_seeds / both) ** 4 / (seeds - 1) + (of_rows / both) ** 4 / (more * spread.freedom)
        )
        if both <= allowed(freedom) * (1 + 1e-9):
            break
        left = allowed(freedom) ** 2 - of_seeds**2
        if left <= 0:
            return math.inf
        more = max(more * 1.001, spread.rows**2 / left)
    return more


def failure_bound(units: int, failures: int = 0) -> float:
    """Largest share of failing seeds that is compatible, at 95 % confidence, with so many failures
    among so many seeds (Clopper and Pearson 1934); 1 - 0.05^(1/n) without any."""
    return 1.0 if failures >= units else float(btdtri(failures + 1, units - failures, 0.95))


def groups_to_detect(size: float, deviation: float) -> int:
    """Groups of rows that show a paired difference at 5 %, two-sided, with 80 % power.

    Args:
        size: of the difference.
        deviation: standard deviation of the difference between groups.
    """
    return math.ceil((_NORMAL * deviation / size) ** 2)


def detectable(groups: int, deviation: float) -> float:
    """The difference that so many groups show, as `groups_to_detect`."""
    return _NORMAL * deviation / math.sqrt(groups)


_NORMAL = float(-ndtri(0.025) - ndtri(0.2))
