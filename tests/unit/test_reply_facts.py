"""The card's line on replies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from slm_lora.report.reply_facts import reply_facts
from slm_lora.runs.folder import read_run, run_folders
from slm_lora.runs.scored_run import ScoredRun, read_scored_run
from slm_lora.stats.settings import Setting

RUNS = run_folders(Path(__file__).parents[2] / "results" / "smollm2-dolly" / "runs")


def replied(run: ScoredRun, **shares: int) -> ScoredRun:
    """The run with 0-1 metrics of its rows; shares in tenths."""
    scores = tuple(
        replace(
            score,
            values={name: (float(index % 10 < share), 1.0) for name, share in shares.items()},
        )
        for index, score in enumerate(run.scores)
    )
    return replace(run, scores=scores)


@pytest.fixture(scope="module")
def pair() -> tuple[ScoredRun, ScoredRun]:
    runs = [read_scored_run(read_run(folder)) for folder in RUNS]
    base = next(run for run in runs if run.is_base)
    return base, next(run for run in runs if not run.is_base)


def test_better_worse_and_unclear_metrics_are_told(pair: tuple[ScoredRun, ScoredRun]) -> None:
    base, tuned = pair
    (fact,) = reply_facts(
        Setting((replied(base, exact_match=2, token_f1=5, rouge_l=5),)),
        Setting((replied(tuned, exact_match=6, token_f1=3, rouge_l=5),)),
    )
    assert fact.text.startswith("better than the base's: exact match 0.200 → 0.600 (+0.3")
    assert "WORSE than the base's: token F1 0.500 → 0.300 (-0.2" in fact.text
    assert fact.text.endswith("no clear difference: ROUGE-L.")


def test_no_line_without_replies_of_both(pair: tuple[ScoredRun, ScoredRun]) -> None:
    base, tuned = pair
    assert reply_facts(Setting((base,)), Setting((replied(tuned, exact_match=6),))) == []
