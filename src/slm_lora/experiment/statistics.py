"""What the per-row scores can carry: losses, paired differences, and how sure they are.

Loss is a ratio (nats over tokens), and rows of one group are not independent: groups are the
sampling units throughout. A paired difference has two sources of chance, the choice of test rows
and the training seed, and an interval says which of them it covers:

- one seed: BCa bootstrap over groups (Efron 1987), which covers the rows alone;
- several seeds: the wider of Student's interval over seeds and a two-way bootstrap over groups
  and seeds, which covers both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from slm_lora.errors import IntegrityError
from slm_lora.records import LossOn, RowScore

Floats = npt.NDArray[np.float64]

RESAMPLES = 9_999
"""Bootstrap samples and sign flips; drawn from a fixed seed, so that a report is repeatable."""

_Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Estimate:
    """A loss in nats per token, with its clustered standard error.

    The variance is that of a ratio, linearised over groups (Cochran, Sampling Techniques, 3rd
    ed., ch. 6; recommended for evaluations by Miller 2024, arXiv 2411.00640). ``low`` and
    ``high`` bound the 95 % interval over the choice of test rows.
    """

    value: float
    standard_error: float
    groups: int

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.value - _Z95 * self.standard_error

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.value + _Z95 * self.standard_error

    def record(self) -> dict[str, float | int | None]:
        """For JSON, which has no infinity: what is not known from one group is null."""
        known = math.isfinite(self.standard_error)
        return {
            "value": self.value,
            "standard_error": self.standard_error if known else None,
            "low": self.low if known else None,
            "high": self.high if known else None,
            "groups": self.groups,
        }


@dataclass(frozen=True, eq=False)
class Paired:
    """Differences between two arms on the same rows, summed by group.

    Attributes:
        nats: loss of the second arm minus that of the first, float64 [seeds, groups].
        tokens: label tokens, float64 [groups].
    """

    nats: Floats
    tokens: Floats

    @property
    def seeds(self) -> int:
        """Pairs of trainings."""
        return len(self.nats)

    @property
    def groups(self) -> int:
        """Groups of rows."""
        return len(self.tokens)

    @property
    def by_seed(self) -> Floats:
        """The difference in nats per token for every seed."""
        found: Floats = self.nats.sum(1) / self.tokens.sum()
        return found

    @property
    def value(self) -> float:
        """The difference in nats per token; below zero, the second arm is better."""
        return float(self.by_seed.mean())

    @property
    def row_error(self) -> float:
        """Standard error over the choice of test rows."""
        return _ratio(self.nats.mean(0), self.tokens).standard_error

    @property
    def seed_deviation(self) -> float:
        """Standard deviation of the difference between seeds; not a number for one seed."""
        return float(self.by_seed.std(ddof=1)) if self.seeds > 1 else math.nan


@dataclass(frozen=True, slots=True)
class Difference:
    """A paired difference and what can be said of it.

    Attributes:
        value: second arm minus first, nats per token.
        low: lower end of the 95 % interval.
        high: upper end.
        p: two-sided; of a sign-flip test over groups and, with several seeds, of Student's test
            over them, the larger.
        equivalent: whether the 90 % interval lies within ±margin (two one-sided tests at 5 %).
        margin: of the equivalence, nats per token.
        covers: what the interval accounts for.
    """

    value: float
    low: float
    high: float
    p: float
    equivalent: bool
    margin: float
    covers: Literal["rows", "rows and seeds"]
    seeds: int
    groups: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def loss_estimate(runs: Sequence[Sequence[RowScore]], tokens: LossOn) -> Estimate:
    """Loss of one model, or the mean over its seeds, with its clustered standard error."""
    nats, counts = group_sums(runs, tokens)
    return _ratio(nats.mean(0), counts)


def group_sums(runs: Sequence[Sequence[RowScore]], tokens: LossOn) -> tuple[Floats, Floats]:
    """Nats [runs, groups] and label tokens [groups] of runs on the same rows.

    Raises:
        IntegrityError: they were not scored on the same tokens of the same rows.
    """
    for other in runs[1:]:
        _check_same_rows(runs[0], other, tokens)
    sums = [_sums(scores, tokens) for scores in runs]
    return np.stack([nats for _, nats, _ in sums]), sums[0][2]


def paired(arms: Sequence[tuple[Sequence[RowScore], Sequence[RowScore]]], tokens: LossOn) -> Paired:
    """Differences between two arms, one pair of runs a seed.

    Raises:
        IntegrityError: runs were not scored on the same tokens of the same rows.
    """
    nats, counts = group_sums([scores for pair in arms for scores in pair], tokens)
    return Paired(nats[1::2] - nats[0::2], counts)


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
        equivalent=-margin < inner[0] and inner[1] < margin,
        margin=margin,
        covers="rows and seeds" if sample.seeds > 1 else "rows",
        seeds=sample.seeds,
        groups=sample.groups,
    )


def interval(sample: Paired, confidence: float) -> tuple[float, float]:
    """Confidence interval of the difference; see the module for what it covers.

    From one group there is none: it is infinite then.
    """
    if sample.groups < 2:
        return -math.inf, math.inf
    if sample.seeds == 1:
        return _bca(sample, confidence)
    spans = _student(sample, confidence), _two_way(sample, confidence)
    return max(spans, key=lambda span: span[1] - span[0])


def p_value(sample: Paired) -> float:
    """Two-sided p of no difference: the larger of the tests over groups and over seeds."""
    rows = _sign_flip(sample)
    if sample.seeds == 1:
        return rows
    from scipy import stats

    if np.ptp(sample.by_seed) == 0:  # no spread at all: Student's test is not defined
        return rows
    return max(rows, float(stats.ttest_1samp(sample.by_seed, 0).pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for a family of comparisons (Holm 1979)."""
    from statsmodels.stats.multitest import multipletests

    if not p_values:
        return []
    return [float(p) for p in multipletests(p_values, method="holm")[1]]


