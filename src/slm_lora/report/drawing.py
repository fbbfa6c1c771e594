"""Drawing of SVG figures: one style, and the same bytes from the same numbers."""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable
from html import escape
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from slm_lora.report.blocks import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SHADE, LIGHT = "#1a1a1a", "#8a8a8a", "#e6e6e6"
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

_WIDTH = 6.4
_SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "slm-lora",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,  # names are literal, even with dollars
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}

P = ParamSpec("P")
R = TypeVar("R")


def styled(function: Callable[P, R]) -> Callable[P, R]:
    """Draw with the report's settings, whatever the user's matplotlibrc says."""

    @functools.wraps(function)
    def draw(*args: P.args, **kwargs: P.kwargs) -> R:
        import matplotlib

        with matplotlib.rc_context({**matplotlib.rcParamsDefault, **_SETTINGS}):
            return function(*args, **kwargs)

    return draw


def new_axes(height: float) -> tuple[Figure, Axes]:
    """A figure of the report's width, ``height`` in inches, with its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height))
    return figure, figure.add_subplot()


def picture(name: str, figure: Figure, caption: str) -> Picture:
    """The figure as SVG, transparent, its size left to the page."""
    out = io.StringIO()
    figure.savefig(
        out, format="svg", metadata={"Date": None}, bbox_inches="tight", transparent=True
    )
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return Picture(name, svg, caption)


def svg_file(shown: Picture) -> str:
    """The SVG as a file of its own: on white paper, with a width for pages that give none."""
    match = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', shown.svg)
    assert match is not None
    width, height = (float(group) for group in match.groups())
    head, rest = shown.svg.split(">", 1)
    margin = 10
    head = head.replace(
        match.group(0),
        f'viewBox="{-margin} {-margin} {width + 2 * margin:g} {height + 2 * margin:g}"',
    )
    paper = f'<rect x="{-margin}" y="{-margin}" width="100%" height="100%" fill="#ffffff"/>'
    name = escape(shown.name)
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        f'{head} width="{1.5 * (width + 2 * margin):.0f}" role="img">\n'
        f"<title>slm-lora: {name}</title>\n{paper}{rest}"
    )
