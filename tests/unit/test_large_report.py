"""A report of many settings with long names: figures end, are distinct, and tables stay narrow."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from slm_lora.report import contents, figures
from slm_lora.report.analysis import Analysis, analyse
from slm_lora.report.drawing import new_axes
from slm_lora.report.terminal import settings_table
from slm_lora.runs.scored_run import ScoredRun

from ..support.runs import scored_run

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_steps(run: ScoredRun, folder: Path) -> ScoredRun:
    """The run in a folder with two steps."""
    path = folder / run.run.cell
    path.mkdir()
    steps = [{"step": step, "loss": 3.0 - step} for step in (1, 2)]
    (path / "steps.jsonl").write_text("".join(f"{json.dumps(step)}\n" for step in steps))
    return replace(run, run=replace(run.run, folder=path))


@pytest.fixture(name="analysis")
def _analysis(tmp_path: Path) -> Analysis:
    """Twelve settings; a method that no comparison separates from its target modules."""
    runs = [scored_run("base", 3.5)]
    for index in range(10):
        rank, size = (2, 4, 8, 16, 32)[index % 5], (100, 200)[index // 5]
        run = scored_run(
            f"r{rank}-{size}",
            3.0 - 0.02 * index,
            adapter__r=rank,
            data__size=size,
            adapter__target_modules=["q_proj", "v_proj"],
        )
        run.run.raw["data"]["sets"]["train"]["rows"] = size
        runs.append(write_steps(run, tmp_path))
    for kind, modules in (("dora", SEVEN), ("rslora", ["q_proj", "v_proj"])):
        run = scored_run(
            kind,
            2.7,
            adapter__r=32,
            data__size=200,
            adapter__kind=kind,
            adapter__target_modules=modules,
        )
        run.run.raw["data"]["sets"]["train"]["rows"] = 200
        runs.append(write_steps(run, tmp_path))
    return analyse(runs)


def test_labels_of_close_points_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A label moved by its height may differ from the one below by less, after rounding."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        figure, axes = new_axes(3.0)
        points = [(float(x), float(y)) for x, y in rng.normal(size=(12, 2)) * 0.01]
        axes.plot(*zip(*points, strict=True), "o")
        moves = Counter[None]()

        def counted(values: list[float], moves: Counter[None] = moves) -> float:
            moves[None] += 1
            assert moves[None] < 150, "a label is moved for ever"
            return sorted(values)[-1]

        monkeypatch.setattr(figures, "max", counted, raising=False)
        figures.label_points(figure, axes, points, ["r=16, 1500 rows"] * 12)


def test_curves_of_many_settings_are_distinct(analysis: Analysis) -> None:
    drawn = figures.training_curves(analysis.settings, analysis.names)
    assert drawn is not None
    groups = re.findall(r'<g id="line2d_\d+">\s*<path d="[^"]*"[^>]*style="([^"]*)"', drawn.svg)
    curves = [style for style in groups if "stroke-width: 0.8" not in style]
    assert len(curves) >= 12 and len(set(curves)) == 12
    points = figures.time_and_loss(analysis.settings, analysis.names)
    assert points is not None and points.svg.count("r=32, 200 rows, DoRA, 7 modules") == 1


def test_question_names_what_no_comparison_separates(analysis: Analysis) -> None:
    question = contents.question(analysis)
    for part in ("the rank (2, 4, 8, 16, 32)", "LoRA, rsLoRA, DoRA", "7 modules"):
        assert part in question


def test_most_of_many_names_are_not_listed(analysis: Analysis, tmp_path: Path) -> None:
    sections = {section.title: section.text for section in contents.sections(analysis, tmp_path)}
    assert max(map(len, re.split(r"[.\n]", sections["Settings"]))) < 250
    assert "Intervals are in metrics.json" in sections["By category"]
    rows = [text for text in sections["Training"].splitlines() if text.startswith("| r=")]
    assert len(rows) == 12
    assert sections["Effect of doubling rank or data"].count("→ r=") == 8 + 5


@pytest.mark.parametrize("width", [80, 100, 120])
def test_terminal_keeps_the_differences(analysis: Analysis, width: int) -> None:
    out = StringIO()
    Console(file=out, width=width).print(settings_table(analysis, width))
    text = out.getvalue()
    assert "Against the recommended, 95 %" in text
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