@dataclass(frozen=True, slots=True)
class Needed:
    """What would decide with 80 % power; ``seeds`` is None where their spread is not known."""

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
    """Rows and seeds, none fewer than now, whose variances make half each of what a difference of
    this size allows; and seeds enough for Student's interval, which few of them make wide.

    ``tails`` are the chances of calling out wrongly, on one side, and of missing it.
    """
    from scipy import stats

    target = size / float(sum(stats.norm.isf(tails)))
    if sample.seeds == 1:
        return Needed(max(rows, math.ceil(rows * (sample.row_error / target) ** 2)), None)
    spread = sample.seed_deviation
    seeds = max(sample.seeds, math.ceil(2 * (spread / target) ** 2))
    while float(sum(stats.t.isf(tails, seeds - 1))) * spread / math.sqrt(seeds) > size:
        seeds += 1
    left = target**2 - spread**2 / seeds
    return Needed(max(rows, math.ceil(rows * sample.row_error**2 / left)), seeds)


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


def _student(sample: Paired, confidence: float) -> tuple[float, float]:
    from scipy import stats

    half = (
        float(stats.t.ppf((1 + confidence) / 2, sample.seeds - 1))
        * sample.seed_deviation
        / math.sqrt(sample.seeds)
    )
    return sample.value - half, sample.value + half


def _two_way(sample: Paired, confidence: float) -> tuple[float, float]:
    tail = 50 * (1 - confidence)
    low, high = np.percentile(_two_way_samples(sample), [tail, 100 - tail])
    return float(low), float(high)


@functools.lru_cache(maxsize=1)
def _two_way_samples(sample: Paired) -> Floats:
    """The difference over resampled groups and, independently, resampled seeds."""
    rng = np.random.default_rng(0)
    values: list[Floats] = []
    for start in range(0, RESAMPLES, 500):
        many = min(500, RESAMPLES - start)
        groups = rng.multinomial(sample.groups, [1 / sample.groups] * sample.groups, many)
        seeds = rng.multinomial(sample.seeds, [1 / sample.seeds] * sample.seeds, many)
        nats = ((seeds / sample.seeds) @ sample.nats * groups).sum(1)
        values.append(nats / (groups @ sample.tokens))
    return np.concatenate(values)


def _sign_flip(sample: Paired) -> float:
    """Permutation test: without a difference, every group's sign is a toss."""
    if sample.groups < 2:
        return 1.0
    from scipy import stats

    nats = sample.nats.mean(0)

    def total(one: Floats, other: Floats, axis: int = -1) -> Floats:
        found: Floats = (one - other).sum(axis)
        return found

    # Exchanging a group's two arms flips the sign of its difference.
    found = stats.permutation_test(
        (nats, np.zeros_like(nats)),
        total,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=500,
        rng=np.random.default_rng(0),
    )
    return float(found.pvalue)


def _check_same_rows(first: Sequence[RowScore], second: Sequence[RowScore], tokens: LossOn) -> None:
    by_id = {s.row_id: s for s in first}
    if by_id.keys() != {s.row_id for s in second}:
        raise IntegrityError("the two runs were scored on different rows; they do not compare")
    for each in second:
        count, other = _nll(each, tokens)[1], _nll(by_id[each.row_id], tokens)[1]
        if count != other:
            raise IntegrityError(
                f"row {each.row_id[:8]} was scored on {other} and on {count} tokens; "
                "the two runs do not compare"
            )
        if each.group_id != by_id[each.row_id].group_id:
            raise IntegrityError(
                f"row {each.row_id[:8]} is in different groups; the two runs do not compare"
            )


def _nll(score: RowScore, tokens: LossOn) -> tuple[float, int]:
    if tokens == "all":
        return score.nll_all, score.tokens_all
    return score.nll_response, score.tokens_response


def _sums(scores: Sequence[RowScore], tokens: LossOn) -> tuple[list[str], Floats, Floats]:
    """Groups in order, their nats and their tokens. Exact sums: row order does not matter."""
    parts: dict[str, list[tuple[float, int]]] = {}
    for score in scores:
        parts.setdefault(score.group_id, []).append(_nll(score, tokens))
    groups = sorted(group for group, each in parts.items() if any(count for _, count in each))
    nats = np.array([math.fsum(nll for nll, _ in parts[group]) for group in groups])
    counts = np.array([float(sum(count for _, count in parts[group])) for group in groups])
    return groups, nats, counts


def _ratio(nats: Floats, tokens: Floats) -> Estimate:
    """Ratio of sums with groups as sampling units."""
    total = math.fsum(tokens)
    value = math.fsum(nats) / total
    groups = len(tokens)
    if groups < 2:
        return Estimate(value, math.inf, groups)
    residual = math.fsum((nats - value * tokens) ** 2)
    return Estimate(value, math.sqrt(residual * groups / (groups - 1)) / total, groups)
