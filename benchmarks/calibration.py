"""Do the statistics tell the truth? Planted differences over real per-row scores.

The scores are those of `recipes/calibration.yaml`: a base and sixteen seeds of one cell on 1,000
test rows. A case draws test rows from the real ones, by group, and seeds whose deviations, row by
row, have the covariance of the sixteen real seeds; to one of two arms it adds a difference that
varies over rows as the real change from base to adapter does. What `statistics.difference` says
is compared with what was planted, beside what two usual ways would say: one seed with an interval
over rows, and one seed with two losses compared as if on different rows.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from slm_lora.experiment import statistics
from slm_lora.experiment.statistics import (
    Difference,
    Floats,
    Paired,
    difference,
    group_sums,
    needed_for_difference,
)
from slm_lora.experiment.table import read_lines
from slm_lora.runs import list_runs
from slm_lora.storage import atomic_write_text

MARGIN, SEEDS = 0.01, 3
EFFECTS = (0.005, 0.01, 0.02)
"""Planted differences, nats a token."""


@dataclass(frozen=True)
class World:
    """What cases are drawn from.

    Attributes:
        mean: nats of every group, mean over the real seeds.
        deviations: of the real seeds from it, [seeds, groups].
        effect: nats of every group that make a difference of one nat a token.
        tokens: label tokens of every group.
    """

    mean: Floats
    deviations: Floats
    effect: Floats
    tokens: Floats

    @property
    def seed_deviation(self) -> float:
        """Standard deviation of the loss between seeds, nats a token."""
        return float(self.deviations.sum(1).std(ddof=1) / self.tokens.sum())

    def case(
        self, rng: np.random.Generator, planted: float, seeds: int, groups: int | None = None
    ) -> tuple[Floats, Floats, Floats]:
        """Nats of two arms, [seeds, groups] each, and tokens of the drawn groups."""
        drawn = rng.integers(0, len(self.tokens), groups or len(self.tokens))

        def arm() -> Floats:
            real = len(self.deviations)
            weights = rng.standard_normal((seeds, real)) / math.sqrt(real - 1)
            found: Floats = self.mean[drawn] + weights @ self.deviations[:, drawn]
            return found

        return arm(), arm() + planted * self.effect[drawn], self.tokens[drawn]


def read_world(results: Path) -> World:
    """From the runs of the calibration recipe."""
    lines = read_lines(list_runs(results))
    base = [line.scores for line in lines if line.is_base]
    nats, tokens = group_sums([line.scores for line in lines if not line.is_base], "all")
    change = group_sums(base, "all")[0][0] - nats.mean(0)
    return World(
        mean=nats.mean(0),
        deviations=nats - nats.mean(0),
        effect=change * tokens.sum() / change.sum(),
        tokens=tokens,
    )


def judged(
    world: World, planted: float, cases: int, seeds: int, groups: int | None = None
) -> Iterator[tuple[Difference, Difference, tuple[float, float]]]:
    """Of each case: ours, that of its first seed alone, and the unpaired interval of that seed."""
    rng = np.random.default_rng([round(planted * 1e6), seeds, groups or 0])
    for _ in track(range(cases), f"{planted:+.3f} nats, {seeds} seeds"):
        first, second, tokens = world.case(rng, planted, seeds, groups)
        ours = difference(Paired(second - first, tokens), MARGIN)
        alone = difference(Paired(second[:1] - first[:1], tokens), MARGIN)
        losses = [statistics._ratio(arm[0], tokens) for arm in (first, second)]
        half = 1.96 * math.hypot(*(each.standard_error for each in losses))
        middle = losses[1].value - losses[0].value
        yield ours, alone, (middle - half, middle + half)


def share(found: list[bool]) -> float:
    """Of those that are true."""
    return sum(found) / len(found)


def differs(found: Difference) -> bool:
    """As a contrast without others says it."""
    return found.excludes_zero and found.p < 0.05


def within(low: float, high: float, truth: float) -> bool:
    """Whether an interval holds the truth."""
    return low <= truth <= high


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--results", type=Path, default=Path("results/calibration"))
    arguments.add_argument("--cases", type=int, default=1000)
    arguments.add_argument("--resamples", type=int, default=1999)
    given = arguments.parse_args()
    statistics.RESAMPLES = given.resamples
    world = read_world(given.results)
    same = list(judged(world, 0.0, given.cases, SEEDS))
    covered = {0.0: share([within(d.low, d.high, 0.0) for d, _, _ in same])}
    naive_covered = {0.0: share([within(d.low, d.high, 0.0) for _, d, _ in same])}
    power: dict[float, float] = {}
    unpaired_power: dict[float, float] = {}
    for effect in EFFECTS:
        found = list(judged(world, effect, given.cases // 2, SEEDS))
        covered[effect] = share([within(d.low, d.high, effect) for d, _, _ in found])
        naive_covered[effect] = share([within(d.low, d.high, effect) for _, d, _ in found])
        power[effect] = share([differs(d) for d, _, _ in found])
        unpaired_power[effect] = share([not within(*span, 0.0) for _, _, span in found])
    at_margin = list(judged(world, MARGIN, given.cases // 2, SEEDS))
    promised = _promised_power(world, given.cases // 2)
    record: dict[str, Any] = {
        "command": "make calibration",
        "cases": given.cases,
        "seeds_of_an_arm": SEEDS,
        "resamples": given.resamples,
        "real_seeds": len(world.deviations),
        "groups": len(world.tokens),
        "seed_deviation": world.seed_deviation,
        "false_difference_rate": share([differs(d) for d, _, _ in same]),
        "coverage_95": mean_of(covered),
        "coverage_95_by_planted": covered,
        "tost_wrong_rate": share([d.equivalent for d, _, _ in at_margin]),
        "power_by_planted": power,
        **promised,
        "naive": {
            "one_seed_false_difference_rate": share([differs(d) for _, d, _ in same]),
            "one_seed_coverage_95": mean_of(naive_covered),
            "one_seed_tost_wrong_rate": share([d.equivalent for _, d, _ in at_margin]),
            "unpaired_power_by_planted": unpaired_power,
        },
    }
    path = given.results / "calibration.json"
    atomic_write_text(path, json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    print(path)


def mean_of(by_planted: dict[float, float]) -> float:
    """Mean over what was planted."""
    return sum(by_planted.values()) / len(by_planted)


def _promised_power(world: World, cases: int) -> dict[str, Any]:
    """Whether the rows and seeds that are said to decide do decide, with the power promised."""
    effect = EFFECTS[1]
    # What is needed follows from the true spreads, not from one lucky pilot: two seeds as far
    # apart as differences of two real ones are.
    apart = np.outer([1, -1], world.seed_deviation * world.tokens)
    sample = Paired(apart + effect * world.effect, world.tokens)
    needed = needed_for_difference(sample, len(world.tokens))
    if needed is None or needed.seeds is None:
        raise SystemExit("the planted difference needs no sample at all")
    found = judged(world, effect, cases, needed.seeds, needed.rows)
    return {
        "power_planted": effect,
        "power_seeds": needed.seeds,
        "power_groups": needed.rows,
        "power_predicted": 0.8,
        "power_measured": share([differs(d) for d, _, _ in found]),
    }


main()
