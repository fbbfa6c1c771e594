"""Calibration of the statistics: planted differences in real per-row scores.

The scores come from `recipes/calibration.yaml`: a base and sixteen seeds of one cell on 1,000 test
rows. A case resamples groups of test rows, and draws seeds whose per-row deviations have the
covariance of the real seeds. It adds to one of two arms a difference that varies over rows as the
real change from base to adapter does and, in some worlds, a row effect of mean zero, so that the
sampling of rows contributes as much variance as the seeds, or more. The results of
`inference.difference` are compared to the planted difference, and to those of common practice:
one seed with an interval over rows, one seed with unpaired losses, and seeds added after an
undecided first test.
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
"""Planted differences, nats per token."""
WORLDS = tuple((seeds, rows) for seeds in (2, 3, 5, 10) for rows in (0.0, 1.0, 3.0))
"""Seeds per arm, and ratio of the standard error over rows to that over seeds."""
FAMILY = 10
"""Comparisons in a family for the multiplicity correction."""
MAX_SEEDS = 60
"""Limit of added seeds."""


@dataclass(frozen=True)
class World:
    """Distribution of cases; arrays are per group of rows.

    Attributes:
        mean: nats, mean over the real seeds, [groups].
        deviations: nats, deviations of the real seeds from the mean, [seeds, groups].
        effect: nats that add up to a difference of one nat per token, [groups].
        row_effect: nats of sum zero, with a standard error of one nat per token, [groups].
        tokens: label tokens, [groups].
    """

    mean: Floats
    deviations: Floats
    effect: Floats
    row_effect: Floats
    tokens: Floats

    @property
    def seed_deviation(self) -> float:
        """Standard deviation of the loss between seeds, nats per token."""
        return float(self.deviations.sum(1).std(ddof=1) / self.tokens.sum())

    def case(self, rng: np.random.Generator, plan: Plan) -> tuple[Floats, Floats, Floats]:
        """Nats of two arms, [seeds, groups] each, and tokens of the drawn groups."""
        groups = rng.integers(0, len(self.tokens), plan.groups or len(self.tokens))
        planted = plan.planted * self.effect + plan.row_error * self.row_effect

        def arm() -> Floats:
            n_real = len(self.deviations)
            weights = rng.standard_normal((plan.seeds, n_real)) / math.sqrt(n_real - 1)
            nats: Floats = self.mean[groups] + weights @ self.deviations[:, groups]
            return nats

        return arm(), arm() + planted[groups], self.tokens[groups]


@dataclass(frozen=True)
class Plan:
    """Parameters of a case: planted difference in nats per token, seeds per arm, standard error of
    the row effect, and groups of test rows (unset: as many as the real ones)."""

    planted: float
    seeds: int = SEEDS
    row_error: float = 0.0
    groups: int | None = None


def read_world(results: Path) -> World:
    """The world of the runs of the calibration recipe."""
    runs = read_scored_runs(list_runs(results))
    base = [line.scores for line in runs if line.is_base]
    nats, tokens = group_sums([line.scores for line in runs if not line.is_base], METRICS["all"])
    change = group_sums(base, METRICS["all"])[0][0] - nats.mean(0)
    row_effect = change - tokens * change.sum() / tokens.sum()
    return World(
        mean=nats.mean(0),
        deviations=nats - nats.mean(0),
        effect=change * tokens.sum() / change.sum(),
        row_effect=row_effect / estimate_of_sums(row_effect, tokens).standard_error,
        tokens=tokens,
    )


def judge(
    world: World, plan: Plan, cases: int
) -> Iterator[tuple[Difference, Difference, tuple[float, float]]]:
    """Per case: difference over all seeds, over the first seed, and its unpaired interval."""
    for first, second, tokens in draw_cases(world, plan, cases):
        all_seeds = difference(Paired(second - first, tokens), MARGIN)
        one_seed = difference(Paired(second[:1] - first[:1], tokens), MARGIN)
        losses = [estimate_of_sums(arm[0], tokens) for arm in (first, second)]
        half_width = 1.96 * math.hypot(*(loss.standard_error for loss in losses))
        centre = losses[1].value - losses[0].value
        yield all_seeds, one_seed, (centre - half_width, centre + half_width)


def draw_cases(world: World, plan: Plan, cases: int) -> Iterator[tuple[Floats, Floats, Floats]]:
    """Cases of a plan, from a seed that depends on the plan alone."""
    seed = [round(plan.planted * 1e6), plan.seeds, round(plan.row_error * 1e6), plan.groups or 0]
    rng = np.random.default_rng(seed)
    for _ in track(range(cases), str(plan)):
        yield world.case(rng, plan)


def fraction(values: list[bool]) -> float:
    """Fraction of true values."""
    return sum(values) / len(values)


def is_different(result: Difference) -> bool:
    """Significance of a single comparison, without correction."""
    return result.excludes_zero and result.p < 0.05


def within(low: float, high: float, truth: float) -> bool:
    """Whether an interval contains the truth."""
    return low <= truth <= high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results/calibration"))
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=1999)
    args = parser.parse_args()
    inference.RESAMPLES = args.resamples
    world, half = read_world(args.results), args.cases // 2
    null_cases = list(judge(world, Plan(0.0), args.cases))
    coverage = {0.0: fraction([within(d.low, d.high, 0.0) for d, _, _ in null_cases])}
    naive_coverage = {0.0: fraction([within(d.low, d.high, 0.0) for _, d, _ in null_cases])}
    power: dict[float, float] = {}
    unpaired_power: dict[float, float] = {}
    for effect in EFFECTS:
        results = list(judge(world, Plan(effect), half))
        coverage[effect] = fraction([within(d.low, d.high, effect) for d, _, _ in results])
        naive_coverage[effect] = fraction([within(d.low, d.high, effect) for _, d, _ in results])
        power[effect] = fraction([is_different(d) for d, _, _ in results])
        unpaired_power[effect] = fraction([not within(*span, 0.0) for _, _, span in results])
    at_margin = list(judge(world, Plan(MARGIN), half))
    worlds = []
    for seeds, ratio in WORLDS:
        row_error = ratio * math.sqrt(2 / seeds) * world.seed_deviation
        equal = _test_equal_arms(world, Plan(0.0, seeds, row_error), args.cases)
        worlds.append({"seeds": seeds, "row_error_over_seed_error": ratio, **equal})
    sure_seeds = replace(world, deviations=np.zeros_like(world.deviations))
    record: dict[str, Any] = {
        "command": "make calibration",
        "cases": args.cases,
        "seeds_of_an_arm": SEEDS,
        "resamples": args.resamples,
        "real_seeds": len(world.deviations),
        "groups": len(world.tokens),
        "seed_deviation": world.seed_deviation,
        "false_difference_rate": fraction([is_different(d) for d, _, _ in null_cases]),
        "coverage_95": mean_of(coverage),
        "coverage_95_by_planted": coverage,
        "tost_wrong_rate": fraction([d.equivalent for d, _, _ in at_margin]),
        "power_by_planted": power,
        **_test_power(world, half),
        "worlds": worlds,
        "family_of": FAMILY,
        "false_difference_rate_in_a_family": mean_over(worlds, "families_with_a_false_difference"),
        "rows_alone": _test_equal_arms(sure_seeds, Plan(0.0, 1, 0.005), args.cases),
        "naive": {
            "one_seed_false_difference_rate": fraction([is_different(d) for _, d, _ in null_cases]),
            "one_seed_coverage_95": mean_of(naive_coverage),
            "one_seed_tost_wrong_rate": fraction([d.equivalent for _, d, _ in at_margin]),
            "unpaired_power_by_planted": unpaired_power,
            "two_seeds_then_as_many_as_would_decide_false_difference_rate": fraction(
                _test_added_seeds(world, args.cases)
            ),
        },
    }
    path = args.results / "calibration.json"
    atomic_write_text(path, json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    print(path)


def _test_equal_arms(world: World, plan: Plan, cases: int) -> dict[str, Any]:
    """False difference rates of equal arms, alone and in families, and coverage of intervals."""
    results = [
        difference(Paired(b - a, tokens), MARGIN) for a, b, tokens in draw_cases(world, plan, cases)
    ]
    starts = range(0, len(results) - FAMILY + 1, FAMILY)
    families = [results[start : start + FAMILY] for start in starts]
    return {
        "false_difference_rate": fraction([is_different(d) for d in results]),
        "coverage_95": fraction([within(d.low, d.high, 0.0) for d in results]),
        "families_with_a_false_difference": fraction([_any_differs(family) for family in families]),
    }


def _any_differs(family: Sequence[Difference]) -> bool:
    corrected = holm([member.p for member in family])
    return any(d.excludes_zero and p < 0.05 for d, p in zip(family, corrected, strict=True))


def _test_added_seeds(world: World, cases: int) -> list[bool]:
    """Significance of equal arms with two seeds, or else with the number of seeds recommended."""
    decisions = []
    for first, second, tokens in draw_cases(world, Plan(0.0, MAX_SEEDS), cases):
        seeds = 2
        pilot = Paired((second - first)[:seeds], tokens)
        if not (different := is_different(difference(pilot, MARGIN))):
            needed = needed_for_difference(pilot, len(tokens))
            assert needed is not None
            seeds = min(needed.seeds or MAX_SEEDS, MAX_SEEDS)
            different = is_different(difference(Paired((second - first)[:seeds], tokens), MARGIN))
        decisions.append(different)
    return decisions


def mean_over(records: Sequence[dict[str, Any]], key: str) -> float:
    """Mean of a key over records."""
    return float(sum(record[key] for record in records) / len(records))


def mean_of(by_planted: dict[float, float]) -> float:
    """Mean over planted differences."""
    return sum(by_planted.values()) / len(by_planted)


def _test_power(world: World, cases: int) -> dict[str, Any]:
    """Measured power with the recommended rows and seeds, beside the promised power."""
    effect = EFFECTS[1]
    # The recommendation uses the true variances, not a random pilot: two seeds whose spread is
    # that of real differences.
    spread = np.outer([1, -1], world.seed_deviation * world.tokens)
    sample = Paired(spread + effect * world.effect, world.tokens)
    needed = needed_for_difference(sample, len(world.tokens))
    if needed is None or needed.seeds is None:
        raise SystemExit("the planted difference needs no sample at all")
    plan = Plan(effect, needed.seeds, groups=needed.rows)
    results = judge(world, plan, cases)
    return {
        "power_planted": effect,
        "power_seeds": needed.seeds,
        "power_groups": needed.rows,
        "power_predicted": 0.8,
        "power_measured": fraction([is_different(d) for d, _, _ in results]),
    }


main()
