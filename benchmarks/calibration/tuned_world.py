"""Simulated experiments that tune a learning rate for each of two settings.

The losses come from committed runs on Dolly: rank 4 and 16 at three learning rates (seed 0, 375
rows; results/dolly-grid and results/learning-rates), scored on 1,000 test rows. A group's loss is
a parabola in the logarithm of the rate through the three, so groups differ in level, slope and
curvature, and in how these go together, as they do there. The mean over groups is replaced by a
planted curve with a known minimum. Trainings deviate as the seeds of results/dolly-grid do (nine
settings of three seeds), in part alike for all rates of one seed. Validation and test rows are
drawn independently; the search is that of the program.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from world import Indices

from slm_lora.config.axes import TuningSection
from slm_lora.runs.folder import list_runs
from slm_lora.runs.metrics import METRICS
from slm_lora.runs.scored_run import read_scored_runs
from slm_lora.stats.clustered import Floats
from slm_lora.stats.estimates import Paired, group_sums
from slm_lora.stats.regret import Regret
from slm_lora.stats.selection_regret import regret_of_sums
from slm_lora.stats.tuning import Point, progress

RANKS, RATES, SIZES, SEEDS = (4, 16), (2e-4, 3e-3, 1e-2), (375, 750, 1500), (0, 1, 2)
VALIDATION_GROUPS = 285
"""Of 300 rows."""
LEAST_LOSS = 2.6
MEASURED = (-3.0, 1.5)
"""Distances from the optimum, in the logarithm, that the rates cover."""


def _rates(first: float, factor: float, count: int) -> list[float]:
    return [float(f"{first * factor**index:.1e}") for index in range(count)]


SEARCHES = {
    "factor 5, refined": {"values": _rates(2e-4, 5, 3), "refine": 2, "extend": 2},
    "factor 2.5, refined": {"values": _rates(2e-4, 2.5, 5), "refine": 1, "extend": 2},
    "factor 1.5": {"values": _rates(2.6e-4, 1.5, 12), "refine": 0, "extend": 2},
    "factor 5": {"values": _rates(2e-4, 5, 3), "refine": 0, "extend": 2},
    "edge": {"values": [1e-4, 5e-4], "refine": 2, "extend": 0},
    "edge, refined": {"values": _rates(1e-4, 4, 3), "refine": 1, "extend": 0},
}


@dataclass(frozen=True)
class TunedPlan:
    """Parameters of a case.

    Attributes:
        search: name of a search.
        curvature: of both planted curves, nats per squared unit of the logarithm.
        skew: curvature above the optimum, relative to that below.
        quartic: coefficient of the fourth power: flat at the optimum, steep further away.
        apart: ratio of the two optimal rates.
        planted: difference of the lowest losses among the rates tried, second minus first.
        noise: deviation of trainings, relative to the real one.
        growth: exponent by which it grows with the rate.
        share: share of a seed's variance that all rates and both settings have in common.
        seeds: final seeds.
        tuning_seeds: seeds of the search.
        validation_groups: of validation rows.
    """

    search: str = "factor 5, refined"
    curvature: tuple[float, float] = (0.03, 0.03)
    skew: float = 1.0
    quartic: float = 0.0
    apart: float = 5.0
    planted: float = 0.0
    noise: float = 1.0
    growth: float = 0.0
    share: float = 0.5
    seeds: int = 3
    tuning_seeds: int = 1
    validation_groups: int = VALIDATION_GROUPS

    @functools.cached_property
    def section(self) -> TuningSection:
        """The search as in a recipe."""
        return TuningSection.model_validate(SEARCHES[self.search])


@dataclass(frozen=True)
class TunedWorld:
    """Distribution of cases.

    Attributes:
        tokens: label tokens, [groups].
        shapes: level, slope and curvature of the groups' losses around the optimum in nats, less
            the mean over groups, one [3, groups] a rank.
        deviations: nats, deviations of real trainings from the mean of their setting, scaled so
            that their squares are unbiased, [trainings, groups].
    """

    tokens: Floats
    shapes: tuple[Floats, ...]
    deviations: Floats

    @property
    def seed_deviation(self) -> float:
        """Standard deviation of the loss between seeds, nats per token."""
        return math.sqrt(float(np.mean((self.deviations.sum(1) / self.tokens.sum()) ** 2)))

    def noise(self, rng: np.random.Generator) -> Floats:
        """Deviation of a new training, [groups]."""
        count = len(self.deviations)
        deviation: Floats = rng.standard_normal(count) @ self.deviations / math.sqrt(count)
        return deviation


@functools.cache
def read_tuned_world(results: Path) -> TunedWorld:
    """The world of the committed runs."""
    runs = [
        run
        for experiment in ("dolly-grid", "learning-rates")
        for run in read_scored_runs(list_runs(results / experiment))
        if not run.is_base
    ]
    sums, tokens = group_sums([run.scores for run in runs], METRICS["all"])
    nats = {run.run.cell: own for run, own in zip(runs, sums, strict=True)}
    total = tokens.sum()
    shapes = []
    for rank in RANKS:
        names = (f"r{rank}-375-seed0", *(f"r{rank}-lr{rate:g}" for rate in RATES[1:]))
        powers = np.vander(np.log(RATES), 3, increasing=True)
        level, slope, curvature = np.linalg.solve(powers, np.stack([nats[name] for name in names]))
        optimum = -slope.sum() / (2 * curvature.sum())
        moved = (
            level + slope * optimum + curvature * optimum**2,
            slope + 2 * curvature * optimum,
            curvature,
        )
        shapes.append(np.stack([part - tokens * part.sum() / total for part in moved]))
    deviations = []
    for rank in (4, 8, 16):
        for size in SIZES:
            own = np.stack([nats[f"r{rank}-{size}-seed{seed}"] for seed in SEEDS])
            deviations.append((own - own.mean(0)) * math.sqrt(len(SEEDS) / (len(SEEDS) - 1)))
    return TunedWorld(tokens, tuple(shapes), np.concatenate(deviations))


@dataclass(frozen=True)
class Arm:
    """A setting with a planted curve of loss against learning rate."""

    world: TunedWorld
    plan: TunedPlan
    shape: Floats
    lowest: float
    optimum: float
    curvature: float

    def loss(self, rate: float) -> float:
        """Expected loss at a rate."""
        distance = math.log(rate / self.optimum)
        curvature = self.curvature * (self.plan.skew if distance > 0 else 1.0)
        return self.lowest + curvature * distance**2 + self.plan.quartic * distance**4

    def train(self, rng: np.random.Generator, rate: float, shared: Floats) -> Floats:
        """Nats of one training, [groups]; ``shared`` is the seed's deviation."""
        distance = math.log(rate / self.optimum)
        inside = min(max(distance, MEASURED[0]), MEASURED[1])
        level, slope, curvature = self.shape
        share = self.plan.share
        deviation = math.sqrt(share) * shared + math.sqrt(1 - share) * self.world.noise(rng)
        scale = self.plan.noise * math.exp(self.plan.growth * inside)
        nats: Floats = (
            self.world.tokens * self.loss(rate)
            + level
            + inside * slope
            + inside**2 * curvature
            + scale * deviation
        )
        return nats


