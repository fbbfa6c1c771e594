"""Differences by category of rows, and whether they are alike."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from scipy.special import fdtrc

from slm_lora.records import RowScore
from slm_lora.stats.clustered import Floats, effective_groups
from slm_lora.stats.comparisons import Comparison
from slm_lora.stats.estimates import paired
from slm_lora.stats.inference import LEAST_GROUPS, Difference, difference
from slm_lora.stats.settings import draw_of

MOST_CATEGORIES = 20
"""Only the largest are compared."""


def compared_categories(scores: Sequence[RowScore]) -> list[str]:
    """Names of the `MOST_CATEGORIES` largest categories that have `LEAST_GROUPS` groups, sorted."""
    groups: dict[str, set[str]] = defaultdict(set)
    for score in scores:
        groups[score.category].add(score.group_id)
    rows = Counter(score.category for score in scores if score.category)
    largest = [name for name, _ in rows.most_common(MOST_CATEGORIES)]
    return sorted(name for name in largest if len(groups[name]) >= LEAST_GROUPS)


def by_category(comparison: Comparison) -> list[tuple[str, int, Difference]]:
    """The difference among the rows of every category: its name, its rows, the difference."""
    results = []
    draws = [draw_of(second) for _, second in comparison.pairs]
    for category in compared_categories(comparison.pairs[0][0].scores):
        pairs = [
            (_within(first.scores, category), _within(second.scores, category))
            for first, second in comparison.pairs
        ]
        sample = paired(pairs, comparison.metric, draws)
        if sample.groups >= LEAST_GROUPS:
            result = difference(sample, comparison.difference.margin)
            results.append((category, len(pairs[0][0]), result))
    return results


def _within(scores: Sequence[RowScore], category: str) -> list[RowScore]:
    return [score for score in scores if score.category == category]


def p_alike(comparison: Comparison) -> float | None:
    """Wald's test that a difference is the same in all categories, for these trainings.

    The covariance of the categories' differences is clustered by group, whose rows may be of
    several categories. Hotelling's T² is referred to F, with the effective groups of the category
    that has fewest.

    Returns:
        p; None with fewer than two categories, or more categories than effective groups.
    """
    categories = compared_categories(comparison.pairs[0][0].scores)
    if len(categories) < 2:
        return None
    numerators, denominators = _sums(comparison, categories)
    enough = (denominators > 0).sum(1) >= LEAST_GROUPS  # a response may be empty
    numerators, denominators = numerators[enough], denominators[enough]
    if len(denominators) < 2:
        return None
    sizes = np.array([effective_groups(row[row > 0]) for row in denominators])
    values = numerators.sum(1) / denominators.sum(1)
    influence = (numerators - values[:, None] * denominators) / denominators.sum(1, keepdims=True)
    influence *= np.sqrt(sizes / (sizes - 1))[:, None]
    between = influence[1:] - influence[0]
    apart = values[1:] - values[0]
    return _hotelling(apart, between @ between.T, float(sizes.min()))


def _sums(comparison: Comparison, categories: Sequence[str]) -> tuple[Floats, Floats]:
    """Differences of numerators, mean over trainings, and denominators: [categories, groups]."""
    metric = comparison.metric
    place = {name: index for index, name in enumerate(categories)}
    rows = [score for score in comparison.pairs[0][0].scores if score.category in place]
    groups = {name: index for index, name in enumerate(dict.fromkeys(r.group_id for r in rows))}
    shape = len(categories), len(groups)
    numerators, denominators = np.zeros(shape), np.zeros(shape)
    for first, second in comparison.pairs:
        for sign, run in ((-1, first), (1, second)):
            for score in run.scores:
                if score.category in place:
                    at = place[score.category], groups[score.group_id]
                    numerators[at] += sign * metric.parts(score)[0] / len(comparison.pairs)
    for score in rows:
        denominators[place[score.category], groups[score.group_id]] += metric.parts(score)[1]
    return numerators, denominators


def _hotelling(apart: Floats, covariance: Floats, groups: float) -> float | None:
    """p of T² as F with ``len(apart)`` and ``groups - len(apart)`` degrees of freedom."""
    count = len(apart)
    freedom = groups - count
    if freedom < 1:
        return None
    if not covariance.any():
        return float(not apart.any())
    statistic = float(apart @ np.linalg.pinv(covariance, hermitian=True) @ apart)
    return float(fdtrc(count, freedom, statistic * freedom / (count * (groups - 1))))
