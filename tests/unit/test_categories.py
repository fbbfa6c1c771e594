"""Differences by category: planted alike and planted unlike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from slm_lora.records import RowScore
from slm_lora.stats.categories import by_category, compared_categories, p_alike
from slm_lora.stats.comparisons import Comparison, compare
from slm_lora.stats.settings import Setting

from ..support.runs import scored_run

NAMES = ("brainstorming", "qa", "summary", "writing")


def comparison(seed: int, unlike: float, straddle: bool = False) -> Comparison:
    """Two runs on 200 rows of four categories; the last one's difference is ``unlike`` larger."""
    rng = np.random.default_rng(seed)
    first, second = [], []
    for index in range(200):
        category = NAMES[index % 4]
        group = f"{index // 2 if straddle else index}"
        change = -0.1 + 0.05 * rng.standard_normal() + unlike * (category == NAMES[3])
        loss = 2 + 0.3 * rng.standard_normal()
        for scores, nats in ((first, loss), (second, loss + change)):
            row = RowScore(f"{index}", group, category, "test", 10 * nats, 10, 1, 0.0, 10, 1)
            scores.append(row)
    runs = [
        Setting((replace(scored_run(name, 2.0, adapter__r=rank), scores=tuple(scores)),))
        for name, rank, scores in (("r4", 4, first), ("r8", 8, second))
    ]
    return compare(runs)[0]


@pytest.mark.parametrize("straddle", [False, True])
def test_equal_categories_are_called_different_at_the_stated_rate(straddle: bool) -> None:
    ps = [p_alike(comparison(seed, 0.0, straddle)) for seed in range(400)]
    rate = sum(p is not None and p < 0.05 for p in ps) / 400
    assert 0.02 <= rate <= 0.075


def test_category_that_gains_less_is_detected() -> None:
    p = p_alike(comparison(0, 0.1))
    assert p is not None and p < 1e-4


def test_by_category_gives_the_difference_within_each_category() -> None:
    parts = by_category(comparison(0, 0.1))
    assert [(name, rows) for name, rows, _ in parts] == [(name, 50) for name in NAMES]
    assert parts[3][2].value == pytest.approx(0.0, abs=0.02)
    assert parts[0][2].value == pytest.approx(-0.1, abs=0.02)


def test_single_and_small_categories_are_not_compared() -> None:
    planted = comparison(0, 0.0)
    scores = planted.pairs[0][0].scores
    assert compared_categories(scores) == list(NAMES)
    relabelled = [replace(s, category="few" if int(s.row_id) < 9 else "many") for s in scores]
    assert compared_categories(relabelled) == ["many"]


def test_category_without_the_metric_is_left_out() -> None:
    planted = comparison(0, 0.0)

    def emptied(setting: Setting) -> Setting:
        rows = [
            replace(row, tokens_all=0, nll_all=0.0) if row.category == "qa" else row
            for row in setting.first_run.scores
        ]
        return Setting((replace(setting.first_run, scores=tuple(rows)),))

    (without,) = compare([emptied(planted.first), emptied(planted.second)])
    assert [name for name, _, _ in by_category(without)] == ["brainstorming", "summary", "writing"]
    p = p_alike(without)
    assert p is not None and p > 0.05
