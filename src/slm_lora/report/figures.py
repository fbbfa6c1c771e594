"""Figures of a report, as SVG: markers, fillings and line styles differ, not colours."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slm_lora.report.blocks import Picture
from slm_lora.report.card import Card
from slm_lora.report.drawing import INK, LIGHT, LINES, MARKERS, SHADE, new_axes, picture, styled
from slm_lora.report.names import SettingNames
from slm_lora.stats.comparisons import Comparison
from slm_lora.stats.estimates import perplexity
from slm_lora.stats.inference import LEAST_GROUPS, Difference
from slm_lora.stats.learning_curve import LearningCurve
from slm_lora.stats.selection import cost
from slm_lora.stats.settings import Setting, amount

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_LABELS, LONGEST_LABEL = 8, 24
"""Settings, and characters of a name, that have room inside a drawing."""
FILLS = ("white", SHADE, INK)


@styled
def gaps(card: Card, names: SettingNames) -> Picture | None:
    """Every setting, and the base, against the recommended one, in the order of cost."""
    if card.recommended is None:
        return None
    others = list(card.gaps)
    widest = max((abs(gap.value) for gap in others), default=0.0)
    shows_base = card.base is not None and (
        widest == 0 or abs(card.base.value) < 2.5 * max(widest, card.margin)
    )
    if shows_base and card.base is not None:
        others.insert(0, card.base)
    if not others:
        return None
    figure, axes = new_axes(0.9 + 0.34 * (len(others) + 1))
    axes.axvspan(-card.margin, card.margin, color=LIGHT, lw=0)
    axes.axvline(0, color=INK, lw=0.8)
    # The recommended setting has its place in the order of cost.
    place = sum(
        gap.setting.first_run.is_base or cost(gap.setting) <= cost(card.recommended)
        for gap in others
    )
    labels = [names.of(gap.setting) for gap in others]
    labels.insert(place, f"{names.of(card.recommended)} (recommended)")
    rows = [row for row in range(len(labels)) if row != place]
    for row, gap in zip(rows, others, strict=True):
        at = len(labels) - 1 - row
        if math.isfinite(gap.low + gap.high):
            axes.plot([gap.low, gap.high], [at, at], color=INK, lw=1.2)
        axes.plot(
            [gap.value], [at], "o", ms=6, color=INK, mfc=INK if gap.excludes_zero else "white"
        )
    axes.plot([0], [len(labels) - 1 - place], marker="D", ms=7, color=INK, mfc=INK)
    axes.set_yticks(range(len(labels)), labels[::-1])
    axes.set_ylim(-0.6, len(labels) - 0.4)
    axes.set_xlabel("loss above that of the recommended setting, nats per token (right: worse)")
    seeds = sorted({gap.seeds for gap in others})
    covers = (
        f"test rows and {' or '.join(map(str, seeds))} seeds"
        if seeds[0] > 1
        else "test rows; one seed"
    )
    base = (
        ""
        if shows_base or card.base is None
        else f" The base is off the scale, at {card.base.value:+.3f}."
    )
    return picture(
        "settings",
        figure,
        f"Loss of each setting minus that of the recommended one, paired on the same test rows, "
        f"with 95 % intervals ({covers}), cheapest setting on top. Filled: the interval excludes "
        "zero. "
        f"Grey band: equivalence margin (±{card.margin:g} nats).{base} Intervals are not corrected "
        "for the number of settings.",
    )


@styled
def training_curves(settings: Sequence[Setting], names: SettingNames) -> Picture | None:
    """Training loss by step, smoothed; the first seed of every setting."""
    if not settings:
        return None
    figure, axes = new_axes(3.2)
    for index, setting in enumerate(settings):
        steps = setting.first_run.run.steps()
        losses = [step["loss"] for step in steps]
        window = max(1, len(losses) // 20)
        smooth = [
            sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window)
            for i in range(len(losses))
        ]
        axes.plot(
            [step["step"] for step in steps], smooth, LINES[index // 2 % len(LINES)],
            color=INK if index % 2 == 0 else SHADE, lw=1.3 + index // (2 * len(LINES)),
            label=names.of(setting),
        )  # fmt: skip
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss, nats per token")
    _legend(axes, "setting", below=_crowded(settings, names))
    return picture(
        "training",
        figure,
        "Training loss by optimizer step (running mean over 5 % of the steps, first seed of each "
        "setting), with dropout, so not comparable with the held-out losses.",
    )


@styled
def perplexity_along(
    key: str, label: str, series: Sequence[Sequence[Setting]], names: SettingNames
) -> Picture | None:
    """Perplexity of settings that differ in one number; one line per series."""
    if not series:
        return None
    figure, axes = new_axes(3.0)
    ticks = sorted({_amount(setting, key) for settings in series for setting in settings})
    for index, settings in enumerate(series):
        shift = 1 + 0.02 * (index - (len(series) - 1) / 2)
        losses = [setting.estimate() for setting in settings]
        middle = [perplexity(loss.value) for loss in losses]
        bars = None
        if all(loss.groups > 1 for loss in losses):
            bars = [
                [m - perplexity(loss.low) for m, loss in zip(middle, losses, strict=True)],
                [perplexity(loss.high) - m for m, loss in zip(middle, losses, strict=True)],
            ]
        axes.errorbar(
            [_amount(setting, key) * shift for setting in settings], middle, yerr=bars,
            marker=MARKERS[index % len(MARKERS)], ms=6, capsize=3, lw=1,
            ls=LINES[index % len(LINES)], color=INK if index % 2 == 0 else SHADE,
            label=names.series(key, settings[0]),
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("training rows" if key == "data.size" else label)
    axes.set_ylabel("perplexity")
    if len(series) > 1:
        _legend(axes, names.series_keys(key), below=len(series) > MOST_LABELS, columns=1)
    return picture(
        f"perplexity-{key.rsplit('.', 1)[-1]}",
        figure,
        f"Perplexity against {label}, with unpaired 95 % intervals over the choice of test rows. "
        "All points share these rows, so paired differences are more precise than the intervals "
        "suggest (see the comparisons).",
    )


def _amount(setting: Setting, key: str) -> float:
    value = amount(setting, key)
    assert value is not None
    return value


@styled
def forest(
    name: str, comparisons: Sequence[Comparison], title: str, names: SettingNames
) -> Picture | None:
    """Differences with their intervals and the equivalence margin."""
    if not comparisons:
        return None
    figure, axes = new_axes(0.7 + 0.32 * len(comparisons))
    margin = comparisons[0].difference.margin
    axes.axvspan(-margin, margin, color=LIGHT, lw=0)
    axes.axvline(0, color=INK, lw=0.8)
    bottom_up = comparisons[::-1]
    for row, comparison in enumerate(bottom_up):
        _interval(axes, row, comparison.difference, filled=comparison.verdict == "different")
    axes.set_yticks(
        range(len(comparisons)),
        [f"{names.of(pair.second)} vs {names.of(pair.first)}" for pair in bottom_up],
    )
    axes.set_ylim(-0.6, len(comparisons) - 0.4)
    axes.set_xlabel("loss difference, nats per token (left: lower loss)")
    covers = " or ".join(dict.fromkeys(pair.difference.covers for pair in comparisons))
    return picture(
        name,
        figure,
        f"{title}: paired differences with 95 % intervals over {covers}. Filled: significant after "
        f"correction for all comparisons. Grey band: ±{margin:g} nats, the equivalence margin.",
    )


def _interval(axes: Axes, row: int, difference: Difference, filled: bool) -> None:
    if math.isfinite(difference.low + difference.high):
        axes.plot([difference.low, difference.high], [row, row], color=INK, lw=1.2)
    axes.plot([difference.value], [row], "o", ms=6, color=INK, mfc=INK if filled else "white")


@styled
def categories(
    differences: Sequence[tuple[str, int, Difference]], second: str, first: str
) -> Picture | None:
    """Differences within each category of rows: name, rows, difference."""
    if len(differences) < 2:
        return None
    figure, axes = new_axes(0.7 + 0.3 * len(differences))
    axes.axvline(0, color=INK, lw=0.8)
    bottom_up = differences[::-1]
    for row, (_, _, difference) in enumerate(bottom_up):
        significant = difference.excludes_zero
        _interval(axes, row, difference, filled=significant)
    axes.set_yticks(range(len(differences)), [f"{name} ({rows})" for name, rows, _ in bottom_up])
    axes.set_ylim(-0.6, len(differences) - 0.4)
    axes.set_xlabel("loss difference, nats per token (left: lower loss)")
    return picture(
        "categories",
        figure,
        f"{second} vs {first} by category (test rows in brackets; categories of {LEAST_GROUPS} "
        "groups or more), with 95 % intervals, not corrected for the number of "
        "categories. Filled: the interval excludes zero.",
    )


@styled
def time_and_loss(settings: Sequence[Setting], names: SettingNames) -> Picture | None:
    """Loss against training time."""
    if len(settings) < 2:
        return None
    figure, axes = new_axes(3.0)
    points = []
    crowded = _crowded(settings, names)
    for index, setting in enumerate(settings):
        seconds = sum(run.run.record.trained.seconds for run in setting.runs)
        minutes, loss = seconds / len(setting.runs) / 60, setting.estimate().value
        axes.plot(
            [minutes], [loss], marker=MARKERS[index % len(MARKERS)], ms=7, color=INK,
            mfc=FILLS[index // len(MARKERS) % len(FILLS)], ls="" if crowded else "-",
            label=names.of(setting),
        )  # fmt: skip
        points.append((minutes, loss))
    axes.set_xlabel("training time, minutes")
    axes.set_ylabel("held-out loss, nats per token")
    axes.margins(0.15)
    if crowded:
        _legend(axes, "setting", below=True)
    else:
        label_points(figure, axes, points, [names.of(setting) for setting in settings])
    return picture(
        "time",
        figure,
        "Held-out loss against training time, means over seeds. Other programs on the machine may "
        "have increased the time.",
    )


@dataclass(frozen=True, slots=True)
class GainPoint:
    """A setting in `gain_against`: name, and value, low and high along both axes."""

    name: str
    change: tuple[float, float, float]
    gain: tuple[float, float, float]


@styled
def gain_against(
    name: str, label: str, settings: Sequence[GainPoint], margin: float = 0.0
) -> Picture:
    """Gain over the base against what was lost for it; the base is at the origin.

    Args:
        name: of the file.
        label: of the horizontal axis, in words.
        settings: the points.
        margin: of non-inferiority, drawn as a line; 0: none.
    """
    figure, axes = new_axes(3.4)
    axes.axhline(0, color=LIGHT, lw=0.8, zorder=0)
    axes.axvline(0, color=LIGHT, lw=0.8, zorder=0)
    if margin:
        axes.axvline(margin, color=SHADE, lw=1, ls="--", zorder=0)
    axes.plot([0], [0], marker="x", ms=7, color=INK, ls="", label="base")
    longest = max(len(point.name) for point in settings)
    crowded = len(settings) > MOST_LABELS or longest > LONGEST_LABEL
    for index, point in enumerate(settings):
        axes.errorbar(
            [point.change[0]], [point.gain[0]], xerr=_bars(point.change), yerr=_bars(point.gain),
            marker=MARKERS[index % len(MARKERS)], mfc=FILLS[index // len(MARKERS) % len(FILLS)],
            ms=6, color=INK, ecolor=SHADE, elinewidth=1, ls="", label=point.name,
        )  # fmt: skip
    axes.set_xlabel(f"{label}, nats per token (left: less)")
    axes.set_ylabel("gain over the base,\nnats per token (up: better)")
    axes.margins(0.12)
    if crowded:
        _legend(axes, "setting", below=True)
    else:
        places = [(0.0, 0.0), *((point.change[0], point.gain[0]) for point in settings)]
        labels = ["base", *(point.name for point in settings)]
        label_points(figure, axes, places, labels, offset=(6, 5), letter=5)
    line = f" Dashed: the margin, {margin:g}." if margin else ""
    return picture(
        name,
        figure,
        f"Gain over the base on the test rows against {label}, one point per setting, means over "
        f"seeds, with 95 % intervals along both axes.{line} Upper left is best.",
    )


def _bars(values: tuple[float, float, float]) -> list[list[float]] | None:
    """Lengths of an error bar to both sides; None without an interval."""
    middle, low, high = values
    return [[middle - low], [high - middle]] if math.isfinite(low + high) else None


def _crowded(settings: Sequence[Setting], names: SettingNames) -> bool:
    """Whether names of settings would cover the drawing, or each other."""
    longest = max(len(names.of(setting)) for setting in settings)
    return len(settings) > MOST_LABELS or longest > LONGEST_LABEL


def _legend(axes: Axes, title: str, below: bool, columns: int = 2) -> None:
    """Lines or markers with their names, beside the data or below the axes."""
    place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.45, -0.2)} if below else {}
    axes.legend(
        title=title, title_fontsize=8, frameon=False, fontsize=8, ncols=2 if below else columns,
        **place,
    )  # fmt: skip


def label_points(
    figure: Figure,
    axes: Axes,
    points: Sequence[tuple[float, float]],
    names: Sequence[str],
    offset: tuple[float, float] = (9, -3),
    letter: float = 0.0,
) -> None:
    """A name to the right of each point, moved up where it would cover another.

    Args:
        figure: of the axes.
        axes: with the points.
        points: in data coordinates.
        names: of the points.
        offset: of a name from its point, in points of type.
        letter: width of a letter, in points of type; 0: names of one generous width.
    """
    axes.autoscale_view()
    height = 10.0  # of a name, in points
    positions = axes.transData.transform(points) * 72 / figure.dpi
    placed: list[tuple[float, float, float]] = []
    if letter:  # markers, too, are not covered
        placed += [(float(x), float(y) - offset[1] - 4, 0.0) for x, y in positions]
    for index in sorted(range(len(points)), key=lambda index: float(positions[index][1])):
        x, y = float(positions[index][0]), float(positions[index][1])
        top, width = y, letter * len(names[index]) or 120.0
        # Tolerance: py + height - py may round to less than height, and the loop would not end.
        while near := [
            py for px, py, own in placed if -own < px - x < width and abs(py - top) < height - 0.01
        ]:
            top = max(near) + height
        placed.append((x, top, width))
        axes.annotate(
            names[index], points[index], xytext=(offset[0], top - y + offset[1]),
            textcoords="offset points", fontsize=8,
        )  # fmt: skip


@styled
def learning_curve(curve: LearningCurve) -> Picture:
    """Losses against training rows, and the fitted curve with its band where it fits."""
    figure, axes = new_axes(3.0)
    if curve.fits:
        axes.fill_between(curve.rows, curve.low, curve.high, color=LIGHT, lw=0)
        axes.plot(curve.rows, curve.middle, color=INK, lw=1.2)
    axes.plot(curve.sizes, curve.losses, "o", ms=6, color=INK, mfc="white")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(curve.sizes), [f"{size:,}" for size in curve.sizes])
    axes.minorticks_off()
    axes.set_xlabel("training rows")
    axes.set_ylabel("held-out loss, nats per token")
    return picture(
        f"learning-curve-{re.sub(r'[^a-z0-9]+', '-', curve.name.lower()).strip('-')}",
        figure,
        f"Learning curve of {curve.name}, E + A·N^(−β), with its 95 % band over test rows (and "
        "seeds, where there are several), to twice the largest size."
        if curve.fits
        else f"Loss of {curve.name} against training rows; E + A·N^(−β) does not fit.",
    )
