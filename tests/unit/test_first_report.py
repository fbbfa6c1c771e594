"""Seeds that were added after a look at the others are marked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from slm_lora.errors import IntegrityError
from slm_lora.report.write import write_report
from slm_lora.runs.folder import read_run, run_folders

COMMITTED = Path(__file__).parents[2] / "results" / "data-size" / "runs"


def add(results: Path, *patterns: str) -> None:
    """Copy committed runs whose names match."""
    for pattern in patterns:
        for run in COMMITTED.glob(pattern):
            shutil.copytree(run, results / "runs" / run.name, dirs_exist_ok=True)


def metrics(results: Path) -> dict[str, object]:
    write_report([read_run(folder) for folder in run_folders(results / "runs")], results)
    content: dict[str, object] = json.loads((results / "metrics.json").read_text())
    return content


def added(content: dict[str, object]) -> set[int]:
    return {pair["added_after_a_report"] for pair in content["contrasts"]}  # type: ignore[attr-defined]


def test_seeds_added_after_the_first_report_stay_marked(tmp_path: Path) -> None:
    add(tmp_path, "base-*", "*-seed0-*", "*-seed1-*")
    first = metrics(tmp_path)
    assert added(first) == {0}
    assert "Added seeds" not in first["card"]["facts"]  # type: ignore[index]
    add(tmp_path, "*-seed2-*")
    for _ in range(2):
        later = metrics(tmp_path)
        assert added(later) == {1}
        assert later["first_report"] == first["first_report"]
        report = (tmp_path / "report.md").read_text()
        assert "1 of 3 seeds were added after the first report" in report
        assert "**[Added seeds](#comparisons):** in 7 of 7 comparisons" in report


def test_settings_added_after_the_first_report_are_not_marked(tmp_path: Path) -> None:
    """All seeds of a comparison are new: nothing was seen of it before."""
    add(tmp_path, "base-*", "100-seed*", "200-seed*")
    first = metrics(tmp_path)
    add(tmp_path, "*")
    later = metrics(tmp_path)
    assert added(later) == {0}
    assert len(later["contrasts"]) > len(first["contrasts"])  # type: ignore[arg-type]


def test_broken_metrics_json_is_not_replaced(tmp_path: Path) -> None:
    add(tmp_path, "*-seed0-*")
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(IntegrityError, match="lists the runs of the first report; restore it, or"):
        write_report([read_run(folder) for folder in run_folders(tmp_path / "runs")], tmp_path)
    assert (tmp_path / "metrics.json").read_text() == "{"
