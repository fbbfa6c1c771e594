"""Scored runs with given settings and losses, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slm_lora.config.grid import set_key
from slm_lora.config.schema import CellConfig
from slm_lora.records import RowScore
from slm_lora.runs.folder import Run
from slm_lora.runs.scored_run import ScoredRun


def line(name: str, loss: float, **settings: Any) -> ScoredRun:
    """A run with settings (``adapter__r`` for adapter.r) on 40 rows whose mean loss is given."""
    own: dict[str, Any] = {}
    for key, value in settings.items():
        set_key(own, key.replace("__", "."), value)
    recipe = CellConfig.model_validate(own).model_dump(mode="json")
    recipe["adapter"]["lora_alpha"] = 2.0 * recipe["adapter"]["r"]
    scores = tuple(
        RowScore(
            f"{i:02d}", f"{i:02d}", "odd" if i % 2 else "even", "test",
            10 * (loss + 0.01 * ((i * 7) % 5 - 2)), 10, 1, 0.0, 10, 1,
        )
        for i in range(40)
    )  # fmt: skip
    record = {
        "cell": name,
        "recipe": recipe,
        "model": {"name": "tiny", "sha256": "0", "precision": "fp32"},
        "machine": {"device": "cpu"},
        "data": {"held_out_sha256": "0", "origin": "rows.jsonl", "sets": {"train": {"rows": 9}}},
        "evaluation": {"headline": "all"},
        "training": {"steps": 5},
    }
    if name != "base":
        record["adapter"] = {"trainable_parameters": recipe["adapter"]["r"]}
    return ScoredRun(Run(Path(name), record), scores)
