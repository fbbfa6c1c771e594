"""Settings at their own tuned values: bounds of regret, and intervals that include the choice."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from slm_lora.records import RowScore
from slm_lora.runs.metrics import METRICS, Metric
from slm_lora.runs.tuning import ArmRecord, CandidateRecord
from slm_lora.stats.clustered import Floats, clustered, clustered_covariance
from slm_lora.stats.estimates import Paired
from slm_lora.stats.inference import difference, interval, p_below
from slm_lora.stats.regret import NO_REGRET, Contrasts, Regret
from slm_lora.stats.selection_regret import (
    at_own_best,
    own_best_interval,
    p_worse,
    pooled_training_variance,
    regret_bound,
    regret_of_arm,
    regret_of_sums,
)
from slm_lora.stats.settings import Setting
from slm_lora.stats.tuned_arms import TunedArm

from ..support.runs import scored_run

RATES = (2e-4, 1e-3, 2.2e-3, 5e-3, 1.1e-2, 2.5e-2)


def candidates(rng: np.random.Generator, seeds: int = 1, groups: int = 40) -> Floats:
    """Nats of six rates on groups of ten tokens, lowest near the fourth."""
    distances = np.log(np.array(RATES) / 5e-3)
    means = 2.6 + 0.02 * distances**2
    slopes = rng.normal(0, 0.05, groups)
    noise = rng.normal(0, 0.03, (len(RATES), seeds, groups))
    return 10 * (means[:, None, None] + distances[:, None, None] * slopes + noise)


def regret(value: float, error: float, freedom: float = 20.0) -> Regret:
    return Regret(Contrasts(np.array([value]), np.array([error]), np.array([freedom])))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 300), min_size=3, max_size=20), st.integers(0, 1000))
def test_linear_combinations_have_the_errors_of_their_own_ratio(
    sizes: list[int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    denominators = np.array(sizes, dtype=float)
    numerators = denominators * rng.normal(2.0, 0.3, (4, len(sizes)))
    weights = rng.normal(size=4)
    values, covariance, freedom = clustered_covariance(numerators, denominators)
    alone = clustered(weights @ numerators, denominators)
    assert weights @ values == pytest.approx(alone.value)
    assert math.sqrt(weights @ covariance @ weights) == pytest.approx(alone.standard_error)
    assert freedom == alone.freedom


def test_observed_losses_bound_the_regret_by_paired_t_intervals() -> None:
    nats = candidates(np.random.default_rng(0))
    tokens = np.full(40, 10.0)
    per_group = nats[:, 0] / 10
    bounds = []
    for other in (0, 1, 2, 4, 5):
        test = stats.ttest_rel(per_group[3], per_group[other])
        bounds.append(test.confidence_interval(0.95).high)  # one side of it: 2.5 %
    found = regret_of_sums(nats, tokens, 3)
    assert found.fitted is None
    assert found.upper(0.025) == pytest.approx(max(0.0, *bounds))
    assert found.bound == pytest.approx(found.upper(0.025))


def test_training_variance_adds_to_every_difference() -> None:
    nats = candidates(np.random.default_rng(1), seeds=2)
    tokens = np.full(40, 10.0)
    found = regret_of_sums(nats, tokens, 3, None, 4e-4, 6.0)
    per_group = nats.mean(1) / 10
    for place, other in enumerate((0, 1, 2, 4, 5)):
        rows = stats.sem(per_group[3] - per_group[other]) ** 2
        training = 2 * 4e-4 / 2  # two runs, means over two seeds
        assert found.observed.errors[place] == pytest.approx(math.sqrt(rows + training))
        freedom = (rows + training) ** 2 / (rows**2 / 39 + training**2 / 6)
        assert found.observed.freedom[place] == pytest.approx(freedom)


def test_a_parabola_is_fitted_to_values_within_a_factor_of_five() -> None:
    nats = candidates(np.random.default_rng(2))
    tokens = np.full(40, 10.0)
    found = regret_of_sums(nats, tokens, 3, RATES)
    assert found.fitted is not None
    x, near = np.log(RATES), [1, 2, 3, 4, 5]
    # Least squares in every group: groups are of one size, so their mean is that of the losses.
    curves = np.polyfit(x[near], nats[near, 0] / 10, 2)
    fitted = np.stack([np.polyval(curves[:, group], x) for group in range(40)], 1)
    for place, other in enumerate((0, 1, 2, 4, 5)):
        contrast = fitted[3] - fitted[other]
        if other == 0:  # a factor of 25: as measured
            contrast = (nats[3, 0] - nats[0, 0]) / 10
        assert found.fitted.values[place] == pytest.approx(contrast.mean())
        assert found.fitted.errors[place] == pytest.approx(stats.sem(contrast))
    assert found.estimate == pytest.approx(max(0.0, found.fitted.values.max()))
    assert found.upper(0.1) == min(found.observed.upper(0.1), found.fitted.upper(0.1))


def test_few_values_have_no_curve() -> None:
    nats = candidates(np.random.default_rng(3))[:4]
    assert regret_of_sums(nats, np.full(40, 10.0), 3, RATES[:4]).fitted is None


def test_one_value_has_no_regret_and_changes_nothing() -> None:
    rng = np.random.default_rng(4)
    sample = Paired(rng.normal(0.05, 0.3, (3, 30)), np.full(30, 10.0))
    none = regret_of_sums(candidates(rng)[:1], np.full(40, 10.0), 0, RATES[:1], 1e-4, 4.0)
    assert none.bound == none.estimate == 0
    ordinary = difference(sample, 0.01)
    assert at_own_best(ordinary, sample, none, none) == ordinary


def test_one_validation_group_bounds_nothing() -> None:
    rng = np.random.default_rng(5)
    unknown = regret_of_sums(candidates(rng, groups=1), np.full(1, 10.0), 3, RATES)
    sample = Paired(rng.normal(5.0, 0.3, (3, 30)), np.full(30, 10.0))
    found = at_own_best(difference(sample, 0.01), sample, NO_REGRET, unknown)
    assert found.low == -math.inf
    assert found.high == interval(sample, 0.95)[1]
    assert found.p == 1


def test_the_ends_move_by_the_regret_on_their_side() -> None:
    """At its best value the second setting may be lower than at the chosen one: the low end."""
    rng = np.random.default_rng(6)
    sample = Paired(rng.normal(0.05, 0.3, (3, 30)), np.full(30, 10.0))
    low, high = interval(sample, 0.95)
    half = (high - low) / 2
    bound = stats.t.isf(0.025, 20) * 0.004
    found = own_best_interval(sample, 0.95, NO_REGRET, regret(0.0, 0.004))
    assert found == pytest.approx((sample.value - math.hypot(half, bound), high))
    found = own_best_interval(sample, 0.95, regret(0.0, 0.004), NO_REGRET)
    assert found == pytest.approx((low, sample.value + math.hypot(half, bound)))
    # Of an accuracy the best value is higher.
    higher = replace(regret(0.0, 0.004), higher_is_better=True)
    found = own_best_interval(sample, 0.95, NO_REGRET, higher)
    assert found == pytest.approx((low, sample.value + math.hypot(half, bound)))
    better = p_worse(sample, NO_REGRET, regret(0.0, 0.004)), p_worse(sample, NO_REGRET, higher)
    assert better[0] > p_worse(sample, NO_REGRET, NO_REGRET) == p_below(sample, sample.value)
    assert better[1] == p_below(sample, -sample.value)


REGRETS = st.builds(
    regret, st.floats(-0.05, 0.01), st.floats(0.0, 0.02), st.sampled_from([1.0, 4.0, 60.0])
)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10_000), st.integers(1, 4), st.floats(-0.03, 0.03), REGRETS, REGRETS)
def test_interval_and_p_values_are_one_statement(
    seed: int, seeds: int, shift: float, first: Regret, second: Regret
) -> None:
    rng = np.random.default_rng(seed)
    sample = Paired(rng.normal(10 * shift, 0.2, (seeds, 30)), np.full(30, 10.0))
    ordinary = difference(sample, 0.02)
    found = at_own_best(ordinary, sample, first, second)
    assert first.bound >= 0
    assert found.low <= ordinary.low
    assert found.high >= ordinary.high
    assert found.p >= ordinary.p * (1 - 1e-6)
    assert found.p_equivalence >= ordinary.p_equivalence * (1 - 1e-6)
    assert (found.p < 0.05) == found.excludes_zero
    low, high = own_best_interval(sample, 0.90, first, second)
    assert (found.p_equivalence < 0.05) == (low > -0.02 and high < 0.02)
    # At any other level, as Holm's correction asks for it.
    for confidence in (0.5, 0.99, 0.9999):
        low, high = own_best_interval(sample, confidence, first, second)
        assert (found.p < 1 - confidence) == (low > 0 or high < 0)


def scored(value: float, rates: list[tuple[int, Floats]]) -> Setting:
    """A setting with one run per seed, with a loss per row."""
    runs = []
    for seed, losses in rates:
        run = scored_run(f"lr{value:g}-seed{seed}", 2.0, seed=seed, training__learning_rate=value)
        scores = tuple(
            RowScore(f"{i:03d}", f"{i:03d}", "", "test", 10 * loss, 10, 1, 0.0, 10, 1)
            for i, loss in enumerate(losses)
        )
        runs.append(replace(run, scores=scores))
    return Setting(tuple(runs))


def test_settings_are_compared_by_the_seeds_that_all_have() -> None:
    nats = candidates(np.random.default_rng(7), seeds=2) / 10
    settings_ = [
        scored(rate, [(1000, own[0]), (1001, own[1])])
        for rate, own in zip(RATES, nats, strict=True)
    ]
    found = regret_bound(settings_, settings_[3], RATES, 1e-5, 4.0)
    expected = regret_of_sums(10 * nats, np.full(40, 10.0), 3, RATES, 1e-5, 4.0)
    assert found.bound == pytest.approx(expected.bound)
    settings_[0] = Setting(settings_[0].runs[1:])  # one seed was stopped
    settings_[1] = Setting(settings_[1].runs[::-1])
    found = regret_bound(settings_, settings_[3], RATES, 1e-5, 4.0)
    expected = regret_of_sums(10 * nats[:, 1:], np.full(40, 10.0), 3, RATES, 1e-5, 4.0)
    assert found.bound == pytest.approx(expected.bound)
    settings_[1] = Setting(settings_[1].runs[1:])
    assert regret_bound(settings_, settings_[3], RATES, 1e-5, 4.0).bound == math.inf
    with pytest.raises(ValueError, match="none of the candidates"):
        regret_bound(settings_[:3], settings_[3], RATES[:3], None, 0.0)


def test_the_regret_of_a_search_is_that_of_its_finished_values() -> None:
    nats = candidates(np.random.default_rng(11)) / 10
    key = "training.learning_rate"

    def searched(**more: float) -> ArmRecord:
        records = tuple(
            CandidateRecord(values={key: rate, **more}, loss=2.6, tokens=1, tokens_to_end=1)
            for rate in RATES
        )
        return ArmRecord(
            name="r8", settings={}, chosen={key: 5e-3, **more}, edges={}, candidates=records
        )

    finished = {
        place: scored(rate, [(1000, own[0])])
        for place, (rate, own) in enumerate(zip(RATES, nats, strict=True))
        if place != 1  # stopped
    }
    arm = TunedArm(searched(), finished)
    kept = [place for place in range(len(RATES)) if place != 1]
    expected = regret_of_sums(
        10 * nats[kept], np.full(40, 10.0), 2, [RATES[place] for place in kept], 1e-5, 4.0
    )
    assert expected.fitted is not None
    assert regret_of_arm(arm, 1e-5, 4.0).bound == pytest.approx(expected.bound)
    # Of two keys there is no curve.
    arm = TunedArm(searched(alpha=8.0), finished)
    assert regret_of_arm(arm, 1e-5, 4.0).fitted is None


def test_of_a_metric_that_is_better_when_higher_the_costs_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accuracy = Metric(
        "accuracy", "", "", "", lambda row: (row.nll_all, row.tokens_all), higher_is_better=True
    )
    monkeypatch.setitem(METRICS, "accuracy", accuracy)
    nats = candidates(np.random.default_rng(8)) / 10
    settings_ = []
    for rate, own in zip(RATES, 5 - nats, strict=True):
        (run,) = scored(rate, [(1000, own[0])]).runs
        settings_.append(Setting((replace(run, headline="accuracy"),)))
    found = regret_bound(settings_, settings_[3], RATES, None, 0.0)
    assert found.higher_is_better
    expected = regret_of_sums(10 * nats, np.full(40, 10.0), 3, RATES)
    assert found.bound == pytest.approx(expected.bound)


def test_the_training_variance_is_pooled_over_settings() -> None:
    rng = np.random.default_rng(9)
    rows = rng.normal(2.6, 0.3, (5, 40))
    three = scored(1e-3, [(seed, rows[seed]) for seed in range(3)])
    two = scored(2e-3, [(seed, rows[seed]) for seed in (3, 4)])
    one = scored(3e-3, [(0, rows[0])])
    variance, freedom = pooled_training_variance([three, two, one])
    losses = rows.mean(1)
    assert freedom == 3
    assert variance == pytest.approx(
        (2 * np.var(losses[:3], ddof=1) + np.var(losses[3:], ddof=1)) / 3
    )
    assert pooled_training_variance([one]) == (None, 0.0)


def test_the_interval_covers_what_ignoring_the_choice_misses() -> None:
    """Brute force: two settings of the same lowest loss; of one, seven values are tried that
    differ by less than the noise of validation, of the other none. The choice is not the best."""
    rng = np.random.default_rng(10)
    cases, groups, tokens = 400, 60, np.full(60, 10.0)
    means = 2.6 + np.array([0.003, 0.002, 0.001, 0.0, 0.001, 0.002, 0.003]) * 4
    covered = {"ordinary": 0, "own best": 0}
    for _ in range(cases):
        validation = means[:, None] + rng.normal(0, 0.06, (7, groups))
        chosen = int(validation.mean(1).argmin())
        test = rng.normal(means[chosen] - 2.6, 0.02, (3, groups)) * 10
        sample = Paired(test, tokens)
        own = regret_of_sums(10 * validation[:, None], tokens, chosen)
        low, high = interval(sample, 0.95)
        covered["ordinary"] += low <= 0 <= high
        low, high = own_best_interval(sample, 0.95, NO_REGRET, own)
        covered["own best"] += low <= 0 <= high
    assert covered["ordinary"] / cases < 0.85
    assert covered["own best"] / cases > 0.95
