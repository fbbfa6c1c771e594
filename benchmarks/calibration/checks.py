"""Checks of the statistics on planted truths: a promise, and the rate that was measured."""

from __future__ import annotations

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
    half_width,
    holm,
    interval,
    p_below,
    p_value,
)
from slm_lora.stats.power import Needed, needed

NONE = "–"
"""Of lines that show another way, or a limit."""
MARGIN = 0.01
GROUPS = (10, 20, 30, 78, 210)


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        name: of what was tested.
        promise: rate that the report promises, as text; `NONE` for what it does not promise.
        measured: the rate, or several of them over conditions.
        cases: simulated cases of each rate.
        low, high: bounds that the rates must keep; None: no bound.
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


def share(found: Iterable[bool]) -> float:
    """Of those that are true."""
    values = list(found)
    return sum(values) / len(values)


def covers(found: Difference, truth: float) -> bool:
    """Whether the 95 % interval holds the truth."""
    return found.low <= truth <= found.high


def differences(world: World, plan: Plan, count: int) -> list[Difference]:
    """What the program finds in the cases of a plan."""
    return [
        difference(Paired(case.nats, case.tokens), MARGIN) for case in cases(world, plan, count)
    ]


def several_seeds(world: World, count: int) -> list[Check]:
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
            tuple(share(d.p < 0.05 for d in found) for found in equal),
            count,
            high=0.07,
        ),
        Check(
            "equal settings called different, where both settings share 50 or 95 % of a seed's "
            "deviation",
            "5 %",
            tuple(share(d.p < 0.05 for d in found) for found in paired),
            count,
            high=0.07,
        ),
        Check(
            "planted differences of 0.005, 0.01 and 0.02 nats within the 95 % interval, 3 seeds",
            "95 %",
            tuple(map(share, planted)),
            count,
            low=0.93,
        ),
        Check(
            "equivalence declared at a true difference of the margin, 2 to 10 seeds",
            "5 %",
            tuple(share(d.p_equivalence < 0.05 for d in found) for found in at_margin),
            count,
            high=0.06,
        ),
    ]


def few_groups(world: World, count: int) -> list[Check]:
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
        of_pairs: list[float] = []
        for name, nats in values.items():
            truth = nats.sum() / world.tokens.sum()
            hits = []
            for _ in range(count):
                rows = rng.integers(0, len(world.tokens), groups)
                found = clustered(nats[rows], world.tokens[rows])
                half = stats.t.isf(0.025, found.freedom) * found.standard_error
                hits.append(abs(found.value - truth) <= half)
            (losses if name == "losses" else of_pairs).append(share(hits))
        pairs.append(of_pairs)
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


def draws_and_seeds(world: World, count: int) -> list[Check]:
    """Three seeds on each of three draws of training rows, equal settings."""
    draws = [Draw(seed, data) for data in range(3) for seed in range(3)]
    rates, as_nine = [], []
    for of_draw in (1.0, 0.5, 0.0):
        rng = np.random.default_rng(round(10 * of_draw))
        ours, naive = [], []
        for _ in range(count):
            rows = rng.integers(0, len(world.tokens), len(world.tokens))
            data = math.sqrt(of_draw) * world.noise(rng, 3, rows)
            seeds = math.sqrt(1 - of_draw) * world.noise(rng, 3, rows)
            own = 0.2 * world.noise(rng, 9, rows)
            nats = np.stack(
                [
                    data[draw.data_seed] + seeds[draw.seed] + noise
                    for draw, noise in zip(draws, own, strict=True)
                ]
            )
            ours.append(p_value(paired_of_sums(nats, world.tokens[rows], draws)) < 0.05)
            naive.append(p_value(Paired(nats, world.tokens[rows])) < 0.05)
        rates.append(share(ours))
        as_nine.append(share(naive))
    return [
        Check(
            "equal settings called different, three draws of training rows with three seeds each, "
            "the chance in draws, in both, in seeds",
            "5 %",
            tuple(rates),
            count,
            high=0.06,
        ),
        Check("the same, counted as nine seeds", NONE, tuple(as_nine), count),
    ]


