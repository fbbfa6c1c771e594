"""Checks of comparisons between settings at their own tuned values: false differences, coverage and
length of intervals that include the choice in different ways."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from checks import MARGIN, NONE, Check, fraction
from scipy.special import stdtr
from tuned_world import (
    SEARCHES,
    VALIDATION_GROUPS,
    Search,
    TunedCase,
    TunedPlan,
    TunedWorld,
    final_runs,
    lift,
    searches_of,
    tuned_cases,
)

from slm_lora.stats.clustered import Floats, clustered_covariance
from slm_lora.stats.estimates import Paired
from slm_lora.stats.inference import difference, interval
from slm_lora.stats.regret import Regret
from slm_lora.stats.selection import best_members
from slm_lora.stats.selection_regret import at_own_best, own_best_interval

FLAT, USUAL, MIXED = (0.01, 0.01), (0.03, 0.03), (0.01, 0.1)
"""Curvatures of both settings, nats per squared unit of the logarithm; the real ones are 0.02 to
0.06."""
FINE = ("factor 5, refined", "factor 2.5, refined", "factor 1.5")
"""Searches whose rates come near the optimum."""
SHAPES = (
    TunedPlan(apart=1.0),
    TunedPlan(skew=3.0),
    TunedPlan("factor 1.5", MIXED, skew=3.0),
    TunedPlan("factor 1.5", (0.005, 0.005), quartic=0.02),
    TunedPlan(noise=2.5, share=0.0, curvature=FLAT),
    TunedPlan("factor 1.5", noise=2.5, share=0.0),
    TunedPlan("factor 2.5, refined", noise=1.5, growth=0.6),
    TunedPlan("factor 1.5", FLAT, seeds=10),
    TunedPlan(seeds=5, share=0.9),
    TunedPlan("factor 1.5", tuning_seeds=2),
)
"""Other curves and trainings, with searches near the optimum."""
EQUAL = [
    *(TunedPlan(name, curvature) for name in FINE for curvature in (FLAT, USUAL, MIXED)),
    *SHAPES,
]
COARSE = [
    TunedPlan(name, curvature)
    for name in SEARCHES
    if name not in FINE
    for curvature in (FLAT, MIXED)
]
PLANTED = [
    TunedPlan(name, planted=planted)
    for name in (FINE[0], FINE[2])
    for planted in (0.005, 0.02, 0.05)
]
OTHERS = [TunedPlan(name, curvature) for name in FINE for curvature in (FLAT, USUAL)]
"""Plans on which procedures with further trainings are simulated."""


@dataclass(frozen=True)
class Outcome:
    """An interval for the difference of two settings at their own best values.

    Attributes:
        low: lower end.
        high: upper end.
        truth: difference of the lowest losses, among the rates that were tried.
    """

    low: float
    high: float
    truth: float

    @property
    def covers(self) -> bool:
        """Whether the truth is inside."""
        return self.low <= self.truth <= self.high

    @property
    def different(self) -> bool:
        """Whether zero is outside."""
        return self.low > 0 or self.high < 0


def _own_best(case: TunedCase, part: Callable[[Regret], Regret]) -> tuple[float, float]:
    first, second = map(part, case.regrets)
    return own_best_interval(case.sample, 0.95, first, second)


WAYS: Mapping[str, Callable[[TunedCase], tuple[float, float]]] = {
    "chosen": lambda case: _own_best(case, lambda regret: regret),
    "ordinary": lambda case: interval(case.sample, 0.95),
    "observed": lambda case: _own_best(case, lambda regret: replace(regret, fitted=None)),
    "fitted": lambda case: _own_best(case, lambda regret: Regret(regret.fitted or regret.observed)),
}


def outcomes(world: TunedWorld, plan: TunedPlan, count: int) -> dict[str, list[Outcome]]:
    """Intervals of all ways without further trainings."""
    results: dict[str, list[Outcome]] = {way: [] for way in WAYS}
    for _, case in tuned_cases(world, plan, count):
        for way, of_case in WAYS.items():
            results[way].append(Outcome(*of_case(case), plan.planted))
    return results


def _kept(search: Search) -> list[float]:
    """Rates that may be the best, paired by validation group."""
    losses, covariance, freedom = clustered_covariance(search.nats.mean(1), search.tokens)
    variances = np.diag(covariance)
    errors = np.sqrt(np.maximum(np.add.outer(variances, variances) - 2 * covariance, 1e-30))
    p: Floats = stdtr(freedom, -np.subtract.outer(losses, losses) / errors)
    return [
        search.rates[index]
        for index in best_members(len(losses), lambda one, other: float(p[one, other]))
    ]


def intersection_union(
    world: TunedWorld, plan: TunedPlan, count: int
) -> tuple[list[Outcome], list[float]]:
    """Final runs at all kept rates; the interval covers those of all pairs. Also the number of
    final settings, relative to two."""
    results, runs = [], []
    for rng, case in tuned_cases(world, plan, count):
        kept = [_kept(own) for own in case.searches]
        choices = [
            (arm, rate) for arm, rates in zip(case.arms, kept, strict=True) for rate in rates
        ]
        final = final_runs(rng, choices, case.test_rows, plan.seeds)
        ends = [
            interval(Paired(second - first, case.tokens), 0.95)
            for first in final[: len(kept[0])]
            for second in final[len(kept[0]) :] + case.tokens * lift(plan, [case.searches])
        ]
        low, high = min(end[0] for end in ends), max(end[1] for end in ends)
        results.append(Outcome(low, high, plan.planted))
        runs.append(len(choices) / 2)
    return results, runs


def repeated(world: TunedWorld, plan: TunedPlan, count: int) -> list[Outcome]:
    """A search with a tuning seed of its own for every final seed, on the same validation rows."""
    results = []
    groups = len(world.tokens)
    for rng, case in tuned_cases(world, plan, count):
        rows = rng.integers(0, groups, plan.validation_groups)
        differences, searches = [], []
        for _ in range(plan.seeds):
            own = searches_of(rng, case.arms, rows, 1)
            choices = [(arm, found.rate) for arm, found in zip(case.arms, own, strict=True)]
            final = final_runs(rng, choices, case.test_rows, 1)
            differences.append(final[1, 0] - final[0, 0])
            searches.append(own)
        nats = np.stack(differences) + case.tokens * lift(plan, searches)
        low, high = interval(Paired(nats, case.tokens), 0.95)
        results.append(Outcome(low, high, plan.planted))
    return results


def _length(results: Sequence[Outcome]) -> float:
    return math.fsum(result.high - result.low for result in results) / len(results)


def _coverage(results: Sequence[Outcome]) -> float:
    return fraction(result.covers for result in results)


def check_tuned(world: TunedWorld, count: int) -> list[Check]:
    """Ways to include the choice of a learning rate, on the same cases."""
    equal = [outcomes(world, plan, count) for plan in EQUAL]
    coarse = [outcomes(world, plan, count) for plan in COARSE]
    planted = [outcomes(world, plan, count) for plan in PLANTED]
    everything = [*equal, *coarse, *planted]

    def false(way: str) -> tuple[float, ...]:
        return tuple(fraction(result.different for result in cases[way]) for cases in equal)

    def coverage(way: str) -> tuple[float, ...]:
        return tuple(_coverage(cases[way]) for cases in everything)

    def length(way: str) -> tuple[float, ...]:
        return tuple(_length(cases[way]) / _length(cases["ordinary"]) for cases in everything)

    names = {
        "ordinary": "the interval at the chosen rates, which ignores the choice",
        "observed": "regret bounded by the losses of single rates alone",
        "fitted": "regret bounded by a parabola alone",
    }
    at_margin = [
        fraction(_falsely_equivalent(case) for _, case in tuned_cases(world, plan, count))
        for plan in (TunedPlan(name, planted=MARGIN) for name in FINE)
    ]
    lowest_of_all = tuple(
        fraction(
            low <= case.truth_of_all <= high
            for _, case in tuned_cases(world, plan, count)
            for low, high in [WAYS["chosen"](case)]
        )
        for plan in EQUAL[: len(FINE) * 3]
    )
    return [
        Check(
            "settings with the same lowest loss, each at its own tuned learning rate, called "
            "different: optima up to a factor of 5 apart, flat to sharp curves, 3 to 10 seeds",
            "5 %", false("chosen"), count, high=0.06,
        ),
        Check("the same, the choice ignored", NONE, false("ordinary"), count),
        Check(
            "difference of the lowest losses among the rates tried within the 95 % interval for "
            "each setting at its own rate, also for coarse searches, edges, and settings 0.005 "
            "to 0.05 apart",
            "95 %", coverage("chosen"), count, low=0.93,
        ),
        Check(
            "length of this interval, relative to the one that ignores the choice",
            NONE, length("chosen"), count,
        ),
        *(
            check
            for way, name in names.items()
            for check in (
                Check(f"the same coverage by {name}", NONE, coverage(way), count),
                *([Check("its length", NONE, length(way), count)] if way != "ordinary" else []),
            )
        ),
        *_check_others(world, count),
        Check(
            "equivalence declared at a true difference of the margin, each setting at its own rate",
            "5 %", tuple(at_margin), count, high=0.06,
        ),
        Check(
            "difference of the lowest losses of all rates, also those not tried, within the "
            "interval, searches with refinement",
            NONE, lowest_of_all, count,
        ),
        *(
            Check(
                f"settings {size:g} apart called different, each at its own rate", NONE,
                tuple(
                    fraction(result.different for result in cases["chosen"])
                    for cases, plan in zip(planted, PLANTED, strict=True)
                    if plan.planted == size
                ),
                count,
            )
            for size in (0.005, 0.02, 0.05)
        ),
    ]  # fmt: skip


def _falsely_equivalent(case: TunedCase) -> bool:
    """Whether equivalence is declared where the true difference is the margin."""
    sample = case.sample
    result = at_own_best(difference(sample, MARGIN), sample, *case.regrets)
    return result.p_equivalence < 0.05


def _check_others(world: TunedWorld, count: int) -> list[Check]:
    union = [intersection_union(world, plan, count) for plan in OTHERS]
    again = [repeated(world, plan, count) for plan in OTHERS]
    plain = [
        _length(
            [
                Outcome(*interval(case.sample, 0.95), plan.planted)
                for _, case in tuned_cases(world, plan, count)
            ]
        )
        for plan in OTHERS
    ]

    def relative(results: Sequence[Sequence[Outcome]]) -> tuple[float, ...]:
        return tuple(_length(own) / length for own, length in zip(results, plain, strict=True))

    return [
        Check(
            "the same coverage by final runs at all rates that may be the best",
            NONE, tuple(_coverage(results) for results, _ in union), count,
        ),
        Check("its length", NONE, relative([results for results, _ in union]), count),
        Check(
            "its final runs, relative to those at the chosen rates",
            NONE, tuple(float(np.mean(runs)) for _, runs in union), count,
        ),
        Check(
            "the same coverage by a search of its own for each of 3 seeds",
            NONE, tuple(_coverage(results) for results in again), count,
        ),
        Check("its length", NONE, relative(again), count),
    ]  # fmt: skip


def widening(world: TunedWorld, count: int) -> list[dict[str, float]]:
    """Mean regret and bound of a setting, and mean half-lengths without and with them, nats per
    token, by the deviation between seeds, validation rows and tuning seeds; of flat curves, where
    the choice is least certain."""
    records = []
    for noise, rows, seeds in itertools.product((1.0, 2.5), (100, 300, 1000), (1, 2)):
        plan = TunedPlan(
            curvature=FLAT,
            noise=noise,
            tuning_seeds=seeds,
            validation_groups=round(rows * VALIDATION_GROUPS / 300),
        )
        values = [
            (
                np.mean([arm.loss(own.rate) - own.lowest for arm, own in case.pairs]),
                np.mean([regret.bound for regret in case.regrets]),
                *(np.diff(WAYS[way](case))[0] / 2 for way in ("ordinary", "chosen")),
            )
            for _, case in tuned_cases(world, plan, count)
        ]
        names = ("regret", "bound", "half_length_ordinary", "half_length")
        records.append(
            {
                "seed_deviation": noise * world.seed_deviation,
                "validation_rows": rows,
                "tuning_seeds": seeds,
            }
            | dict(zip(names, map(float, np.mean(values, 0)), strict=True))
        )
    return records
