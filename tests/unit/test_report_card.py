"""The card of a report: which setting is recommended, and what is pointed out as unknown."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slm_lora.report.card import Card, make_card
from slm_lora.report.names import SettingNames, rate_name
from slm_lora.runs.scored_run import ScoredRun
from slm_lora.stats.comparisons import all_comparisons
from slm_lora.stats.settings import Setting, group_settings

from ..support.runs import scored_run


def run(
    folder: Path, name: str, loss: float, steps: int = 200, falling: bool = False, **keys: Any
) -> ScoredRun:
    """A run of `scored_run` with its training: ``steps`` losses, at the end falling or level."""
    scored = scored_run(name, loss, **keys)
    record = dict(scored.run.raw)
    path = folder / name
    path.mkdir()
    if name != "base":
        rank = record["adapter"]["trainable_parameters"]
        record["training"] = record["training"] | {
            "steps": steps, "tokens": 1000 * steps, "seconds": 60.0 * rank,
            "peak_memory_bytes": 10**9,
        }  # fmt: skip
        losses = [3.0 - 0.01 * step if falling else 2.0 for step in range(steps)]
        text = "".join(f"{json.dumps({'step': i, 'loss': x})}\n" for i, x in enumerate(losses))
        (path / "steps.jsonl").write_text(text)
    return replace(scored, run=replace(scored.run, folder=path, raw=record))


def card_of(runs: list[ScoredRun], margin: float = 0.02) -> Card:
    settings = group_settings(runs)
    bases = [Setting((run,)) for run in runs if run.is_base]
    return make_card(settings, bases, all_comparisons(runs), margin, SettingNames(settings))


def facts(card: Card) -> dict[str, str]:
    return {fact.label: fact.text for fact in card.facts}


def test_lowest_loss_is_recommended_when_no_cheaper_setting_is_equivalent(tmp_path: Path) -> None:
    runs = [run(tmp_path, "base", 3.0)]
    runs += [run(tmp_path, f"r{r}", loss, adapter__r=r) for r, loss in ((4, 2.2), (8, 2.0))]
    card = card_of(runs)
    assert card.recommended is not None and card.recommended.name == "r8"
    assert "lowest loss of 2 settings" in facts(card)["Recommended"]
    assert [gap.setting.name for gap in card.gaps] == ["r4"]
    assert card.gaps[0].value == pytest.approx(0.2)
    assert card.base is not None and card.base.value == pytest.approx(1.0)


def test_cheapest_equivalent_setting_is_recommended(tmp_path: Path) -> None:
    losses = ((4, 2.2), (8, 2.005), (16, 2.0))
    runs = [run(tmp_path, f"r{r}", loss, adapter__r=r) for r, loss in losses]
    card = card_of(runs)
    assert card.recommended is not None and card.recommended.name == "r8"
    assert card.lowest is not None and card.lowest.name == "r16"
    why = facts(card)["Recommended"]
    assert "cheapest of 3 settings" in why and "r=16 (difference +0.0050" in why
    # With a margin below the difference the lowest loss is taken.
    card = card_of(runs, margin=0.004)
    assert card.recommended is not None and card.recommended.name == "r16"


def test_card_shows_the_perplexity_gain_with_the_corrected_verdict(tmp_path: Path) -> None:
    runs = [run(tmp_path, "base", 3.0), run(tmp_path, "r8", 2.0)]
    gain = facts(card_of(runs))["Against the base"]
    assert gain.startswith("perplexity 20.09 → 7.39, -63.2 %")  # exp 3, exp 2, 1 - 1/e
    assert "significantly lower across test rows (one seed)" in gain


def test_card_calls_an_adapter_worse_than_the_base_higher(tmp_path: Path) -> None:
    runs = [run(tmp_path, "base", 2.0), run(tmp_path, "r8", 3.0)]
    assert "significantly HIGHER" in facts(card_of(runs))["Against the base"]


def test_card_points_out_one_seed_untuned_rate_and_grid_edge(tmp_path: Path) -> None:
    runs = [run(tmp_path, f"r{r}", 2.0 - r / 50, adapter__r=r) for r in (4, 8)]
    shown = facts(card_of(runs))
    assert shown["Seeds"].startswith("one:")
    assert "2e-4 for all settings: this compares how fast they learn" in shown["Learning rate"]
    assert shown["Edge of the grid"].startswith("8 is the largest rank tried")


def test_card_says_that_rates_were_selected_on_the_test_rows(tmp_path: Path) -> None:
    runs = [
        run(tmp_path, f"lr{rate}", 2.0 + rate, training__learning_rate=rate)
        for rate in (1e-3, 2e-3)
    ]
    shown = facts(card_of(runs, margin=1e-6))
    assert "1e-3, selected from 1e-3, 2e-3 on the test rows" in shown["Learning rate"]
    tied = [
        run(tmp_path, "lora", 2.0, adapter__kind="lora", training__learning_rate=1e-3),
        run(tmp_path, "full", 1.9, adapter__kind="full", training__learning_rate=1e-4),
    ]
    assert "one per setting" in facts(card_of(tied))["Learning rate"]


def test_best_rank_inside_the_grid_is_no_edge(tmp_path: Path) -> None:
    losses = ((4, 2.2), (8, 2.0), (16, 2.3))
    runs = [run(tmp_path, f"r{r}", loss, adapter__r=r) for r, loss in losses]
    assert "Edge of the grid" not in facts(card_of(runs))


@pytest.mark.parametrize(
    ("steps", "falling", "expected"),
    [(50, False, "50 optimizer steps"), (200, True, "still falling"), (200, False, None)],
)
def test_card_points_out_short_and_unfinished_trainings(
    tmp_path: Path, steps: int, falling: bool, expected: str | None
) -> None:
    shown = facts(card_of([run(tmp_path, "r8", 2.0, steps, falling)]))
    if expected is None:
        assert "Training length" not in shown
    else:
        assert expected in shown["Training length"]


def test_card_joins_seeds_into_one_setting_with_its_verdict(tmp_path: Path) -> None:
    runs = [run(tmp_path, "base", 3.0)]
    runs += [
        run(tmp_path, f"r{r}-seed{n}", 2.0 - r / 50 + n / 100, adapter__r=r, seed=n)
        for r in (4, 8)
        for n in (0, 1, 2)
    ]
    card = card_of(runs)
    shown = facts(card)
    assert shown["Seeds"].startswith("3; 3 of 3 seeds agree in the sign")
    assert "up to 63 % of all may not" in shown["Seeds"]
    assert "across test rows and 3 seeds" in shown["Against the base"]
    assert card.gaps[0].seeds == 3


def test_card_without_a_trained_setting_is_empty(tmp_path: Path) -> None:
    card = card_of([run(tmp_path, "base", 3.0)])
    assert card.recommended is None and not card.facts


@pytest.mark.parametrize(
    ("rate", "name"), [(2e-4, "2e-4"), (1e-3, "1e-3"), (2.5e-5, "2.5e-5"), (0.1, "1e-1")]
)
def test_learning_rates_are_named_in_short_scientific_form(rate: float, name: str) -> None:
    assert rate_name(rate) == name


def test_card_compares_the_recommended_setting_with_its_own_base(tmp_path: Path) -> None:
    """Of two bases the recommended setting is compared with its own."""
    small, large = run(tmp_path, "base", 3.0), run(tmp_path, "base-large", 2.0)
    adapters = [run(tmp_path, name, loss) for name, loss in (("small", 2.8), ("large", 1.9))]
    for scored in (large, adapters[1]):
        scored.run.raw["model"] = {**scored.run.raw["model"], "name": "large", "sha256": "1"}
    large.run.raw.pop("adapter")
    large.run.raw.pop("training")
    card = card_of([small, large, *adapters])
    assert card.recommended is not None and card.recommended.name == "large"
    assert facts(card)["Against the base"].startswith("perplexity 7.39 → 6.69")  # exp 2, exp 1.9
