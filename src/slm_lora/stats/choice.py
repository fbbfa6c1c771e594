"""The choice among tuned values: the lowest on the validation set, and those that may be the best.

The kept values are a best set (multiple comparisons with the best, Hsu 1981), paired by groups of
validation rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from slm_lora.runs.scored_run import ScoredRun
from slm_lora.runs.tuning import ArmRecord, CandidateRecord
from slm_lora.stats.inference import interval, p_below
from slm_lora.stats.selection import best_members
from slm_lora.stats.settings import Setting, pair_runs, sample_of
from slm_lora.stats.tuning import End


@dataclass(frozen=True)
class Candidate:
    """A point of a search with its finished runs, one per tuning seed.

    Attributes:
        values: of the tuned keys.
        runs: scored on the validation set; none where one was stopped.
        stopped: why; empty for finished ones.
        tokens: computed in training.
        tokens_to_end: as many as without stopping.
    """

    values: Mapping[str, float]
    runs: tuple[ScoredRun, ...]
    stopped: str
    tokens: int
    tokens_to_end: int


def arm_record(
    name: str,
    settings: Mapping[str, object],
    candidates: Sequence[Candidate],
    chosen: Mapping[str, float],
    edges: Mapping[str, End],
) -> ArmRecord:
    """The record of one search with differences to the lowest and the kept values."""
    finished = [candidate for candidate in candidates if candidate.runs]
    arms = [Setting(candidate.runs) for candidate in finished]
    kept = {id(finished[index]) for index in best_members(len(arms), _p_worse(arms))}
    lowest = next(
        arm for arm, candidate in zip(arms, finished, strict=True) if candidate.values == chosen
    )
    records = []
    for candidate in candidates:
        loss, above = None, None
        if candidate.runs:
            setting = Setting(candidate.runs)
            loss = setting.estimate().value
            sample = sample_of(pair_runs(lowest, setting), lowest.metric)
            low, high = interval(sample, 0.95)
            above = (sample.value, low, high) if math.isfinite(low + high) else None
        records.append(
            CandidateRecord(
                values=dict(candidate.values),
                loss=loss,
                stopped=candidate.stopped,
                above_lowest=above,
                kept=id(candidate) in kept,
                tokens=candidate.tokens,
                tokens_to_end=candidate.tokens_to_end,
                folders=tuple(run.run.folder.name for run in candidate.runs),
            )
        )
    return ArmRecord(
        name=name,
        settings=dict(settings),
        chosen=dict(chosen),
        edges=dict(edges),
        candidates=tuple(records),
    )


def _p_worse(arms: Sequence[Setting]) -> Callable[[int, int], float]:
    def p(index: int, other: int) -> float:
        sample = sample_of(pair_runs(arms[other], arms[index]), arms[index].metric)
        return p_below(sample, arms[index].metric.cost(sample.value))

    return p
