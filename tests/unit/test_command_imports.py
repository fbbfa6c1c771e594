"""Commands that only read finished runs do not import torch and similar libraries."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..support.imports import HEAVY, RUN, loaded

RESULTS = Path(__file__).parents[2] / "results" / "quickstart"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(RESULTS, tmp_path_factory.mktemp("results") / "quickstart"))


def test_report_imports_no_heavy_library(results: Path) -> None:
    assert loaded("report", results) == "loaded []"
    # Not the figures: they depend on the version of matplotlib.
    assert (results / "report.md").read_text() == (RESULTS / "report.md").read_text()


def test_compare_imports_no_heavy_library(results: Path) -> None:
    first, second = sorted((results / "runs").glob("r*"))[:2]
    assert loaded("compare", first, second) == "loaded []"


def test_verdict_imports_no_heavy_library(results: Path) -> None:
    assert loaded("verdict", results, "--require", "gain > 0.02") == "loaded []"


def test_help_imports_no_heavy_library() -> None:
    assert loaded("--help") == "loaded []"


def test_watch_imports_no_heavy_library(results: Path) -> None:
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    # Ends once all is imported, instead of serving.
    script = RUN.format(heavy=HEAVY).replace(
        "try:", "from slm_lora.serve import server\nserver.serve = lambda *_: None\ntry:"
    )
    words = ["watch", str(results.parent), "--port", "0"]
    completed = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, check=True
    )
    assert "http://127.0.0.1:" in completed.stdout + completed.stderr
    assert completed.stderr.splitlines()[-1] == "loaded []"
