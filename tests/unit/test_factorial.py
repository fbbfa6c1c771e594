"""Ends of axes, main effects and interactions of a grid."""

from __future__ import annotations

from pathlib import Path

import pytest

from slm_lora.runs.folder import list_runs
from slm_lora.runs.scored_run import read_scored_runs
from slm_lora.stats.factorial import Contrast, contrasts
from slm_lora.stats.settings import group_settings

from ..support.runs import scored_run

LOSSES = {(4, 100): 2.4, (8, 100): 2.3, (16, 100): 2.1, (4, 200): 2.2, (8, 200): 2.1,
          (16, 200): 2.05}  # fmt: skip


def grid(losses: dict[tuple[int, int], float]) -> list[Contrast]:
    runs = []
    for (rank, size), loss in losses.items():
        run = scored_run(f"r{rank}-{size}", loss, adapter__r=rank, data__size=size)
        run.run.raw["data"]["sets"]["train"]["rows"] = size
        runs.append(run)
    return contrasts(group_settings(runs))


def by_kind(results: list[Contrast]) -> dict[tuple[str, str], list[float]]:
    values: dict[tuple[str, str], list[float]] = {}
    for contrast in results:
        values.setdefault((contrast.kind, contrast.key), []).append(contrast.difference.value)
    return values


def test_contrasts_of_a_grid_equal_those_by_hand() -> None:
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


def test_grid_of_one_key_has_only_the_contrast_of_its_ends() -> None:
    values = by_kind(grid({key: loss for key, loss in LOSSES.items() if key[1] == 100}))
    assert values == {("ends", "adapter.r"): [pytest.approx(-0.3)]}


def test_method_contrasts_are_against_lora() -> None:
    runs = [
        scored_run(f"{kind}-{n}", loss, adapter__kind=kind, data__size=n)
        for (kind, n), loss in {
            ("lora", 100): 2.4, ("dora", 100): 2.3, ("lora", 200): 2.2, ("dora", 200): 2.0,
        }.items()
    ]  # fmt: skip
    for run in runs:
        run.run.raw["data"]["sets"]["train"]["rows"] = run.setting("data.size")
    values = by_kind(contrasts(group_settings(runs)))
    assert values["main effect", "adapter.kind"] == pytest.approx([-0.15])
    assert values["interaction", "data.size"] == pytest.approx([-0.3 - -0.2])


def test_rank_is_worth_less_with_more_rows_on_the_committed_grid() -> None:
    """Computed once by hand from the scores: +0.0737 (0.0687 to 0.0788)."""
    results = Path(__file__).parents[2] / "results" / "dolly-grid"
    settings = group_settings(read_scored_runs(list_runs(results)))
    (interaction,) = [
        contrast for contrast in contrasts(settings) if contrast.kind == "interaction"
    ]
    difference = interaction.difference
    assert difference.value == pytest.approx(0.0737, abs=5e-5)
    assert (difference.low, difference.high) == pytest.approx((0.0687, 0.0788), abs=2e-4)
    assert interaction.significant and difference.units == 3


def test_a_key_of_one_value_has_no_interaction() -> None:
    """Target modules are ordered by trained weights, which differ between ranks, too."""
    runs = []
    for (rank, size), loss in LOSSES.items():
        runs.append(scored_run(f"r{rank}-{size}", loss, adapter__r=rank, data__size=size))
    runs.append(scored_run("other", 2.0, adapter__target_modules=["q_proj"]))
    planned = contrasts(group_settings(runs))
    assert planned
    assert all(contrast.by_low is not contrast.by_high for contrast in planned if contrast.by)
    assert {contrast.by for contrast in planned} <= {"", "data.size"}
