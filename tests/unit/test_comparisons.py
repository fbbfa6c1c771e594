"""Which cells are compared, and in which name."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from slm_lora.report import method, sentences
from slm_lora.report.names import SettingNames
from slm_lora.report.summary import category_table, comparisons_table
from slm_lora.runs.scored_run import ScoredRun
from slm_lora.stats.categories import by_category
from slm_lora.stats.comparisons import all_comparisons
from slm_lora.stats.settings import Setting, group_settings, varied

from ..support.runs import line


def test_runs_recorded_without_a_later_key_have_its_default() -> None:
    """A record without the key is read as if it had it, so old and new seeds are one arm."""
    lines = [line("base", 3.0), *(line(f"s{n}", 2.0 + 0.01 * n, seed=n) for n in range(3))]
    old = lines[1].run.raw["recipe"]
    del old["training"]["fsdp"], old["training"]["activation_checkpointing"]
    del old["model"]["quantization"]
    assert [len(arm.runs) for arm in group_settings(lines)] == [3]
    assert lines[1].setting("training.fsdp") is False
    other = [*lines, line("q", 2.0, model__quantization="nf4")]
    assert [len(arm.runs) for arm in group_settings(other)] == [3, 1]


def compared(lines: list[ScoredRun]) -> list[tuple[str, str, str]]:
    return [(each.key, each.first.name, each.second.name) for each in all_comparisons(lines)]


def test_neighbours_along_each_key_and_every_setting_with_the_base_are_compared() -> None:
    lines = [line("base", 3.0)] + [
        line(f"r{r}-{n}", 2.0, adapter__r=r, data__size=n)
        for r, n in ((4, 100), (8, 100), (16, 100), (16, 200))
    ]
    assert compared(lines) == [
        ("base", "base", "r4-100"), ("base", "base", "r8-100"),
        ("base", "base", "r16-100"), ("base", "base", "r16-200"),
        ("adapter.r", "r4-100", "r8-100"), ("adapter.r", "r8-100", "r16-100"),
        ("data.size", "r16-100", "r16-200"),
    ]  # fmt: skip


def test_keys_that_change_together_are_one_comparison() -> None:
    lines = [
        line("lora", 2.0, adapter__kind="lora", training__learning_rate=1e-3),
        line("full", 1.9, adapter__kind="full", training__learning_rate=1e-4),
    ]
    (found,) = all_comparisons(lines)
    assert (found.key, found.tied) == ("adapter.kind", ("training.learning_rate",))
    asked = method.question(lines, group_settings(lines), [found])
    assert "the method with its learning rate (LoRA, Full fine-tuning)" in asked
    assert "Method and learning rate change together" in method.confounds([found])
    # Once the rates cross, they are two differences again.
    lines.append(line("slow", 2.1, adapter__kind="lora", training__learning_rate=1e-4))
    assert compared(lines) == [
        ("training.learning_rate", "slow", "lora"), ("adapter.kind", "slow", "full"),
    ]  # fmt: skip


def test_sizes_and_steps_that_change_together_are_one_key() -> None:
    lines = [
        line(f"{n}", 2.0, data__size=n, training__max_steps=steps)
        for n, steps in ((100, 40), (200, 50), (400, 60))
    ]
    assert varied(group_settings(lines)) == {"data.size": ("training.max_steps",)}


def test_rank_is_ignored_for_full_fine_tuning() -> None:
    lines = [line(f"r{r}", 2.0, adapter__r=r) for r in (4, 8)]
    lines.append(line("full", 1.9, adapter__kind="full", adapter__r=16))
    assert compared(lines) == [
        ("adapter.r", "r4", "r8"), ("adapter.kind", "r4", "full"), ("adapter.kind", "r8", "full"),
    ]  # fmt: skip


def test_methods_are_compared_with_lora() -> None:
    lines = [line(kind, 2.0, adapter__kind=kind) for kind in ("dora", "lora", "pissa")]
    assert compared(lines) == [
        ("adapter.kind", "lora", "dora"), ("adapter.kind", "lora", "pissa"),
    ]  # fmt: skip


def test_size_null_is_the_largest_size() -> None:
    lines = [line(name, 2.0, data__size=n) for name, n in (("all", None), ("100", 100))]
    lines[0].run.raw["data"]["sets"]["train"]["rows"] = 900
    assert compared(lines) == [("data.size", "100", "all")]


def test_seeds_are_joined_into_one_setting() -> None:
    lines = [
        line(f"r{r}-seed{seed}", 2.0 - r / 100, adapter__r=r, seed=seed)
        for seed in (0, 1, 2)
        for r in (4, 8)
    ]
    (found,) = all_comparisons(lines)
    assert (found.first.name, found.second.name, len(found.pairs)) == ("r4", "r8", 3)
    assert found.difference.covers == "rows and seeds"
    assert found.second.estimate().value == pytest.approx(1.92)


def test_categories_are_compared_separately() -> None:
    lines = [line("base", 3.0), line("r8", 2.0)]
    (found,) = all_comparisons(lines)
    parts = by_category(found)
    assert [(name, rows) for name, rows, _ in parts] == [("even", 20), ("odd", 20)]
    assert all(d.value == pytest.approx(-1) for _, _, d in parts)
    settings = [Setting((lines[1],))]
    table = category_table(settings, Setting((lines[0],)), SettingNames(settings))
    assert "| even | 20 | 3.000 (2." in table


def test_a_category_of_few_groups_has_no_interval() -> None:
    one = line("r8", 2.0)
    few = tuple(replace(s, category="few" if s.row_id < "05" else s.category) for s in one.scores)
    settings = [Setting((replace(one, scores=few),))]
    table = category_table(settings, None, SettingNames(settings))
    assert re.search(r"\| few \| 5 \| \d\.\d+ \|", table)
    assert re.search(r"\| odd \| 18 \| 2\.\d+ \(1\.\d+ to 2\.\d+\) \|", table)


def test_settings_of_unequal_seeds_are_compared_on_common_seeds() -> None:
    lines = [line("base", 3.0)]
    lines += [line(f"r4-seed{n}", 2.0 + n / 100, adapter__r=4, seed=n) for n in (0, 1)]
    lines += [line("r8-seed0", 1.9, adapter__r=8, seed=0)]
    found = all_comparisons(lines)
    assert [(c.second.name, c.first.name) for c in found] == [
        ("r4", "base"), ("r8-seed0", "base"), ("r8-seed0", "r4-seed0"),
    ]  # fmt: skip
    shown = method.description([*lines], found)
    assert "With one seed they cover the choice of test rows only" in shown
    assert "With several trainings (2 seeds) they cover rows and trainings" in shown
    table = comparisons_table(found, SettingNames(group_settings(lines)))
    assert "| Lower (one seed). |" in table


def test_verdict_texts_name_their_reason() -> None:
    lines = [line("base", 3.0)]
    lines += [
        line(f"r{r}-seed{n}", loss, adapter__r=r, seed=n)
        for n in (0, 1, 2)
        for r, loss in ((4, 2.0), (8, 2.0), (16, 2.5 + n / 10))
    ]
    verdicts = [sentences.verdict_text(pair) for pair in all_comparisons(lines)]
    lower = "Significantly lower across test rows and 3 seeds, in each of them."
    assert verdicts[:3] == [lower] * 3
    assert verdicts[3] == "Equivalent within ±0.01 nats."
    assert verdicts[4] == "Significantly higher across test rows and 3 seeds, in each of them."
    note = method.untuned(all_comparisons(lines))
    assert "Settings are compared at equal learning rates (2e-4 for all)" in note
    rates = [
        line("r4-a", 2.0, adapter__r=4, training__learning_rate=1e-3),
        line("r4-b", 2.1, adapter__r=4, training__learning_rate=2e-3),
    ]
    assert not method.untuned(all_comparisons([lines[0], *rates]))


def test_inconclusive_verdict_names_the_corrected_p() -> None:
    """Two seeds far apart: the interval over rows excludes zero, the corrected p is large."""
    lines = [
        line(f"r{r}-seed{n}", loss, adapter__r=r, seed=n)
        for n, r, loss in ((0, 4, 2.0), (1, 4, 2.0), (0, 8, 1.9), (1, 8, 1.2))
    ]
    (pair,) = all_comparisons(lines)
    assert pair.verdict == "inconclusive"
    assert sentences.verdict_text(pair).startswith("Inconclusive: the interval includes zero")
    far = replace(pair, difference=replace(pair.difference, low=-0.9, high=-0.1), p_corrected=0.08)
    reason = sentences.verdict_text(replace(far, family=12))
    assert reason.startswith("Inconclusive: p = 0.08 after correction for 12 comparisons")