def families(world: World, count: int) -> list[Check]:
    """Comparisons that are corrected together, and share their runs."""
    rng = np.random.default_rng(7)
    size, seeds = 10, 3
    false: dict[str, list[bool]] = {"base": [], "neighbours": [], "margin": [], "mixed": []}
    plain_margin = []
    row_error = math.sqrt(2 / seeds) * world.seed_deviation
    shift = world.tokens / world.tokens.sum() * world.tokens.sum() * MARGIN
    for _ in range(count):
        rows = rng.integers(0, len(world.tokens), len(world.tokens))
        tokens = world.tokens[rows]
        arms = [world.noise(rng, seeds, rows) for _ in range(size + 1)]
        against_base = [arm + row_error * world.unlike[rows] for arm in arms[1:]]
        neighbours = [after - before for before, after in itertools.pairwise(arms)]
        for name, family in (("base", against_base), ("neighbours", neighbours)):
            ps = holm([p_value(Paired(nats, tokens)) for nats in family])
            false[name].append(min(ps) < 0.05)
        found = [difference(Paired(nats + shift[rows], tokens), MARGIN) for nats in neighbours]
        equivalences = [d.p_equivalence for d in found]
        plain_margin.append(min(equivalences) < 0.05)
        false["margin"].append(min(holm(equivalences)) < 0.05)
        half = size // 2
        mixed = [difference(Paired(nats, tokens), MARGIN) for nats in neighbours[:half]]
        mixed += found[half:]
        different = holm([d.p for d in mixed])[:half]
        equivalent = holm([d.p_equivalence for d in mixed])[half:]
        false["mixed"].append(min(different) < 0.05 or min(equivalent) < 0.05)
    return [
        Check(
            "families of ten equal settings against one base with a false difference", "5 %",
            (share(false["base"]),), count, high=0.06,
        ),
        Check(
            "families of ten equal neighbours with a false difference", "5 %",
            (share(false["neighbours"]),), count, high=0.06,
        ),
        Check(
            "families of ten at the margin with a false equivalence", "5 %",
            (share(false["margin"]),), count, high=0.06,
        ),
        Check("the same, not corrected", NONE, (share(plain_margin),), count),
        Check(
            "families of five equal and five at the margin with any false verdict",
            "10 % (5 % of either kind)", (share(false["mixed"]),), count, high=0.1,
        ),
    ]  # fmt: skip


