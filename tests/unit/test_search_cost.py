"""Least and most of a search, against a search written anew and run on random losses."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from slm_lora.config.axes import TuningSection
from slm_lora.stats.search_cost import cost_range
from slm_lora.stats.tuning import progress


def section(values: list[float], **keys: object) -> TuningSection:
    return TuningSection.model_validate({"values": values, **keys})


def losses(seed: int) -> Callable[[float], float]:
    """A function of one value: every new loss is far or hardly below or above those before it."""
    rng = random.Random(seed)
    known: dict[float, float] = {}

    def loss(value: float) -> float:
        if value not in known:
            lowest = min(known.values(), default=2.0)
            known[value] = lowest + rng.choice((-0.3, -1e-6, 1e-6, 0.3, 0.3))
        return known[value]

    return loss


def tried(
    loss: Callable[[float], float], values: list[float], extend: int, refine: int, race: bool
) -> set[float]:
    """The rule of docs/recipe.md for one key: the values; one beyond an end where the lowest is, as
    often as extend says; geometric means around the lowest, as often as refine says; in a race not
    where the parabola through three points is less than 0.001 below the middle one."""
    known = {value: loss(value) for value in sorted(values, reverse=True)}

    def two_digits(value: float) -> float:
        return float(f"{value:.2g}")

    def around() -> tuple[float, list[float]]:
        lowest = min(known, key=lambda value: (known[value], value))
        line = sorted(known)
        place = line.index(lowest)
        return lowest, line[max(0, place - 1) : place] + line[place + 1 : place + 2]

    for _ in range(extend):
        lowest, neighbours = around()
        if len(neighbours) == 2:
            break
        beyond = two_digits(lowest * lowest / neighbours[0])
        known[beyond] = loss(beyond)
    for _ in range(refine):
        lowest, neighbours = around()
        if race and len(neighbours) == 2:
            x = [math.log(value / lowest) for value in neighbours]
            y = [known[value] - known[lowest] for value in neighbours]
            # a x² + b x through both; its lowest point is at -b / 2a.
            a = (y[0] / x[0] - y[1] / x[1]) / (x[0] - x[1])
            b = y[0] / x[0] - a * x[0]
            if a <= 0 or b * b / (4 * a) < 0.001:
                continue
        means = [two_digits(math.sqrt(lowest * other)) for other in neighbours]
        for mean in sorted(means, reverse=True):
            known.setdefault(mean, loss(mean))
    return set(known)


GRIDS = (
    ([2e-4, 1e-3, 5e-3], 2, 2),
    ([2e-4, 1e-3], 1, 2),
    ([1e-4, 1e-3, 1e-2, 1e-1], 1, 1),
    ([1e-3, 1.1e-3, 1.2e-3], 0, 3),  # two digits: nothing is left between
    ([1e-3, 2e-3, 3e-3], 2, 0),
)


@pytest.mark.parametrize("race", [True, False])
@pytest.mark.parametrize(("values", "extend", "refine"), GRIDS)
def test_range_is_that_of_all_losses(
    values: list[float], extend: int, refine: int, race: bool
) -> None:
    tuning = section(values, extend=extend, refine=refine, race=race)
    counts = {len(tried(losses(seed), values, extend, refine, race)) for seed in range(4000)}
    assert cost_range(tuning, {}, lambda point: 1) == (min(counts), max(counts))


@pytest.mark.parametrize("race", [True, False])
def test_range_narrows_to_what_is_left(race: bool) -> None:
    """From every state of a search the range holds its end, and never widens."""
    tuning = section([2e-4, 1e-3, 5e-3], race=race)
    for seed in range(40):
        loss = losses(seed)
        end = len(tried(loss, [2e-4, 1e-3, 5e-3], 2, 2, race))
        outcomes: dict[tuple[float, ...], float] = {}
        earlier = (0.0, math.inf)
        while missing := progress(tuning, outcomes).missing:
            least, most = (len(outcomes) + n for n in cost_range(tuning, outcomes, lambda _: 1))
            assert earlier[0] <= least <= end <= most <= earlier[1]
            earlier = least, most
            outcomes |= {point: loss(point[0]) for point in missing}
        assert cost_range(tuning, outcomes, lambda _: 1) == (0, 0)
        assert len(outcomes) == end


def test_cost_follows_the_values() -> None:
    """Epochs cost what they are: 1, 2 and 4 for certain; with the lowest at 4, 8 follow."""
    tuning = TuningSection.model_validate(
        {"key": "training.num_train_epochs", "values": [1, 2, 4], "extend": 1, "refine": 0}
    )
    assert cost_range(tuning, {}, lambda point: point[0]) == (7, 15)
    # Beyond the limit of a key nothing is tried.
    assert cost_range(tuning, {}, lambda point: point[0], lambda point: 1 <= point[0] < 5) == (7, 7)


def test_several_keys() -> None:
    """Nine combinations; the lowest in a corner has two ends."""
    tuning = TuningSection.model_validate(
        {
            "key": ["training.learning_rate", "training.num_train_epochs"],
            "values": [[1e-4, 1e-3, 1e-2], [1, 2, 4]],
            "extend": 1,
            "refine": 0,
        }
    )
    assert cost_range(tuning, {}, lambda point: 1) == (9, 11)


def test_a_search_of_too_many_courses_has_bounds() -> None:
    tuning = TuningSection.model_validate(
        {
            "key": ["training.learning_rate", "training.weight_decay", "adapter.lora_alpha"],
            "values": [[1e-5, 1e-3, 1e-1]] * 3,
            "extend": 3,
            "refine": 5,
        }
    )
    least, most = cost_range(tuning, {}, lambda point: 1)
    assert least >= 27 and most <= 27 + 3 * 3 + 5 * 6
