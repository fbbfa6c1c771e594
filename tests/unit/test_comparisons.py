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

from ..support.runs import scored_run


def test_runs_recorded_without_a_later_key_have_its_default() -> None:
    """A record without the key is read as if it had it, so old and new seeds are one arm."""
    runs = [
        scored_run("base", 3.0),
        *(scored_run(f"s{n}", 2.0 + 0.01 * n, seed=n) for n in range(3)),
    ]
    old = runs[1].run.raw["recipe"]
    del old["training"]["fsdp"], old["training"]["activation_checkpointing"]
    del old["model"]["quantization"]
    assert [len(setting.runs) for setting in group_settings(runs)] == [3]
    assert runs[1].setting("training.fsdp") is False
    with_quantized = [*runs, scored_run("q", 2.0, model__quantization="nf4")]
    assert [len(setting.runs) for setting in group_settings(with_quantized)] == [3, 1]


def compared_names(runs: list[ScoredRun]) -> list[tuple[str, str, str]]:
    return [
        (comparison.key, comparison.first.name, comparison.second.name)
        for comparison in all_comparisons(runs)
    ]


def test_neighbours_along_each_key_and_every_setting_with_the_base_are_compared() -> None:
    runs = [scored_run("base", 3.0)] + [
        scored_run(f"r{r}-{n}", 2.0, adapter__r=r, data__size=n)
        for r, n in ((4, 100), (8, 100), (16, 100), (16, 200))
    ]
    assert compared_names(runs) == [
        ("base", "base", "r4-100"), ("base", "base", "r8-100"),
        ("base", "base", "r16-100"), ("base", "base", "r16-200"),
        ("adapter.r", "r4-100", "r8-100"), ("adapter.r", "r8-100", "r16-100"),
        ("data.size", "r16-100", "r16-200"),
    ]  # fmt: skip


def test_keys_that_change_together_are_one_comparison() -> None:
    runs = [
        scored_run("lora", 2.0, adapter__kind="lora", training__learning_rate=1e-3),
        scored_run("full", 1.9, adapter__kind="full", training__learning_rate=1e-4),
    ]
    (comparison,) = all_comparisons(runs)
    assert (comparison.key, comparison.tied) == ("adapter.kind", ("training.learning_rate",))
    question = method.question(runs, group_settings(runs), [comparison])
    assert "the method with its learning rate (LoRA, Full fine-tuning)" in question
    assert "Method and learning rate change together" in method.confounds([comparison])
    # Once the rates cross, they are two differences again.
    runs.append(scored_run("slow", 2.1, adapter__kind="lora", training__learning_rate=1e-4))
    assert compared_names(runs) == [
        ("training.learning_rate", "slow", "lora"), ("adapter.kind", "slow", "full"),
    ]  # fmt: skip


def test_sizes_and_steps_that_change_together_are_one_key() -> None:
    runs = [
        scored_run(f"{n}", 2.0, data__size=n, training__max_steps=steps)
        for n, steps in ((100, 40), (200, 50), (400, 60))
    ]
    assert varied(group_settings(runs)) == {"data.size": ("training.max_steps",)}


def test_rank_is_ignored_for_full_fine_tuning() -> None:
    runs = [scored_run(f"r{r}", 2.0, adapter__r=r) for r in (4, 8)]
    runs.append(scored_run("full", 1.9, adapter__kind="full", adapter__r=16))
    assert compared_names(runs) == [
        ("adapter.r", "r4", "r8"), ("adapter.kind", "r4", "full"), ("adapter.kind", "r8", "full"),
    ]  # fmt: skip


def test_methods_are_compared_with_lora() -> None:
    runs = [scored_run(kind, 2.0, adapter__kind=kind) for kind in ("dora", "lora", "pissa")]
    assert compared_names(runs) == [
        ("adapter.kind", "lora", "dora"), ("adapter.kind", "lora", "pissa"),
    ]  # fmt: skip


def test_size_null_is_the_largest_size() -> None:
    runs = [scored_run(name, 2.0, data__size=n) for name, n in (("all", None), ("100", 100))]
    runs[0].run.raw["data"]["sets"]["train"]["rows"] = 900
    assert compared_names(runs) == [("data.size", "100", "all")]


