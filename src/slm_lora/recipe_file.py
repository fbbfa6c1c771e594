"""Read a recipe: YAML file, dotted overrides, and every mistake explained at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from slm_lora.errors import UsageError
from slm_lora.recipe import CellRecipe, Recipe

Settings = dict[str, Any]
_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Cell:
    """One point of the grid: its name, what sets it apart, and its complete recipe."""

    name: str
    settings: Mapping[str, Any]
    recipe: CellRecipe


@dataclass(slots=True)
class _Sources:
    """Where each dotted key was written, for messages."""

    file: str
    lines: dict[str, int] = field(default_factory=dict)
    overrides: set[str] = field(default_factory=set)

    def explain(self, key: str) -> str:
        """`file`, or `override`, and the end of a message: the line, if there is one."""
        return "override" if self._from_override(key) else self.file

    def line(self, key: str) -> str:
        if self._from_override(key):
            return ""
        parts = key.split(".")
        for end in range(len(parts), 0, -1):
            if (number := self.lines.get(".".join(parts[:end]))) is not None:
                return f" (line {number})"
        return ""

    def _from_override(self, key: str) -> bool:
        return any(key == o or key.startswith(f"{o}.") for o in self.overrides)


def known_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """All dotted keys of the schema, sections before what is in them."""
    for name, info in model.model_fields.items():
        yield prefix + name
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from known_keys(info.annotation, f"{prefix}{name}.")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, list[Cell]]:
    """Read, override and validate a recipe, and unfold its grid.

    Args:
        path: a YAML file.
        overrides: ``dotted.key=value``, the value as in YAML.

    Raises:
        UsageError: the file cannot be read, or the recipe is wrong; one line a mistake.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such recipe{_nearby(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
    return parse_recipe(text, path.name, overrides)


def parse_recipe(text: str, file: str, overrides: Sequence[str] = ()) -> tuple[Recipe, list[Cell]]:
    """`load_recipe` for text that was read already; ``file`` names it in messages.

    Raises:
        UsageError: one line a mistake.
    """
    sources = _Sources(file)
    mistakes: list[str] = []
    settings = _parse_yaml(text, sources, mistakes)
    for override in overrides:
        _apply_override(settings, override, sources, mistakes)
    recipe = _validated(Recipe, settings, sources, mistakes)
    if recipe is None or mistakes:
        raise UsageError("\n".join(dict.fromkeys(mistakes)))
    cells = _cells(recipe, settings, sources, mistakes)
    if mistakes:
        raise UsageError("\n".join(dict.fromkeys(mistakes)))
    return recipe, cells


def _nearby(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _parse_yaml(text: str, sources: _Sources, mistakes: list[str]) -> Settings:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UsageError(f"{sources.file}: not valid YAML: {problem}{where}") from error
    if value is None:
        return {}
    if not isinstance(node, yaml.MappingNode) or not isinstance(value, dict):
        raise UsageError(f"{sources.file}: must be a mapping of keys to values")
    _record_lines(node, "", sources, mistakes)
    return value


def _record_lines(
    node: yaml.MappingNode, prefix: str, sources: _Sources, mistakes: list[str]
) -> None:
    seen: set[str] = set()
    for key_node, value_node in node.value:
        key = prefix + str(key_node.value)
        line = key_node.start_mark.line + 1
        if key in seen:
            mistakes.append(f"{sources.file}: '{key}' is written twice (line {line})")
        seen.add(key)
        sources.lines[key] = line
        # A key that holds itself through an anchor would never end.
        if isinstance(value_node, yaml.MappingNode) and key.count(".") < 8:
            _record_lines(value_node, f"{key}.", sources, mistakes)


def _apply_override(
    settings: Settings, override: str, sources: _Sources, mistakes: list[str]
) -> None:
    key, separator, raw = override.partition("=")
    key = key.strip()
    if not separator or not key:
        mistakes.append(f"override: '{override}' is not key=value")
        return
    try:
        value = yaml.safe_load(raw)
    except (yaml.YAMLError, ValueError):
        mistakes.append(f"override: {key} = {raw}: not a value in YAML")
        return
    if raw == "":
        value = ""
    _set(settings, key, value)
    sources.overrides.add(key)


def _set(settings: Settings, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = settings.get(parent)
        # Copied, never changed in place: cells share what they do not override.
        settings[parent] = dict(inner) if isinstance(inner, dict) else {}
        settings = settings[parent]
    settings[last] = value


def _validated(
    model: type[_Model], settings: Settings, sources: _Sources, mistakes: list[str], place: str = ""
) -> _Model | None:
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        keys = list(known_keys())
        for each in error.errors():
            mistakes.append(_explained(dict(each), keys, sources, place))
        return None


def _explained(error: dict[str, Any], keys: list[str], sources: _Sources, place: str) -> str:
    location = [str(part) for part in error["loc"]]
    # What pydantic adds for the branches of a union is not a key.
    known = [part for part in location if not part.startswith(("literal[", "tuple[", "function-"))]
    while len(known) > 1 and ".".join(known) not in keys and known[-1] in ("float", "str", "int"):
        known.pop()
    key = ".".join(known)
    source = place or sources.explain(key)
    line = "" if place else sources.line(key)
    if error["type"] == "extra_forbidden":
        return f"{source}: unknown key '{key}'{line}{_did_you_mean(key, keys)}"
    if error["type"] == "missing":
        return f"{source}: '{key}' is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    message = message.replace("Input should be", "must be").replace("a valid ", "a ")
    shown = error["input"]
    if not key or isinstance(shown, BaseModel | dict):
        return f"{source}: {f'{key}: ' if key else ''}{message}{line}"
    hint = ""
    if error["type"] == "literal_error" and isinstance(shown, str):
        choices = [
            c.strip(" '") for c in str(error["ctx"]["expected"]).replace(" or ", ",").split(",")
        ]
        close = difflib.get_close_matches(shown, choices, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"{source}: {key} = {shown}: {message}{line}{hint}"


def _did_you_mean(key: str, keys: list[str]) -> str:
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if not close:
        # The right name in the wrong section.
        last = key.rsplit(".", 1)[-1]
        close = [known for known in keys if known.rsplit(".", 1)[-1] == last][:1]
    return f"; did you mean '{close[0]}'?" if close else ""


_SHORT = {
    "adapter.r": "r",
    "data.size": "",
    "seed": "seed",
    "data_seed": "data",
    "adapter.kind": "",
}
_NOT_IN_CELLS = ("name", "description", "grid", "seeds")


def _cells(
    recipe: Recipe, settings: Settings, sources: _Sources, mistakes: list[str]
) -> list[Cell]:
    keys = set(known_keys(CellRecipe))
    shared = {name: value for name, value in settings.items() if name not in _NOT_IN_CELLS}
    cells = []
    # Seed-major, so that any finished prefix holds every setting equally often.
    for seed in recipe.seeds or (None,):
        for index, varied in enumerate(recipe.grid.settings(), start=1):
            place = f"{sources.explain('grid')}: grid cell {index}"
            unknown = [key for key in varied if key not in keys]
            for key in unknown:
                mistakes.append(f"{place}: unknown key '{key}'{_did_you_mean(key, sorted(keys))}")
            own = dict(shared)
            chosen = dict(varied) if seed is None else {**varied, "seed": seed}
            for key, value in chosen.items():
                _set(own, key, value)
            if unknown:
                continue
            cell = _validated(CellRecipe, own, sources, mistakes, place)
            if cell is not None:
                cells.append(Cell(_cell_name(cell, chosen), chosen, cell))
    doubles = {c.name for c in cells if sum(o.name == c.name for o in cells) > 1}
    for name in sorted(doubles):
        mistakes.append(f"{sources.file}: grid has the cell {name} more than once")
    return cells


def _cell_name(cell: CellRecipe, chosen: Mapping[str, Any]) -> str:
    """A short name of what sets the cell apart: `r16-1500-seed1`; `r8` where nothing does."""
    parts = []
    order = ["adapter.kind", "adapter.r", "data.size"]
    for key in [*order, *sorted(set(chosen) - {*order, "seed"}), "seed"]:
        if key not in chosen:
            continue
        value = chosen[key]
        if key == "adapter.lora_alpha" and cell.adapter.lora_alpha == "2r":
            continue
        shown = "+".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        prefix = _SHORT.get(key, key.rsplit(".", 1)[-1].replace("_", ""))
        parts.append(prefix + "".join(c if c.isalnum() or c in ".+" else "_" for c in shown))
    return "-".join(parts) or f"r{cell.adapter.r}"
