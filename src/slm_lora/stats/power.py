"""How many rows and seeds would decide what was not decided.

They are for a new experiment: adding seeds to one whose result was seen, and testing again,
calls more equal things different than the test allows for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.special import ndtri, stdtrit

from slm_lora.stats.estimates import Paired


@dataclass(frozen=True, slots=True)
class Needed:
    """What would decide with 80 % power; ``seeds`` is None where their spread is not known: so
    many rows decide it for one pair of trainings then."""

    rows: int
    seeds: int | None


def needed_for_difference(sample: Paired, rows: int, family: int = 1) -> Needed | None:
    """To tell a difference of the observed size from zero; None if that cannot be said.

    Args:
        sample: what was observed.
        rows: test rows of it.
        family: comparisons that are corrected together, this one among them.
    """
    if sample.value == 0 or sample.groups < 2:
        return None
    return _needed(sample, rows, abs(sample.value), (0.025 / family, 0.2))


def needed_for_equivalence(sample: Paired, rows: int, margin: float) -> Needed | None:
    """To show equivalence within ``margin`` if there truly is no difference: at one-sided 5 %, with
    80 % power against both bounds."""
    if sample.groups < 2:
        return None
    return _needed(sample, rows, margin, (0.05, 0.1))


def _needed(sample: Paired, rows: int, size: float, tails: tuple[float, float]) -> Needed:
    """Of all pairs that are enough, none fewer than now, the one that multiplies either least.

    ``tails`` are the chances of calling out wrongly, on one side, and of missing it.
    """
    normal = float(-ndtri(tails).sum())
    if sample.seeds == 1:
        return Needed(max(rows, math.ceil(rows * (normal * sample.row_error / size) ** 2)), None)
    # Fewer would not do even with all rows of the world.
    seeds = max(sample.seeds, math.floor((normal * sample.seed_deviation / size) ** 2))
    best, growth = None, math.inf
    while seeds / sample.seeds < growth:
        more = _times_the_rows(sample, seeds, size, tails)
        if max(more, seeds / sample.seeds) < growth:
            growth = max(more, seeds / sample.seeds)
            best = Needed(math.ceil(rows * more), seeds)
        seeds = max(seeds + 1, round(1.02 * seeds))
    assert best is not None
    return best


def _times_the_rows(sample: Paired, seeds: int, size: float, tails: tuple[float, float]) -> float:
    """How many times the rows so many seeds ask for: one at least; infinity where none do."""
    spread = sample.seed_deviation / math.sqrt(seeds)

    def allowed(freedom: float) -> float:
        """The largest standard error that decides."""
        return size / float(-stdtrit(freedom, tails).sum())

    if spread > allowed(seeds - 1):
        return math.inf
    more = 1.0
    for _ in range(100):  # the fewer the rows, the more they count for the freedom
        rows = sample.row_error / math.sqrt(more)
        both = math.hypot(spread, rows)
        if both == 0:
            break
        freedom = 1 / (
            (spread / both) ** 4 / (seeds - 1) + (rows / both) ** 4 / (more * sample.groups - 1)
        )
        if both <= allowed(freedom) * (1 + 1e-9):
            break
        left = allowed(freedom) ** 2 - spread**2
        if left <= 0:
            return math.inf
        more = max(more * 1.001, sample.row_error**2 / left)
    return more
