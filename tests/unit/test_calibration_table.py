"""The committed calibration: shown as it was measured, and within its bounds."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
CALIBRATION = ROOT / "results" / "calibration"


def test_docs_show_the_committed_calibration_table() -> None:
    table = (CALIBRATION / "calibration.md").read_text(encoding="utf-8").strip()
    assert table.startswith("| tested | promised | measured | cases |")
    assert table in (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")


def test_docs_show_by_how_much_a_choice_lengthens_intervals() -> None:
    table = (CALIBRATION / "widening.md").read_text(encoding="utf-8").strip()
    assert table.startswith("| deviation between seeds | validation rows |")
    assert table in (ROOT / "docs" / "statistics.md").read_text(encoding="utf-8")


def test_every_promised_calibration_rate_is_within_its_bounds() -> None:
    record = json.loads((CALIBRATION / "calibration.json").read_text(encoding="utf-8"))
    promised = [check for check in record["checks"] if check["promise"] != "–"]
    assert len(promised) > 15
    assert [check["name"] for check in promised if not check["holds"]] == []
