"""Simulated cases with planted differences in real scores.

The scores come from `recipes/calibration.yaml`: a base and sixteen seeds of one cell on 1,000 test
rows, in groups of very unequal size. A case resamples groups, and draws seeds whose deviations per
group have the covariance of the real seeds. It adds to one of two settings a difference that varies
over groups as the real change from base to adapter does and, in some plans, a row effect of mean
zero, so that the sampling of rows contributes as much variance as the seeds, or more.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slm_lora.runs.folder import list_runs
from slm_lora.runs.metrics import METRICS
from slm_lora.runs.scored_run import read_scored_runs
from slm_lora.stats.clustered import Floats, clustered
from slm_lora.stats.estimates import group_sums

Indices = npt.NDArray[np.intp]
"""Indices of the groups of a case."""


@dataclass(frozen=True)
class World:
    """Distribution of cases.

    Attributes:
        base: nats of the base, [groups].
        mean: nats, mean over the real seeds, [groups].
        deviations: nats, deviations of the real seeds from the mean, [seeds, groups].
        effect: nats that add up to a difference of one nat per token, [groups].
        row_effect: nats of sum zero, with a standard error of one nat per token, [groups].
        tokens: label tokens, [groups].
    """

    base: Floats
    mean: Floats
    deviations: Floats
    effect: Floats
    row_effect: Floats
    tokens: Floats

    @property
    def seed_deviation(self) -> float:
        """Standard deviation of the loss between seeds, nats per token."""
        return float(self.deviations.sum(1).std(ddof=1) / self.tokens.sum())

    def noise(self, rng: np.random.Generator, count: int, rows: Indices) -> Floats:
        """Deviations of new seeds on the drawn groups, [count, groups]."""
        n_real = len(self.deviations)
        weights = rng.standard_normal((count, n_real)) / math.sqrt(n_real - 1)
        deviations: Floats = weights @ self.deviations[:, rows]
        return deviations


def read_world(results: Path) -> World:
    """The world of the runs of the calibration recipe."""
    runs = read_scored_runs(list_runs(results))
    metric = METRICS["all"]
    base = group_sums([run.scores for run in runs if run.is_base], metric)[0][0]
    nats, tokens = group_sums([run.scores for run in runs if not run.is_base], metric)
    change = base - nats.mean(0)
    row_effect = change - tokens * change.sum() / tokens.sum()
    return World(
        base=base,
        mean=nats.mean(0),
        deviations=nats - nats.mean(0),
        effect=change * tokens.sum() / change.sum(),
        row_effect=row_effect / clustered(row_effect, tokens).standard_error,
        tokens=tokens,
    )


@dataclass(frozen=True)
class Plan:
    """Parameters of a case.

    Attributes:
        planted: difference of the second setting, nats per token.
        seeds: number of seeds of both settings.
        row_ratio: ratio of the standard error over rows to that over seeds.
        groups: number of groups of test rows; unset: as many as the real ones.
        common: share of a seed's variance that both settings of a pair have in common.
    """

    planted: float = 0.0
    seeds: int = 3
    row_ratio: float = 0.0
    groups: int | None = None
    common: float = 0.0

    def generator(self, salt: int = 0) -> np.random.Generator:
        """Random generator, seeded by the plan and ``salt``."""
        numbers = (self.planted, self.seeds, self.row_ratio, self.groups or 0, self.common)
        return np.random.default_rng([salt, *(round((1 + number) * 1e6) for number in numbers)])


@dataclass(frozen=True)
class Case:
    """Two settings and their difference, second minus first.

    Attributes:
        nats: differences, [seeds, groups].
        tokens: label tokens, [groups].
        first, second: nats of the settings, [seeds, groups].
    """

    nats: Floats
    tokens: Floats
    first: Floats
    second: Floats


def cases(world: World, plan: Plan, count: int) -> Iterator[Case]:
    """Cases of a plan."""
    rng = plan.generator()
    row_error = plan.row_ratio * math.sqrt(2 / plan.seeds) * world.seed_deviation
    change = plan.planted * world.effect + row_error * world.row_effect
    for _ in range(count):
        rows = rng.integers(0, len(world.tokens), plan.groups or len(world.tokens))
        shared = math.sqrt(plan.common) * world.noise(rng, plan.seeds, rows)
        own_share = math.sqrt(1 - plan.common)
        first: Floats = world.mean[rows] + shared + own_share * world.noise(rng, plan.seeds, rows)
        second: Floats = world.mean[rows] + shared + own_share * world.noise(rng, plan.seeds, rows)
        second = second + change[rows]
        yield Case(second - first, world.tokens[rows], first, second)
