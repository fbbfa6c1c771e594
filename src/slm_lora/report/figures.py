"""Pictures of a report, as SVG: readable in black and white, the same bytes from the same numbers.

Shape and filling tell what colour would; intervals are always drawn.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slm_lora.stats.comparisons import Comparison, Setting, amount
from slm_lora.stats.estimates import perplexity
from slm_lora.stats.inference import LEAST_GROUPS, Difference
from slm_lora.stats.learning_curve import LearningCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SHADE, LIGHT = "#1a1a1a", "#8a8a8a", "#e6e6e6"
_WIDTH = 6.4
_STYLES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "slm-lora",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # names are names, even with dollars
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True, slots=True)
class Picture:
    """An SVG with what it shows in words, for a caption and for those who do not see it."""

    svg: str
    caption: str


def _drawn(figure: Figure, caption: str) -> Picture:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None}, bbox_inches="tight")
    svg = out.getvalue()
    # Inside a page: no prologue, and a width that the page decides.
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return Picture(svg, caption)


def _axes(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height))
    return figure, figure.add_subplot()


def _style(function: Any) -> Any:
    """Draw with the report's settings, whatever the user's own are."""
    import functools

    @functools.wraps(function)
    def draw(*args: Any, **kwargs: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_SETTINGS}):
            return function(*args, **kwargs)

    return draw


@_style
def training_curves(arms: Sequence[Setting]) -> Picture | None:
    """Training loss by step, smoothed; the first seed of every cell."""
    if not arms:
        return None
    figure, axes = _axes(3.2)
    for index, arm in enumerate(arms):
        steps = arm.line.run.steps()
        losses = [step["loss"] for step in steps]
        window = max(1, len(losses) // 20)
        smooth = [
            sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window)
            for i in range(len(losses))
        ]
        shade = INK if index % 2 == 0 else SHADE
        style = _STYLES[index // 2 % len(_STYLES)]
        axes.plot([s["step"] for s in steps], smooth, style, color=shade, lw=1.3, label=arm.name)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss, nats a token")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return _drawn(
        figure,
        "Training loss by optimizer step: a running mean over a twentieth of the steps, first "
        "seed of every cell. It is measured on rows in training, with dropout; the table is not.",
    )


@_style
def perplexity_against(key: str, name: str, series: Sequence[Sequence[Setting]]) -> Picture | None:
    """Perplexity of arms that differ in one number, with intervals; one line a series."""
    if not series:
        return None
    figure, axes = _axes(3.0)
    ticks = sorted({_at(arm, key) for arms in series for arm in arms})
    for index, arms in enumerate(series):
        shift = 1 + 0.02 * (index - (len(series) - 1) / 2)
        found = [arm.loss() for arm in arms]
        at = [_at(arm, key) * shift for arm in arms]
        middle = [perplexity(each.value) for each in found]
        known = all(each.groups > 1 for each in found)
        bars = (
            [
                [m - perplexity(each.low) for m, each in zip(middle, found, strict=True)],
                [perplexity(each.high) - m for m, each in zip(middle, found, strict=True)],
            ]
            if known
            else None
        )
        axes.errorbar(
            at, middle, yerr=bars, marker=_MARKERS[index % len(_MARKERS)], ms=6, capsize=3, lw=1,
            ls=_STYLES[index % len(_STYLES)], color=INK if index % 2 == 0 else SHADE,
            label=name_without(key, arms[0]),
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(f"{name}, in training rows" if key == "data.size" else name)
    axes.set_ylabel("perplexity")
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8)
    return _drawn(
        figure,
        f"Perplexity against {name}, with 95 % intervals over the choice of test rows. Lines "
        "share those rows: what they differ by is far surer than these intervals suggest; see "
        "the comparisons.",
    )


def name_without(key: str, arm: Setting) -> str:
    """Name of a series: that of an arm, without what varies along it."""
    prefix = "r" if key == "adapter.r" else ""
    gone = f"{prefix}{arm.setting(key)}"
    kept = "-".join(part for part in arm.name.split("-") if part != gone)
    other = f"r{arm.setting('adapter.r')}" if key == "data.size" else "all ranks"
    return kept or other


def _at(arm: Setting, key: str) -> float:
    value = amount(arm, key)
    assert value is not None
    return value


@_style
def forest(contrasts: Sequence[Comparison], title: str) -> Picture | None:
    """Differences with their intervals; the band counts as no difference."""
    if not contrasts:
        return None
    figure, axes = _axes(0.7 + 0.32 * len(contrasts))
    margin = contrasts[0].difference.margin
    axes.axvspan(-margin, margin, color=LIGHT, lw=0)
    axes.axvline(0, color=INK, lw=0.8)
    for row, each in enumerate(reversed(contrasts)):
        _interval(axes, row, each.difference, filled=each.verdict == "different")
    axes.set_yticks(
        range(len(contrasts)),
        [f"{each.second.name} against {each.first.name}" for each in reversed(contrasts)],
    )
    axes.set_ylim(-0.6, len(contrasts) - 0.4)
    axes.set_xlabel("difference of loss, nats a token (left: lower loss)")
    covers = " or ".join(dict.fromkeys(each.difference.covers for each in contrasts))
    return _drawn(
        figure,
        f"{title}: differences with 95 % intervals over {covers}. Filled: different after "
        f"correction for all comparisons. Grey band: ±{margin:g} nats, which counts as none.",
    )


def _interval(axes: Axes, row: int, d: Difference, filled: bool) -> None:
    if math.isfinite(d.low):
        axes.plot([d.low, d.high], [row, row], color=INK, lw=1.2)
    axes.plot([d.value], [row], "o", ms=6, color=INK, mfc=INK if filled else "white")


@_style
def categories(
    found: Sequence[tuple[str, int, Difference]], second: str, first: str
) -> Picture | None:
    """Differences in each category of rows: name, rows, difference."""
    if len(found) < 2:
        return None
    figure, axes = _axes(0.7 + 0.3 * len(found))
    axes.axvline(0, color=INK, lw=0.8)
    for row, (_, _, d) in enumerate(reversed(found)):
        _interval(axes, row, d, filled=d.excludes_zero and d.p < 0.05)
    axes.set_yticks(range(len(found)), [f"{name} ({rows})" for name, rows, _ in reversed(found)])
    axes.set_ylim(-0.6, len(found) - 0.4)
    axes.set_xlabel("difference of loss, nats a token (left: lower loss)")
    return _drawn(
        figure,
        f"{second} (the lowest loss of the table, if only by chance) against {first} by category "
        f"(test rows in brackets; {LEAST_GROUPS} groups or more), with 95 % intervals, not "
        "corrected for their number. "
        "Filled: the interval excludes zero, and p < 0.05.",
    )


@_style
def cost(arms: Sequence[Setting]) -> Picture | None:
    """Loss against the time of training."""
    if len(arms) < 2:
        return None
    figure, axes = _axes(3.0)
    points = []
    for index, arm in enumerate(arms):
        seconds = sum(line.run.record["training"]["seconds"] for line in arm.lines)
        loss = arm.loss()
        at = seconds / len(arm.lines) / 60
        half_width = loss.high - loss.value if loss.groups > 1 else 0.0
        axes.errorbar(
            [at], [loss.value], yerr=[half_width], marker=_MARKERS[index % len(_MARKERS)], ms=7,
            color=INK, mfc="white", ecolor=SHADE, elinewidth=0.8,
        )  # fmt: skip
        points.append((at, loss.value))
    axes.set_xlabel("training time, minutes")
    axes.set_ylabel("held-out loss, nats a token")
    axes.margins(0.15)
    _label(figure, axes, points, [arm.name for arm in arms])
    return _drawn(
        figure,
        "Held-out loss against the time of training, mean over seeds, with 95 % intervals over "
        "the choice of test rows, which all share.",
    )


def _label(
    figure: Figure, axes: Axes, points: Sequence[tuple[float, float]], names: Sequence[str]
) -> None:
    """A name to the right of each point, moved up where it would lie on another."""
    axes.autoscale_view()
    wide, high = 90, 10  # as much room as a name takes, in points of print
    placed: list[tuple[float, float]] = []
    at = axes.transData.transform(points) * 72 / figure.dpi
    for index in sorted(range(len(points)), key=lambda index: float(at[index][1])):
        x, y = float(at[index][0]), float(at[index][1])
        up = y
        while near := [py for px, py in placed if abs(px - x) < wide and abs(py - up) < high]:
            up = max(near) + high
        placed.append((x, up))
        axes.annotate(
            names[index], points[index], xytext=(9, up - y - 3), textcoords="offset points",
            fontsize=8,
        )  # fmt: skip


@_style
def learning_curve(curve: LearningCurve) -> Picture:
    """The losses, and where it fits them the curve with its band."""
    figure, axes = _axes(3.0)
    if curve.fits:
        axes.fill_between(curve.rows, curve.low, curve.high, color=LIGHT, lw=0)
        axes.plot(curve.rows, curve.middle, color=INK, lw=1.2)
    axes.plot(curve.sizes, curve.losses, "o", ms=6, color=INK, mfc="white")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(curve.sizes), [f"{size:,}" for size in curve.sizes])
    axes.minorticks_off()
    axes.set_xlabel("training rows")
    axes.set_ylabel("held-out loss, nats a token")
    return _drawn(
        figure,
        f"Learning curve of {curve.name}, E + A·N^(−β), with its 95 % band over test rows (and "
        "seeds, where there are several); drawn to twice the largest size and no further."
        if curve.fits
        else f"Loss of {curve.name} against training rows: no curve E + A·N^(−β) goes through.",
    )