@dataclass(frozen=True)
class Search:
    """A finished search.

    Attributes:
        rates: tried.
        nats: validation scores, [rates, seeds, groups].
        tokens: label tokens, [groups].
        chosen: index of the chosen rate.
        lowest: expected loss of the best of the rates.
    """

    rates: list[float]
    nats: Floats
    tokens: Floats
    chosen: int
    lowest: float

    @property
    def rate(self) -> float:
        """The chosen one."""
        return self.rates[self.chosen]

    def regret(self, training_variance: float, freedom: float) -> Regret:
        """Of the choice."""
        return regret_of_sums(
            self.nats, self.tokens, self.chosen, self.rates, training_variance, freedom
        )


def search(rng: np.random.Generator, arm: Arm, rows: Indices, shared: Sequence[Floats]) -> Search:
    """Choose a rate for a setting; ``shared`` has the deviation of each tuning seed."""
    tokens = arm.world.tokens[rows]
    outcomes: dict[Point, float] = {}
    nats: dict[Point, Floats] = {}
    while (state := progress(arm.plan.section, outcomes)).missing:
        for point in state.missing:
            nats[point] = np.stack([arm.train(rng, point[0], own)[rows] for own in shared])
            outcomes[point] = float(nats[point].mean(0).sum() / tokens.sum())
    assert state.lowest is not None
    points = sorted(outcomes)
    return Search(
        [point[0] for point in points],
        np.stack([nats[point] for point in points]),
        tokens,
        points.index(state.lowest),
        min(arm.loss(point[0]) for point in points),
    )


