"""What was scored, as sums: losses with their errors, and paired differences of two arms.

Loss is a ratio (nats over tokens), and rows of one group are not independent: groups are the
sampling units throughout.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from slm_lora.errors import IntegrityError
from slm_lora.records import RowScore
from slm_lora.runs.metrics import Metric

Floats = npt.NDArray[np.float64]
_LARGEST_LOSS = 700.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A loss in nats per token, with its clustered standard error.

    The variance is that of a ratio, linearised over groups (Cochran, Sampling Techniques, 3rd
    ed., ch. 6; recommended for evaluations by Miller 2024, arXiv 2411.00640). ``low`` and
    ``high`` bound the 95 % interval over the choice of test rows, by Student's t.
    """

    value: float
    standard_error: float
    groups: int

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.value - self._half

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.value + self._half

    @property
    def _half(self) -> float:
        if self.groups < 2:
            return math.inf
        return float(stdtrit(self.groups - 1, 0.975)) * self.standard_error

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
        return estimate_of_sums(self.nats.mean(0), self.tokens).standard_error

    @property
    def seed_deviation(self) -> float:
        """Standard deviation of the difference between seeds; not a number for one seed."""
        return float(self.by_seed.std(ddof=1)) if self.seeds > 1 else math.nan


def estimate(runs: Sequence[Sequence[RowScore]], metric: Metric) -> Estimate:
    """A metric of one model, or its mean over seeds, with its clustered standard error."""
    numerators, denominators = group_sums(runs, metric)
    return estimate_of_sums(numerators.mean(0), denominators)


def estimate_of_sums(nats: Floats, tokens: Floats) -> Estimate:
    """Loss from the nats and the tokens of every group, with its clustered standard error."""
    total = math.fsum(tokens)
    value = math.fsum(nats) / total
    groups = len(tokens)
    if groups < 2:
        return Estimate(value, math.inf, groups)
    residual = math.fsum((nats - value * tokens) ** 2)
    return Estimate(value, math.sqrt(residual * groups / (groups - 1)) / total, groups)


def perplexity(loss: float) -> float:
    """exp of it; infinite where that is no number any more."""
    return math.exp(loss) if loss < _LARGEST_LOSS else math.inf


def group_sums(runs: Sequence[Sequence[RowScore]], metric: Metric) -> tuple[Floats, Floats]:
    """Numerators [runs, groups] and denominators [groups] of runs on the same rows.

    Raises:
        IntegrityError: they were not scored on the same tokens of the same rows.
    """
    for other in runs[1:]:
        _check_same_rows(runs[0], other, metric)
    sums = [_sums(_ById(scores), metric) for scores in runs]
    return np.stack([values for values, _ in sums]), sums[0][1]


@dataclass(frozen=True, eq=False)
class _ById:
    """Scores as a cache key: the same object, not equal content."""

    scores: Sequence[RowScore]

    def __hash__(self) -> int:
        return id(self.scores)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.scores is other.scores


def paired(arms: Sequence[tuple[Sequence[RowScore], Sequence[RowScore]]], metric: Metric) -> Paired:
    """Differences between two arms, one pair of runs a seed.

    Raises:
        IntegrityError: runs were not scored on the same tokens of the same rows.
    """
    nats, counts = group_sums([scores for pair in arms for scores in pair], metric)
    return Paired(nats[1::2] - nats[0::2], counts)


def _check_same_rows(first: Sequence[RowScore], second: Sequence[RowScore], metric: Metric) -> None:
    expected, actual = (_scored_on(_ById(scores), metric) for scores in (first, second))
    if expected == actual:
        return
    if expected.keys() != actual.keys():
        raise IntegrityError("the two runs were scored on different rows; they do not compare")
    for row_id, (count, group) in actual.items():
        other, other_group = expected[row_id]
        if count != other:
            raise IntegrityError(
                f"row {row_id[:8]} was scored on {other:g} and on {count:g} tokens; "
                "the two runs do not compare"
            )
        if group != other_group:
            raise IntegrityError(
                f"row {row_id[:8]} is in different groups; the two runs do not compare"
            )


@functools.lru_cache(maxsize=256)
def _scored_on(key: _ById, metric: Metric) -> dict[str, tuple[float, str]]:
    """Denominator and group of every row, by its id."""
    return {score.row_id: (metric.parts(score)[1], score.group_id) for score in key.scores}


@functools.lru_cache(maxsize=256)
def _sums(key: _ById, metric: Metric) -> tuple[Floats, Floats]:
    """Numerators and denominators by group, in the order of group ids. Exact sums, so the order of
    rows does not matter. Groups without a denominator are left out."""
    values: dict[str, list[float]] = {}
    counts: dict[str, float] = {}
    for score in key.scores:
        value, count = metric.parts(score)
        values.setdefault(score.group_id, []).append(value)
        counts[score.group_id] = counts.get(score.group_id, 0) + count
    groups = sorted(group for group, count in counts.items() if count)
    return (
        np.array([math.fsum(values[group]) for group in groups]),
        np.array([float(counts[group]) for group in groups]),
    )
