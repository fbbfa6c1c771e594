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
    done = subprocess.run(
        [sys.executable, CAMPAIGN, "--every", "24"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["failed"] == []
    assert found["kills"] == found["kills_equal"] >= 10
    assert found["corruptions"] == found["corruptions_detected"] >= 140
    assert found["numbers"] == found["numbers_held"] == 7
    assert found["bad_rows_kinds"] == 15