@dataclass(frozen=True)
class TunedCase:
    """An experiment of two settings.

    Attributes:
        arms: the settings.
        searches: one a setting.
        test_rows: indices of test groups.
        final: nats of the final runs at the chosen rates, [settings, seeds, test groups].
        tokens: label tokens, [test groups].
    """

    arms: tuple[Arm, Arm]
    searches: tuple[Search, Search]
    test_rows: Indices
    final: Floats
    tokens: Floats

    @property
    def pairs(self) -> list[tuple[Arm, Search]]:
        """Either setting with its search."""
        return list(zip(self.arms, self.searches, strict=True))

    @functools.cached_property
    def sample(self) -> Paired:
        """Final runs, second setting minus first."""
        return Paired(self.final[1] - self.final[0], self.tokens)

    @property
    def truth_of_all(self) -> float:
        """Difference of the lowest expected losses among all rates, also those not tried."""
        first, second = (own.lowest - arm.lowest for arm, own in self.pairs)
        return self.arms[0].plan.planted - (second - first)

    @functools.cached_property
    def regrets(self) -> tuple[Regret, Regret]:
        """With the training variance pooled over the final runs of both settings."""
        losses = self.final.sum(2) / self.tokens.sum()
        variance, seeds = float(losses.var(1, ddof=1).mean()), losses.shape[1]
        first, second = (own.regret(variance, 2.0 * (seeds - 1)) for own in self.searches)
        return first, second


def final_runs(
    rng: np.random.Generator, choices: Sequence[tuple[Arm, float]], rows: Indices, seeds: int
) -> Floats:
    """Final runs of settings at rates, [choices, seeds, groups]; seeds are common to all."""
    runs = []
    for _ in range(seeds):
        shared = choices[0][0].world.noise(rng)
        runs.append([arm.train(rng, rate, shared)[rows] for arm, rate in choices])
    return np.stack(runs, axis=1)


def searches_of(
    rng: np.random.Generator, arms: tuple[Arm, Arm], rows: Indices, seeds: int
) -> tuple[Search, Search]:
    """A search for either setting with the same seeds and validation rows."""
    shared = [arms[0].world.noise(rng) for _ in range(seeds)]
    return search(rng, arms[0], rows, shared), search(rng, arms[1], rows, shared)


def tuned_cases(
    world: TunedWorld, plan: TunedPlan, count: int
) -> Iterator[tuple[np.random.Generator, TunedCase]]:
    """Cases of a plan, each with the generator for further draws."""
    groups = len(world.tokens)
    text = repr(plan).encode()
    rng = np.random.default_rng(list(text))
    for _ in range(count):
        optimum = 3.5e-3 * math.exp(rng.uniform(-0.8, 0.8))
        optima = [optimum, optimum / plan.apart]
        rng.shuffle(optima)
        first, second = (
            Arm(world, plan, shape, LEAST_LOSS, own, curvature)
            for shape, own, curvature in zip(world.shapes, optima, plan.curvature, strict=True)
        )
        rows = rng.integers(0, groups, plan.validation_groups)
        test_rows = rng.integers(0, groups, groups)
        searches = searches_of(rng, (first, second), rows, plan.tuning_seeds)
        choices = [(first, searches[0].rate), (second, searches[1].rate)]
        final = final_runs(rng, choices, test_rows, plan.seeds)
        tokens = world.tokens[test_rows]
        # A level for the second setting, which no search depends on: the planted truth is exact.
        final[1] += tokens * lift(plan, [searches])
        yield rng, TunedCase((first, second), searches, test_rows, final, tokens)


def lift(plan: TunedPlan, searches: Sequence[tuple[Search, Search]]) -> float:
    """Nats per token to add to the second setting, so that the lowest losses among the rates that
    either tried, in any of the searches, differ by the planted amount."""
    first, second = (min(own[place].lowest for own in searches) for place in (0, 1))
    return plan.planted - (second - first)
