"""Whether to ship a setting of an experiment: its conditions as lines and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slm_lora.config.conditions import Condition
from slm_lora.errors import DO_NOT_SHIP, NOT_ENOUGH_EVIDENCE, UsageError
from slm_lora.report.analysis import Analysis
from slm_lora.runs.metrics import FORGETTING
from slm_lora.stats.settings import Setting, base_of
from slm_lora.stats.ship import GAIN, Decision, Judged, decision, judge

WIDTH = 100
"""Columns of the longest line."""
EXIT_CODES: dict[Decision, int] = {
    "ship": 0,
    "do not ship": DO_NOT_SHIP,
    "not enough evidence": NOT_ENOUGH_EVIDENCE,
}


@dataclass(frozen=True)
class Verdict:
    """The conditions of an experiment, judged on one setting.

    Attributes:
        experiment: name.
        setting: that is judged.
        name: of the setting.
        candidates: settings from which it was recommended; 1 if the user named it.
        judged: every condition.
    """

    experiment: str
    setting: Setting
    name: str
    candidates: int
    judged: tuple[Judged, ...]

    @property
    def decision(self) -> Decision:
        """From all conditions."""
        return decision(self.judged)

    @property
    def exit_code(self) -> int:
        """Of `slm-lora verdict`."""
        return EXIT_CODES[self.decision]

    def lines(self) -> list[str]:
        """A line per condition, then the verdict; a hint that does not fit has a line of its
        own."""
        width = max(len(str(each.condition)) for each in self.judged)
        return [*(line for each in self.judged for line in _lines(each, width)), self._last_line()]

    def _last_line(self) -> str:
        count, decided = len(self.judged), self.decision
        conditions = "condition" if count == 1 else "conditions"
        states = [each.state for each in self.judged]
        seeds = len(self.setting.runs)
        rest = {
            "ship": f" meets {count} of {count} {conditions}",
            "do not ship": f" violates {states.count('violated')} of {count} {conditions}",
            "not enough evidence": f" leaves {states.count('undecided')} of {count} {conditions} "
            "undecided",
        }[decided]
        if self.candidates > 1:
            rest = f", recommended of {self.candidates} settings,{rest}"
        rest += f" ({seeds} seeds)" if seeds > 1 else " (one seed)"
        room = WIDTH - len(f"{decided}: {rest}")
        name = self.name if len(self.name) <= room else f"{self.name[: room - 1]}…"
        return f"{decided}: {name}{rest}"

    def record(self) -> dict[str, Any]:
        """For JSON, which has no infinity: an end that is not known is null."""
        return {
            "experiment": self.experiment,
            "setting": self.name,
            "cells": [run.run.cell for run in self.setting.runs],
            "candidates": self.candidates,
            "seeds": len(self.setting.runs),
            "verdict": self.decision,
            "exit_code": self.exit_code,
            "conditions": [_record(each) for each in self.judged],
        }


def make_verdict(
    analysis: Analysis, conditions: Sequence[Condition], setting_name: str = ""
) -> Verdict:
    """Judge conditions on a setting of an experiment.

    Args:
        analysis: of the experiment.
        conditions: at least one.
        setting_name: name in the report, or of a cell; empty: the recommended setting.

    Raises:
        UsageError: no setting was trained, none has the name, or a condition names what was not
            measured.
    """
    experiment = analysis.runs[0].run.record.experiment
    recommended = analysis.card.recommended
    if recommended is None:
        raise UsageError(f"{experiment}: only the base was scored; a verdict is on a setting")
    setting, candidates = recommended, 1
    if setting_name:
        setting = _named(analysis, setting_name)
    else:
        rows = recommended.first_run.run.record.data.held_out_sha256
        candidates = sum(
            each.first_run.run.record.data.held_out_sha256 == rows for each in analysis.settings
        )
    judged = judge(setting, base_of(setting, analysis.bases), conditions, candidates)
    return Verdict(experiment, setting, analysis.names.of(setting), candidates, tuple(judged))


def _named(analysis: Analysis, name: str) -> Setting:
    names = analysis.names
    matching = [
        setting
        for setting in analysis.settings
        if name in (names.of(setting), setting.name, *(run.run.cell for run in setting.runs))
    ]
    if len(matching) != 1:
        problem = f"{len(matching)} settings have this name" if matching else "no such setting"
        known = "; ".join(map(names.of, analysis.settings))
        raise UsageError(f"--setting {name}: {problem}; the settings are: {known}")
    return matching[0]


def _lines(each: Judged, width: int) -> list[str]:
    signed = each.condition.measurement.partition(":")[0] in (GAIN, FORGETTING)
    sign = "+" if signed else ""
    number = f"{{:{sign}.4f}}".format
    span = f"({number(each.low)} to {number(each.high)})"
    if math.isinf(each.low) and math.isinf(each.high):
        span = "(no interval)"
    start = f"{each.state:9}  {each.condition!s:{width}}  {number(each.value)} {span}"
    hint = each.hint()
    end = f"; {hint}" if hint else ""
    with_unit = f"{start} {each.measurement.unit}".rstrip()
    fitting = [line for line in (with_unit + end, start + end) if len(line) <= WIDTH]
    return fitting[:1] or [start, *([f"{'':11}{hint}"] if hint else [])]


def _record(each: Judged) -> dict[str, Any]:
    sample = each.measurement.sample
    return {
        "condition": str(each.condition),
        "measurement": each.condition.measurement,
        "operator": each.condition.operator,
        "bound": each.condition.bound,
        "state": each.state,
        "value": each.value,
        "low": each.low if math.isfinite(each.low) else None,
        "high": each.high if math.isfinite(each.high) else None,
        "unit": each.measurement.unit,
        "error_met": each.error_met,
        "error_violated": each.error_violated,
        "rows": each.measurement.rows,
        "groups": sample.groups,
        "repetitions": sample.units,
        "hint": each.hint(),
        "needed_rows": each.needed.rows if each.needed else None,
        "needed_seeds": each.needed.seeds if each.needed else None,
    }
