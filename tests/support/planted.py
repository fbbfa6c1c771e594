"""Run folders of an experiment that was planted instead of trained."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slm_lora.records import RowScore
from slm_lora.runs.folder import STEPS_FILE, new_run
from slm_lora.runs.scored_run import ScoredRun
from slm_lora.runs.scores import write_scores

from .runs import scored_run

Floats = npt.NDArray[np.float64]


def planted_run(
    cell: str, losses: Floats, values: dict[str, Sequence[float]] | None = None, **keys: object
) -> ScoredRun:
    """A run with a loss per row, [rows], and values of further metrics per row; every row is a
    group of its own with 10 tokens."""
    run = scored_run(cell, float(np.mean(losses)), **keys)
    scores = tuple(
        RowScore(
            f"{i:04d}", f"{i:04d}", "", "test", 10 * float(loss), 10, 20, 5 * float(loss), 5, 10,
            {name: (float(own[i]), 1.0) for name, own in (values or {}).items()},
        )
        for i, loss in enumerate(losses)
    )  # fmt: skip
    return replace(run, scores=scores)


def write_runs(runs: Sequence[ScoredRun], results: Path) -> Path:
    """The runs as folders of an experiment."""
    for number, run in enumerate(runs):
        record = dict(run.run.raw)
        loss = math.fsum(score.nll_all for score in run.scores) / (10 * len(run.scores))
        tokens = {"tokens": 10 * len(run.scores), "rows": len(run.scores)}
        own = {**record["evaluation"]["all"], "loss": loss, **tokens}
        record["evaluation"] = {**record["evaluation"], "all": own}
        for key in ("format", "cell", "hash"):
            record.pop(key)
        with new_run(results, run.run.cell, f"{number:064x}"[::-1], record) as folder:
            write_scores(run.scores, folder / "scores.parquet")
            steps = [json.dumps({"step": step, "loss": 2.0}) for step in range(1, 6)]
            (folder / STEPS_FILE).write_text("\n".join(steps) + "\n")
    return results
