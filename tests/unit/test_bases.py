"""Comparisons between base models of a grid, by bits per byte on the rows that compare."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from slm_lora.report.bases import base_facts, base_section
from slm_lora.report.names import SettingNames
from slm_lora.runs.scored_run import ScoredRun
from slm_lora.stats.bases import compare_bases
from slm_lora.stats.settings import group_settings

from ..support.runs import scored_run

BYTES = 50
"""UTF-8 bytes of a planted row; its 10 tokens are those of the first model."""


def on_model(model: str, name: str, loss: float, tokens: int = 10, **keys: Any) -> ScoredRun:
    """A run on a base whose tokenizer cuts a row into ``tokens``."""
    run = scored_run(name, loss, model__name=model, **keys)
    raw = run.run.raw
    raw["model"] = {**raw["model"], "name": model, "sha256": f"{model}-{'0' * 8}"}
    raw["data"] = {**raw["data"], "held_out_sha256": f"tokens of {model}"}
    scores = tuple(
        replace(
            score, nll_all=score.nll_all * tokens / 10, tokens_all=tokens,
            bytes_all=BYTES, bytes_response=BYTES, tokens_response=tokens, nll_response=1.0,
        )
        for score in run.scores
    )  # fmt: skip
    return replace(run, run=replace(run.run, folder=run.run.folder / model), scores=scores)


def grid() -> list[ScoredRun]:
    """Losses per token are lower on the second base, bits per byte are higher."""
    return [
        on_model("coarse", "base", 3.0),
        on_model("fine", "base", 2.5, tokens=20),
        *(on_model("coarse", f"r4-{seed}", 2.0 + 0.01 * seed, seed=seed) for seed in range(3)),
        *(on_model("fine", f"r4-{seed}", 1.5 + 0.01 * seed, 20, seed=seed) for seed in range(3)),
    ]


def test_bits_per_byte_compare_where_losses_per_token_do_not() -> None:
    between = compare_bases(grid())
    assert between is not None
    untuned, tuned = between.comparisons
    assert untuned.difference.value == pytest.approx((2.5 * 20 - 3.0 * 10) / BYTES / math.log(2))
    # Seeds 0, 1, 2: 1.50, 1.51, 1.52 nats per token against 2.00, 2.01, 2.02.
    expected = (1.51 * 20 - 2.01 * 10) / BYTES / math.log(2)
    assert tuned.difference.value == pytest.approx(expected)
    assert tuned.difference.units == 3
    assert tuned.verdict == "different"
    assert between.best is not None
    assert between.best.first_run.run.record.model.name == "coarse"
    (fact,) = base_facts(between, SettingNames(group_settings(grid())))
    bits = 2.01 * 10 / BYTES / math.log(2)
    assert fact.text.startswith(f"coarse, LoRA r=8 has the lowest bits per byte, {bits:.4f};")
    assert f"fine, LoRA r=8: {expected:+.4f} (" in fact.text
    assert "significantly higher, 3 seeds" in fact.text


def test_rows_of_which_one_base_scored_other_bytes_are_left_out_and_counted() -> None:
    runs = grid()
    cut = runs[0].scores[0]
    runs[0] = replace(
        runs[0], scores=(replace(cut, bytes_all=9, bytes_response=9), *runs[0].scores[1:])
    )
    between = compare_bases(runs)
    assert between is not None
    assert (between.rows, between.left_out) == (39, 1)
    assert "39 test rows of which all bases scored the same bytes (1 left out)" in (
        base_section(between, SettingNames(group_settings(runs))).text
    )


def test_response_is_compared_where_templates_write_other_text() -> None:
    runs = grid()
    runs[1] = replace(
        runs[1], scores=tuple(replace(score, bytes_all=BYTES + 7) for score in runs[1].scores)
    )
    between = compare_bases(runs)
    assert between is not None
    assert (between.metric.name, between.rows) == ("response_bits_per_byte", 40)


def test_bases_without_a_common_row_are_not_compared() -> None:
    runs = grid()
    scores = [
        replace(score, bytes_all=BYTES + 7, bytes_response=BYTES + 7) for score in runs[1].scores
    ]
    runs[1] = replace(runs[1], scores=tuple(scores))
    between = compare_bases(runs)
    assert between is not None
    assert (between.rows, between.left_out, between.comparisons) == (0, 40, ())
    names = SettingNames(group_settings(runs))
    assert "not compared: the bases scored other bytes" in base_facts(between, names)[0].text
    assert "40 test rows" in base_section(between, names).text


def test_one_base_has_no_comparisons_of_bases() -> None:
    assert compare_bases([run for run in grid() if run.setting("model.name") == "coarse"]) is None


def test_bases_of_one_name_are_told_apart_by_their_weights() -> None:
    runs = grid()
    for run in runs:
        run.run.raw["model"] = {**run.run.raw["model"], "name": "model"}
    names = SettingNames(group_settings(runs))
    assert [names.of(setting) for setting in group_settings(runs)] == [
        "model (coarse-0), LoRA r=8", "model (fine-000), LoRA r=8",
    ]  # fmt: skip


def test_replies_that_one_base_lacks_are_left_out() -> None:
    """A prompt without room for a reply with one tokenizer has no value there."""
    runs = [
        replace(
            run,
            scores=tuple(
                replace(score, values={"token_f1": (0.1 * (i % 7), 1.0)} if i or has_all else {})
                for i, score in enumerate(run.scores)
            ),
        )
        for run in grid()
        for has_all in [run.setting("model.name") == "coarse"]
    ]
    between = compare_bases(runs)
    assert between is not None
    (pairs,) = between.other_metrics
    assert {len(pair.first.first_run.scores) for pair in pairs} == {39}
    assert [pair.difference.value for pair in pairs] == [0.0, 0.0]
