"""From a grid to its cells: settings, names, complete recipes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slm_lora.config.schema import CellConfig, Recipe
from slm_lora.config.types import RunOptions
from slm_lora.config.validation import Settings, Sources, validated, why_not_settable

MOST_CELLS = 10_000
"""Cells times seeds; axes multiply quickly, and more than this is a slip."""

_LONGEST_NAME = 120
"""Characters of a cell's name: it is a folder's, and files are named after it."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid: name, the keys that set it apart, complete configuration."""

    name: str
    settings: Mapping[str, Any]
    config: CellConfig
    options: RunOptions


def set_key(settings: Settings, key: str, value: Any) -> None:
    """Set a dotted key; what lies on the way is copied, so that cells share nothing changed."""
    *parents, last = key.split(".")
    for parent in parents:
        inner = settings.get(parent)
        if inner is not None and not isinstance(inner, dict):
            return  # a mistake of the file's, that validation finds
        settings[parent] = dict(inner or {})
        settings = settings[parent]
    settings[last] = value


def setting_of(resolved: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key of a resolved recipe.

    Raises:
        KeyError: the recipe has no such key.
    """
    value: Any = resolved
    for part in key.split("."):
        value = value[part]
    return value


_SHORT = {
    "adapter.r": "r",
    "data.size": "",
    "seed": "seed",
    "data_seed": "data",
    "adapter.kind": "",
    "adapter.target_modules": "",
    "adapter.lora_alpha": "alpha",
    "training.learning_rate": "lr",
    "training.num_train_epochs": "epochs",
}
_NOT_IN_CELLS = Recipe.model_fields.keys() - CellConfig.model_fields.keys()


def unfold(recipe: Recipe, settings: Settings, sources: Sources, mistakes: list[str]) -> list[Cell]:
    """All cells of a recipe, seed-major; what is wrong with the grid goes to ``mistakes``."""
    count = recipe.grid.count() * max(1, len(recipe.seeds))
    source = sources.explain("grid.cells" if recipe.grid.cells else "grid.axes")
    if count > MOST_CELLS:
        mistakes.append(f"{source}: {count} cells (with seeds); at most {MOST_CELLS}")
        return []
    grid = recipe.grid.settings()
    before = len(mistakes)
    for index, varied in enumerate(grid, start=1):
        for key in varied:
            if why := why_not_settable(key, CellConfig):
                mistakes.append(f"{source}: grid cell {index}: {why}")
    if recipe.seeds and any("seed" in varied for varied in grid):
        mistakes.append(f"{source}: the grid sets 'seed', and so do 'seeds'; leave one out")
    for key in sources.overrides:
        if all(key in varied for varied in grid) or (key == "seed" and recipe.seeds):
            by = "seeds" if key == "seed" and recipe.seeds else "grid"
            mistakes.append(f"override: {key} has no effect: '{by}' sets it in every cell")
    if len(mistakes) > before:
        return []
    # What a size is worth depends on the rows it takes: chance that other seeds must cover.
    draws_rows = "data_seed" not in settings and any("data.size" in varied for varied in grid)
    shared = {name: value for name, value in settings.items() if name not in _NOT_IN_CELLS}
    cells = []
    # Seed-major, so that any finished prefix holds every setting equally often.
    for seed in recipe.seeds or (None,):
        for index, varied in enumerate(grid, start=1):
            own = dict(shared)
            chosen = varied if seed is None else {**varied, "seed": seed}
            for key, value in chosen.items():
                set_key(own, key, value)
            if draws_rows and seed is not None:
                own.setdefault("data_seed", seed)
            cell = validated(CellConfig, own, sources, mistakes, f"{source}: grid cell {index}")
            if cell is not None:
                # As validated: `2e-4` is text in YAML, and a number here.
                values = {key: _value_at(cell, key) for key in chosen}
                cells.append(Cell(_cell_name(cell, values), values, cell, recipe.run_options))
    # Folders are named after cells, and some file systems take R8 for r8.
    times = Counter(cell.name.casefold() for cell in cells)
    for name in dict.fromkeys(cell.name for cell in cells):
        if times[name.casefold()] > 1:
            mistakes.append(f"{source}: the grid has the cell {name} more than once")
    return cells


def _value_at(cell: CellConfig, key: str) -> Any:
    value: Any = cell
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def _cell_name(cell: CellConfig, chosen: Mapping[str, Any]) -> str:
    """A short name of what sets the cell apart: `r16-1500-seed1`; `r8` where nothing does."""
    parts = []
    order = ["adapter.kind", "adapter.r", "data.size"]
    for key in [*order, *sorted(set(chosen) - {*order, "seed"}), "seed"]:
        if key not in chosen:
            continue
        if key == "adapter.lora_alpha" and cell.adapter.lora_alpha == "2r":
            continue
        prefix = _SHORT.get(key, key.rsplit(".", 1)[-1].replace("_", ""))
        parts.append(prefix + _in_name(chosen[key]))
    name = "".join(
        c if c.isascii() and (c.isalnum() or c in "._+-") else "_" for c in "-".join(parts)
    )
    if len(name) > _LONGEST_NAME:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name[: _LONGEST_NAME - 9]}-{digest}"
    return name or f"r{cell.adapter.r}"


def _in_name(value: Any) -> str:
    if isinstance(value, str) and "/" in value:
        return value.rstrip("/").rsplit("/", 1)[-1]  # of a path or a hub id the last part
    if isinstance(value, list | tuple):
        return "+".join(map(str, value))
    if isinstance(value, float):
        return str(value).removesuffix(".0")
    return str(value)
