"""What was scored, as sums: losses with their errors, and paired differences of two arms.

Loss is a ratio (nats over tokens), and rows of one group are not independent: groups are the
sampling units throughout.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import stdtrit

from slm_lora.errors import IntegrityError
from slm_lora.records import RowScore
from slm_lora.runs.metrics import Metric
from slm_lora.stats.clustered import Clustered, Floats, clustered, effective_groups

_LARGEST_LOSS = 700.0


@dataclass(frozen=True, slots=True)
class Estimate:
    """A metric with its clustered standard error.

    ``low`` and ``high`` bound the 95 % interval over the choice of test rows: Student's t with the
    degrees of freedom of `clustered`, as recommended for evaluations by Miller 2024
    (arXiv 2411.00640) with the correction for few groups.
    """

    value: float
    standard_error: float
    freedom: float
    groups: int
    effective_groups: float

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
        return float(stdtrit(self.freedom, 0.975)) * self.standard_error

    def record(self) -> dict[str, float | int | None]:
        """For JSON, which has no infinity: unknown from one group is null."""
        known = math.isfinite(self.standard_error)
        return {
            "value": self.value,
            "standard_error": self.standard_error if known else None,
            "low": self.low if known else None,
            "high": self.high if known else None,
            "groups": self.groups,
            "effective_groups": self.effective_groups,
        }


UnitName = Literal["seed", "data draw"]
"""Independent repetitions of a comparison: training seeds, or draws of training rows."""


@dataclass(frozen=True, eq=False)
class Paired:
    """Differences between two settings on the same rows, summed by group.

    Attributes:
        nats: numerator of the second setting minus that of the first, float64 [units, groups].
        tokens: denominators, float64 [groups].
        unit: what was drawn independently. Where several seeds train on each draw of training
            rows, a unit is a draw, averaged over its seeds.
        several_seeds: whether the chance of the seed is in the units.
        crossed: the difference by seed, averaged over draws, float64 [seeds], where the same seeds
            train on several draws; else None.
    """

    nats: Floats
    tokens: Floats
    unit: UnitName = "seed"
    several_seeds: bool = True
    crossed: Floats | None = None

    @property
    def units(self) -> int:
        """Independent repetitions."""
        return len(self.nats)

    @property
    def groups(self) -> int:
        """Groups of rows."""
        return len(self.tokens)

    @property
    def by_unit(self) -> Floats:
        """The difference per unit, in the metric's unit, [units]."""
        values: Floats = self.nats.sum(1) / self.tokens.sum()
        return values

    @functools.cached_property
    def over_rows(self) -> Clustered:
        """The mean difference with its standard error over the choice of test rows."""
        return clustered(self.nats.mean(0), self.tokens)

    @property
    def value(self) -> float:
        """The mean difference; for a loss below zero the second setting is better."""
        return self.over_rows.value

    @property
    def row_error(self) -> float:
        """Standard error over the choice of test rows."""
        return self.over_rows.standard_error

    @property
    def unit_deviation(self) -> float:
        """Standard deviation of the difference between units; not a number for one unit."""
        return float(self.by_unit.std(ddof=1)) if self.units > 1 else math.nan


def estimate(runs: Sequence[Sequence[RowScore]], metric: Metric) -> Estimate:
    """A metric of one model, or its mean over seeds, with its clustered standard error."""
    numerators, denominators = group_sums(runs, metric)
    return estimate_of_sums(numerators.mean(0), denominators)


def estimate_of_sums(numerators: Floats, denominators: Floats) -> Estimate:
    """A metric from the sums of every group, with its clustered standard error."""
    result = clustered(numerators, denominators)
    return Estimate(
        result.value,
        result.standard_error,
        result.freedom,
        result.groups,
        effective_groups(denominators),
    )


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


class Draw(NamedTuple):
    """What a training drew at random."""

    seed: int
    data_seed: int


def paired(
    arms: Sequence[tuple[Sequence[RowScore], Sequence[RowScore]]],
    metric: Metric,
    draws: Sequence[Draw] | None = None,
) -> Paired:
    """Differences between two settings.

    Args:
        arms: scores of both, one pair per training.
        metric: numerator and denominator of a row.
        draws: seeds of each pair; None: every pair is a seed of its own.

    Raises:
        IntegrityError: runs were not scored on the same tokens of the same rows.
    """
    sums, denominators = group_sums([scores for pair in arms for scores in pair], metric)
    return paired_of_sums(sums[1::2] - sums[0::2], denominators, draws)


def paired_of_sums(
    numerators: Floats, denominators: Floats, draws: Sequence[Draw] | None = None
) -> Paired:
    """As `paired`, from differences of sums, [trainings, groups]."""
    seeds = {draw.seed for draw in draws or ()}
    data_seeds = {draw.data_seed for draw in draws or ()}
    if draws is None or len(data_seeds) < 2 or len(seeds) == len(data_seeds) == len(draws):
        return Paired(numerators, denominators)

    # A seed that trains on several draws is one chance, not several.
    if 1 < len(seeds) < len(draws):
        complete = _complete_part(draws)
        if len(complete) < len(draws):
            kept = [index for index, draw in enumerate(draws) if draw in complete]
            return paired_of_sums(numerators[kept], denominators, [draws[i] for i in kept])

    def means(labels: Sequence[int]) -> Floats:
        return np.stack(
            [
                numerators[[own == label for own in labels]].mean(0)
                for label in dict.fromkeys(labels)
            ]
        )

    by_draw = means([draw.data_seed for draw in draws])
    shared = 1 < len(seeds) < len(draws)
    by_seed = means([draw.seed for draw in draws]).sum(1) / denominators.sum()
    crossed = by_seed if shared else None
    return Paired(by_draw, denominators, "data draw", len(seeds) > 1, crossed)


def _complete_part(draws: Sequence[Draw]) -> set[Draw]:
    """The largest part in which every seed trains on every draw of rows; all of it where no seed
    trains on two draws. Missing cells would make seeds and draws depend on each other."""
    seeds_of: dict[int, set[int]] = {}
    for draw in draws:
        seeds_of.setdefault(draw.data_seed, set()).add(draw.seed)
    if sum(map(len, seeds_of.values())) == len({draw.seed for draw in draws}):
        return set(draws)
    parts = []
    for seeds in seeds_of.values():
        data_seeds = [data for data, own in seeds_of.items() if seeds <= own]
        parts.append({Draw(seed, data) for seed in seeds for data in data_seeds})
    return max(parts, key=lambda part: (len(part), len({draw.data_seed for draw in part})))


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
