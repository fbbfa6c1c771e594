"""The tuning phase in a report: curves, candidates, and what the tuned key had to do with a
difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slm_lora.config.axes import LEARNING_RATE
from slm_lora.report.blocks import Fact, Picture, Section, markdown_table, plain
from slm_lora.report.drawing import INK, LINES, MARKERS, SHADE, new_axes, picture, styled
from slm_lora.report.names import SettingNames, key_name, rate_name
from slm_lora.runs.scored_run import ScoredRun
from slm_lora.runs.tuning import ArmRecord, CandidateRecord, TuningRecord
from slm_lora.stats.comparisons import ALPHA, Comparison
from slm_lora.stats.inference import Difference
from slm_lora.stats.settings import Setting
from slm_lora.stats.splits import Split, splits
from slm_lora.stats.tuned_arms import TunedArm, arm_of, common_values


@dataclass(frozen=True)
class Tuned:
    """The tuning phase of an experiment.

    Attributes:
        record: tuning.json.
        arms: searches with validation scores.
        common: values that all settings were tried at; None where there are none.
        splits: comparisons at these values and at each setting's own.
    """

    record: TuningRecord
    arms: tuple[TunedArm, ...]
    common: dict[str, float] | None
    splits: tuple[Split, ...]

    def summary(self) -> dict[str, Any]:
        """For metrics.json: the values, and every difference in its two parts."""
        return {
            "search": self.record.search,
            "chosen": {arm.name: arm.chosen for arm in self.record.arms},
            "edges": {arm.name: arm.edges for arm in self.record.arms if arm.edges},
            "common": self.common,
            "splits": [part.record() for part in self.splits],
        }

    def arm_of(self, setting: Setting) -> ArmRecord:
        """The search of a setting."""
        arm = arm_of(setting, self.arms)
        assert arm is not None
        return arm.record


def tuned_keys(record: TuningRecord | None, runs: Sequence[ScoredRun]) -> tuple[str, ...]:
    """The tuned keys, where all trained runs have the values that tuning.json chose for them."""
    if record is None:
        return ()
    arms = [TunedArm(arm, {}) for arm in record.arms]
    for run in runs:
        if run.is_base:
            continue
        setting = Setting((run,))
        arm = next(
            (
                arm
                for arm in arms
                if all(
                    _as_json(setting.setting(key)) == _as_json(value)
                    for key, value in (arm.record.settings | arm.record.chosen).items()
                )
            ),
            None,
        )
        if arm is None:
            return ()
    return record.keys


def _as_json(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def tuned(
    record: TuningRecord, arms: Sequence[TunedArm], comparisons: Sequence[Comparison]
) -> Tuned:
    """The tuning phase with its validation scores."""
    common = common_values(arms, record)
    parts = splits(comparisons, arms, common) if common else []
    return Tuned(record, tuple(arms), common, tuple(parts))


def value_text(key: str, value: float) -> str:
    """A tuned value: ``2e-4`` for a learning rate."""
    return rate_name(value) if key == LEARNING_RATE else f"{value:g}"


def values_text(values: dict[str, float]) -> str:
    """The values of all tuned keys."""
    return ", ".join(value_text(key, value) for key, value in values.items())


def keys_text(record: TuningRecord) -> str:
    """The tuned keys in words."""
    return " and ".join(map(key_name, record.keys))


def facts(phase: Tuned, settings: Sequence[Setting], names: SettingNames) -> list[Fact]:
    """Lines of the card: how values were chosen, what they explain, edges."""
    record = phase.record
    seeds = f"seed{'s' * (len(record.seeds) > 1)} {', '.join(map(str, record.seeds))}"
    own = [phase.arm_of(setting) for setting in settings]
    chosen = [arm.chosen[record.keys[0]] for arm in own]
    kept = sorted({len(arm.kept) for arm in own})
    span = " to ".join(
        dict.fromkeys(value_text(record.keys[0], end) for end in (min(chosen), max(chosen)))
    )
    counts = " to ".join(map(str, dict.fromkeys((kept[0], kept[-1]))))
    counts = "only that value" if kept[-1] == 1 else f"{counts} values"
    lines = [
        Fact(
            key_name(record.keys[0]).capitalize(),
            f"each setting's own ({span}), the lowest on {record.validation_rows} validation rows "
            f"({seeds}); {counts} per setting may be the best.",
            "tuning",
        )
    ]
    if part := _largest(phase.splits):
        lines.append(
            Fact(
                "One rate for all" if LEARNING_RATE in record.keys else "One value for all",
                split_text(part, phase, names),
                "tuning",
            )
        )
    at_edge = [
        f"{names.of(setting)}: {value_text(key, arm.chosen[key])} is the "
        f"{'largest' if end == 'high' else 'smallest'} {key_name(key)} tried"
        for setting, arm in zip(settings, own, strict=True)
        for key, end in arm.edges.items()
    ]
    if at_edge:
        shown = at_edge if len(at_edge) < 4 else [*at_edge[:3], f"{len(at_edge) - 3} more"]
        text = f"{'; '.join(shown)}. No best value is claimed there."
        lines.append(Fact("Edge of the search", text, "tuning"))
    return lines


def _largest(parts: Sequence[Split]) -> Split | None:
    clear = [part for part in parts if part.at_common.excludes_zero]
    return max(clear, key=lambda part: abs(part.at_common.value), default=None)


def split_text(part: Split, phase: Tuned, names: SettingNames) -> str:
    """A difference at one value for all, at each one's own, and the part that is gone."""
    assert phase.common is not None
    first, second = names.of(part.comparison.first), names.of(part.comparison.second)
    common, own = part.at_common.value, part.at_own.value
    key = keys_text(phase.record)
    share = part.share
    if share is None:
        rest = f"it is {own:+.4f}"
    elif not part.at_own.excludes_zero:
        span = f"{own:+.4f}, {part.at_own.low:+.4f} to {part.at_own.high:+.4f}"
        rest = (
            f"they are equivalent ({span}): it was due to the {key}"
            if part.at_own.p_equivalence < ALPHA
            else f"no clear difference is left ({span})"
        )
    elif share > 1:
        rest = f"the order turns round ({own:+.4f})"
    elif share < 0:
        rest = f"it is larger ({own:+.4f})"
    else:
        rest = f"{own:+.4f} is left: {100 * share:.0f} % were due to the {key}"
    direction = "lower" if common < 0 else "higher"
    return (
        f"with {values_text(phase.common)} for both, {second} is {abs(common):.4f} nats {direction}"
        f" than {first}; each at its own {key} {rest} (validation rows)."
    )


