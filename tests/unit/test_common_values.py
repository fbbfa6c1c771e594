"""Values of replies that only some runs have do not end a report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from slm_lora.report.write import write_report
from slm_lora.runs.folder import list_runs, run_folders
from slm_lora.runs.metrics import METRICS
from slm_lora.runs.replies import RowReply, replies_file, write_replies
from slm_lora.runs.scored_run import has_metric, read_scored_runs

from ..support.planted import planted_run, write_runs


def test_a_row_that_one_run_lacks_is_left_out_of_the_metric(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    runs = [planted_run(cell, 2 + rng.normal(0, 0.1, 30), seed=0) for cell in ("base", "r8")]
    ids = [score.row_id for score in runs[0].scores]
    folder = write_runs(runs, tmp_path / "planted")
    for number, path in enumerate(run_folders(folder / "runs")):
        replies = [
            RowReply(row, "text", 5, "stop", {} if number and not i else {"exact_match": 1.0})
            for i, row in enumerate(ids)
        ]
        run_hash = json.loads((path / "run.json").read_text())["hash"]
        write_replies(replies_file(path), run_hash, {}, ["exact_match"], replies)
    scored = read_scored_runs(list_runs(folder))
    for run in scored:
        assert has_metric(run, METRICS["exact_match"])
        rows = {score.row_id for score in run.scores if "exact_match" in score.values}
        assert rows == {*ids[1:]}
        assert all("ended" in score.values for score in run.scores)
    write_report(list_runs(folder), folder)
    assert "Exact match" in (folder / "report.md").read_text()
