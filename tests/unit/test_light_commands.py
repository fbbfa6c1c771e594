"""Commands that read finished runs load none of the libraries that compute."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "results" / "quickstart"
HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate")

RUN = """
import sys
from slm_lora.cli import app
try:
    app(sys.argv[1:], standalone_mode=False)
finally:
    print("loaded", [name for name in {heavy} if name in sys.modules], file=sys.stderr)
"""


def loaded(*words: object) -> str:
    """The heavy libraries that a command loaded, as its last line on standard error."""
    script = RUN.format(heavy=HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(RESULTS, tmp_path_factory.mktemp("results") / "quickstart"))


def test_report_loads_nothing_that_computes(results: Path) -> None:
    assert loaded("report", results) == "loaded []"
    # (Figures depend on matplotlib's version.)
    assert (results / "report.md").read_text() == (RESULTS / "report.md").read_text()


def test_compare_loads_nothing_that_computes(results: Path) -> None:
    first, second = sorted((results / "runs").glob("r*"))[:2]
    assert loaded("compare", first, second) == "loaded []"


def test_help_loads_nothing_that_computes() -> None:
    assert loaded("--help") == "loaded []"
