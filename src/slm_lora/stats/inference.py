"""How sure a paired difference is: interval, test, equivalence.

It has two sources of chance, the choice of test rows and the training seed, and an interval says
which of them it covers:

- one seed: BCa bootstrap over groups (Efron 1987), which covers the rows alone;
- several seeds: the widest of Student's interval over seeds, of Satterthwaite's for the sum of
  both variances, and of a two-way bootstrap over groups and seeds, which cover both. The first
  has the few degrees of freedom of few seeds; the second adds the rows; the third does not assume
  normality.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
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
    corrected = [0.0] * len(p_values)
    largest = 0.0
    # Step down: each p by the number of hypotheses that are left, never below an earlier one.
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


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
    seeds alone would show (n-1)/n of their variance, so deviations from their mean are scaled."""
    mean = sample.nats.mean(0)
    scaled = mean + (sample.nats - mean) * math.sqrt(sample.seeds / (sample.seeds - 1))
    by_seed = np.vstack([scaled, sample.tokens]).T
    values: list[Floats] = []
    for groups, seeds in _batches(_resampled, sample.groups, sample.seeds):
        sums = groups.astype(np.float64) @ by_seed
        values.append((sums[:, :-1] * seeds).sum(1) / (sample.seeds * sums[:, -1]))
    return np.concatenate(values)


def _sign_flip(sample: Paired) -> float:
    """Permutation test: without a difference, the sign of every group is random.

    All signs, where they are no more than `RESAMPLES`; else as many random ones. The p of
    `scipy.stats.permutation_test`, whose random signs these are.
    """
    if sample.groups < 2:
        return 1.0
    nats = sample.nats.mean(0)
    observed = abs(nats.sum())
    least = observed - 100 * np.finfo(np.float64).eps * observed
    if 2**sample.groups <= RESAMPLES:
        signs = 1 - 2 * ((np.arange(2**sample.groups)[:, None] >> np.arange(sample.groups)) & 1)
        return float((np.abs(signs @ nats) >= least).mean())
    extreme = sum(
        int((np.abs(signs.astype(np.float64) @ nats) >= least).sum())
        for (signs,) in _batches(_random_signs, sample.groups)
    )
    return (extreme + 1) / (RESAMPLES + 1)


BATCH = 500
"""Resamples at once: of 1,000 groups 4 MB in float64."""
CACHED_GROUPS = 10_000
"""Resamples of more groups are not cached: of this many they take 100 MB."""

Counts = npt.NDArray[np.signedinteger[Any]]


def _batches(
    draw: Callable[..., Iterator[tuple[Counts, ...]]], *sizes: int
) -> Iterable[tuple[Counts, ...]]:
    """What ``draw`` yields, kept from call to call: every comparison resamples alike."""
    return _drawn(draw, *sizes) if sizes[0] <= CACHED_GROUPS else draw(*sizes)


@functools.lru_cache(maxsize=4)
def _drawn(
    draw: Callable[..., Iterator[tuple[Counts, ...]]], *sizes: int
) -> tuple[tuple[Counts, ...], ...]:
    return tuple(draw(*sizes))


def _resampled(groups: int, seeds: int) -> Iterator[tuple[Counts, ...]]:
    """How often each group and each seed is drawn: [batch, groups] and [batch, seeds]."""
    rng = np.random.default_rng(0)
    for start in range(0, RESAMPLES, BATCH):
        count = min(BATCH, RESAMPLES - start)
        of_groups = rng.multinomial(groups, [1 / groups] * groups, count)
        of_seeds = rng.multinomial(seeds, [1 / seeds] * seeds, count)
        yield of_groups.astype(np.int16), of_seeds.astype(np.int16)


def _random_signs(groups: int) -> Iterator[tuple[Counts, ...]]:
    """Signs [batch, groups]."""
    rng = np.random.default_rng(0)
    pairs = np.tile(np.arange(2), (BATCH, groups, 1))
    for start in range(0, RESAMPLES, BATCH):
        swapped = rng.permuted(pairs, axis=-1)[: RESAMPLES - start, :, 0]
        yield ((1 - 2 * swapped).astype(np.int8),)
