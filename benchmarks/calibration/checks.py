"""Checks of the statistics on planted differences: promised and measured rates."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from world import Plan, World, cases

from slm_lora.stats.clustered import Floats, clustered
from slm_lora.stats.estimates import Draw, Paired, paired_of_sums
from slm_lora.stats.inference import (
    Difference,
    difference,
    holm,
    interval,
    p_below,
    p_value,
)
from slm_lora.stats.power import Needed, failure_bound, needed
from slm_lora.stats.selection import best_members, selected_confidence

NONE = "–"
"""Of lines that show another way, or a limit."""
MARGIN = 0.01
GROUPS = (10, 20, 30, 78, 210)


@dataclass(frozen=True)
class Check:
    """A row of the table.

    Attributes:
        name: description of the check.
        promise: the report's promised rate, as text; `NONE` for methods that it does not use.
        measured: the rate, or one per condition.
        cases: number of simulated cases per rate.
        low, high: bounds of the rates; None: no bound.
    """

    name: str
    promise: str
    measured: tuple[float, ...]
    cases: int
    low: float | None = None
    high: float | None = None

    @property
    def holds(self) -> bool:
        """Whether all rates are within the bounds."""
        return all(
            (self.low is None or rate >= self.low) and (self.high is None or rate <= self.high)
            for rate in self.measured
        )

    @property
    def measured_text(self) -> str:
        """``4.1 %``, or ``1.9 to 5.4 %, mean 4.2``."""
        rates = [100 * rate for rate in self.measured]
        if f"{min(rates):.1f}" == f"{max(rates):.1f}":
            return f"{rates[0]:.1f} %"
        return f"{min(rates):.1f} to {max(rates):.1f} %, mean {sum(rates) / len(rates):.1f}"


def fraction(outcomes: Iterable[bool]) -> float:
    """Fraction of true values."""
    values = list(outcomes)
    return sum(values) / len(values)


def covers(result: Difference, truth: float) -> bool:
    """Whether the 95 % interval contains the truth."""
    return result.low <= truth <= result.high


def differences(world: World, plan: Plan, count: int) -> list[Difference]:
    """The program's results for the cases of a plan."""
    return [
        difference(Paired(case.nats, case.tokens), MARGIN) for case in cases(world, plan, count)
    ]


def check_several_seeds(world: World, count: int) -> list[Check]:
    """Equal settings, planted differences, and differences of the margin, over several seeds."""
    plans = [
        Plan(0.0, seeds, ratio, groups)
        for seeds in (2, 3, 5, 10)
        for ratio in (0.0, 1.0, 3.0)
        for groups in GROUPS
    ]
    equal = [differences(world, plan, count) for plan in plans]
    planted = [
        [covers(d, effect) for d in differences(world, Plan(effect), count)]
        for effect in (0.005, 0.01, 0.02)
    ]
    at_margin = [
        differences(world, Plan(MARGIN, seeds, ratio), count)
        for seeds in (2, 3, 5, 10)
        for ratio in (0.0, 1.0)
    ]
    paired = [
        differences(world, Plan(0.0, seeds, 1.0, None, common), count)
        for seeds in (3, 10)
        for common in (0.5, 0.95)
    ]
    return [
        Check(
            "equal settings called different: 2 to 10 seeds, 10 to 210 groups, error over rows 0 "
            "to 3 times the error over seeds",
            "5 %",
            tuple(fraction(d.p < 0.05 for d in results) for results in equal),
            count,
            high=0.07,
        ),
        Check(
            "equal settings called different, where both settings share 50 or 95 % of a seed's "
            "deviation",
            "5 %",
            tuple(fraction(d.p < 0.05 for d in results) for results in paired),
            count,
            high=0.07,
        ),
        Check(
            "planted differences of 0.005, 0.01 and 0.02 nats within the 95 % interval, 3 seeds",
            "95 %",
            tuple(map(fraction, planted)),
            count,
            low=0.93,
        ),
        Check(
            "equivalence declared at a true difference of the margin, 2 to 10 seeds",
            "5 %",
            tuple(fraction(d.p_equivalence < 0.05 for d in results) for results in at_margin),
            count,
            high=0.06,
        ),
    ]


