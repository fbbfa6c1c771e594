"""The end of `slm-lora tune`: sentences and exit from planted losses."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest

from slm_lora.report.analysis import analyse
from slm_lora.report.outcome import Outcome, not_known, outcome_of, record, sentences
from slm_lora.report.tuning import Tuned
from slm_lora.runs.folder import Run
from slm_lora.runs.scored_run import ScoredRun
from slm_lora.runs.tuning import ArmRecord, CandidateRecord, TuningRecord
from slm_lora.stats.settings import Setting
from slm_lora.stats.tuned_arms import TunedArm

from ..support.runs import scored_run

RATE = "training.learning_rate"


@pytest.fixture(autouse=True)
def no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted runs have no steps.jsonl."""
    monkeypatch.setattr(Run, "steps", lambda run: [])


def run(name: str, loss: float, rank: int, rate: float, seed: int = 0) -> ScoredRun:
    scored = scored_run(name, loss, adapter__r=rank, training__learning_rate=rate, seed=seed)
    raw = {**scored.run.raw, "settings": {"adapter.r": rank, RATE: rate}}
    return replace(scored, run=replace(scored.run, raw=raw), tuned=(RATE,))


def candidate(rate: float, loss: float | None, **keys: Any) -> CandidateRecord:
    return CandidateRecord(values={RATE: rate}, loss=loss, tokens=9, tokens_to_end=9, **keys)


def arm(rank: int, *candidates: CandidateRecord, chosen: float, **edges: Any) -> ArmRecord:
    settings = {"adapter.r": rank}
    return ArmRecord(
        name=f"r{rank}", settings=settings, chosen={RATE: chosen},
        edges={RATE: edges["edge"]} if edges else {}, candidates=candidates,
    )  # fmt: skip


USUAL = candidate(2e-4, 2.3, above_lowest=(0.1, 0.08, 0.12))
BEST = candidate(1e-3, 2.2, above_lowest=(0.0, 0.0, 0.0), kept=True)
RIVAL = candidate(2e-3, 2.21, above_lowest=(0.01, -0.02, 0.04), kept=True)
STOPPED = candidate(5e-3, None, stopped="0.4 behind")


def outcome(
    base: float,
    losses: dict[int, float],
    seeds: int = 1,
    arms: tuple[ArmRecord, ...] = (),
    searched: dict[int, Setting] | None = None,
) -> Outcome:
    runs = [
        run(f"r{r}-seed{s}", loss, r, 1e-3, s) for r, loss in losses.items() for s in range(seeds)
    ]
    analysis = analyse([scored_run("base", base), *runs])
    arms = arms or tuple(arm(r, USUAL, BEST, STOPPED, chosen=1e-3) for r in losses)
    choice = TuningRecord(
        format=1, experiment="x", search="", section={"common_value": 2e-4, "key": [RATE]},
        metric="all", validation_rows=60, validation_groups=60, base_loss=base, machine={},
        arms=arms,
    )  # fmt: skip
    tuned = Tuned(choice, tuple(TunedArm(a, searched or {}) for a in arms), None, ())
    result = outcome_of(replace(analysis, tuned=tuned))
    assert result is not None
    return result


def test_cheaper_of_equivalent_ranks_is_to_be_used() -> None:
    result = outcome(3.0, {4: 2.001, 16: 2.0})
    text = sentences(result)
    assert result.is_better
    assert (
        text[0] == "Use r=4 at learning rate 1e-3: as good as r=16 within 0.01 nats, and cheaper."
    )
    # exp(2.001), and 1 - exp(-0.999) of the base's perplexity
    assert text[1].startswith(
        "Perplexity 7.40: 63.2 % (63.2 to 63.2 %) below the base; loss 2.0010"
    )
    assert text[2].startswith("r=4 and r=16 are equivalent within 0.01 nats (-0.0010")
    assert text[3] == "Learning rates: 6 tried, 2 stopped early; no other of r=4's is as good."
    assert text[4].startswith(
        "At the usual 2e-4 the loss would be 0.100 nats higher (0.080 to 0.120)"
    )


def test_better_rank_is_named_with_its_difference() -> None:
    text = sentences(outcome(3.0, {4: 2.2, 16: 2.0}))
    assert text[0] == "Use r=16 at learning rate 1e-3: the lowest loss of 2 settings."
    assert text[2].startswith("r=16 is better than r=4 (-0.2000 nats")


@pytest.mark.parametrize("after", [3.0, 3.2])
def test_nothing_is_recommended_where_the_base_is_as_good_or_better(after: float) -> None:
    result = outcome(3.0, {4: after, 16: after + 0.1})
    assert not result.is_better
    assert sentences(result)[0].startswith("No adapter is shown to be better than the base")
    assert record(result)["better_than_base"] is False


def test_seeds_edges_and_few_validation_rows_are_pointed_out() -> None:
    ends = tuple(arm(r, USUAL, BEST, RIVAL, chosen=1e-3, edge="high") for r in (4, 16))
    spread = [0.1 * (-1) ** (n // 2) for n in range(40)]  # nats, on rows of equal length
    lowest, rival = run("a", 2.2, 16, 1e-3), run("b", 2.2, 16, 2e-3)
    scores = zip(rival.scores, spread, strict=True)
    noisy = tuple(replace(score, nll_all=score.nll_all + 10 * nats) for score, nats in scores)
    searched = {1: Setting((lowest,)), 2: Setting((replace(rival, scores=noisy),))}
    unknown = not_known(outcome(3.0, {4: 2.2, 16: 2.0}, 1, ends, searched))
    assert unknown[:3] == [
        "rows unlike these 40",
        "other seeds (one was trained)",
        "larger learning rates (1e-3 is the largest tried)",
    ]
    match = re.fullmatch(
        r"which rate is best \(about ([\d,]+) validation rows would tell, here 60\)", unknown[3]
    )
    assert match
    # (1.96 + 0.84)² · (0.1 / 0.01)² groups of deviation 0.1 for 60/40 rows each, and the assurance
    # of a pilot's deviation.
    textbook = (1.96 + 0.8416) ** 2 * (0.1 / 0.01) ** 2 * 60 / 40
    assert textbook < int(match[1].replace(",", "")) < 1.6 * textbook
    more = not_known(outcome(3.0, {4: 2.2, 16: 2.0}, seeds=3))
    assert not any("seeds" in phrase or "rate" in phrase for phrase in more)


def test_usual_rate_may_be_the_chosen_one_or_stopped() -> None:
    own = (arm(4, candidate(2e-4, 2.0, kept=True), chosen=2e-4),)
    assert (
        "none of the others tried was better than 2e-4" in sentences(outcome(3, {4: 2}, 1, own))[-1]
    )
    own = (arm(4, candidate(2e-4, None, stopped="diverged"), BEST, chosen=1e-3),)
    assert sentences(outcome(3, {4: 2}, 1, own))[-1] == (
        "At the usual 2e-4 training was stopped: diverged."
    )


def test_record_is_json_without_infinities() -> None:
    document = record(outcome(3.0, {4: 2.2, 16: 2.0}, seeds=2))
    text = json.dumps(document, allow_nan=False)
    assert json.loads(text)["gain"]["nats"] == pytest.approx(1.0)
    assert document["recommended"]["perplexity"] == pytest.approx(math.exp(2.0))
    assert document["usual"]["lost"] == [0.1, 0.08, 0.12]
    assert [pair["verdict"] for pair in document["settings"]] == ["different"]
