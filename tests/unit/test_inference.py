"""Planted truths: what the statistics say of data whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from slm_lora.errors import IntegrityError
from slm_lora.records import RowScore
from slm_lora.runs.metrics import METRICS, mean_over_rows
from slm_lora.stats.clustered import Floats
from slm_lora.stats.estimates import Draw, Paired, estimate, paired, paired_of_sums
from slm_lora.stats.inference import LEAST_GROUPS, difference, holm, interval, p_value

from ..support.samples import sample


def score(row: str, group: str, nll: float, tokens: int) -> RowScore:
    return RowScore(row, group, "", "test", nll, tokens, 1, nll / 2, tokens // 2, 1)


def test_loss_is_total_nll_over_tokens_and_groups_are_the_units() -> None:
    rows = [score("a", "g1", 10.0, 4), score("b", "g1", 2.0, 4), score("c", "g2", 3.0, 2)]
    result = estimate([rows], METRICS["all"])
    assert result.value == pytest.approx(1.5)
    # Residuals by hand: g1 12 - 1.5·8 = 0, g2 3 - 1.5·2 = 0.
    assert result.standard_error == pytest.approx(0)
    assert result.groups == 2
    # Groups of one size: the standard error of a mean.
    equal = [score(f"r{i}", f"g{i}", nll, 4) for i, nll in enumerate((10.0, 2.0, 3.0))]
    assert estimate([equal], METRICS["all"]).standard_error == pytest.approx(
        stats.sem([2.5, 0.5, 0.75])
    )


def test_estimate_of_several_seeds_is_the_mean_of_their_losses() -> None:
    runs = [[score("a", "g", nll, 4), score("b", "h", 1.0, 4)] for nll in (3.0, 7.0)]
    assert estimate(runs, METRICS["all"]).value == pytest.approx((4 / 8 + 8 / 8) / 2)
    with pytest.raises(IntegrityError, match="different rows"):
        estimate([runs[0], runs[1][:1]], METRICS["all"])


def test_mean_over_rows_weighs_rows_equally() -> None:
    rows = [score("a", "g", 10.0, 4), score("b", "g", 2.0, 4), score("c", "h", 3.0, 2)]
    result = estimate([rows], mean_over_rows(METRICS["all"]))
    assert result.value == pytest.approx((2.5 + 0.5 + 1.5) / 3)
    assert result.groups == 2
    empty = RowScore("d", "i", "", "test", 5.0, 2, 1, 0.0, 0, 1)
    assert estimate([[*rows, empty]], mean_over_rows(METRICS["response"])).groups == 2, (
        "no token, no mean"
    )


def test_one_group_has_an_infinite_interval() -> None:
    rows = [score("a", "g", 1.0, 2), score("b", "g", 2.0, 2)]
    assert estimate([rows], METRICS["all"]).standard_error == math.inf
    both = paired([(rows, rows)], METRICS["all"])
    assert interval(both, 0.95) == (-math.inf, math.inf)
    assert p_value(both) == 1


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(12)))
def test_paired_does_not_depend_on_the_order_of_rows(order: Sequence[int]) -> None:
    rng = np.random.default_rng(1)
    first = [score(f"r{i}", f"g{i % 5}", float(rng.random()), 3) for i in range(12)]
    second = [score(s.row_id, s.group_id, s.nll_all + 0.1, 3) for s in first]
    expected = paired([(first, second)], METRICS["all"])
    reordered = paired([(first, [second[i] for i in order])], METRICS["all"])
    assert np.array_equal(expected.nats, reordered.nats)
    assert reordered.value == pytest.approx(0.4 / 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (score("other", "g0", 1.0, 3), "different rows"),
        (score("r0", "g0", 1.0, 4), "on 3 and on 4 tokens"),
        (score("r0", "g9", 1.0, 3), "different groups"),
    ],
)
def test_runs_on_other_rows_cannot_be_paired(change: RowScore, message: str) -> None:
    first = [score(f"r{i}", f"g{i}", 1.0, 3) for i in range(3)]
    with pytest.raises(IntegrityError, match=message):
        paired([(first, [change, *first[1:]])], METRICS["all"])


def test_difference_of_a_run_with_itself_is_zero() -> None:
    rows = [score(f"r{i}", f"g{i}", float(i), 3) for i in range(12)]
    result = difference(paired([(rows, rows)], METRICS["all"]), 0.01)
    assert (result.value, result.low, result.high, result.p) == (0, 0, 0, 1)
    assert result.p_equivalence == 0


def test_swapping_the_runs_flips_the_sign() -> None:
    planted = sample(3, effect=0.01)
    swapped = difference(Paired(-planted.nats, planted.tokens), 0.01)
    result = difference(planted, 0.01)
    assert swapped.value == pytest.approx(-result.value)
    assert swapped.low == pytest.approx(-result.high)
    assert swapped.p == pytest.approx(result.p)


@pytest.mark.parametrize(("effect", "significant"), [(0.05, True), (-0.05, True), (0.0, False)])
def test_planted_effect_is_significant_and_none_is_not(effect: float, significant: bool) -> None:
    result = difference(sample(5, effect=effect), 0.01)
    assert result.excludes_zero == significant
    assert (result.p < 0.05) == significant
    assert result.low < effect < result.high


def test_seeds_that_disagree_widen_the_interval() -> None:
    one_seed = sample(7, groups=1000, seeds=1, effect=0.0, seed_spread=0.05)
    # Of this one pair of adapters it is true that they differ; of the settings it is not.
    assert difference(one_seed, 0.01).excludes_zero
    several = sample(7, groups=1000, seeds=4, effect=0.0, seed_spread=0.05)
    result = difference(several, 0.01)
    assert result.covers == "rows and seeds"
    assert not result.excludes_zero
    assert result.p > 0.05
    assert result.p_equivalence > 0.05


def test_equivalence_needs_a_narrow_interval() -> None:
    assert difference(sample(1, groups=3000), 0.01).p_equivalence < 0.05
    assert difference(sample(1, groups=50), 0.01).p_equivalence > 0.05
    assert difference(sample(1, groups=3000, effect=0.02), 0.01).p_equivalence > 0.95


def test_few_groups_have_a_wide_interval_and_no_equivalence() -> None:
    few = Paired(np.array([[0.1, 0.2]]), np.array([100.0, 100.0]))
    result = difference(few, 0.01)
    # Student's of one degree of freedom, by hand: 0.0015 ± 12.706 · 0.0005.
    assert result.low == pytest.approx(0.0015 - 12.706 * 0.0005, rel=1e-4)
    same = Paired(np.zeros((1, LEAST_GROUPS - 1)), np.ones(LEAST_GROUPS - 1))
    enough = Paired(np.zeros((1, LEAST_GROUPS)), np.ones(LEAST_GROUPS))
    assert difference(same, 0.01).p_equivalence == 1
    assert difference(enough, 0.01).p_equivalence == 0


def test_variances_of_rows_and_seeds_add_in_interval_and_p() -> None:
    """Neither alone is the error: a difference 2.4 times either is 1.7 times both."""
    rng = np.random.default_rng(0)
    tokens, groups, seeds = np.full(400, 100.0), 400, 10
    of_rows = rng.standard_normal(groups)
    of_rows = (of_rows - of_rows.mean()) / of_rows.std(ddof=1) * 100 * 0.001 * math.sqrt(groups)
    of_seeds = rng.standard_normal((seeds, 1))
    of_seeds = (of_seeds - of_seeds.mean()) / of_seeds.std(ddof=1) * 0.001 * math.sqrt(seeds)
    planted = Paired(of_rows + 100 * (of_seeds + 0.0024), tokens)
    assert planted.row_error == pytest.approx(0.001)
    assert planted.unit_deviation / math.sqrt(seeds) == pytest.approx(0.001)
    # Satterthwaite's degrees of freedom by hand: 4 / (1/9 + 1/399).
    freedom = 4 / (1 / 9 + 1 / 399)
    assert p_value(planted) == pytest.approx(2 * stats.t.sf(2.4 / math.sqrt(2), freedom))
    low, high = interval(planted, 0.95)
    assert high - low >= 2 * stats.t.isf(0.025, freedom) * 0.001 * math.sqrt(2) * 0.999
    assert low < 0


def test_holm_corrected_p_values_equal_those_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    # The documentation of R's p.adjust defines it: max over j ≤ i of min(1, (n - j + 1) p_(j)).
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_values: list[float]) -> None:
    """Holm 1979: from the smallest p on, reject while p ≤ alpha / (hypotheses left)."""
    rejected: set[int] = set()
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if (len(p_values) - rank) * p_values[index] > 0.05:
            break
        rejected.add(index)
    assert {index for index, p in enumerate(holm(p_values)) if p <= 0.05} == rejected


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000), st.integers(2, 40), st.integers(1, 5), st.floats(-0.1, 0.1),
    st.floats(0.001, 0.2),
)  # fmt: skip
def test_p_values_agree_with_intervals(
    seed: int, groups: int, seeds: int, effect: float, margin: float
) -> None:
    planted = sample(seed, groups=groups, seeds=seeds, effect=effect, seed_spread=0.02)
    result = difference(planted, margin)
    assert (result.p < 0.05) == result.excludes_zero
    low, high = interval(planted, 0.90)
    within = groups >= LEAST_GROUPS and -margin < low and high < margin
    assert (result.p_equivalence < 0.05) == within


def test_one_seed_of_equal_groups_has_the_p_of_the_one_sample_t_test() -> None:
    values = np.random.default_rng(3).normal(0.02, 0.1, 17)
    expected = stats.ttest_1samp(values, 0)
    result = difference(Paired(values[None] * 50, np.full(17, 50.0)), 0.01)
    assert result.p == pytest.approx(expected.pvalue)
    assert (result.low, result.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_large_difference_is_significant_in_a_family_of_2000() -> None:
    """No resampling floor: two thousand corrected comparisons leave a plain difference plain."""
    plain = difference(sample(5, effect=0.5), 0.01).p
    assert max(holm([plain] * 2000)) < 1e-6


TOKENS = np.full(200, 100.0)


def _trainings(seed: int, draws: list[Draw], draw_spread: float, seed_spread: float) -> Floats:
    """Equal settings whose difference varies with the draw of rows and with the seed."""
    rng = np.random.default_rng(seed)
    of_draw = {d: draw_spread * rng.standard_normal() for d in sorted({x.data_seed for x in draws})}
    of_seed = {s: seed_spread * rng.standard_normal() for s in sorted({x.seed for x in draws})}
    shift = np.array([of_draw[x.data_seed] + of_seed[x.seed] for x in draws])
    noise = 0.002 * rng.standard_normal((len(draws), 200))
    nats: Floats = TOKENS * (shift[:, None] + noise + 0.005 * rng.standard_normal(200))
    return nats


@pytest.mark.parametrize(("draw_spread", "seed_spread"), [(0.01, 0.0), (0.007, 0.007), (0, 0.01)])
def test_crossed_draws_and_seeds_keep_the_false_positive_rate(
    draw_spread: float, seed_spread: float
) -> None:
    """Three seeds on each of three draws of rows are not nine independent trainings."""
    crossed = [Draw(seed, data) for data in range(3) for seed in range(3)]
    cases = [
        paired_of_sums(_trainings(case, crossed, draw_spread, seed_spread), TOKENS, crossed)
        for case in range(600)
    ]
    assert (cases[0].units, cases[0].unit) == (3, "data draw")
    assert sum(p_value(case) < 0.05 for case in cases) / 600 <= 0.06
    independent = [Draw(index, index) for index in range(9)]
    as_nine = [
        paired_of_sums(_trainings(case, crossed, draw_spread, seed_spread), TOKENS, independent)
        for case in range(600)
    ]
    assert sum(p_value(case) < 0.05 for case in as_nine) / 600 > 0.1


def test_units_are_the_independently_drawn_seeds_or_draws() -> None:
    nats, tokens = np.arange(12.0).reshape(4, 3), np.ones(3)
    own = paired_of_sums(nats, tokens, [Draw(n, n) for n in range(4)])
    assert (own.units, own.unit) == (4, "seed")
    fixed = paired_of_sums(nats, tokens, [Draw(n, 0) for n in range(4)])
    assert (fixed.units, fixed.unit) == (4, "seed")
    one_seed = paired_of_sums(nats, tokens, [Draw(0, n) for n in range(4)])
    assert (one_seed.units, one_seed.unit, one_seed.crossed) == (4, "data draw", None)
    nested = paired_of_sums(nats, tokens, [Draw(0, 0), Draw(1, 0), Draw(2, 1), Draw(3, 1)])
    assert (nested.units, nested.unit) == (2, "data draw")
    assert np.array_equal(nested.nats, [nats[:2].mean(0), nats[2:].mean(0)])
    crossed = paired_of_sums(nats, tokens, [Draw(0, 0), Draw(1, 0), Draw(0, 1), Draw(1, 1)])
    assert crossed.crossed is not None
    assert np.allclose(crossed.crossed, [nats[[0, 2]].mean(), nats[[1, 3]].mean()])


def test_the_next_seed_is_within_its_prediction_interval() -> None:
    """95 % of new seeds, where the interval of the mean holds far fewer."""
    rng = np.random.default_rng(0)
    tokens, predicted, in_mean = np.full(50, 10.0), 0, 0
    for _ in range(2000):
        by_seed = 0.02 + 0.01 * rng.standard_normal(11)
        result = difference(Paired(by_seed[:10, None] * tokens, tokens), 0.01)
        assert result.next_low is not None and result.next_high is not None
        predicted += result.next_low < by_seed[10] < result.next_high
        in_mean += result.low < by_seed[10] < result.high
    assert 0.935 < predicted / 2000 < 0.965
    assert in_mean / 2000 < 0.6
    assert difference(sample(1), 0.01).next_low is None


def test_equivalence_p_values_of_a_family_are_corrected() -> None:
    """Twelve pairs at the margin: at most one family in twenty holds a false "equivalent"."""
    rng, margin, families = np.random.default_rng(4), 0.01, 400
    uncorrected = corrected = 0
    for _ in range(families):
        tokens = np.full(100, 10.0)
        ps = []
        for _ in range(12):
            by_seed = margin + 0.004 * rng.standard_normal((3, 1))
            rows = 0.01 * rng.standard_normal(100)
            ps.append(difference(Paired(10 * (by_seed + rows), tokens), margin).p_equivalence)
        uncorrected += min(ps) < 0.05
        corrected += min(holm(ps)) < 0.05
    assert corrected / families <= 0.06
    assert uncorrected / families > 0.25


def test_incomplete_grid_of_draws_and_seeds_uses_its_largest_complete_part() -> None:
    """Seed 0 on five draws and four more seeds on one of them: five draws of one seed."""
    draws = [Draw(0, data) for data in range(5)] + [Draw(seed, 0) for seed in range(1, 5)]
    differences = paired_of_sums(np.arange(27.0).reshape(9, 3), np.ones(3), draws)
    assert (differences.units, differences.unit, differences.several_seeds) == (
        5,
        "data draw",
        False,
    )
    assert difference(differences, 0.01).covers == "rows and training rows"
    three = [Draw(seed, data) for data, seed in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 2))]
    differences = paired_of_sums(np.arange(18.0).reshape(6, 3), np.ones(3), three)
    assert (differences.units, differences.several_seeds) == (2, True)
    assert np.array_equal(differences.nats[0], np.arange(18.0).reshape(6, 3)[:2].mean(0))


@pytest.mark.parametrize("draw_spread", [0.01, 0.0])
def test_many_draws_of_few_seeds_keep_the_false_positive_rate(draw_spread: float) -> None:
    """Ten draws with the same two seeds: two seeds are two, however many draws they train on."""
    crossed = [Draw(seed, data) for data in range(10) for seed in range(2)]
    cases = [
        paired_of_sums(_trainings(case, crossed, draw_spread, 0.01), TOKENS, crossed)
        for case in range(600)
    ]
    assert sum(p_value(case) < 0.05 for case in cases) / 600 <= 0.06


def test_draws_of_training_rows_have_no_prediction_interval() -> None:
    crossed = [Draw(seed, data) for data in range(3) for seed in range(3)]
    result = difference(paired_of_sums(_trainings(0, crossed, 0, 0), TOKENS, crossed), 0.01)
    assert result.next_low is None and result.units == 3
