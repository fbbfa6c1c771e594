"""Comparisons by a judge in a report: win rates, and how far the judge can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from slm_lora.report.blocks import Section, markdown_table, plain
from slm_lora.report.names import SettingNames
from slm_lora.runs.judge import JUDGE_FILE, WIN_RATE, JudgedPair, Judgement, read_judgement
from slm_lora.runs.metrics import METRICS
from slm_lora.runs.scored_run import ScoredRun, has_metric
from slm_lora.stats.estimates import Estimate, estimate_of_sums
from slm_lora.stats.inference import interval
from slm_lora.stats.settings import Setting, base_of, pair_runs, sample_of


def position_bias(judgement: Judgement, runs: Sequence[ScoredRun]) -> Estimate | None:
    """Share of answers for the first place among those for either, clustered by group of rows;
    None if all are ties."""
    group_of = {score.row_id: score.group_id for run in runs for score in run.scores}
    sums: dict[str, list[int]] = {}
    for pair in judgement.pairs:
        first, decided = pair.first_and_decided
        if decided:
            own = sums.setdefault(group_of.get(pair.row, pair.row), [0, 0])
            own[0] += first
            own[1] += decided
    if not sums:
        return None
    parts = np.array([*sums.values()], dtype=np.float64)
    return estimate_of_sums(parts[:, 0], parts[:, 1])


def judge_section(
    runs: Sequence[ScoredRun], settings: Sequence[Setting], names: SettingNames, results: Path
) -> list[Section]:
    """The section of the report; empty where no judge was asked."""
    judgement = read_judgement(results / JUDGE_FILE)
    if judgement is None:
        return []
    bases = [Setting((run,)) for run in runs if run.is_base]
    metric = METRICS[WIN_RATE]
    rows = []
    for setting in settings:
        base = base_of(setting, bases)
        if base is None or not all(has_metric(run, metric) for run in setting.runs):
            continue
        low, high = interval(sample_of(pair_runs(base, setting), metric), 0.95)
        own = [
            pair
            for pair in judgement.pairs
            if pair.run in {run.run.record.hash for run in setting.runs}
        ]
        scores = [pair.score for pair in own if pair.row in judgement.rows]
        counts = [sum(scores.count(value) for value in values) for values in _OUTCOMES]
        rows.append(
            [
                names.of(setting),
                f"{setting.estimate(metric).value:.3f}",
                f"{max(0.0, 0.5 + low):.3f} to {min(1.0, 0.5 + high):.3f}",
                *map(str, counts),
                str(sum(pair.flips for pair in own)),
                str(sum(pair.score is None for pair in own)),
            ]
        )
    header = ("Setting", "Win rate", "95 % interval", "won", "tie", "lost", "flips", "unreadable")
    text = (
        f"{plain(str(judgement.header.settings.get('model', '')))} compared the replies of each "
        f"adapter with the base's on {len(judgement.rows)} test rows, in both orders; a tie counts "
        "half. Won and lost: mean of both orders above or below one half, over all seeds. Flips: "
        "the same place won in both orders. Rows with an unreadable answer are left out of all "
        f"win rates. {' '.join(_trust(judgement, runs))}"
    )
    table = f"\n\n{markdown_table(header, rows)}" if rows else ""
    return [Section("Judge", text + table, anchor="judge", folded=True)]


def judge_lines(runs: Sequence[ScoredRun], results: Path) -> list[str]:
    """The end of `slm-lora judge`."""
    judgement = read_judgement(results / JUDGE_FILE)
    if judgement is None:
        return []
    by_hash: dict[str, list[JudgedPair]] = {}
    for pair in judgement.pairs:
        by_hash.setdefault(pair.run, []).append(pair)
    metric = METRICS[WIN_RATE]
    lines = []
    for run in runs:
        if (pairs := by_hash.get(run.run.record.hash)) and has_metric(run, metric):
            value = Setting((run,)).estimate(metric)
            lines.append(
                f"{run.run.cell}  win rate {value.value:.3f} "
                f"({max(0.0, value.low):.3f} to {min(1.0, value.high):.3f}), {len(pairs)} pairs"
            )
    return [*lines, *_trust(judgement, runs)]


_OUTCOMES = ((1.0, 0.75), (0.5,), (0.0, 0.25))
"""Scores of a pair that count as won, tie and lost."""


def _trust(judgement: Judgement, runs: Sequence[ScoredRun]) -> list[str]:
    flips = sum(pair.flips for pair in judgement.pairs)
    unreadable = sum(
        answer is None
        for pair in judgement.pairs
        for answer in (pair.base_first, pair.adapter_first)
    )
    bias = position_bias(judgement, runs)
    lines = []
    if bias is not None:
        lines.append(
            f"Position bias: the first reply wins {bias.value:.3f} of decided answers "
            f"({max(0.0, bias.low):.3f} to {min(1.0, bias.high):.3f}; 0.5 is none)."
        )
    lines.append(
        f"{flips} of {len(judgement.pairs)} pairs flip with the order; unreadable answers: "
        f"{unreadable}."
    )
    return lines
