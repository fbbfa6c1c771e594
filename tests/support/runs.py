"""Scored runs with given settings and losses, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slm_lora.config.grid import set_key
from slm_lora.config.schema import CellConfig
from slm_lora.records import RowScore
from slm_lora.runs.folder import Run
from slm_lora.runs.scored_run import ScoredRun


def scored_run(name: str, loss: float, **settings: Any) -> ScoredRun:
    """A run with settings (``adapter__r`` for adapter.r) on 40 rows whose mean loss is given."""
    own: dict[str, Any] = {}
    for key, value in settings.items():
        set_key(own, key.replace("__", "."), value)
    recipe = CellConfig.model_validate(own).model_dump(mode="json")
    recipe["adapter"]["lora_alpha"] = 2.0 * recipe["adapter"]["r"]
    if recipe["training"]["learning_rate"] == "auto":  # resolved before a run is recorded
        recipe["training"]["learning_rate"] = 2e-4
    scores = tuple(
        RowScore(
            f"{i:02d}", f"{i:02d}", "odd" if i % 2 else "even", "test",
            10 * (loss + 0.01 * ((i * 7) % 5 - 2)), 10, 1, 0.0, 10, 1,
        )
        for i in range(40)
    )  # fmt: skip
    rows = {"rows": 9, "tokens": 90}
    held_out = {"loss": loss, "perplexity": 1.0, "tokens": 400, "rows": 40, "bits_per_byte": 1.0}
    record: dict[str, Any] = {
        "format": 1,
        "cell": name,
        "hash": "0",
        "experiment": "planted",
        "recipe": recipe,
        "model": {"name": "tiny", "sha256": "0", "precision": "fp32"},
        "machine": {"processor": "none", "cores": 1, "memory_gb": 1.0, "device": "cpu"},
        "versions": {},
        "data": {
            "origin": "rows.jsonl", "format": "dolly", "template": {"kind": "plain"},
            "rows_available": 60, "groups": 60, "split_version": 2, "held_out_sha256": "0",
            "train_sha256": "0", "sets": {"test": rows, "validation": rows, "train": dict(rows)},
        },
        "evaluation": {"headline": "all", "all": held_out},
    }  # fmt: skip
    if name != "base":
        rank = recipe["adapter"]["r"]
        record["adapter"] = {
            "folder": name, "sha256": "0", "bytes": 1, "trainable_parameters": rank,
            "all_parameters": 100, "percent": 1.0,
        }  # fmt: skip
        record["training"] = {
            "steps": 5, "epochs": 1.0, "tokens": 1000, "label_tokens": 1000, "seconds": 1.0,
            "first_step_seconds": 0.1, "tokens_per_s": 1.0, "peak_memory_bytes": 1,
            "compiled": False, "last_step_loss": 1.0, "rows_without_labels": 0, "kept_step": 5,
            "stopped_early": False, "skipped_steps": 0,
        }  # fmt: skip
    return ScoredRun(Run(Path(name), record), scores)