def section(phase: Tuned, settings: Sequence[Setting], names: SettingNames) -> Section:
    """The searches: text, curves, splits, candidates."""
    record = phase.record
    candidates = [candidate for arm in record.arms for candidate in arm.candidates]
    tokens = sum(candidate.tokens for candidate in candidates)
    to_end = sum(candidate.tokens_to_end for candidate in candidates)
    stopped = sum(bool(candidate.stopped) for candidate in candidates)
    text = (
        f"Every setting has its own {keys_text(record)}: the value of the lowest loss on "
        f"{record.validation_rows} validation rows in {record.validation_groups} groups, of runs "
        f"with seeds ({', '.join(map(str, record.seeds))}) and training rows of their own. The "
        "choice was sealed in `tuning.json` before any run was scored on test rows. "
        f"{len(candidates)} values were tried for {len(record.arms)} settings, {stopped} of them "
        f"stopped before the end: {100 * (1 - tokens / to_end):.0f} % of the training tokens were "
        "saved. Values that may be the best: 95 % confidence, paired by groups of validation rows; "
        "seeds are not covered with one tuning seed."
    )
    return Section(
        f"{key_name(record.keys[0]).capitalize()} of each setting",
        "\n\n".join(
            [text, *_splits_table(phase, names), _candidates_table(phase, settings, names)]
        ),
        tuple(shown for shown in [curves(phase, settings, names)] if shown),
        anchor="tuning",
    )


def _splits_table(phase: Tuned, names: SettingNames) -> list[str]:
    if not phase.splits or phase.common is None:
        return []
    rows = [
        [
            plain(f"{names.of(part.comparison.second)} vs {names.of(part.comparison.first)}"),
            _span(part.at_common),
            _span(part.at_own),
            _span(part.comparison.difference),
            "–" if part.share is None else f"{100 * part.share:.0f} %",
        ]
        for part in phase.splits
    ]
    key = keys_text(phase.record)
    table = markdown_table(
        [
            "First minus second", f"Both at {values_text(phase.common)}, validation",
            "Each at its own, validation", "Each at its own, test",
            f"Due to the {key}",
        ],
        rows,
    )  # fmt: skip
    note = (
        f"Loss differences, nats per token (95 %, over rows). Due to the {key}: part of the first "
        "difference that is gone in the second; over 100 %: the order turns round."
    )
    return [f"{table}\n{note}"]


