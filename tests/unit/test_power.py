"""Sample sizes of a new experiment: enough, for a stated difference, and not more than that."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from slm_lora.stats.estimates import Paired
from slm_lora.stats.power import (
    ASSURANCE,
    Needed,
    detectable,
    failure_bound,
    groups_to_detect,
    needed,
)

from ..support.samples import sample

TOKENS = np.full(300, 100.0)


def test_plan_from_one_seed_asks_for_rows_only() -> None:
    pilot = sample(2, groups=300, effect=0.004)
    plan = needed(pilot, rows=400, margin=0.002)
    assert plan is not None and plan.seeds is None
    freedom = pilot.over_rows.freedom
    upper = pilot.row_error * math.sqrt(freedom / stats.chi2.ppf(1 - ASSURANCE, freedom))
    # Equivalence asks for most: one-sided 5 %, and 10 % on either side for 80 % power.
    assert plan.rows == math.ceil(
        400 * (float(-stats.norm.ppf([0.05, 0.1]).sum()) * upper / 0.002) ** 2
    )


def test_plan_depends_on_the_margin_not_on_the_observed_effect() -> None:
    plans = [
        needed(sample(2, groups=300, seeds=3, effect=effect, seed_spread=0.005), 300, 0.01)
        for effect in (0.0, 0.5)
    ]
    assert plans[0] == plans[1]


def decides(truth: Paired, plan: Needed, rows: int, margin: float, family: int) -> float:
    """The lesser of two chances with normal rows and seeds: to show a true difference of the
    margin, and to show equivalence where there is none."""
    assert plan.seeds is not None
    rng = np.random.default_rng(0)
    cases = 4_000
    error = truth.row_error / math.sqrt(plan.rows / rows)
    of_seeds = rng.standard_normal((cases, plan.seeds)) * truth.unit_deviation
    value = error * rng.standard_normal(cases) + of_seeds.mean(1)
    spread = of_seeds.std(1, ddof=1) / math.sqrt(plan.seeds)
    both = np.hypot(error, spread)
    freedom = plan.rows / rows * truth.over_rows.freedom
    of_both = both**4 / (spread**4 / (plan.seeds - 1) + error**4 / freedom)

    def p(distance: object) -> object:
        return np.maximum(
            stats.t.sf(distance / spread, plan.seeds - 1), stats.t.sf(distance / both, of_both)
        )

    different = (2 * p(abs(value + margin)) < 0.05 / family).mean()
    equivalent = (p(margin - abs(value)) < 0.05 / family).mean()
    return float(min(different, equivalent))


@pytest.mark.parametrize("spread", [0.004, 0.01])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_plans_from_small_pilots_have_the_promised_power(spread: float, seeds: int) -> None:
    """Of plans from small pilots at least three quarters have the power they promise."""
    margin, rng = 0.01, np.random.default_rng(1)
    apart = np.array([-1.0, 0, 1])[:, None] * spread
    rows = 0.05 * rng.standard_normal(300)
    truth = Paired(TOKENS * (apart + rows - rows.mean()), TOKENS)
    held, plans = [], 0
    for _ in range(60):
        of_seeds = spread * rng.standard_normal((seeds, 1))
        pilot = Paired(TOKENS * (of_seeds + rows), TOKENS)
        plan = needed(pilot, 300, margin)
        plans += plan is not None
        held.append(plan is None or decides(truth, plan, 300, margin, 1) >= 0.79)
    assert plans >= 30
    assert sum(held) / len(held) >= 0.7  # 75 % less the chance of sixty pilots


def test_plan_from_the_true_spread_is_at_most_1_4_times_the_exact_one() -> None:
    spread = 0.01
    apart = np.linspace(-1, 1, 40)[:, None]
    pilot = Paired(TOKENS * (apart / apart.std(ddof=1) * spread), TOKENS)
    plan = needed(pilot, 300, 0.01)
    assert plan is not None and plan.seeds == 40, "fewer than now are not asked for"
    plan = needed(pilot, 300, 0.002)
    assert plan is not None and plan.seeds is not None and plan.rows == 300
    exact = (spread / 0.002 * (1.96 + 0.8416)) ** 2
    assert exact < plan.seeds < 1.4 * exact


def test_plan_for_a_family_asks_for_more_seeds() -> None:
    pilot = sample(2, groups=300, seeds=3, seed_spread=0.005)
    alone, one_of_nine = (needed(pilot, 300, 0.01, family=family) for family in (1, 9))
    assert alone is not None and alone.seeds is not None
    assert one_of_nine is not None and one_of_nine.seeds is not None
    assert one_of_nine.seeds > alone.seeds


def test_plan_of_too_many_seeds_is_none() -> None:
    assert needed(sample(2, seeds=2, seed_spread=1.0), 300, 0.001) is None
    assert needed(Paired(np.zeros((3, 1)), np.ones(1)), 20, 0.01) is None


def test_plan_without_variance_asks_for_no_more() -> None:
    plan = needed(Paired(np.zeros((3, 20)), np.ones(20)), 20, 0.01)
    assert plan == Needed(rows=20, seeds=3)


def test_draws_of_training_rows_have_no_plan() -> None:
    assert needed(Paired(np.ones((3, 20)), np.ones(20), "data draw"), 20, 0.01) is None


@pytest.mark.parametrize(
    ("units", "failures", "share"), [(3, 0, 0.632), (10, 0, 0.259), (3, 1, 0.865)]
)
def test_failure_bound_equals_clopper_pearson(units: int, failures: int, share: float) -> None:
    expected = stats.binomtest(failures, units, alternative="less").proportion_ci(0.95).high
    assert failure_bound(units, failures) == pytest.approx(expected)
    assert failure_bound(units, failures) == pytest.approx(share, abs=5e-4)
    assert failure_bound(2, 2) == 1


@pytest.mark.parametrize("size", [0.2, 0.5])
def test_groups_to_detect_a_paired_difference(size: float) -> None:
    """Student's test, whose power is known exactly, takes two more (34 at 0.5, 199 at 0.2)."""

    def power(groups: int) -> float:
        limit = stats.t.isf(0.025, groups - 1)
        return float(stats.nct.sf(limit, groups - 1, size * math.sqrt(groups)))

    groups = groups_to_detect(size, 1.0)
    assert power(groups + 1) < 0.8 <= power(groups + 2)
    assert detectable(groups, 1.0) == pytest.approx(size, rel=0.02)
