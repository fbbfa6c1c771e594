"""What the race of tuning runs saves and costs, on searches that were run to their end.

    python benchmarks/racing.py results/dolly-tuned

Repeats every search of the experiment with stopping, from the recorded steps and validation losses
of its runs, and writes results/racing/racing.json: tokens saved and regret against all runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_lora.config.axes import TuningSection
from slm_lora.runs.folder import Run, read_run, run_folders, to_json
from slm_lora.runtime.storage import atomic_write_text
from slm_lora.stats.racing import Race, rungs
from slm_lora.stats.tuning import Point, first_points, progress

RATE = "training.learning_rate"
OUT = Path("results/racing/racing.json")


@dataclass(frozen=True)
class Candidate:
    """A run to the end: its validation loss, steps and tokens."""

    loss: float
    steps: Sequence[dict[str, Any]]
    tokens: int


def read_searches(results: Path) -> tuple[dict[str, dict[float, Candidate]], float]:
    """Candidates by setting and rate, and the base's loss on the validation set."""
    searches: dict[str, dict[float, Candidate]] = {}
    base_loss = float("nan")
    for run in map(read_run, run_folders(results / "tuning" / "runs")):
        loss = _loss(run)
        if run.record.adapter is None:
            base_loss = loss
            continue
        rate = run.record.recipe.training.learning_rate
        kept = {k: v for k, v in run.record.settings.items() if k not in ("seed", RATE)}
        name = ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in kept.items())
        searches.setdefault(name, {})[rate] = Candidate(
            loss, run.steps(), run.record.trained.tokens
        )
    return searches, base_loss


def _loss(run: Run) -> float:
    evaluation = run.record.evaluation
    loss = evaluation.loss(evaluation.headline)
    assert loss is not None
    return loss.loss


def race(
    candidates: dict[float, Candidate],
    tuning: TuningSection,
    base_loss: float,
    epochs: float,
) -> dict[str, Any]:
    """One search with stopping: what it chose, its regret, and the tokens it took."""
    forced = {point[0] for point in first_points(tuning)} & {tuning.common_value}
    outcomes: dict[Point, float] = {}
    seen: dict[float, Sequence[dict[str, Any]]] = {}
    tokens, stopped, missing = 0, {}, []
    while (state := progress(tuning, outcomes)).missing:
        value = state.missing[0][0]
        if value not in candidates:
            missing.append(value)  # not run: the search with stopping went elsewhere
            outcomes[value,] = float("inf")
            continue
        own = candidates[value]
        steps_in_epoch = sum(step["epoch"] <= 1 + 1e-9 for step in own.steps)
        reason, done = "", len(own.steps)
        trial = Race(value, dict(seen), rungs(steps_in_epoch, done), base_loss, epochs)
        for rung in () if value in forced else trial.rungs:
            if reason := trial.stop_reason(own.steps[:rung]):
                done = rung
                break
        seen[value] = own.steps[:done]
        tokens += sum(int(step["tokens"]) for step in own.steps[:done])
        outcomes[value,] = float("inf") if reason else own.loss
        if reason:
            stopped[f"{value:g}"] = reason
    best = min(candidate.loss for candidate in candidates.values())
    assert state.lowest is not None
    return {
        "chosen": state.lowest[0],
        "lowest": min(candidates, key=lambda rate: candidates[rate].loss),
        "regret": candidates[state.lowest[0]].loss - best,
        "tried": len(outcomes) - len(missing),
        "stopped": stopped,
        "not_run": missing,
        "tokens": tokens,
        "tokens_of_all": sum(candidate.tokens for candidate in candidates.values()),
    }


def main() -> None:
    """Print and write the table."""
    results = Path(sys.argv[1])
    document = json.loads((results / "tuning.json").read_text(encoding="utf-8"))
    section = {**document["section"], "race": True}
    searches, base_loss = read_searches(results)
    epochs = float(next(iter(next(iter(searches.values())).values())).steps[-1]["epoch"])
    report = {}
    for common in (section.get("common_value"), None):
        tuning = TuningSection.model_validate({**section, "common_value": common})
        rows = {
            name: race(candidates, tuning, base_loss, epochs)
            for name, candidates in searches.items()
        }
        taken = sum(row["tokens"] for row in rows.values())
        everything = sum(row["tokens_of_all"] for row in rows.values())
        label = f"common value {common:g} to the end" if common else "no common value"
        report[label] = {
            "saved": 1 - taken / everything,
            "largest_regret": max(row["regret"] for row in rows.values()),
            "searches": rows,
        }
        print(f"{label}: {100 * (1 - taken / everything):.1f} % of the tokens saved")
        for name, row in rows.items():
            saved = 1 - row["tokens"] / row["tokens_of_all"]
            print(
                f"  {name}: chose {row['chosen']:g}, lowest {row['lowest']:g}, regret "
                f"{row['regret']:.4f}, saved {100 * saved:.0f} %, stopped {row['stopped']}"
            )
    machine = document["machine"]
    command = f"python benchmarks/racing.py {results}"
    atomic_write_text(OUT, to_json({"command": command, "runs_on": machine, "searches": report}))


if __name__ == "__main__":
    main()