def _span(difference: Difference) -> str:
    if not math.isfinite(difference.low + difference.high):
        return f"{difference.value:+.4f}"
    return f"{difference.value:+.4f} ({difference.low:+.4f}, {difference.high:+.4f})"


def _candidates_table(phase: Tuned, settings: Sequence[Setting], names: SettingNames) -> str:
    record = phase.record
    rows = []
    for setting in settings:
        arm = phase.arm_of(setting)
        ordered = sorted(arm.candidates, key=lambda candidate: tuple(candidate.values.values()))
        cells = [_candidate_text(candidate, arm) for candidate in ordered]
        rows.append([plain(names.of(setting)), "; ".join(cells)])
    table = markdown_table(
        ["Setting", f"{key_name(record.keys[0]).capitalize()}: validation loss"], rows, left=(0, 1)
    )
    return f"{table}\nBold: chosen. Asterisk: may be the best."


def _candidate_text(candidate: CandidateRecord, arm: ArmRecord) -> str:
    values = values_text(candidate.values)
    if candidate.loss is None:
        return f"{values}: {plain(candidate.stopped)}"
    text = f"{values}: {candidate.loss:.4f}{'*' * candidate.kept}".replace("*", "\\*")
    return f"**{text}**" if candidate.values == arm.chosen else text


def _ticks(key: str, values: Sequence[float]) -> tuple[list[float], list[str]]:
    """Ticks at values that were tried, as many as have room for their labels."""
    span = math.log(values[-1] / values[0]) or 1.0
    shown: list[float] = []
    for value in values:
        if not shown or math.log(value / shown[-1]) > span / 9:
            shown.append(value)
    return shown, [value_text(key, value) for value in shown]


@styled
def curves(phase: Tuned, settings: Sequence[Setting], names: SettingNames) -> Picture | None:
    """Validation loss against the first tuned key, a curve per setting."""
    record, key = phase.record, phase.record.keys[0]
    lines = []
    for setting in settings:
        arm = phase.arm_of(setting)
        others = {name: value for name, value in arm.chosen.items() if name != key}
        points = [
            (candidate.values[key], candidate)
            for candidate in arm.candidates
            if all(candidate.values[name] == value for name, value in others.items())
        ]
        points.sort(key=lambda point: point[0])
        lines.append((setting, arm, points))
    losses = [c.loss for _, _, points in lines for _, c in points if c.loss is not None]
    if not losses:
        return None
    figure, axes = new_axes(3.6)
    top = min(max(losses), max(record.base_loss, min(losses)) + 0.05)
    room = max(top - min(losses), 0.01)
    axes.axhline(record.base_loss, color=SHADE, lw=0.8, ls=":")
    for index, (setting, arm, points) in enumerate(lines):
        color = INK if index % 2 == 0 else SHADE
        finished = [(x, c.loss) for x, c in points if c.loss is not None]
        marker = MARKERS[index % len(MARKERS)]
        axes.plot(
            [x for x, _ in finished], [y for _, y in finished],
            LINES[index // 2 % len(LINES)], color=color, lw=1.2,
            marker=marker, ms=5, mfc="white", mec=color, label=names.of(setting),
        )  # fmt: skip
        kept = [(x, c.loss) for x, c in points if c.kept and c.loss is not None]
        axes.plot([x for x, _ in kept], [y for _, y in kept], marker, ms=5, color=color)
        best = arm.chosen[key]
        axes.plot(
            [best], [next(y for x, y in finished if x == best)], "o", ms=12, mfc="none", mec=color
        )
        gone = [x for x, c in points if c.loss is None]
        axes.plot(gone, [top + 0.04 * room] * len(gone), "x", ms=5, color=color)
    axes.set_xscale("log")
    values = sorted({x for _, _, points in lines for x, _ in points})
    axes.set_xticks(*_ticks(key, values))
    axes.minorticks_off()
    axes.set_ylim(min(losses) - 0.06 * room, top + 0.09 * room)
    axes.set_xlabel(key_name(key))
    axes.set_ylabel("validation loss, nats per token")
    axes.legend(title="setting", title_fontsize=8, frameon=False, fontsize=8)
    return picture(
        "tuning",
        figure,
        f"Validation loss against {key_name(key)}, mean over tuning seeds. Circled: chosen. "
        "Filled: may be the best (95 % confidence). Cross: stopped before the end. Dotted: the "
        "base.",
    )
