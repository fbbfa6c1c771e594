"""What would decide: enough, and not more than that."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from slm_lora.stats.estimates import Paired
from slm_lora.stats.power import needed_for_difference, needed_for_equivalence

from ..support.samples import sample


def test_of_one_seed_it_is_rows_for_these_trainings() -> None:
    found = sample(2, groups=300, effect=0.004)
    needed = needed_for_difference(found, rows=400)
    assert needed is not None and needed.seeds is None
    assert needed.rows == math.ceil(400 * (2.8016 * found.row_error / abs(found.value)) ** 2)


def power(sample: Paired, rows: float, seeds: int, size: float, alpha: float) -> float:
    """Chance to call out a true difference, of draws from normal rows and seeds."""
    rng = np.random.default_rng(0)
    many = 20_000
    error = sample.row_error / math.sqrt(rows)
    of_seeds = rng.standard_normal((many, seeds)) * sample.seed_deviation
    value = size + error * rng.standard_normal(many) + of_seeds.mean(1)
    spread = of_seeds.std(1, ddof=1) / math.sqrt(seeds)
    both = np.hypot(error, spread)
    freedom = both**4 / (spread**4 / (seeds - 1) + error**4 / (rows * sample.groups - 1))
    p = 2 * np.maximum(
        stats.t.sf(abs(value) / spread, seeds - 1), stats.t.sf(abs(value) / both, freedom)
    )
    return float((p < alpha).mean())


@pytest.mark.parametrize(
    ("effect", "spread"), [(0.01, 0.0074), (0.01, 0.02), (0.02, 0.01), (0.004, 0.001)]
)
@pytest.mark.parametrize("family", [1, 9])
def test_what_is_needed_has_the_power_and_little_more(
    effect: float, spread: float, family: int
) -> None:
    found = sample(2, groups=300, seeds=3, effect=effect, seed_spread=spread)
    needed = needed_for_difference(found, 300, family)
    assert needed is not None and needed.seeds is not None
    now = power(found, needed.rows / 300, needed.seeds, abs(found.value), 0.05 / family)
    # A step from 2 to 3 seeds, or one that may not go below what there is, is a large one.
    assert now >= (0.77 if needed.seeds > 3 else 0.75)
    if needed.seeds > 4:
        assert now <= 0.9


def test_equivalence_needs_both_variances_small() -> None:
    noisy = sample(2, groups=300, seeds=3, seed_spread=0.02)
    both = needed_for_equivalence(noisy, 400, margin=0.01)
    assert both is not None and both.seeds is not None and both.seeds > 3
    error = math.hypot(
        noisy.seed_deviation / math.sqrt(both.seeds), noisy.row_error * math.sqrt(400 / both.rows)
    )
    # With so many seeds and rows, the standard error is what the test needs.
    assert 0.9 < error / (0.01 / (1.6449 + 1.2816)) <= 1.001


def test_rows_that_say_nothing_are_not_asked_for() -> None:
    """Seeds alone make the spread here: more rows would not help."""
    shift = np.array([[-1.0], [0.0], [1.0]]) * 0.02 + 0.01
    found = Paired(np.full((3, 300), 100.0) * shift, np.full(300, 100.0))
    needed = needed_for_difference(found, 300)
    assert needed is not None and needed.rows == 300
    assert needed.seeds == 34  # as statsmodels' TTestPower().solve_power(0.5, power=0.8) rounds up


def test_two_seeds_that_agree_are_few_all_the_same() -> None:
    """Student's quantile of two seeds is 12.7, and 115 where nine comparisons are corrected."""
    found = sample(2, groups=300, seeds=2, effect=0.1, seed_spread=0.005)
    alone, one_of_nine = (needed_for_difference(found, 300, family=many) for many in (1, 9))
    assert alone is not None and alone.seeds is not None
    assert one_of_nine is not None and one_of_nine.seeds is not None
    assert one_of_nine.seeds >= max(3, alone.seeds)


def test_nothing_is_needed_for_no_difference() -> None:
    rows = np.zeros((3, 20))
    assert needed_for_difference(Paired(rows, np.ones(20)), 20) is None
    still = needed_for_equivalence(Paired(rows, np.ones(20)), 20, 0.01)
    assert still is not None and (still.rows, still.seeds) == (20, 3)
