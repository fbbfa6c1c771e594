"""Sizes of an experiment that fit a time budget: rows, epochs, seeds, number of tuning runs.

Every tuning run is counted to its end and every step of the search as needed; what a race stops is
the reserve of the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from slm_lora.data.splits import TRAINING_SHARE, training_rows_for

RATES = (2e-4, 1e-3, 5e-3)
"""Learning rates to try first. 2e-4 is the usual one of examples and papers; LoRA's own optimum is
about ten times that of full fine-tuning ("LoRA Without Regret", 2025)."""
USUAL_RATE = RATES[0]

RANKS = (4, 16)
"""A factor of four: two doublings differ by more than one, and a smaller rank that is equivalent is
the cheaper adapter."""

BATCH = 8
"""Examples per step: of the same tokens twice the steps of the default, as a budget buys few."""

MAX_EPOCHS = 3
FULL_STEPS, LEAST_STEPS = 40, 12
"""Steps of a training below which a smaller search is taken, and below which none fits."""

SCORING_SHARE = 0.35
"""Largest share of the budget that scores held-out rows."""
LEAST_TEST_ROWS, LEAST_VALIDATION_ROWS = 50, 30

STARTUP_SECONDS, RUN_SECONDS = 30.0, 2.0
"""Reading rows, model and report, once; attaching, saving and recording an adapter, per run."""


@dataclass(frozen=True, slots=True)
class Search:
    """How much is searched, and how often the result is repeated.

    Attributes:
        extend: of the recipe's ``tuning``.
        refine: likewise.
        seeds: final runs of each rank.
    """

    extend: int
    refine: int
    seeds: int

    @property
    def tuning_runs(self) -> int:
        """Most tuning runs of all ranks: an extension adds one point, a refinement two."""
        return len(RANKS) * (len(RATES) + self.extend + 2 * self.refine)

    @property
    def final_runs(self) -> int:
        """Final runs of all ranks."""
        return len(RANKS) * self.seeds


SEARCHES = (Search(2, 1, 3), Search(1, 1, 1), Search(1, 0, 1))
"""From the one that answers most to the cheapest."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds per token of training and scoring, and of compiling per run."""

    training: float
    scoring: float
    compiling: float = 0.0


@dataclass(frozen=True, slots=True)
class Material:
    """What can be trained on.

    Attributes:
        rows: of the data set, without exact duplicates.
        tokens_per_row: mean, after the limit of length.
        sizes_near: test and validation rows that can be drawn, near wanted ones.
    """

    rows: int
    tokens_per_row: float
    sizes_near: Callable[[int, int], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of an experiment, and its cost.

    Attributes:
        search: how much is tried.
        test_rows: of the test set.
        validation_rows: of the validation set.
        size: ``data.size``; None: all rows left.
        training_rows: of each training.
        epochs: passes over them.
        seconds: of the whole experiment if no tuning run is stopped early.
    """

    search: Search
    test_rows: int
    validation_rows: int
    size: int | None
    training_rows: int
    epochs: float
    seconds: float

    @property
    def steps(self) -> int:
        """Optimizer steps of a training."""
        return math.ceil(self.epochs * math.ceil(self.training_rows / BATCH))


def held_out_rows(rows: int) -> tuple[int, int]:
    """Test and validation rows: a tenth and a twentieth of many rows, more of few.

    Of few rows a fifth and three twentieths, up to 200 and 120: a budget rarely trains on all of
    them, and 120 validation rows tell rates apart that differ by about 0.013 nats
    (`experiment.choice`).
    """
    test = min(1000, max(rows // 10, min(rows // 5, 200)))
    validation = min(300, max(rows // 20, min(3 * rows // 20, 120)))
    return max(1, test), max(1, validation)


def fit(budget: float, material: Material, speed: Speed) -> Sizes | None:
    """The sizes that use a budget best; None where none fits.

    Args:
        budget: seconds.
        material: the rows.
        speed: of this machine on this model.
    """
    fitting = [
        sizes for search in SEARCHES if (sizes := _fit(search, budget, material, speed)) is not None
    ]
    for sizes in fitting:
        if _is_enough(sizes, FULL_STEPS):
            return sizes
    return fitting[-1] if fitting else None


def least_budget(material: Material, speed: Speed, search: Search = SEARCHES[-1]) -> float:
    """Seconds of the smallest experiment of a search, rounded up to minutes."""
    low, high = 0.0, 60.0
    while _fit(search, high, material, speed) is None:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) / 2
        if _fit(search, middle, material, speed) is None:
            low = middle
        else:
            high = middle
    return 60.0 * math.ceil(high / 60)


def _is_enough(sizes: Sizes, steps: int) -> bool:
    return sizes.steps >= steps or sizes.epochs == MAX_EPOCHS


def _fit(search: Search, budget: float, material: Material, speed: Speed) -> Sizes | None:
    runs = search.tuning_runs + search.final_runs
    left = budget - STARTUP_SECONDS - runs * (RUN_SECONDS + speed.compiling)
    test, validation = material.sizes_near(*_affordable(search, left, material, speed))
    pool = material.rows - test - validation
    scoring = material.tokens_per_row * speed.scoring * _scored_rows(search, test, validation)
    row_seconds = material.tokens_per_row * speed.training
    passes = math.floor((left - scoring) / runs / row_seconds)
    if passes < 1 or pool < 1:
        return None
    epochs, size = 1.0, None  # type: float, int | None
    if passes >= pool:
        epochs = min(float(MAX_EPOCHS), passes * 2 // pool / 2)
        rows = pool
    else:
        size = math.floor(passes / TRAINING_SHARE)
        rows = training_rows_for(size)
    if size is not None and size < 2:
        return None
    seconds = budget - left + scoring + runs * epochs * rows * row_seconds
    sizes = Sizes(search, test, validation, size, rows, epochs, seconds)
    return sizes if _is_enough(sizes, LEAST_STEPS) else None


def _affordable(
    search: Search, seconds: float, material: Material, speed: Speed
) -> tuple[int, int]:
    """Wanted test and validation rows, fewer where scoring them would take too much."""
    wanted = held_out_rows(material.rows)
    rows_cost = material.tokens_per_row * speed.scoring * _scored_rows(search, *wanted)
    share = min(1.0, max(0.0, SCORING_SHARE * seconds / rows_cost))
    least = (LEAST_TEST_ROWS, LEAST_VALIDATION_ROWS)
    test, validation = (
        max(min(most, floor), math.floor(share * most))
        for most, floor in zip(wanted, least, strict=True)
    )
    return test, validation


def _scored_rows(search: Search, test: int, validation: int) -> int:
    """Rows scored by all runs and the base."""
    return (search.final_runs + 1) * test + (search.tuning_runs + 1) * validation
