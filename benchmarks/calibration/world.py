"""Planted truths over real scores: test rows, seeds and draws of cases whose truth is known.

The scores are those of `recipes/calibration.yaml`: a base and sixteen seeds of one cell on 1,000
test rows in groups of very unequal size. A case draws groups from the real ones, and seeds whose
deviations, group by group, have the covariance of the sixteen real seeds. To one of two settings it
adds a difference that varies over groups as the real change from base to adapter does and, in some
plans, one that varies like it and is zero on average: there the choice of rows is as uncertain as
that of seeds, or more so.
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
"""Which real groups a case draws."""


@dataclass(frozen=True)
class World:
    """What cases are drawn from.

    Attributes:
        base: nats of the base, [groups].
        mean: nats, mean over the real seeds, [groups].
        deviations: of the real seeds from it, [seeds, groups].
        effect: nats that make a difference of one nat a token, [groups].
        unlike: nats that are zero in sum, of a standard error of one nat a token, [groups].
        tokens: label tokens, [groups].
    """

    base: Floats
    mean: Floats
    deviations: Floats
    effect: Floats
    unlike: Floats
    tokens: Floats

    @property
    def seed_deviation(self) -> float:
        """Standard deviation of the loss between seeds, nats a token."""
        return float(self.deviations.sum(1).std(ddof=1) / self.tokens.sum())

    def noise(self, rng: np.random.Generator, count: int, rows: Indices) -> Floats:
        """Deviations of new seeds on the drawn groups, [count, groups]."""
        real = len(self.deviations)
        weights = rng.standard_normal((count, real)) / math.sqrt(real - 1)
        deviations: Floats = weights @ self.deviations[:, rows]
        return deviations


def read_world(results: Path) -> World:
    """From the runs of the calibration recipe."""
    runs = read_scored_runs(list_runs(results))
    metric = METRICS["all"]
    base = group_sums([run.scores for run in runs if run.is_base], metric)[0][0]
    nats, tokens = group_sums([run.scores for run in runs if not run.is_base], metric)
    change = base - nats.mean(0)
    unlike = change - tokens * change.sum() / tokens.sum()
    return World(
        base=base,
        mean=nats.mean(0),
        deviations=nats - nats.mean(0),
        effect=change * tokens.sum() / change.sum(),
        unlike=unlike / clustered(unlike, tokens).standard_error,
        tokens=tokens,
    )


@dataclass(frozen=True)
class Plan:
    """What a case is to be.

    Attributes:
        planted: difference of the second setting, nats a token.
        seeds: of both settings.
        row_ratio: error over rows, as a multiple of the error over seeds.
        groups: of test rows; unset: as many as are real.
        common: share of a seed's variance that both settings of a pair have in common.
    """

    planted: float = 0.0
    seeds: int = 3
    row_ratio: float = 0.0
    groups: int | None = None
    common: float = 0.0

    def generator(self, salt: int = 0) -> np.random.Generator:
        """The same for the same plan."""
        numbers = (self.planted, self.seeds, self.row_ratio, self.groups or 0, self.common)
        return np.random.default_rng([salt, *(round((1 + number) * 1e6) for number in numbers)])


@dataclass(frozen=True)
class Case:
    """Differences of two settings, second minus first, [seeds, groups], and what they come from."""

    nats: Floats
    tokens: Floats
    first: Floats
    second: Floats


def cases(world: World, plan: Plan, count: int) -> Iterator[Case]:
    """Cases of a plan."""
    rng = plan.generator()
    row_error = plan.row_ratio * math.sqrt(2 / plan.seeds) * world.seed_deviation
    change = plan.planted * world.effect + row_error * world.unlike
    for _ in range(count):
        rows = rng.integers(0, len(world.tokens), plan.groups or len(world.tokens))
        shared = math.sqrt(plan.common) * world.noise(rng, plan.seeds, rows)
        own = math.sqrt(1 - plan.common)
        first: Floats = world.mean[rows] + shared + own * world.noise(rng, plan.seeds, rows)
        second: Floats = world.mean[rows] + shared + own * world.noise(rng, plan.seeds, rows)
        second = second + change[rows]
        yield Case(second - first, world.tokens[rows], first, second)
