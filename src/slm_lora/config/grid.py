"""Expand a grid into cells: settings, names, complete configurations."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from slm_lora.config.axes import LEARNING_RATE
from slm_lora.config.schema import CellConfig, Recipe
from slm_lora.config.types import RunOptions
from slm_lora.config.validation import (
    Settings,
    Sources,
    number_keys,
    unsettable_reason,
    validate,
)

MAX_CELLS = 10_000
"""Limit of cells × seeds: axes multiply quickly, and more is a typing error."""

_MAX_NAME_LENGTH = 120
"""Characters; the cell's folder and files carry its name."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid: name, varied keys, complete configuration."""

    name: str
    settings: Mapping[str, Any]
    config: CellConfig
    options: RunOptions


def set_key(settings: Settings, key: str, value: Any) -> None:
    """Set a dotted key. Sections on its path are copied, so that cells share no changed mapping."""
    *parents, last = key.split(".")
    for parent in parents:
        inner = settings.get(parent)
        if inner is not None and not isinstance(inner, dict):
            return  # reported by validation
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


_SHORT_KEYS = {
    "model.name": "",
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
_EXPERIMENT_KEYS = Recipe.model_fields.keys() - CellConfig.model_fields.keys()


def expand_grid(
    recipe: Recipe, settings: Settings, sources: Sources, errors: list[str]
) -> list[Cell]:
    """All cells of a recipe, seed-major; problems of the grid are appended to ``errors``."""
    count = recipe.grid.count() * max(1, len(recipe.seeds))
    source = sources.origin("grid.cells" if recipe.grid.cells else "grid.axes")
    if count > MAX_CELLS:
        errors.append(f"{source}: {count} cells (with seeds); at most {MAX_CELLS}")
        return []
    points = recipe.grid.settings()
    n_errors = len(errors)
    for index, point in enumerate(points, start=1):
        for key in point:
            if reason := unsettable_reason(key, CellConfig):
                errors.append(f"{source}: grid cell {index}: {reason}")
    if recipe.seeds and any("seed" in point for point in points):
        errors.append(f"{source}: the grid sets 'seed', and so do 'seeds'; leave one out")
    for key in sources.overrides:
        if all(key in point for point in points) or (key == "seed" and recipe.seeds):
            by = "seeds" if key == "seed" and recipe.seeds else "grid"
            errors.append(f"override: {key} has no effect: '{by}' sets it in every cell")
    if recipe.tuning is not None:
        errors.extend(_tuning_faults(recipe, points, sources))
    if len(errors) > n_errors:
        return []
    # The effect of a size depends on the drawn rows, so seeds must vary the draw as well.
    draws_rows = "data_seed" not in settings and any("data.size" in point for point in points)
    shared = {name: value for name, value in settings.items() if name not in _EXPERIMENT_KEYS}
    cells = []
    # Seed-major: any finished prefix covers all settings equally.
    for seed in recipe.seeds or (None,):
        for index, point in enumerate(points, start=1):
            cell_settings = dict(shared)
            varied = point if seed is None else {**point, "seed": seed}
            for key, value in varied.items():
                set_key(cell_settings, key, value)
            if draws_rows and seed is not None:
                cell_settings.setdefault("data_seed", seed)
            cell = validate(
                CellConfig, cell_settings, sources, errors, f"{source}: grid cell {index}"
            )
            if cell is not None:
                # Validated values: `2e-4` is a string in YAML, and a number here.
                values = {key: _value_at(cell, key) for key in varied}
                cells.append(Cell(_cell_name(cell, values), values, cell, recipe.run_options))
    # Folders carry the names of cells, and some file systems ignore case.
    name_counts = Counter(cell.name.casefold() for cell in cells)
    for name in dict.fromkeys(cell.name for cell in cells):
        if name_counts[name.casefold()] > 1:
            errors.append(f"{source}: the grid has the cell {name} more than once")
    return cells


_NOT_TUNABLE = (
    "training.micro_batch_tokens",  # changes no result
    "training.eval_steps",
    "training.early_stopping_patience",
)


def _tuning_faults(
    recipe: Recipe, points: Sequence[Mapping[str, Any]], sources: Sources
) -> Iterator[str]:
    """What is wrong with the tuned keys and seeds, beyond the section itself."""
    tuning = recipe.tuning
    assert tuning is not None
    source, line = sources.origin("tuning"), sources.line_suffix("tuning.key")
    tunable = [
        key
        for key in number_keys(CellConfig)
        if key.startswith(("adapter.", "training.")) and key not in _NOT_TUNABLE
    ]
    for key in tuning.key:
        if key not in tunable:
            unknown = unsettable_reason(key, CellConfig)
            reason = unknown or "must be a key of adapter or training with a number"
            yield f"{source}: tuning.key = {key}: {reason}{line}"
        elif any(key in point for point in points):
            yield (
                f"{source}: tuning.key = {key}: the grid varies it, too; remove it from one of "
                f"them{line}"
            )
        elif key in sources.overrides:
            yield f"override: {key} has no effect: tuning chooses it for each setting"
    if len(set(tuning.key)) < len(tuning.key):
        yield f"{source}: tuning.key names a key twice{line}"
    final = set(recipe.seeds or (recipe.seed,))
    if overlap := sorted(final & set(tuning.seeds)):
        yield (
            f"{source}: tuning.seeds = {overlap}: also seeds of the experiment; tuning runs need "
            f"seeds of their own, e.g. [1000]{sources.line_suffix('tuning.seeds')}"
        )
    if recipe.training.keep_best or recipe.training.early_stopping_patience:
        yield (
            f"{source}: tuning chooses by the validation set at the end of training; leave out "
            "training.keep_best and training.early_stopping_patience (or tune "
            "training.num_train_epochs)"
        )
    for key, values in zip(tuning.key, tuning.values, strict=True):
        for value in values if key in tunable and values != "auto" else ():
            faults: list[str] = []
            settings = recipe.model_dump(mode="json", include=set(CellConfig.model_fields))
            set_key(settings, key, value)
            validate(CellConfig, settings, sources, faults, f"{source}: tuning.values")
            yield from faults


def arms_of(cells: Sequence[Cell]) -> list[Cell]:
    """One cell of each setting: those that differ in seeds alone share their tuned values."""
    first: dict[str, Cell] = {}
    for cell in cells:
        first.setdefault(arm_key(cell), cell)
    return list(first.values())


def arm_key(cell: Cell) -> str:
    """Equal for cells that differ in seeds alone."""
    config = cell.config.model_dump(mode="json", exclude={"seed", "data_seed"})
    return json.dumps(config, sort_keys=True)


def arm_name(arm: Cell) -> str:
    """Name of a setting: that of its cells without seeds."""
    config = arm.config
    return name_without_seeds(arm.name, config.seed, config.data_seed, config.adapter.r)


def name_without_seeds(name: str, seed: int, data_seed: int, rank: int) -> str:
    """The name of a cell without its seeds; `r8` where nothing is left."""
    seeds = {f"seed{seed}", f"data{data_seed}"}
    return "-".join(part for part in name.split("-") if part not in seeds) or f"r{rank}"


def tuning_cell(arm: Cell, values: Mapping[str, float], seed: int) -> Cell:
    """A setting with values of its tuned keys and a tuning seed, which also draws its rows."""
    config = _with(arm.config, {**values, "seed": seed, "data_seed": seed})
    settings = {key: value for key, value in arm.settings.items() if key != "data_seed"}
    settings |= {**values, "seed": seed}
    return replace(arm, name=_cell_name(config, settings), settings=settings, config=config)


def name_without(config: CellConfig, settings: Mapping[str, Any], keys: Sequence[str]) -> str:
    """Name of a tuning cell without the values of its tuned keys: `r16-1500-seed1000`."""
    return _cell_name(config, {key: settings[key] for key in settings if key not in keys})


def tuned_cell(cell: Cell, values: Mapping[str, float]) -> Cell:
    """A cell of the grid at the values that were chosen for its setting; its name stays."""
    return replace(cell, settings={**cell.settings, **values}, config=_with(cell.config, values))


def at_learning_rate(cell: Cell, rate: float) -> Cell:
    """A cell at a learning rate in place of ``auto``; its name stays, by which commands choose it
    before any model is read."""
    value = {LEARNING_RATE: rate}
    settings = {**cell.settings, **value} if LEARNING_RATE in cell.settings else cell.settings
    return replace(cell, settings=settings, config=_with(cell.config, value))


def _with(config: CellConfig, values: Mapping[str, Any]) -> CellConfig:
    settings = config.model_dump(mode="json")
    for key, value in values.items():
        set_key(settings, key, value)
    return CellConfig.model_validate(settings)


def _value_at(cell: CellConfig, key: str) -> Any:
    value: Any = cell
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def _cell_name(cell: CellConfig, varied: Mapping[str, Any]) -> str:
    """A short name from the varied keys: `r16-1500-seed1`; `r8` without any."""
    parts = []
    order = ["adapter.kind", "adapter.r", "data.size"]
    for key in [*order, *sorted(set(varied) - {*order, "seed"}), "seed"]:
        if key not in varied:
            continue
        if key == "adapter.lora_alpha" and cell.adapter.lora_alpha == "2r":
            continue
        prefix = _SHORT_KEYS.get(key, key.rsplit(".", 1)[-1].replace("_", ""))
        parts.append(prefix + _format_in_name(varied[key]))
    name = "".join(
        c if c.isascii() and (c.isalnum() or c in "._+-") else "_" for c in "-".join(parts)
    )
    if len(name) > _MAX_NAME_LENGTH:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name[: _MAX_NAME_LENGTH - 9]}-{digest}"
    return name or f"r{cell.adapter.r}"


def _format_in_name(value: Any) -> str:
    if isinstance(value, str) and "/" in value:
        return value.rstrip("/").rsplit("/", 1)[-1]  # last part of a path or hub id
    if isinstance(value, list | tuple):
        return "+".join(map(str, value))
    if isinstance(value, float):
        return str(value).removesuffix(".0")
    return str(value)
