"""The typed record of a run reads every run that was ever committed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slm_lora.errors import IntegrityError
from slm_lora.runs.folder import Run, list_runs, read_run

from ..support.runs import scored_run

RESULTS = Path(__file__).parents[2] / "results"
RUNS = sorted(path.parent for path in RESULTS.glob("*/runs/*/run.json"))


def test_every_committed_run_is_read_with_its_values() -> None:
    assert len(RUNS) > 100
    for folder in RUNS:
        run = read_run(folder)
        raw = json.loads((folder / "run.json").read_text())
        assert run.raw == raw
        record = run.record
        assert (record.cell, record.hash) == (raw["cell"], raw["hash"])
        assert record.evaluation.all.loss == raw["evaluation"]["all"]["loss"]
        assert record.data.sets.train.rows == raw["data"]["sets"]["train"]["rows"]
        assert (record.training is None) == ("training" not in raw)
        if record.training is not None:
            assert record.trained.tokens == raw["training"]["tokens"]
            assert record.saved.trainable_parameters == raw["adapter"]["trainable_parameters"]


@pytest.mark.parametrize(
    "results", sorted({folder.parents[1] for folder in RUNS}), ids=lambda p: p.name
)
def test_every_committed_experiment_is_listed_whole(results: Path) -> None:
    metrics = json.loads((results / "metrics.json").read_text())
    assert {run.folder.name for run in list_runs(results)} == {
        run["folder"] for run in metrics["runs"]
    }


def test_run_record_with_unknown_keys_is_read() -> None:
    raw = {**scored_run("r8", 2.0).run.raw, "later": 1}
    assert Run(Path("r8"), raw).record.cell == "r8"


@pytest.mark.parametrize("key", ["model", "data", "machine", "evaluation", "recipe"])
def test_run_record_without_a_section_is_refused_by_name(key: str) -> None:
    raw = {name: value for name, value in scored_run("r8", 2.0).run.raw.items() if name != key}
    with pytest.raises(IntegrityError, match=rf"run\.json: broken \({key}: Field required\)"):
        _ = Run(Path("r8"), raw).record
