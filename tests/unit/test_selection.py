"""Choosing among settings: the best set, equivalence to the lowest, corrected gains."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from slm_lora.errors import UsageError
from slm_lora.records import RowScore
from slm_lora.report.names import SettingNames
from slm_lora.runs.scored_run import ScoredRun
from slm_lora.stats.selection import (
    best_set,
    equivalent_to,
    lowest_of,
    pareto_set,
    selected_interval,
)
from slm_lora.stats.settings import Setting, group_settings

from ..support.runs import scored_run


def setting(rank: int, losses: np.ndarray) -> Setting:
    """A setting of one run with a loss per row, [rows]."""
    run = scored_run(f"r{rank}", 2.0, adapter__r=rank)
    scores = tuple(
        RowScore(f"{i:03d}", f"{i:03d}", "", "test", 10 * loss, 10, 1, 0.0, 10, 1)
        for i, loss in enumerate(losses)
    )
    return Setting((replace(run, scores=scores),))


def settings_of(rng: np.random.Generator, means: list[float], spread: float) -> list[Setting]:
    rows = rng.normal(0, 0.3, 60)
    return [
        setting(2 + index, mean + rows + spread * rng.standard_normal(60))
        for index, mean in enumerate(means)
    ]


def test_truly_best_setting_is_in_the_best_set() -> None:
    rng = np.random.default_rng(0)
    missed = kept_bad = 0
    for _ in range(200):
        settings = settings_of(rng, [2.0, 2.0, 2.0, 2.0, 2.2], 0.1)
        best = best_set(settings)
        missed += settings[0] not in best  # one of four equal ones
        kept_bad += settings[4] in best
    assert missed / 200 <= 0.05
    assert kept_bad == 0


def test_selected_interval_covers_the_gain_of_the_best_of_equal_settings() -> None:
    """The lowest of twelve equal settings looks better than it is; its corrected interval holds."""
    rng = np.random.default_rng(1)
    corrected = plain = 0
    for _ in range(200):
        base, *settings = settings_of(rng, [2.0] * 13, 0.1)
        lowest = min(settings, key=lambda each: each.estimate().value)
        low, high = selected_interval(base, lowest, 12)
        corrected += low <= 0 <= high
        low, high = selected_interval(base, lowest, 1)
        plain += low <= 0 <= high
    assert corrected / 200 >= 0.93
    assert plain / 200 < 0.9


def test_equivalence_to_the_lowest_is_corrected_for_candidates() -> None:
    settings = settings_of(np.random.default_rng(2), [2.0, 2.0], 0.02)
    margins = [
        next(m for m in np.arange(0.001, 0.1, 0.001) if equivalent_to(*settings, m, candidates))
        for candidates in (1, 20)
    ]
    assert margins[0] < margins[1]


def test_pareto_set_holds_settings_that_none_beats() -> None:
    def run(name: str, loss: float, tokens: int, rank: int) -> ScoredRun:
        scored = scored_run(name, loss, adapter__r=rank)
        scored.run.raw["training"]["tokens"] = tokens
        return scored

    settings = [
        Setting((run(*values),))
        for values in (
            ("cheap", 2.2, 100, 4), ("lowest", 2.0, 300, 8), ("beaten", 2.1, 400, 16),
            ("between", 2.1, 200, 4),
        )
    ]  # fmt: skip
    assert [setting.name for setting in pareto_set(settings)] == ["cheap", "between", "lowest"]


@pytest.mark.parametrize("count", [1, 2])
def test_best_set_of_few_equal_settings_holds_all(count: int) -> None:
    settings = settings_of(np.random.default_rng(3), [2.0] * count, 0.1)
    assert len(best_set(settings)) == count


def test_best_set_with_one_common_seed_excludes_nothing() -> None:
    """Rows alone would exclude: the settings share one seed of three."""
    settings = []
    for rank, seeds in ((4, (0, 1, 2)), (8, (2, 3, 4))):
        runs = [
            scored_run(
                f"r{rank}-seed{n}", 2.0 + 0.05 * (rank == 8) + n / 100, adapter__r=rank, seed=n
            )
            for n in seeds
        ]
        settings.append(Setting(tuple(runs)))
    assert best_set(settings) == settings
    assert lowest_of(settings) is settings[0]


def test_lowest_setting_is_chosen_by_common_seeds() -> None:
    """A bad seed that only one setting has does not make the other one better."""
    a = [scored_run(f"a{n}", loss, adapter__r=4, seed=n) for n, loss in enumerate((2.0, 2.4, 2.4))]
    b = [scored_run("b0", 2.03, adapter__r=8, seed=0)]
    settings = [Setting(tuple(a)), Setting(tuple(b))]
    assert lowest_of(settings) is settings[0]


def test_settings_have_distinct_names_and_repeated_seeds_are_refused() -> None:
    full = [
        Setting((scored_run(f"f{rate}", 2.0, adapter__kind="full", training__learning_rate=rate),))
        for rate in (1e-5, 1e-4)
    ]
    names = SettingNames(full)
    assert [names.of(setting) for setting in full] == [
        "Full fine-tuning, lr 1e-5", "Full fine-tuning, lr 1e-4",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="a and b have the same settings and seeds, but other"):
        group_settings([scored_run("a", 2.0), scored_run("b", 2.1)])
