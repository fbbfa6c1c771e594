"""Do the statistics tell the truth? Planted differences over real per-row scores.

The scores are those of `recipes/calibration.yaml`: a base and sixteen seeds of one cell on 1,000
test rows. A case draws test rows from the real ones, by group, and seeds whose deviations, row by
row, have the covariance of the sixteen real seeds; to one of two arms it adds a difference that
varies over rows as the real change from base to adapter does and, in some worlds, one that varies
like it and is nothing on average: there the choice of rows is as chancy as that of seeds, or more.
What `statistics.difference` says is compared with what was planted, beside what usual ways would
say: one seed with an interval over rows, one seed with two losses compared as if on different
rows, and seeds added to what was not decided at first.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from slm_lora.runs.folder import list_runs
from slm_lora.runs.metrics import METRICS
from slm_lora.runs.scored_run import read_scored_runs
from slm_lora.runtime.storage import atomic_write_text
from slm_lora.stats import inference
from slm_lora.stats.estimates import Floats, Paired, estimate_of_sums, group_sums
from slm_lora.stats.inference import Difference, difference, holm
from slm_lora.stats.power import needed_for_difference

MARGIN, SEEDS = 0.01, 3
EFFECTS = (0.005, 0.01, 0.02)
"""Planted differences, nats a token."""
WORLDS = tuple((seeds, rows) for seeds in (2, 3, 5, 10) for rows in (0.0, 1.0, 3.0))
"""Seeds of an arm, and by how much the error of a difference over rows is that over seeds."""
FAMILY = 10
"""Comparisons that are corrected together."""
MOST_SEEDS = 60
"""Nobody adds more than these."""


@dataclass(frozen=True)
class World:
    """What cases are drawn from.

    Attributes:
        mean: nats of every group, mean over the real seeds.
        deviations: of the real seeds from it, [seeds, groups].
        effect: nats of every group that make a difference of one nat a token.
        unlike: nats of every group that are none in sum, of a standard error of one nat a token.
        tokens: label tokens of every group.
    """

    mean: Floats
    deviations: Floats
    effect: Floats
    unlike: Floats
    tokens: Floats

    @property
    def seed_deviation(self) -> float:
        """Standard deviation of the loss between seeds, nats a token."""
        return float(self.deviations.sum(1).std(ddof=1) / self.tokens.sum())

    def case(self, rng: np.random.Generator, plan: Plan) -> tuple[Floats, Floats, Floats]:
        """Nats of two arms, [seeds, groups] each, and tokens of the drawn groups."""
        drawn = rng.integers(0, len(self.tokens), plan.groups or len(self.tokens))
        change = plan.planted * self.effect + plan.row_error * self.unlike

        def arm() -> Floats:
            real = len(self.deviations)
            weights = rng.standard_normal((plan.seeds, real)) / math.sqrt(real - 1)
            found: Floats = self.mean[drawn] + weights @ self.deviations[:, drawn]
            return found

        return arm(), arm() + change[drawn], self.tokens[drawn]


@dataclass(frozen=True)
class Plan:
    """What a case is to be: nats a token that are planted, seeds of an arm, standard error by
    rows that are unlike, and groups of test rows (unset: as many as are real)."""

    planted: float
    seeds: int = SEEDS
    row_error: float = 0.0
    groups: int | None = None


def read_world(results: Path) -> World:
    """From the runs of the calibration recipe."""
    lines = read_scored_runs(list_runs(results))
    base = [line.scores for line in lines if line.is_base]
    nats, tokens = group_sums([line.scores for line in lines if not line.is_base], METRICS["all"])
    change = group_sums(base, METRICS["all"])[0][0] - nats.mean(0)
    unlike = change - tokens * change.sum() / tokens.sum()
    return World(
        mean=nats.mean(0),
        deviations=nats - nats.mean(0),
        effect=change * tokens.sum() / change.sum(),
        unlike=unlike / estimate_of_sums(unlike, tokens).standard_error,
        tokens=tokens,
    )


def judged(
    world: World, plan: Plan, cases: int
) -> Iterator[tuple[Difference, Difference, tuple[float, float]]]:
    """Of each case: ours, that of its first seed alone, and the unpaired interval of that seed."""
    for first, second, tokens in drawn(world, plan, cases):
        ours = difference(Paired(second - first, tokens), MARGIN)
        alone = difference(Paired(second[:1] - first[:1], tokens), MARGIN)
        losses = [estimate_of_sums(arm[0], tokens) for arm in (first, second)]
        half = 1.96 * math.hypot(*(each.standard_error for each in losses))
        middle = losses[1].value - losses[0].value
        yield ours, alone, (middle - half, middle + half)


def drawn(world: World, plan: Plan, cases: int) -> Iterator[tuple[Floats, Floats, Floats]]:
    """Cases of a plan, the same whenever it is the same."""
    seed = [round(plan.planted * 1e6), plan.seeds, round(plan.row_error * 1e6), plan.groups or 0]
    rng = np.random.default_rng(seed)
    for _ in track(range(cases), str(plan)):
        yield world.case(rng, plan)


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
    inference.RESAMPLES = given.resamples
    world, half = read_world(given.results), given.cases // 2
    same = list(judged(world, Plan(0.0), given.cases))
    covered = {0.0: share([within(d.low, d.high, 0.0) for d, _, _ in same])}
    naive_covered = {0.0: share([within(d.low, d.high, 0.0) for _, d, _ in same])}
    power: dict[float, float] = {}
    unpaired_power: dict[float, float] = {}
    for effect in EFFECTS:
        found = list(judged(world, Plan(effect), half))
        covered[effect] = share([within(d.low, d.high, effect) for d, _, _ in found])
        naive_covered[effect] = share([within(d.low, d.high, effect) for _, d, _ in found])
        power[effect] = share([differs(d) for d, _, _ in found])
        unpaired_power[effect] = share([not within(*span, 0.0) for _, _, span in found])
    at_margin = list(judged(world, Plan(MARGIN), half))
    worlds = []
    for seeds, ratio in WORLDS:
        row_error = ratio * math.sqrt(2 / seeds) * world.seed_deviation
        equal = _equal_arms(world, Plan(0.0, seeds, row_error), given.cases)
        worlds.append({"seeds": seeds, "row_error_over_seed_error": ratio, **equal})
    sure_seeds = replace(world, deviations=np.zeros_like(world.deviations))
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
        **_promised_power(world, half),
        "worlds": worlds,
        "family_of": FAMILY,
        "false_difference_rate_in_a_family": share_of(worlds, "families_with_a_false_difference"),
        "rows_alone": _equal_arms(sure_seeds, Plan(0.0, 1, 0.005), given.cases),
        "naive": {
            "one_seed_false_difference_rate": share([differs(d) for _, d, _ in same]),
            "one_seed_coverage_95": mean_of(naive_covered),
            "one_seed_tost_wrong_rate": share([d.equivalent for _, d, _ in at_margin]),
            "unpaired_power_by_planted": unpaired_power,
            "two_seeds_then_as_many_as_would_decide_false_difference_rate": share(
                _added_seeds(world, given.cases)
            ),
        },
    }
    path = given.results / "calibration.json"
    atomic_write_text(path, json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    print(path)


def _equal_arms(world: World, plan: Plan, cases: int) -> dict[str, Any]:
    """How often equal arms are called different, alone and in families, and intervals hold 0."""
    found = [
        difference(Paired(b - a, tokens), MARGIN) for a, b, tokens in drawn(world, plan, cases)
    ]
    families = [found[at : at + FAMILY] for at in range(0, len(found) - FAMILY + 1, FAMILY)]
    return {
        "false_difference_rate": share([differs(d) for d in found]),
        "coverage_95": share([within(d.low, d.high, 0.0) for d in found]),
        "families_with_a_false_difference": share([_any_differs(each) for each in families]),
    }


def _any_differs(family: Sequence[Difference]) -> bool:
    corrected = holm([each.p for each in family])
    return any(d.excludes_zero and p < 0.05 for d, p in zip(family, corrected, strict=True))


def _added_seeds(world: World, cases: int) -> list[bool]:
    """Two seeds of equal arms and, where these do not differ, as many as are said to decide."""
    found = []
    for first, second, tokens in drawn(world, Plan(0.0, MOST_SEEDS), cases):
        seeds = 2
        pilot = Paired((second - first)[:seeds], tokens)
        if not (different := differs(difference(pilot, MARGIN))):
            needed = needed_for_difference(pilot, len(tokens))
            assert needed is not None
            seeds = min(needed.seeds or MOST_SEEDS, MOST_SEEDS)
            different = differs(difference(Paired((second - first)[:seeds], tokens), MARGIN))
        found.append(different)
    return found


def share_of(records: Sequence[dict[str, Any]], key: str) -> float:
    """Mean of what all say."""
    return float(sum(each[key] for each in records) / len(records))


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
    plan = Plan(effect, needed.seeds, groups=needed.rows)
    found = judged(world, plan, cases)
    return {
        "power_planted": effect,
        "power_seeds": needed.seeds,
        "power_groups": needed.rows,
        "power_predicted": 0.8,
        "power_measured": share([differs(d) for d, _, _ in found]),
    }


main()