def large_family(world: World, count: int) -> list[Check]:
    """A difference of 0.05 nats among five hundred comparisons, and equal ones."""
    found = [d.p for d in differences(world, Plan(0.05, 10), count)]
    equal = [
        [d.p for d in differences(world, Plan(0.0, 10, 0.5, None, index / 1e4), 500)]
        for index in range(max(count // 25, 1))
    ]
    return [
        Check(
            "a difference of 0.05 nats found by 10 seeds among 500 comparisons", NONE,
            (share(500 * p < 0.05 for p in found),), count, low=0.9,
        ),
        Check(
            "families of 500 equal comparisons with a false difference", "5 %",
            (share(min(holm(ps)) < 0.05 for ps in equal),), len(equal), high=0.15,
        ),
    ]  # fmt: skip


def prediction(world: World, count: int) -> list[Check]:
    """Whether one more seed's difference, on the same rows, lies in its interval."""
    rates, in_mean = [], []
    for seeds in (2, 3, 5, 10):
        hits, mean_hits = [], []
        for case in cases(world, Plan(0.005, seeds + 1, 1.0), count):
            found = difference(Paired(case.nats[:seeds], case.tokens), MARGIN)
            following = float(case.nats[seeds].sum() / case.tokens.sum())
            assert found.next_low is not None
            assert found.next_high is not None
            hits.append(found.next_low <= following <= found.next_high)
            mean_hits.append(covers(found, following))
        rates.append(share(hits))
        in_mean.append(share(mean_hits))
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


def power(world: World, count: int) -> list[Check]:
    """Whether plans from pilots have the power that they promise."""
    held = []
    for seeds in (2, 3, 5):
        truth = _Truth(
            math.sqrt(2) * world.seed_deviation,
            math.sqrt(2 / seeds) * world.seed_deviation,
            len(world.tokens),
        )
        kept = []
        for case in cases(world, Plan(0.0, seeds, 1.0), count):
            plan = needed(Paired(case.nats, case.tokens), truth.rows, MARGIN)
            kept.append(plan is None or truth.power(plan) >= 0.8)
        held.append(share(kept))
    return [
        Check(
            "plans from pilots of 2, 3 and 5 seeds that have at least their 80 % power", "75 %",
            tuple(held), count, low=0.75,
        )
    ]  # fmt: skip


@dataclass(frozen=True)
class _Truth:
    """The deviation of a difference between seeds, its error over so many rows."""

    seed_deviation: float
    row_error: float
    rows: int

    def power(self, plan: Needed) -> float:
        """The lesser chance, with normal errors: to show a difference of the margin, or
        equivalence where there is none."""
        seeds = plan.seeds
        assert seeds is not None
        rng = np.random.default_rng(0)
        draws = 4_000
        error = self.row_error * math.sqrt(self.rows / plan.rows)
        spread = self.seed_deviation / math.sqrt(seeds)
        seen = spread * np.sqrt(rng.chisquare(seeds - 1, draws) / (seeds - 1))
        value = math.hypot(error, spread) * rng.standard_normal(draws)
        both = np.hypot(error, seen)
        freedom = both**4 / (seen**4 / (seeds - 1) + error**4 / plan.rows)

        def p(distance: Floats) -> Floats:
            return np.maximum(
                stats.t.sf(distance / seen, seeds - 1), stats.t.sf(distance / both, freedom)
            )

        different = (2 * p(np.abs(value + MARGIN)) < 0.05).mean()
        equivalent = (p(MARGIN - np.abs(value)) < 0.05).mean()
        return float(min(different, equivalent))


def selection(world: World, count: int) -> list[Check]:
    """Twelve equal settings: whether the best set holds a given one, and the chosen one's gain."""
    rng = np.random.default_rng(11)
    size, seeds = 12, 3
    kept, corrected, plain = [], [], []
    for _ in range(count):
        rows = rng.integers(0, len(world.tokens), len(world.tokens))
        tokens = world.tokens[rows]
        base, *arms = (world.noise(rng, seeds, rows) for _ in range(size + 1))
        against = [Paired(arms[0] - other, tokens) for other in arms[1:]]
        kept.append(not any(p_below(s, s.value) < 0.05 / (size - 1) for s in against))
        lowest = min(arms, key=lambda arm: float(arm.sum()))
        sample = Paired(lowest - base, tokens)
        half = half_width(sample, 0.025 / size)
        corrected.append(abs(sample.value) <= half)
        low, high = interval(sample, 0.95)
        plain.append(low <= 0 <= high)
    return [
        Check(
            "a setting as good as the best of twelve is in the best set", "95 %",
            (share(kept),), count, low=0.95,
        ),
        Check(
            "gain of the lowest of twelve equal settings within its corrected interval", "95 %",
            (share(corrected),), count, low=0.95,
        ),
        Check("the same within the interval of one comparison", NONE, (share(plain),), count),
    ]  # fmt: skip


def rare_failures(world: World, count: int) -> list[Check]:
    """One seed in ten fails by 0.3 nats, the others gain 0.01: the mean is 0.02 worse."""
    rng = np.random.default_rng(13)
    claims: dict[int, list[float]] = {seeds: [0, 0] for seeds in (3, 10)}
    for seeds in claims:
        for case in cases(world, Plan(-0.01, seeds, 0.0, None, 0.9), count):
            failed = rng.random(seeds) < 0.1
            nats = case.nats + 0.3 * failed[:, None] * case.tokens
            found = difference(Paired(nats, case.tokens), MARGIN)
            claims[seeds][0] += bool(found.p < 0.05 and found.value < 0)
            claims[seeds][1] += bool(1 - 0.05 ** (1 / seeds) >= 0.1 or failed.any())
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
            "the share of failing seeds below the stated bound (63 % for 3 seeds, 26 % for 10)",
            "95 %",
            tuple(bounded / count for _, bounded in claims.values()),
            count,
            low=0.95,
        )
    ]


def ways_not_taken(world: World, count: int) -> list[Check]:
    """Usual ways, on the same cases."""
    alone, unpaired, added = [], [], []
    for case in cases(world, Plan(0.0), count):
        alone.append(p_value(Paired(case.nats[:1], case.tokens)) < 0.05)
    for case in cases(world, Plan(0.02), count):
        losses = [clustered(arm[0], case.tokens) for arm in (case.first, case.second)]
        half = 1.96 * math.hypot(*(loss.standard_error for loss in losses))
        unpaired.append(abs(losses[1].value - losses[0].value) > half)
    most = 60
    for case in cases(world, Plan(0.0, most), count):
        p = p_value(Paired(case.nats[:2], case.tokens))
        for seeds in range(3, 11):
            if p < 0.05:
                break
            p = p_value(Paired(case.nats[:seeds], case.tokens))
        added.append(p < 0.05)
    return [
        Check(
            "equal settings called different from one seed and an interval over rows", NONE,
            (share(alone),), count,
        ),
        Check(
            "0.02 nats found by two losses of one seed compared as if on different rows", NONE,
            (share(unpaired),), count,
        ),
        Check(
            "equal settings called different where seeds are added to two, one by one up to ten, "
            "until they differ",
            NONE,
            (share(added),),
            count,
        ),
    ]  # fmt: skip


CHECKS: Sequence[Callable[[World, int], list[Check]]] = (
    several_seeds, few_groups, draws_and_seeds, families, large_family, prediction, power,
    selection, rare_failures, ways_not_taken,
)  # fmt: skip