def check_few_groups(world: World, count: int) -> list[Check]:
    """Intervals over test rows alone, from few groups of very unequal size."""
    rng = np.random.default_rng(0)
    values = {
        "losses": world.mean + world.deviations[0],
        "change": world.mean - world.base,
        **{
            f"seeds {first}, {second}": world.deviations[second] - world.deviations[first]
            for first, second in ((0, 1), (2, 12), (3, 7), (5, 9))
        },
    }
    losses: list[float] = []
    pairs: list[list[float]] = []
    for groups in GROUPS:
        pair_rates: list[float] = []
        for name, nats in values.items():
            truth = nats.sum() / world.tokens.sum()
            hits = []
            for _ in range(count):
                rows = rng.integers(0, len(world.tokens), groups)
                estimate = clustered(nats[rows], world.tokens[rows])
                half_length = stats.t.isf(0.025, estimate.freedom) * estimate.standard_error
                hits.append(abs(estimate.value - truth) <= half_length)
            (losses if name == "losses" else pair_rates).append(fraction(hits))
        pairs.append(pair_rates)
    return [
        Check(
            "losses within their own 95 % interval, 10 to 210 unequal groups",
            "95 %", tuple(losses), count, low=0.93, high=0.97,
        ),
        Check(
            "differences of two trainings within their 95 % interval, 10 to 210 unequal groups, "
            "mean of five pairs",
            "95 %", tuple(sum(rates) / len(rates) for rates in pairs), count, low=0.93, high=0.97,
        ),
        Check(
            "the same, each pair alone", NONE,
            tuple(rate for rates in pairs for rate in rates), count,
        ),
    ]  # fmt: skip


def check_draws_and_seeds(world: World, count: int) -> list[Check]:
    """Several seeds on each of several draws of training rows, equal settings."""
    rates, independent = [], []
    for n_draws, n_seeds in ((3, 3), (5, 2), (10, 2), (10, 3)):
        draws = [Draw(seed, data) for data in range(n_draws) for seed in range(n_seeds)]
        for draw_share in (1.0, 0.5, 0.0):
            rng = np.random.default_rng([n_draws, n_seeds, round(10 * draw_share)])
            crossed, naive = [], []
            for _ in range(count):
                rows = rng.integers(0, len(world.tokens), len(world.tokens))
                data = math.sqrt(draw_share) * world.noise(rng, n_draws, rows)
                seeds = math.sqrt(1 - draw_share) * world.noise(rng, n_seeds, rows)
                cell_noise = 0.2 * world.noise(rng, len(draws), rows)
                nats = np.stack(
                    [
                        data[draw.data_seed] + seeds[draw.seed] + noise
                        for draw, noise in zip(draws, cell_noise, strict=True)
                    ]
                )
                crossed.append(p_value(paired_of_sums(nats, world.tokens[rows], draws)) < 0.05)
                naive.append(p_value(Paired(nats, world.tokens[rows])) < 0.05)
            rates.append(fraction(crossed))
            independent.append(fraction(naive))
    return [
        Check(
            "equal settings called different, 2 or 3 seeds on each of 3, 5 or 10 draws of training "
            "rows, the chance in draws, in both, in seeds",
            "5 %",
            tuple(rates),
            count,
            high=0.065,
        ),
        Check("the same, counted as independent trainings", NONE, tuple(independent), count),
    ]


def check_families(world: World, count: int) -> list[Check]:
    """Families of comparisons, corrected together, that share runs."""
    rng = np.random.default_rng(7)
    size, seeds = 10, 3
    false_findings: dict[str, list[bool]] = {
        "base": [],
        "neighbours": [],
        "margin": [],
        "mixed": [],
    }
    plain_margin = []
    row_error = math.sqrt(2 / seeds) * world.seed_deviation
    shift = world.tokens / world.tokens.sum() * world.tokens.sum() * MARGIN
    for _ in range(count):
        rows = rng.integers(0, len(world.tokens), len(world.tokens))
        tokens = world.tokens[rows]
        arms = [world.noise(rng, seeds, rows) for _ in range(size + 1)]
        against_base = [arm + row_error * world.row_effect[rows] for arm in arms[1:]]
        neighbours = [after - before for before, after in itertools.pairwise(arms)]
        for name, family in (("base", against_base), ("neighbours", neighbours)):
            ps = holm([p_value(Paired(nats, tokens)) for nats in family])
            false_findings[name].append(min(ps) < 0.05)
        at_margin = [difference(Paired(nats + shift[rows], tokens), MARGIN) for nats in neighbours]
        equivalences = [d.p_equivalence for d in at_margin]
        plain_margin.append(min(equivalences) < 0.05)
        false_findings["margin"].append(min(holm(equivalences)) < 0.05)
        half = size // 2
        mixed = [difference(Paired(nats, tokens), MARGIN) for nats in neighbours[:half]]
        mixed += at_margin[half:]
        different = holm([d.p for d in mixed])[:half]
        equivalent = holm([d.p_equivalence for d in mixed])[half:]
        false_findings["mixed"].append(min(different) < 0.05 or min(equivalent) < 0.05)
    return [
        Check(
            "families of ten equal settings against one base with a false difference", "5 %",
            (fraction(false_findings["base"]),), count, high=0.06,
        ),
        Check(
            "families of ten equal neighbours with a false difference", "5 %",
            (fraction(false_findings["neighbours"]),), count, high=0.06,
        ),
        Check(
            "families of ten at the margin with a false equivalence", "5 %",
            (fraction(false_findings["margin"]),), count, high=0.06,
        ),
        Check("the same, not corrected", NONE, (fraction(plain_margin),), count),
        Check(
            "families of five equal and five at the margin with any false verdict",
            "10 % (5 % of either kind)", (fraction(false_findings["mixed"]),), count, high=0.1,
        ),
    ]  # fmt: skip


