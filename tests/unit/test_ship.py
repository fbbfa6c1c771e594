"""Conditions judged on planted settings: intervals, states, error rates, what would decide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from slm_lora.config.conditions import parse_condition
from slm_lora.errors import UsageError
from slm_lora.runs.metrics import METRICS, Metric, row_value
from slm_lora.runs.scored_run import ScoredRun
from slm_lora.stats.regret import Contrasts, Regret
from slm_lora.stats.settings import Setting
from slm_lora.stats.ship import Judged, decision, judge

from ..support.planted import Floats, planted_run

TEMPLATE = planted_run("template", np.full(60, 2.0))


def with_losses(run: ScoredRun, losses: Floats) -> ScoredRun:
    """The run with other losses of its rows: quick, for simulations."""
    scores = tuple(
        replace(score, nll_all=10 * loss)
        for score, loss in zip(run.scores, losses.tolist(), strict=True)
    )
    return replace(run, scores=scores)


def one(losses: Floats, values: dict[str, Sequence[float]] | None = None) -> Setting:
    return Setting((planted_run("r8", losses, values),))


def judged(text: str, setting: Setting, base: Setting | None = None, family: int = 1) -> Judged:
    """A condition beside ``family - 1`` others."""
    conditions = [parse_condition(text), *[parse_condition("all > 0")] * (family - 1)]
    return judge(setting, base, conditions)[0]


@pytest.fixture
def valid_json(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = Metric(
        "valid_json", "Valid JSON", "the replies", "share of rows", row_value("valid_json"),
        higher_is_better=True,
    )  # fmt: skip
    monkeypatch.setitem(METRICS, "valid_json", metric)


@pytest.fixture
def rows() -> tuple[Floats, Floats]:
    """Losses of a base and of a setting that is about 0.1 better, [60]."""
    rng = np.random.default_rng(0)
    base = 2.5 + rng.normal(0, 0.3, 60)
    return base, base - 0.1 + 0.05 * rng.standard_normal(60)


def test_gain_has_the_one_sided_t_intervals_of_its_rows(rows: tuple[Floats, Floats]) -> None:
    base, losses = rows
    result = judged("gain > 0.02", one(losses), Setting((planted_run("base", base),)), family=3)
    test = stats.ttest_1samp(base - losses, 0.0)
    assert result.value == pytest.approx((base - losses).mean())
    assert result.low == pytest.approx(test.confidence_interval(1 - 2 * 0.05).low)
    assert result.high == pytest.approx(test.confidence_interval(1 - 2 * 0.05 / 3).high)
    assert result.state == "met" and result.hint() == ""


def test_upper_bound_has_the_errors_the_other_way_round(rows: tuple[Floats, Floats]) -> None:
    result = judged("all <= 9", one(rows[1]), family=3)
    test = stats.ttest_1samp(rows[1], 0.0)
    assert result.low == pytest.approx(test.confidence_interval(1 - 2 * 0.05 / 3).low)
    assert result.high == pytest.approx(test.confidence_interval(1 - 2 * 0.05).high)


@pytest.mark.parametrize(
    ("text", "state"),
    [
        ("gain > 0.05", "met"),
        ("gain > 0.1", "undecided"),
        ("gain > 0.15", "violated"),
        ("gain < 0.15", "met"),
        ("gain < 0.05", "violated"),
        ("gain:bits_per_byte > 0.02", "met"),
        ("all < 9", "met"),
        ("all > 9", "violated"),
        ("bits_per_byte < 9", "met"),
    ],
)
def test_state_follows_from_the_interval(
    rows: tuple[Floats, Floats], text: str, state: str
) -> None:
    base, losses = rows
    assert judged(text, one(losses), Setting((planted_run("base", base),))).state == state


def test_seeds_widen_the_interval_to_that_of_their_spread() -> None:
    """Without variation over rows only that over seeds is left."""
    by_seed = np.array([2.0, 2.1, 2.3, 2.2])
    runs = [planted_run(f"r8-{s}", np.full(60, x), seed=s) for s, x in enumerate(by_seed)]
    result = judged("all < 2.3", Setting(tuple(runs)))
    interval = stats.ttest_1samp(by_seed, 0.0).confidence_interval(0.9)
    assert (result.low, result.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert result.state == "undecided"
    assert result.needed is not None and (result.needed.seeds or 0) > 4


@pytest.mark.parametrize(("good", "rows"), [(60, 60), (0, 60), (12, 12)])
def test_rows_all_alike_have_the_exact_binomial_interval(good: int, rows: int) -> None:
    values = {"fine": [1.0] * good + [0.0] * (rows - good)}
    result = judged("fine >= 0.5", one(np.full(rows, 2.0), values))
    exact = stats.binomtest(good, rows)  # two-sided at 90 %: one-sided ends at 5 %
    interval = exact.proportion_ci(0.9, "exact")
    assert (result.low, result.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    assert result.high - result.low > 0.03


def test_share_has_the_wider_of_t_and_exact_interval() -> None:
    values = np.array([0.0] + [1.0] * 59)
    result = judged("fine >= 0.9", one(np.full(60, 2.0), {"fine": values.tolist()}))
    exact = stats.binomtest(59, 60).proportion_ci(0.9, "exact")
    t = stats.ttest_1samp(values, 0.0).confidence_interval(0.9)
    assert exact.low < t.low
    assert result.low == pytest.approx(exact.low)
    assert result.high == pytest.approx(min(1.0, max(t.high, exact.high)))


def test_all_valid_replies_need_149_rows_for_98_percent() -> None:
    """0.98^n below 5 % from n = 149 on."""
    needed = {}
    for count in (60, 148, 149):
        result = judged("fine >= 0.98", one(np.full(count, 2.0), {"fine": [1.0] * count}))
        needed[count] = result.state, result.needed and result.needed.rows, result.hint()
    assert needed[60] == ("undecided", 149, "needs about 149 test rows")
    assert needed[148] == ("undecided", 149, "needs about 149 test rows")
    assert needed[149] == ("met", None, "")


def test_no_number_of_rows_shows_a_share_of_one() -> None:
    share = one(np.full(60, 2.0), {"fine": [1.0] * 60})
    result = judged("fine >= 1", share)
    assert result.state == "undecided" and "no number of rows decides" in result.hint()
    assert judged("fine <= 1", share).state == "met"


@pytest.mark.usefixtures("valid_json")
def test_gain_of_a_share_is_positive_where_higher_is_better() -> None:
    before, after = [1.0] * 30 + [0.0] * 30, [1.0] * 54 + [0.0] * 6
    base = Setting((planted_run("base", np.full(60, 2.0), {"valid_json": before}),))
    result = judged("gain:valid_json > 0.2", one(np.full(60, 2.0), {"valid_json": after}), base)
    assert result.value == pytest.approx(0.4) and result.state == "met"
    # 24 rows gained, none lost, each end at half of the error.
    gained = stats.binomtest(24, 60).proportion_ci(0.95, "exact").low
    lost = stats.binomtest(0, 60).proportion_ci(0.95, "exact").high
    t = stats.ttest_1samp(np.subtract(after, before), 0.0).confidence_interval(0.9).low
    assert result.low == pytest.approx(min(t, gained - lost))


@pytest.mark.usefixtures("valid_json")
def test_equal_shares_of_base_and_setting_are_not_certainly_equal() -> None:
    values = {"valid_json": [1.0] * 60}
    base = Setting((planted_run("base", np.full(60, 2.0), values),))
    result = judged("gain:valid_json > -0.03", one(np.full(60, 2.0), values), base)
    assert result.low == pytest.approx(-stats.binomtest(0, 60).proportion_ci(0.95, "exact").high)
    assert result.state == "undecided"
    assert result.needed is not None
    assert result.needed.rows == int(np.ceil(np.log(0.025) / np.log(0.97)))


@pytest.mark.usefixtures("valid_json")
def test_rows_gained_and_lost_in_two_seeds_do_not_cancel() -> None:
    """In each of 30 groups one of two rows is valid; one seed gains the other, one loses it."""

    def in_pairs(name: str, values: list[float], seed: int) -> ScoredRun:
        run = planted_run(name, np.full(60, 2.0), {"valid_json": values}, seed=seed)
        scores = [replace(score, group_id=f"{i // 2:02d}") for i, score in enumerate(run.scores)]
        return replace(run, scores=tuple(scores))

    runs = [in_pairs(f"r8-{seed}", [1.0 - seed] * 60, seed) for seed in range(2)]
    base = Setting((in_pairs("base", [1.0, 0.0] * 30, 0),))
    result = judged("gain:valid_json > -0.2", Setting(tuple(runs)), base)
    assert result.value == pytest.approx(0.0) and result.state == "undecided"
    low, high = result.measurement.exact(0.05)
    # A quarter of all rows and seeds is gained, a quarter lost; 30 groups are the sample.
    quarter = stats.beta.ppf(0.025, 7.5, 23.5), stats.beta.ppf(0.975, 8.5, 22.5)
    assert (low, high) == pytest.approx((quarter[0] - quarter[1], quarter[1] - quarter[0]))


def test_rows_of_few_groups_decide_nothing(rows: tuple[Floats, Floats]) -> None:
    losses = rows[1][:9]
    result = judged("all < 9", one(losses))
    assert result.state == "undecided"
    assert result.hint() == "needs 10 groups of test rows, has 9"
    alone = judged("all < 9", one(losses[:1]))
    assert alone.low == -np.inf and alone.high == np.inf and alone.state == "undecided"


def test_no_variation_over_ten_rows_is_no_evidence_at_a_small_error() -> None:
    """Ten signs alike have a chance of 0.5^10 = 0.00098: less than 5 %, more than 5 % / 60."""
    setting, condition = one(np.full(10, 2.0)), parse_condition("all < 9")
    states = [judge(setting, None, [condition], candidates)[0].state for candidates in (1, 60)]
    assert states == ["met", "undecided"]


def test_no_practical_number_of_rows_is_named_near_the_bound() -> None:
    losses = 2.0 + np.random.default_rng(4).normal(0, 0.5, 60)
    result = judged(f"all < {float(losses.mean()) + 1e-6}", one(losses))
    assert result.state == "undecided" and result.needed is None
    assert result.hint() == "no practical number of rows decides"


def test_value_at_the_bound_is_a_tie() -> None:
    losses = np.array([1.0, 3.0] * 30)
    result = judged("all < 2", one(losses))
    assert result.state == "undecided" and result.needed is None
    assert result.hint() == "the value is the bound: no number of rows decides"


def test_needed_rows_decide_with_80_percent_power() -> None:
    """Experiments of the named size, drawn from the observed distribution, mostly decide."""
    rng = np.random.default_rng(3)
    pilot = one(2.0 + rng.normal(0, 0.5, 200))
    bound = round(judged("all < 9", pilot).value + 0.03, 4)
    result = judged(f"all < {bound}", pilot)
    assert result.state == "undecided" and result.needed is not None
    size = result.needed.rows
    draws = rng.normal(result.value, 0.5, (300, size))
    ends = draws.mean(1) + stats.t.ppf(0.95, size - 1) * draws.std(1, ddof=1) / np.sqrt(size)
    assert 0.75 <= (ends < bound).mean() <= 0.95
    assert size == pytest.approx(200 * (2.486 * 0.5 / np.sqrt(200) / 0.03) ** 2, rel=0.3)


def test_choice_among_candidates_divides_both_errors(rows: tuple[Floats, Floats]) -> None:
    conditions = [parse_condition("all < 9"), parse_condition("all > 0")]
    (result, _) = judge(one(rows[1]), None, conditions, candidates=4)
    assert result.error_met == pytest.approx(0.05 / 4)
    assert result.error_violated == pytest.approx(0.05 / 8)


def test_regret_of_a_tuned_value_reaches_the_gain_only(rows: tuple[Floats, Floats]) -> None:
    base, losses = rows
    regret = Regret(Contrasts(np.array([0.05]), np.array([0.1]), np.array([50.0])))
    tuned = replace(one(losses), regret=regret)
    reference = Setting((planted_run("base", base),))
    plain, wide = (judged("gain > 0.15", each, reference) for each in (one(losses), tuned))
    assert wide.low == plain.low and wide.high > plain.high
    assert (plain.state, wide.state) == ("violated", "undecided")
    for text in ("all > 9", "gain:response > 0.15"):
        assert judged(text, tuned, reference).high == judged(text, one(losses), reference).high


@pytest.mark.parametrize("name", ["forgetting", "valid_jason", "gain:forgetting", "Gain"])
def test_unknown_name_lists_the_measurements(rows: tuple[Floats, Floats], name: str) -> None:
    setting = one(rows[1], {"fine": [1.0] * 60})
    base = Setting((planted_run("base", rows[0]),))
    with pytest.raises(UsageError) as error:
        judged(f"{name} > 0", setting, base)
    message = str(error.value)
    assert message.startswith(f"{name}: no such measurement in these runs; what is measured: gain,")
    assert "fine" in message and "gain:fine" not in message and "gain:response" in message
    assert len(message.splitlines()) == 1


def test_gain_without_a_scored_base_is_not_measured(rows: tuple[Floats, Floats]) -> None:
    with pytest.raises(UsageError, match=r"gain: no such measurement in these runs.*: all, "):
        judged("gain > 0", one(rows[1]))


def test_one_violated_condition_decides_against(rows: tuple[Floats, Floats]) -> None:
    setting = one(rows[1])
    met, open_, violated = (
        judged(text, setting) for text in ("all < 9", f"all < {rows[1].mean() + 1e-3}", "all > 9")
    )
    assert decision([met, met]) == "ship"
    assert decision([met, open_]) == "not enough evidence"
    assert decision([met, open_, violated]) == "do not ship"


@pytest.mark.parametrize("seeds", [1, 3])
def test_setting_at_the_bound_is_rarely_called_fit_to_ship(seeds: int) -> None:
    """True gain 0.1, the bound, beside a condition that is surely met. With one seed the claim is
    on this training; with several it is on the setting, whose trainings differ."""
    rng = np.random.default_rng(5)
    conditions = [parse_condition("gain > 0.1"), parse_condition("all < 9")]
    templates = [replace(TEMPLATE, run=planted_run(f"r8-{s}", np.full(60, 2.0), seed=s).run)
                 for s in range(seeds)]  # fmt: skip
    base_run = planted_run("base", np.full(60, 2.0))
    shipped = 0
    spread = 0.02 if seeds > 1 else 0.0
    for _ in range(400):
        base = 2.5 + rng.normal(0, 0.3, 60)
        rows = base - 0.1 + rng.normal(0, 0.1, 60)
        runs = [
            with_losses(run, rows + rng.normal(0, spread) + rng.normal(0, 0.03, 60))
            for run in templates
        ]
        reference = Setting((with_losses(base_run, base),))
        shipped += decision(judge(Setting(tuple(runs)), reference, conditions)) == "ship"
    assert shipped / 400 <= 0.06


def test_share_at_the_bound_is_rarely_called_fit_to_ship() -> None:
    rng = np.random.default_rng(8)
    shipped = {0.5: 0, 0.9: 0, 0.97: 0}
    for share in shipped:
        condition = parse_condition(f"fine >= {share}")
        for _ in range(200):
            values = {"fine": (rng.random(60) < share).astype(float).tolist()}
            shipped[share] += decision(judge(one(np.full(60, 2.0), values), None, [condition])) == (
                "ship"
            )
    assert max(shipped.values()) / 200 <= 0.075
    assert shipped[0.5] > 0


def test_fulfilled_conditions_are_rarely_called_violated() -> None:
    """Five conditions, all at the bound and so just fulfilled: one is found violated in 5 %."""
    rng = np.random.default_rng(6)
    names = [f"m{index}" for index in range(5)]
    conditions = [parse_condition(f"{name} <= 1") for name in names]
    wrong = 0
    for _ in range(200):
        values = {name: rng.normal(1, 0.5, 40).tolist() for name in names}
        wrong += decision(judge(one(np.full(40, 2.0), values), None, conditions)) == "do not ship"
    assert wrong / 200 <= 0.075


def test_best_of_equal_settings_at_the_bound_is_rarely_called_fit_to_ship() -> None:
    """The lowest of eight looks better than it is; the number of candidates corrects for it."""
    rng = np.random.default_rng(7)
    base_run = planted_run("base", np.full(60, 2.0))
    shipped = {1: 0, 8: 0}
    for _ in range(200):
        base = 2.5 + rng.normal(0, 0.3, 60)
        losses = base - 0.1 + rng.normal(0, 0.1, (8, 60))
        lowest = losses[losses.mean(1).argmin()]
        setting = Setting((with_losses(TEMPLATE, lowest),))
        reference = Setting((with_losses(base_run, base),))
        for candidates in shipped:
            result = judge(setting, reference, [parse_condition("gain > 0.1")], candidates)
            shipped[candidates] += decision(result) == "ship"
    assert shipped[8] / 200 <= 0.075
    assert shipped[1] / 200 > 0.15
