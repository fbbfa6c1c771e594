"""How sure a paired difference is: interval, test, equivalence.

It has two sources of chance, the choice of test rows and the training seed, and an interval says
which of them it covers:

- one seed: BCa bootstrap over groups (Efron 1987), which covers the rows alone;
- several seeds: the widest of Student's interval over seeds, of Satterthwaite's for the sum of
  both variances, and of a two-way bootstrap over groups and seeds, which cover both. The first
  knows how little few seeds say; the second adds the rows to that; the third asks for no bell.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import stdtr, stdtrit

from slm_lora.stats.estimates import Floats, Paired

RESAMPLES = 9_999
"""Bootstrap samples and sign flips; drawn from a fixed seed, so that a report is repeatable. The
least p they can show lets up to 499 comparisons be corrected together."""
LEAST_GROUPS = 10
"""Fewer are too few to resample, and show no equivalence."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired difference and what can be said of it.

    Attributes:
        value: second arm minus first, nats per token.
        low: lower end of the 95 % interval.
        high: upper end.
        p: two-sided; of a sign-flip test over groups and, with several seeds, of Student's test
            over them and of Satterthwaite's for both, the largest.
        p_least: what ``p`` cannot fall below, for the sign flips that were drawn are no more.
        equivalent: whether the 90 % interval lies within ±margin (two one-sided tests at 5 %).
        margin: of the equivalence, nats per token.
        covers: what the interval accounts for.
    """

    value: float
    low: float
    high: float
    p: float
    p_least: float
    equivalent: bool
    margin: float
    covers: Literal["rows", "rows and seeds"]
    seeds: int
    groups: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def difference(sample: Paired, margin: float) -> Difference:
    """Interval, test and equivalence of a paired difference.

    Args:
        sample: from `paired`.
        margin: largest difference, in nats per token, that counts as none.
    """
    low, high = interval(sample, 0.95)
    inner = interval(sample, 0.90)
    return Difference(
        value=sample.value,
        low=low,
        high=high,
        p=p_value(sample),
        p_least=1 / (RESAMPLES + 1) if 2**sample.groups > RESAMPLES else 0.0,
        equivalent=sample.groups >= LEAST_GROUPS and -margin < inner[0] and inner[1] < margin,
        margin=margin,
        covers="rows and seeds" if sample.seeds > 1 else "rows",
        seeds=sample.seeds,
        groups=sample.groups,
    )


def interval(sample: Paired, confidence: float) -> tuple[float, float]:
    """Confidence interval of the difference; see the module for what it covers.

    From one group there is none: it is infinite then. From fewer than `LEAST_GROUPS` of one seed
    it is Student's over groups.
    """
    if sample.groups < 2:
        return -math.inf, math.inf
    if sample.seeds == 1:
        if sample.groups >= LEAST_GROUPS:
            return _bca(sample, confidence)
        half = float(stdtrit(sample.groups - 1, (1 + confidence) / 2)) * sample.row_error
        return sample.value - half, sample.value + half
    halves = [
        float(stdtrit(freedom, (1 + confidence) / 2)) * error for error, freedom in _errors(sample)
    ]
    spans = [(sample.value - half, sample.value + half) for half in halves]
    return max(*spans, _two_way(sample, confidence), key=lambda span: span[1] - span[0])


def _errors(sample: Paired) -> list[tuple[float, float]]:
    """Standard errors of a difference of several seeds, with their degrees of freedom: over the
    seeds alone, and over rows and seeds (Satterthwaite 1946).

    What rows and seeds do together is in both variances: the sum is a little too large.
    """
    seeds = sample.seed_deviation / math.sqrt(sample.seeds)
    both = math.hypot(seeds, sample.row_error)
    if both == 0:
        return [(0.0, sample.seeds - 1)]
    freedom = 1 / (
        (seeds / both) ** 4 / (sample.seeds - 1)
        + (sample.row_error / both) ** 4 / (sample.groups - 1)
    )
    return [(seeds, sample.seeds - 1), (both, freedom)]


def p_value(sample: Paired) -> float:
    """Two-sided p of no difference: the largest of the tests over groups, over seeds, and over
    both, so that it covers what the interval does."""
    found = [_sign_flip(sample)]
    if sample.seeds > 1 and sample.groups > 1:
        found += [
            2 * float(stdtr(freedom, -abs(sample.value) / error))
            for error, freedom in _errors(sample)
            if error  # no spread at all: Student's test is not defined
        ]
    return max(found)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for a family of comparisons (Holm 1979)."""
    from statsmodels.stats.multitest import multipletests

    if not p_values:
        return []
    return [float(p) for p in multipletests(p_values, method="holm")[1]]


def _bca(sample: Paired, confidence: float) -> tuple[float, float]:
    from scipy import stats

    nats = sample.nats[0]
    each = nats / sample.tokens
    if np.ptp(each) <= 1e-12 * np.abs(each).max():  # the same in all groups, to rounding
        return sample.value, sample.value

    def ratio(numerator: Floats, tokens: Floats, axis: int = -1) -> Floats:
        found: Floats = numerator.sum(axis) / tokens.sum(axis)
        return found

    found = stats.bootstrap(
        (nats, sample.tokens),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=500,  # of 1,000 groups: 4 MB at once
        confidence_level=confidence,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(found.low), float(found.high)


def _two_way(sample: Paired, confidence: float) -> tuple[float, float]:
    tail = 50 * (1 - confidence)
    low, high = np.percentile(_two_way_samples(sample), [tail, 100 - tail])
    return float(low), float(high)


@functools.lru_cache(maxsize=1)
def _two_way_samples(sample: Paired) -> Floats:
    """The difference over resampled groups and, independently, resampled seeds. Resampling n
    seeds alone would show (n-1)/n of their variance, so what sets them apart is stretched."""
    rng = np.random.default_rng(0)
    mean = sample.nats.mean(0)
    stretched = mean + (sample.nats - mean) * math.sqrt(sample.seeds / (sample.seeds - 1))
    values: list[Floats] = []
    for start in range(0, RESAMPLES, 500):
        many = min(500, RESAMPLES - start)
        groups = rng.multinomial(sample.groups, [1 / sample.groups] * sample.groups, many)
        seeds = rng.multinomial(sample.seeds, [1 / sample.seeds] * sample.seeds, many)
        nats = ((seeds / sample.seeds) @ stretched * groups).sum(1)
        values.append(nats / (groups @ sample.tokens))
    return np.concatenate(values)


def _sign_flip(sample: Paired) -> float:
    """Permutation test: without a difference, every group's sign is a toss."""
    if sample.groups < 2:
        return 1.0
    from scipy import stats

    nats = sample.nats.mean(0)

    def size(one: Floats, other: Floats, axis: int = -1) -> Floats:
        found: Floats = np.abs((one - other).sum(axis))
        return found

    # Exchanging a group's two arms flips the sign of its difference.
    found = stats.permutation_test(
        (nats, np.zeros_like(nats)),
        size,
        permutation_type="samples",
        alternative="greater",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=500,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)
