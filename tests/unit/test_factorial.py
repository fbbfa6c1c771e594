"""Ends of axes, main effects and interactions of a grid."""

from __future__ import annotations

from pathlib import Path

import pytest

from slm_lora.runs.folder import list_runs
from slm_lora.runs.scored_run import read_scored_runs
from slm_lora.stats.factorial import Contrast, contrasts
from slm_lora.stats.settings import group_settings

from ..support.runs import line

LOSSES = {(4, 100): 2.4, (8, 100): 2.3, (16, 100): 2.1, (4, 200): 2.2, (8, 200): 2.1,
          (16, 200): 2.05}  # fmt: skip


def grid(losses: dict[tuple[int, int], float]) -> list[Contrast]:
    lines = []
    for (rank, size), loss in losses.items():
        run = line(f"r{rank}-{size}", loss, adapter__r=rank, data__size=size)
        run.run.raw["data"]["sets"]["train"]["rows"] = size
        lines.append(run)
    return contrasts(group_settings(lines))


def by_kind(found: list[Contrast]) -> dict[tuple[str, str], list[float]]:
    values: dict[tuple[str, str], list[float]] = {}
    for contrast in found:
        values.setdefault((contrast.kind, contrast.key), []).append(contrast.difference.value)
    return values


def test_contrasts_by_hand() -> None:
    values = by_kind(grid(LOSSES))
    assert values.keys() == {
        ("ends", "adapter.r"), ("main effect", "adapter.r"), ("main effect", "data.size"),
        ("interaction", "adapter.r"),
    }  # fmt: skip
    assert values["ends", "adapter.r"] == pytest.approx([2.1 - 2.4, 2.05 - 2.2])
    assert values["main effect", "adapter.r"] == pytest.approx([(-0.3 - 0.15) / 2])
    assert values["main effect", "data.size"] == pytest.approx([(-0.2 - 0.2 - 0.05) / 3])
    # The effect of r=16 at 200 rows minus at 100 rows.
    assert values["interaction", "adapter.r"] == pytest.approx([-0.15 - -0.3])


def test_an_incomplete_grid_has_the_contrasts_of_its_complete_part() -> None:
    losses = {key: loss for key, loss in LOSSES.items() if key != (16, 200)}
    values = by_kind(grid(losses))
    assert ("interaction", "adapter.r") not in values
    assert values["ends", "adapter.r"] == pytest.approx([-0.3])


def test_a_grid_of_one_key_has_its_ends_only() -> None:
    values = by_kind(grid({key: loss for key, loss in LOSSES.items() if key[1] == 100}))
    assert values == {("ends", "adapter.r"): [pytest.approx(-0.3)]}


def test_methods_are_compared_with_the_usual_one() -> None:
    lines = [
        line(f"{kind}-{n}", loss, adapter__kind=kind, data__size=n)
        for (kind, n), loss in {
            ("lora", 100): 2.4, ("dora", 100): 2.3, ("lora", 200): 2.2, ("dora", 200): 2.0,
        }.items()
    ]  # fmt: skip
    for run in lines:
        run.run.raw["data"]["sets"]["train"]["rows"] = run.setting("data.size")
    values = by_kind(contrasts(group_settings(lines)))
    assert values["main effect", "adapter.kind"] == pytest.approx([-0.15])
    assert values["interaction", "data.size"] == pytest.approx([-0.3 - -0.2])


def test_rank_is_worth_less_with_more_rows_on_the_committed_grid() -> None:
    """Computed once by hand from the scores: +0.0737 (0.0687 to 0.0788)."""
    results = Path(__file__).parents[2] / "results" / "dolly-grid"
    settings = group_settings(read_scored_runs(list_runs(results)))
    (found,) = [each for each in contrasts(settings) if each.kind == "interaction"]
    difference = found.difference
    assert difference.value == pytest.approx(0.0737, abs=5e-5)
    assert (difference.low, difference.high) == pytest.approx((0.0687, 0.0788), abs=2e-4)
    assert found.significant and difference.units == 3


def test_a_key_of_one_value_has_no_interaction() -> None:
    """Target modules are ordered by trained weights, which differ between ranks, too."""
    runs = []
    for (rank, size), loss in LOSSES.items():
        runs.append(line(f"r{rank}-{size}", loss, adapter__r=rank, data__size=size))
    runs.append(line("other", 2.0, adapter__target_modules=["q_proj"]))
    planned = contrasts(group_settings(runs))
    assert planned
    assert all(contrast.by_low is not contrast.by_high for contrast in planned if contrast.by)
    assert {contrast.by for contrast in planned} <= {"", "data.size"}
