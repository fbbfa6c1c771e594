"""A sample of `make faults`: every twenty-fourth of its cases, none through the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CAMPAIGN = Path(__file__).parents[2] / "benchmarks" / "faults" / "campaign.py"


@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_every_sampled_fault_is_survived_or_detected() -> None:
    completed = subprocess.run(
        [sys.executable, CAMPAIGN, "--every", "24"], capture_output=True, text=True, check=False
    )
    assert completed.returncode == 0, completed.stdout[-3000:] + completed.stderr[-3000:]
    summary: dict[str, Any] = json.loads(completed.stdout[completed.stdout.index("{") :])
    assert summary["failed"] == []
    assert summary["kills"] == summary["kills_equal"] >= 10
    assert summary["corruptions"] == summary["corruptions_detected"] >= 140
    assert summary["numbers"] == summary["numbers_held"] == 7
    assert summary["bad_rows_kinds"] == 15