def check_large_family(world: World, count: int) -> list[Check]:
    """A difference of 0.05 nats among five hundred comparisons, and equal ones."""
    p_values = [d.p for d in differences(world, Plan(0.05, 10), count)]
    equal = [
        [d.p for d in differences(world, Plan(0.0, 10, 0.5, None, index / 1e4), 500)]
        for index in range(max(count // 5, 1))
    ]
    return [
        Check(
            "a difference of 0.05 nats found by 10 seeds among 500 comparisons", NONE,
            (fraction(500 * p < 0.05 for p in p_values),), count, low=0.9,
        ),
        Check(
            "families of 500 equal comparisons with a false difference", "5 %",
            (fraction(min(holm(ps)) < 0.05 for ps in equal),), len(equal), high=0.09,
        ),
    ]  # fmt: skip


def check_prediction(world: World, count: int) -> list[Check]:
    """Coverage of the prediction interval of one more seed on the same rows."""
    rates, in_mean = [], []
    for seeds in (2, 3, 5, 10):
        hits, mean_hits = [], []
        for case in cases(world, Plan(0.005, seeds + 1, 1.0), count):
            result = difference(Paired(case.nats[:seeds], case.tokens), MARGIN)
            next_value = float(case.nats[seeds].sum() / case.tokens.sum())
            assert result.next_low is not None
            assert result.next_high is not None
            hits.append(result.next_low <= next_value <= result.next_high)
            mean_hits.append(covers(result, next_value))
        rates.append(fraction(hits))
        in_mean.append(fraction(mean_hits))
    return [
        Check(
            "the next seed's difference within its 95 % prediction interval, 2 to 10 seeds",
            "95 %", tuple(rates), count, low=0.93,
        ),
        Check(
            "the next seed's difference within the interval of the mean, 10 seeds", NONE,
            (in_mean[-1],), count,
        ),
    ]  # fmt: skip


def check_power(world: World, count: int) -> list[Check]:
    """Power of plans from pilots."""
    rates, planned = [], []
    for seeds in (2, 3, 5):
        truth = _Truth(
            math.sqrt(2) * world.seed_deviation,
            math.sqrt(2 / seeds) * world.seed_deviation,
            len(world.tokens),
        )
        sufficient = []
        for case in cases(world, Plan(0.0, seeds, 1.0), count):
            plan = needed(Paired(case.nats, case.tokens), truth.rows, MARGIN)
            if plan is not None:  # a pilot without a plan promises nothing
                sufficient.append(truth.power(plan) >= 0.8)
        rates.append(fraction(sufficient))
        planned.append(len(sufficient) / count)
    return [
        Check(
            "plans from pilots of 2, 3 and 5 seeds that have at least their 80 % power", "75 %",
            tuple(rates), count, low=0.75,
        ),
        Check("pilots of 2, 3 and 5 seeds from which a plan is made", NONE, tuple(planned), count),
    ]  # fmt: skip


@dataclass(frozen=True)
class _Truth:
    """True standard deviation of a difference over seeds, and its error over ``rows`` rows."""

    seed_deviation: float
    row_error: float
    rows: int

    def power(self, plan: Needed) -> float:
        """The lower of two powers, with normal errors: for a difference of the margin, and for
        equivalence at a difference of zero."""
        seeds = plan.seeds
        assert seeds is not None
        rng = np.random.default_rng(0)
        draws = 4_000
        error = self.row_error * math.sqrt(self.rows / plan.rows)
        spread = self.seed_deviation / math.sqrt(seeds)
        sample_spread = spread * np.sqrt(rng.chisquare(seeds - 1, draws) / (seeds - 1))
        value = math.hypot(error, spread) * rng.standard_normal(draws)
        total_error = np.hypot(error, sample_spread)
        degrees_of_freedom = total_error**4 / (
            sample_spread**4 / (seeds - 1) + error**4 / plan.rows
        )

        def p(distance: Floats) -> Floats:
            return np.maximum(
                stats.t.sf(distance / sample_spread, seeds - 1),
                stats.t.sf(distance / total_error, degrees_of_freedom),
            )

        different = (2 * p(np.abs(value + MARGIN)) < 0.05).mean()
        equivalent = (p(MARGIN - np.abs(value)) < 0.05).mean()
        return float(min(different, equivalent))


def _p_worse(arms: Sequence[Floats], tokens: Floats, index: int, other: int) -> float:
    sample = Paired(arms[index] - arms[other], tokens)
    return p_below(sample, sample.value)


def check_selection(world: World, count: int) -> list[Check]:
    """Twelve equal settings: coverage of the best set, and of the gain of the chosen one."""
    rng = np.random.default_rng(11)
    size, seeds = 12, 3
    kept, excluded, corrected, plain = [], [], [], []
    for _ in range(count):
        rows = rng.integers(0, len(world.tokens), len(world.tokens))
        tokens = world.tokens[rows]
        base, *arms = (world.noise(rng, seeds, rows) for _ in range(size + 1))

        p_worse = functools.partial(_p_worse, arms, tokens)
        members = best_members(size, p_worse)
        kept.append(0 in members)
        excluded.append(len(members) < size)
        lowest = min(arms, key=lambda arm: float(arm.sum()))
        sample = Paired(lowest - base, tokens)
        low, high = interval(sample, selected_confidence(size))
        corrected.append(low <= 0 <= high)
        low, high = interval(sample, 0.95)
        plain.append(low <= 0 <= high)
    return [
        Check(
            "a setting as good as the best of twelve is in the best set", "95 %",
            (fraction(kept),), count, low=0.94,
        ),
        Check(
            "any of twelve equal settings is not in the best set (no verdict on it)", NONE,
            (fraction(excluded),), count,
        ),
        Check(
            "gain of the lowest of twelve equal settings within its corrected interval", "95 %",
            (fraction(corrected),), count, low=0.95,
        ),
        Check("the same within the interval of one comparison", NONE, (fraction(plain),), count),
    ]  # fmt: skip


def check_rare_failures(world: World, count: int) -> list[Check]:
    """One seed in ten fails by 0.3 nats, the others gain 0.01: the mean is 0.02 worse."""
    rng = np.random.default_rng(13)
    claims: dict[int, list[float]] = {seeds: [0, 0] for seeds in (3, 10)}
    for seeds in claims:
        for case in cases(world, Plan(-0.01, seeds, 0.0, None, 0.9), count):
            failed = rng.random(seeds) < 0.1
            nats = case.nats + 0.3 * failed[:, None] * case.tokens
            result = difference(Paired(nats, case.tokens), MARGIN)
            claims[seeds][0] += bool(result.p < 0.05 and result.value < 0)
        # At the stated bound all seeds agree in 5 % of experiments.
        claims[seeds][1] = (rng.random((count, seeds)) >= failure_bound(seeds)).all(1).sum()
    return [
        Check(
            f"the mean called lower from {seeds} seeds where one seed in ten fails and the mean "
            "is higher",
            NONE,
            (called / count,),
            count,
        )
        for seeds, (called, _) in claims.items()
    ] + [
        Check(
            "3 and 10 seeds agree, though the share of failing seeds is at the stated bound",
            "5 %",
            tuple(agreed / count for _, agreed in claims.values()),
            count,
            high=0.07,
        )
    ]


def check_common_practice(world: World, count: int) -> list[Check]:
    """Methods of common practice, on the same cases."""
    alone, unpaired, added = [], [], []
    for case in cases(world, Plan(0.0), count):
        alone.append(p_value(Paired(case.nats[:1], case.tokens)) < 0.05)
    for case in cases(world, Plan(0.02), count):
        losses = [clustered(arm[0], case.tokens) for arm in (case.first, case.second)]
        half_length = 1.96 * math.hypot(*(loss.standard_error for loss in losses))
        unpaired.append(abs(losses[1].value - losses[0].value) > half_length)
    max_seeds = 60
    for case in cases(world, Plan(0.0, max_seeds), count):
        p = p_value(Paired(case.nats[:2], case.tokens))
        for seeds in range(3, 11):
            if p < 0.05:
                break
            p = p_value(Paired(case.nats[:seeds], case.tokens))
        added.append(p < 0.05)
    return [
        Check(
            "equal settings called different from one seed and an interval over rows", NONE,
            (fraction(alone),), count,
        ),
        Check(
            "0.02 nats found by two losses of one seed compared as if on different rows", NONE,
            (fraction(unpaired),), count,
        ),
        Check(
            "equal settings called different where seeds are added to two, one by one up to ten, "
            "until they differ",
            NONE,
            (fraction(added),),
            count,
        ),
    ]  # fmt: skip


CHECKS: Sequence[Callable[[World, int], list[Check]]] = (
    check_several_seeds, check_few_groups, check_draws_and_seeds, check_families,
    check_large_family, check_prediction, check_power, check_selection, check_rare_failures,
    check_common_practice,
)  # fmt: skip
