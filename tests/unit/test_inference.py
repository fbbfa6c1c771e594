"""Planted truths: what the statistics say of data whose truth is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from slm_lora.errors import IntegrityError
from slm_lora.records import RowScore
from slm_lora.runs.metrics import METRICS, mean_over_rows
from slm_lora.stats.estimates import Paired, estimate, paired
from slm_lora.stats.inference import LEAST_GROUPS, difference, holm, interval, p_value

from ..support.samples import sample


def score(row: str, group: str, nll: float, tokens: int) -> RowScore:
    return RowScore(row, group, "", "test", nll, tokens, 1, nll / 2, tokens // 2, 1)


def test_loss_is_total_nll_over_tokens_and_groups_are_the_units() -> None:
    rows = [score("a", "g1", 10.0, 4), score("b", "g1", 2.0, 4), score("c", "g2", 3.0, 2)]
    found = estimate([rows], METRICS["all"])
    assert found.value == pytest.approx(1.5)
    # Residuals by hand: g1 12 - 1.5·8 = 0, g2 3 - 1.5·2 = 0.
    assert found.standard_error == pytest.approx(0)
    assert found.groups == 2
    # The same rows as three groups: residuals 4, -4, 0.
    alone = [score(r.row_id, r.row_id, r.nll_all, r.tokens_all) for r in rows]
    assert estimate([alone], METRICS["all"]).standard_error == pytest.approx(
        math.sqrt(32 * 3 / 2) / 10
    )


def test_several_seeds_have_the_mean_of_their_losses() -> None:
    runs = [[score("a", "g", nll, 4), score("b", "h", 1.0, 4)] for nll in (3.0, 7.0)]
    assert estimate(runs, METRICS["all"]).value == pytest.approx((4 / 8 + 8 / 8) / 2)
    with pytest.raises(IntegrityError, match="different rows"):
        estimate([runs[0], runs[1][:1]], METRICS["all"])


def test_the_mean_over_rows_weighs_rows_alike() -> None:
    rows = [score("a", "g", 10.0, 4), score("b", "g", 2.0, 4), score("c", "h", 3.0, 2)]
    found = estimate([rows], mean_over_rows(METRICS["all"]))
    assert found.value == pytest.approx((2.5 + 0.5 + 1.5) / 3)
    assert found.groups == 2
    empty = RowScore("d", "i", "", "test", 5.0, 2, 1, 0.0, 0, 1)
    assert estimate([[*rows, empty]], mean_over_rows(METRICS["response"])).groups == 2, (
        "no token, no mean"
    )


def test_one_group_says_nothing_of_its_error() -> None:
    rows = [score("a", "g", 1.0, 2), score("b", "g", 2.0, 2)]
    assert estimate([rows], METRICS["all"]).standard_error == math.inf
    both = paired([(rows, rows)], METRICS["all"])
    assert interval(both, 0.95) == (-math.inf, math.inf)
    assert p_value(both) == 1


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(12)))
def test_rows_may_come_in_any_order(order: Sequence[int]) -> None:
    rng = np.random.default_rng(1)
    first = [score(f"r{i}", f"g{i % 5}", float(rng.random()), 3) for i in range(12)]
    second = [score(s.row_id, s.group_id, s.nll_all + 0.1, 3) for s in first]
    wanted = paired([(first, second)], METRICS["all"])
    found = paired([(first, [second[i] for i in order])], METRICS["all"])
    assert np.array_equal(wanted.nats, found.nats)
    assert found.value == pytest.approx(0.4 / 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (score("other", "g0", 1.0, 3), "different rows"),
        (score("r0", "g0", 1.0, 4), "on 3 and on 4 tokens"),
        (score("r0", "g9", 1.0, 3), "different groups"),
    ],
)
def test_runs_on_other_rows_do_not_compare(change: RowScore, message: str) -> None:
    first = [score(f"r{i}", f"g{i}", 1.0, 3) for i in range(3)]
    with pytest.raises(IntegrityError, match=message):
        paired([(first, [change, *first[1:]])], METRICS["all"])


def test_an_arm_against_itself_is_no_difference() -> None:
    rows = [score(f"r{i}", f"g{i}", float(i), 3) for i in range(12)]
    found = difference(paired([(rows, rows)], METRICS["all"]), 0.01)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert found.equivalent


def test_swapping_the_arms_flips_the_sign() -> None:
    one = sample(3, effect=0.01)
    other = difference(Paired(-one.nats, one.tokens), 0.01)
    found = difference(one, 0.01)
    assert other.value == pytest.approx(-found.value)
    assert other.low == pytest.approx(-found.high, abs=2e-4)
    assert other.p == pytest.approx(found.p, abs=0.01)


@pytest.mark.parametrize(("effect", "found"), [(0.05, True), (-0.05, True), (0.0, False)])
def test_a_planted_effect_is_found_and_none_is_not(effect: float, found: bool) -> None:
    result = difference(sample(5, effect=effect), 0.01)
    assert result.excludes_zero == found
    assert (result.p < 0.05) == found
    assert result.low < effect < result.high


def test_with_seeds_that_disagree_rows_alone_would_be_too_sure() -> None:
    one_seed = sample(7, groups=1000, seeds=1, effect=0.0, seed_spread=0.05)
    # Of this one pair of adapters it is true that they differ; of the settings it is not.
    assert difference(one_seed, 0.01).excludes_zero
    several = sample(7, groups=1000, seeds=4, effect=0.0, seed_spread=0.05)
    found = difference(several, 0.01)
    assert found.covers == "rows and seeds"
    assert not found.excludes_zero
    assert found.p > 0.05
    assert not found.equivalent


def test_equivalence_needs_a_narrow_interval() -> None:
    assert difference(sample(1, groups=3000), 0.01).equivalent
    assert not difference(sample(1, groups=50), 0.01).equivalent
    assert not difference(sample(1, groups=3000, effect=0.02), 0.01).equivalent


def test_few_groups_have_a_wide_interval_and_show_no_equivalence() -> None:
    few = Paired(np.array([[0.1, 0.2]]), np.array([100.0, 100.0]))
    found = difference(few, 0.01)
    # Student's of one degree of freedom, by hand: 0.0015 ± 12.706 · 0.0005.
    assert found.low == pytest.approx(0.0015 - 12.706 * 0.0005, rel=1e-4)
    assert not found.equivalent
    same = Paired(np.zeros((1, LEAST_GROUPS - 1)), np.ones(LEAST_GROUPS - 1))
    enough = Paired(np.zeros((1, LEAST_GROUPS)), np.ones(LEAST_GROUPS))
    assert not difference(same, 0.01).equivalent
    assert difference(enough, 0.01).equivalent


def test_rows_and_seeds_that_chance_alike_are_both_in_interval_and_p() -> None:
    """Neither alone is the error: a difference 2.4 times either is 1.7 times both."""
    rng = np.random.default_rng(0)
    tokens, groups, seeds = np.full(400, 100.0), 400, 10
    of_rows = rng.standard_normal(groups)
    of_rows = (of_rows - of_rows.mean()) / of_rows.std(ddof=1) * 100 * 0.001 * math.sqrt(groups)
    of_seeds = rng.standard_normal((seeds, 1))
    of_seeds = (of_seeds - of_seeds.mean()) / of_seeds.std(ddof=1) * 0.001 * math.sqrt(seeds)
    found = Paired(of_rows + 100 * (of_seeds + 0.0024), tokens)
    assert found.row_error == pytest.approx(0.001)
    assert found.seed_deviation / math.sqrt(seeds) == pytest.approx(0.001)
    # Satterthwaite's degrees of freedom by hand: 4 / (1/9 + 1/399).
    freedom = 4 / (1 / 9 + 1 / 399)
    assert p_value(found) == pytest.approx(2 * stats.t.sf(2.4 / math.sqrt(2), freedom))
    low, high = interval(found, 0.95)
    assert high - low >= 2 * stats.t.isf(0.025, freedom) * 0.001 * math.sqrt(2) * 0.999
    assert low < 0


def test_no_p_is_below_what_the_sign_flips_can_show() -> None:
    found = difference(sample(5, effect=0.5), 0.01)
    assert found.p == found.p_least == 1e-4
    exact = difference(sample(5, groups=8, effect=0.5), 0.01)
    assert (exact.p, exact.p_least) == (2 / 2**8, 0.0)


def test_holm_by_hand() -> None:
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


def test_signs_are_those_of_scipy() -> None:
    """The permutation test gives scipy's p on the same random signs."""
    nats = np.random.default_rng(5).normal(0.3, 1.0, 40)
    paired = Paired(nats[None, :], np.ones(40))

    def size(one: Any, other: Any, axis: int = -1) -> Any:
        return np.abs((one - other).sum(axis))

    expected = stats.permutation_test(
        (nats, np.zeros_like(nats)), size, permutation_type="samples", alternative="greater",
        vectorized=True, n_resamples=9_999, batch=500, rng=np.random.default_rng(0),
    ).pvalue  # fmt: skip
    assert p_value(paired) == expected
    few = stats.permutation_test(
        (nats[:8], np.zeros(8)), size, permutation_type="samples", alternative="greater",
        vectorized=True, n_resamples=9_999,
    ).pvalue  # fmt: skip
    assert p_value(Paired(nats[None, :8], np.ones(8))) == few


def test_reports_are_repeatable() -> None:
    assert difference(sample(4, seeds=3), 0.01) == difference(sample(4, seeds=3), 0.01)