def test_seeds_are_joined_into_one_setting() -> None:
    runs = [
        scored_run(f"r{r}-seed{seed}", 2.0 - r / 100, adapter__r=r, seed=seed)
        for seed in (0, 1, 2)
        for r in (4, 8)
    ]
    (comparison,) = all_comparisons(runs)
    assert (comparison.first.name, comparison.second.name, len(comparison.pairs)) == ("r4", "r8", 3)
    assert comparison.difference.covers == "rows and seeds"
    assert comparison.second.estimate().value == pytest.approx(1.92)


def test_categories_are_compared_separately() -> None:
    runs = [scored_run("base", 3.0), scored_run("r8", 2.0)]
    (comparison,) = all_comparisons(runs)
    parts = by_category(comparison)
    assert [(name, rows) for name, rows, _ in parts] == [("even", 20), ("odd", 20)]
    assert all(d.value == pytest.approx(-1) for _, _, d in parts)
    settings = [Setting((runs[1],))]
    table = category_table(settings, [Setting((runs[0],))], SettingNames(settings))
    assert "| even | 20 | 3.000 (2." in table


def test_a_category_of_few_groups_has_no_interval() -> None:
    run = scored_run("r8", 2.0)
    scores = tuple(
        replace(s, category="few" if s.row_id < "05" else s.category) for s in run.scores
    )
    settings = [Setting((replace(run, scores=scores),))]
    table = category_table(settings, [], SettingNames(settings))
    assert re.search(r"\| few \| 5 \| \d\.\d+ \|", table)
    assert re.search(r"\| odd \| 18 \| 2\.\d+ \(1\.\d+ to 2\.\d+\) \|", table)


def test_settings_of_unequal_seeds_are_compared_on_common_seeds() -> None:
    runs = [scored_run("base", 3.0)]
    runs += [scored_run(f"r4-seed{n}", 2.0 + n / 100, adapter__r=4, seed=n) for n in (0, 1)]
    runs += [scored_run("r8-seed0", 1.9, adapter__r=8, seed=0)]
    comparisons = all_comparisons(runs)
    assert [(c.second.name, c.first.name) for c in comparisons] == [
        ("r4", "base"), ("r8-seed0", "base"), ("r8-seed0", "r4-seed0"),
    ]  # fmt: skip
    shown = method.description([*runs], comparisons)
    assert "With one seed they cover the choice of test rows only" in shown
    assert "With several trainings (2 seeds) they cover rows and trainings" in shown
    table = comparisons_table(comparisons, SettingNames(group_settings(runs)))
    assert "| Lower (one seed). |" in table


def test_verdict_texts_name_their_reason() -> None:
    runs = [scored_run("base", 3.0)]
    runs += [
        scored_run(f"r{r}-seed{n}", loss, adapter__r=r, seed=n)
        for n in (0, 1, 2)
        for r, loss in ((4, 2.0), (8, 2.0), (16, 2.5 + n / 10))
    ]
    verdicts = [sentences.verdict_text(pair) for pair in all_comparisons(runs)]
    lower = "Significantly lower across test rows and 3 seeds, in each of them."
    assert verdicts[:3] == [lower] * 3
    assert verdicts[3] == "Equivalent within ±0.01 nats."
    assert verdicts[4] == "Significantly higher across test rows and 3 seeds, in each of them."
    note = method.untuned(all_comparisons(runs))
    assert "Settings are compared at equal learning rates (2e-4 for all)" in note
    rates = [
        scored_run("r4-a", 2.0, adapter__r=4, training__learning_rate=1e-3),
        scored_run("r4-b", 2.1, adapter__r=4, training__learning_rate=2e-3),
    ]
    assert not method.untuned(all_comparisons([runs[0], *rates]))


def test_inconclusive_verdict_names_the_corrected_p() -> None:
    """Two seeds far apart: the interval over rows excludes zero, the corrected p is large."""
    runs = [
        scored_run(f"r{r}-seed{n}", loss, adapter__r=r, seed=n)
        for n, r, loss in ((0, 4, 2.0), (1, 4, 2.0), (0, 8, 1.9), (1, 8, 1.2))
    ]
    (pair,) = all_comparisons(runs)
    assert pair.verdict == "inconclusive"
    assert sentences.verdict_text(pair).startswith("Inconclusive: the interval includes zero")
    far = replace(pair, difference=replace(pair.difference, low=-0.9, high=-0.1), p_corrected=0.08)
    reason = sentences.verdict_text(replace(far, family=12))
    assert reason.startswith("Inconclusive: p = 0.08 after correction for 12 comparisons")
