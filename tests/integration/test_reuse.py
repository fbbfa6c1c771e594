"""Finished runs under the name of another cell are copied, not computed again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from slm_lora.adapters import io as adapter_io
from slm_lora.training import loop

from ..support.lab import Lab

RANKS = ("grid.cells=[]", "grid.axes=[{adapter.r: [2, 4]}]", "data.size=40")
SIZES = ("grid.cells=[]", "grid.axes=[{data.size: [40]}, {adapter.r: [2, 4]}]")


@pytest.fixture
def lab(tmp_path: Path, tiny_folder: Path) -> Lab:
    made = Lab(tmp_path / "lab", tiny_folder)
    assert made.run(*RANKS) == 0
    return made


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr("slm_lora.experiment.cell.train", fail)
    assert loop.train is not fail


def record(lab: Lab, name: str) -> dict[str, Any]:
    (folder,) = (lab.results / "runs").glob(f"{name}-????????")
    loaded: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return loaded | {"scores": (folder / "scores.parquet").read_bytes()}


def test_runs_and_adapters_are_reused_under_another_cell_name(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lab.run(*SIZES, "--plan") == 0
    plan = capsys.readouterr().out
    assert "finished" in plan
    forbid_training(monkeypatch)
    assert lab.run(*SIZES) == 0
    assert "r4-40  reused from" in capsys.readouterr().err
    first, second = record(lab, "r4"), record(lab, "r4-40")
    assert second["settings"] == {"data.size": 40, "adapter.r": 4}
    for key in ("hash", "scores", "training", "evaluation", "machine"):
        assert first[key] == second[key]
    assert second["adapter"]["folder"] == "tiny-r4-40"
    assert adapter_io.run_of(lab.adapters / "tiny-r4-40") == second["hash"]
    # The second command finds them by name.
    assert lab.run(*SIZES) == 0
    assert "reused" not in capsys.readouterr().err


def test_run_without_its_adapter_is_computed_again(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(lab.adapters / "tiny-r4")
    forbid_training(monkeypatch)
    with pytest.raises(AssertionError, match="trained"):
        lab.run(*SIZES)
    assert lab.run(*SIZES, "keep_adapters=false") == 0


def test_broken_run_under_another_name_is_refused(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder,) = (lab.results / "runs").glob("r4-????????")
    (folder / "scores.parquet").write_bytes(b"")
    assert lab.run(*SIZES) == 4
    assert f"{folder / 'scores.parquet'}: cannot be read as scores" in capsys.readouterr().err
