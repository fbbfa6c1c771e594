"""Learning curve: how held-out loss falls with training rows, E + A·N^(−β).

The form of Hestness et al. 2017 (arXiv 1712.00409) and Hoffmann et al. 2022 (arXiv 2203.15556):
E is what no amount of such data removes. It is fitted where there are at least four sizes, is
never read beyond twice the largest, and is not read at all where the losses depart from the form by
more than chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slm_lora.records import RowScore
from slm_lora.runs.metrics import Metric
from slm_lora.stats.clustered import Floats
from slm_lora.stats.estimates import group_sums

LEAST_SIZES = 4
_EXPONENTS = np.geomspace(0.02, 4, 240)
_RESAMPLES = 999


@dataclass(frozen=True, eq=False)
class LearningCurve:
    """A fitted curve with 95 % intervals over groups of test rows (and seeds, if several).

    Attributes:
        name: of what was trained.
        sizes: training rows of the arms, ascending.
        losses: their held-out losses, nats a token, means over seeds.
        rows: training rows at which the curve is drawn, up to twice the largest.
        middle: the curve there.
        low: lower end of its band.
        high: upper end.
        floor: E with its interval.
        exponent: β with its interval.
        seeds: of every arm.
        falls: whether loss falls with rows at all; β means nothing if it does not.
        residuals: of the losses from the curve, nats a token.
        p_fits: how often chance alone takes losses as far from such a curve.
    """

    name: str
    sizes: tuple[int, ...]
    losses: tuple[float, ...]
    rows: Floats
    middle: Floats
    low: Floats
    high: Floats
    floor: tuple[float, float, float]
    exponent: tuple[float, float, float]
    seeds: int
    falls: bool
    residuals: tuple[float, ...]
    p_fits: float

    @property
    def fits(self) -> bool:
        """Whether the losses are such as a curve of this form may have."""
        return self.p_fits >= 0.05

    def record(self) -> dict[str, Any]:
        """For metrics.json."""
        return {
            "name": self.name,
            "training_rows": self.sizes,
            "losses": self.losses,
            "floor": self.floor,
            "exponent": self.exponent,
            "at_twice_the_largest": [
                float(curve[-1]) for curve in (self.middle, self.low, self.high)
            ],
            "seeds": self.seeds,
            "residuals": self.residuals,
            "p_fits": self.p_fits,
        }


def fit(
    name: str, arms: Sequence[tuple[int, Sequence[Sequence[RowScore]]]], metric: Metric
) -> LearningCurve | None:
    """Fit the curve to arms of different sizes; None with fewer than four, or one group.

    Args:
        name: of what was trained.
        arms: training rows, and the scores of every seed.
        tokens: which loss.
    """
    if len({size for size, _ in arms}) < LEAST_SIZES:
        return None
    arms = sorted(arms, key=lambda arm: arm[0])
    if len({score.group_id for score in arms[0][1][0]}) < 2:
        return None
    sizes = np.array([float(size) for size, _ in arms])
    sums = [group_sums(runs, metric) for _, runs in arms]
    losses = np.array([nats.mean(0).sum() / counts.sum() for nats, counts in sums])
    samples = resampled_losses(sums)
    rows = np.geomspace(sizes[0], 2 * sizes[-1], 60)
    best, resampled = _fitted(sizes, losses[None]), _fitted(sizes, samples)
    low, high = np.percentile(_curve(resampled, sizes, rows), [2.5, 97.5], axis=0)
    expected = _curve(best, sizes, sizes)
    # What chance does to losses that truly are on the curve.
    by_chance = expected + samples - losses
    departs = _squares(sizes, by_chance, _fitted(sizes, by_chance))
    departed = _squares(sizes, losses[None], best)

    def with_interval(which: int) -> tuple[float, float, float]:
        ends = np.percentile(resampled[which], [2.5, 97.5])
        return float(best[which][0]), float(ends[0]), float(ends[1])

    return LearningCurve(
        name=name,
        sizes=tuple(int(size) for size in sizes),
        losses=tuple(map(float, losses)),
        rows=rows,
        middle=_curve(best, sizes, rows)[0],
        low=low,
        high=high,
        floor=with_interval(0),
        exponent=with_interval(2),
        falls=bool(best[1][0] > 0),
        seeds=min(len(nats) for nats, _ in sums),
        residuals=tuple(map(float, losses - expected[0])),
        # (Squares of a perfect fit are rounding.)
        p_fits=(1 + float((departs >= departed - 1e-15).sum())) / (1 + _RESAMPLES),
    )


_Fit = tuple[Floats, Floats, Floats]
"""E, A and β of every sample; A is in units of the largest size."""


def _curve(fitted: _Fit, sizes: Floats, rows: Floats) -> Floats:
    floor, factor, exponent = (parameter[:, None] for parameter in fitted)
    drawn: Floats = floor + factor * (rows / sizes[-1]) ** -exponent
    return drawn


def _squares(sizes: Floats, losses: Floats, fitted: _Fit) -> Floats:
    """What least squares leave of every row of ``losses``."""
    left: Floats = ((losses - _curve(fitted, sizes, sizes)) ** 2).sum(1)
    return left


def resampled_losses(sums: Sequence[tuple[Floats, Floats]]) -> Floats:
    """Losses of every size, [samples, sizes], by the chance of groups and of seeds.

    Groups are resampled, the same for all sizes, as the rows are the same. What sets seeds apart
    is drawn from Student's t of as many, as few seeds say little of how far others may lie; it is
    the same combination of seeds for all sizes, whose training rows are nested.
    """
    rng = np.random.default_rng(0)
    groups = len(sums[0][1])
    weights = rng.multinomial(groups, [1 / groups] * groups, _RESAMPLES)
    drawn = {
        seeds: _students(rng, seeds)
        for seeds in sorted({len(nats) for nats, _ in sums})
        if seeds > 1
    }
    losses = []
    for nats, counts in sums:
        seeds, mean = len(nats), nats.mean(0)
        apart = drawn[seeds] @ (nats - mean) if seeds > 1 else 0.0
        losses.append(((mean + apart) * weights).sum(1) / (weights @ counts))
    return np.stack(losses, 1)


def _students(rng: np.random.Generator, seeds: int) -> Floats:
    """Weights [samples, seeds] that make of deviations from their mean an error of that mean."""
    normal = rng.standard_normal((_RESAMPLES, seeds)) / (seeds * (seeds - 1)) ** 0.5
    spread = rng.chisquare(seeds - 1, (_RESAMPLES, 1)) / (seeds - 1)
    weights: Floats = normal / spread**0.5
    return weights


def _fitted(sizes: Floats, losses: Floats) -> _Fit:
    """Least squares for every row of ``losses`` [samples, sizes], with E and A not negative.

    For a given β the curve is linear in E and A; β is searched on a fine grid, which cannot be
    led astray as a descent from some start can.
    """
    best = np.full(len(losses), np.inf)
    floor, factor, exponent = (np.zeros(len(losses)) for _ in range(3))
    for beta in _EXPONENTS:
        x = (sizes / sizes[-1]) ** -beta
        centred = x - x.mean()
        a = np.maximum(losses @ centred / (centred @ centred), 0)
        e = losses.mean(1) - a * x.mean()
        below = e < 0
        a = np.where(below, losses @ x / (x @ x), a)
        e = np.where(below, 0, e)
        error = ((losses - e[:, None] - a[:, None] * x) ** 2).sum(1)
        better = error < best
        best = np.where(better, error, best)
        floor, factor = np.where(better, e, floor), np.where(better, a, factor)
        exponent = np.where(better, beta, exponent)
    return floor, factor, exponent
