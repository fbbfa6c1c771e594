"""A folder with a recipe, rows and a tiny model, and the command in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slm_lora.cli import app, run_guarded

from .rows import make_rows, write_jsonl

RECIPE = """
name: tiny
model: {{name: {model}}}
data: {{name: {rows}, test_rows: 20, validation_rows: 10, max_length: 128}}
adapter: {{lora_alpha: 2r, target_modules: [q_proj, v_proj]}}
training:
  num_train_epochs: 2
  learning_rate: 1e-2
  effective_batch_size: 8
  precision: fp32
grid:
  cells:
    - {{data.size: 40, adapter.r: 2}}
    - {{data.size: 40, adapter.r: 4}}
    - {{data.size: 80, adapter.r: 4}}
"""


def command(*words: object) -> int:
    """The command in this process, with its exit code."""
    return run_guarded(lambda: app([str(word) for word in words], standalone_mode=False))


class Lab:
    """A folder with a recipe, rows and a model, and the results of its experiments."""

    def __init__(self, folder: Path, model: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.rows = write_jsonl(folder / "rows.jsonl", make_rows(120))
        self.recipe = folder / "tiny.yaml"
        self.recipe.write_text(RECIPE.format(model=model, rows=self.rows), encoding="utf-8")
        self.results, self.adapters = folder / "results" / "tiny", folder / "adapter"

    @property
    def folders(self) -> tuple[object, ...]:
        """Options of the command for its results and adapters."""
        return ("--results", self.results.parent, "--adapters", self.adapters)

    def run(self, *overrides: str) -> int:
        return command("experiment", self.recipe, *overrides, *self.folders)

    def metrics(self) -> dict[str, Any]:
        metrics: dict[str, Any] = json.loads((self.results / "metrics.json").read_text())
        return metrics
