"""Read a recipe: YAML file, dotted overrides, and every mistake explained at once."""

from __future__ import annotations

import difflib
import hashlib
import re
import reprlib
import types
import typing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from slm_lora.errors import UsageError
from slm_lora.recipe import CellRecipe, Recipe

Settings = dict[str, Any]
_Model = TypeVar("_Model", bound=BaseModel)

MOST_CELLS = 10_000
"""Cells times seeds; axes multiply quickly, and more than this is a slip."""

_SURROGATE = re.compile("[\ud800-\udfff]")
_LONGEST_NAME = 120
"""Characters of a cell's name: it is a folder's, and files are named after it."""


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
    overrides: dict[str, None] = field(default_factory=dict)

    def explain(self, key: str) -> str:
        """`override` or the file's name: what a message on the key begins with."""
        return "override" if self._from_override(key) else self.file

    def line(self, key: str) -> str:
        """The line to end the message with, if there is one."""
        if self._from_override(key):
            return ""
        parts = key.split(".")
        for end in range(len(parts), 0, -1):
            if (number := self.lines.get(".".join(parts[:end]))) is not None:
                return f" (line {number})"
        return ""

    def _from_override(self, key: str) -> bool:
        return any(
            key == o
            or key.startswith(f"{o}.")
            # a section that only an override brought into being
            or (o.startswith(f"{key}.") and key not in self.lines)
            for o in self.overrides
        )


# --- the schema's keys -------------------------------------------------------------------------


def _is_section(info: FieldInfo) -> bool:
    return isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)


def _fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, info in model.model_fields.items():
        yield prefix + name, info
        if _is_section(info):
            yield from _fields(typing.cast(type[BaseModel], info.annotation), f"{prefix}{name}.")


def known_keys(model: type[BaseModel] = Recipe) -> Iterator[str]:
    """All dotted keys of the schema, sections before what is in them."""
    for key, _ in _fields(model):
        yield key


def _why_not_settable(key: str, model: type[BaseModel]) -> str:
    """Why a dotted key cannot be set on its own, or nothing if it can."""
    fields = dict(_fields(model))
    if key in fields:
        if not _is_section(fields[key]):
            return ""
        inner = next(each for each in fields if each.startswith(f"{key}."))
        return f"'{_shown(key)}' is a section; set what is in it, such as '{inner}'"
    parent, _, last = key.rpartition(".")
    if last and parent in fields and typing.get_origin(fields[parent].annotation) is dict:
        return ""
    return f"unknown key '{_shown(key)}'{_did_you_mean(key, list(fields))}"


def _did_you_mean(key: str, keys: list[str]) -> str:
    close = difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
    if not close:
        # The right name in the wrong section.
        last = key.rsplit(".", 1)[-1]
        close = [known for known in keys if known.rsplit(".", 1)[-1] == last][:1]
    return f"; did you mean '{close[0]}'?" if close else ""


# --- reading -----------------------------------------------------------------------------------


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
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or no possible path
        raise UsageError(_one_line(f"{path}: cannot be read ({error})")) from error
    return parse_recipe(text, path.name, overrides)


def parse_recipe(text: str, file: str, overrides: Sequence[str] = ()) -> tuple[Recipe, list[Cell]]:
    """`load_recipe` for text that was read already; ``file`` names it in messages.

    Raises:
        UsageError: one line a mistake.
    """
    sources = _Sources(file)
    mistakes: list[str] = []
    settings = _parse_yaml(text, sources, mistakes)
    in_overrides: list[str] = []
    for override in overrides:
        _apply_override(settings, override, sources, in_overrides)
    recipe = _validated(Recipe, settings, sources, mistakes)
    mistakes.extend(in_overrides)
    cells = [] if recipe is None or mistakes else _cells(recipe, settings, sources, mistakes)
    if recipe is None or mistakes:
        raise UsageError("\n".join(dict.fromkeys(map(_one_line, mistakes))))
    return recipe, cells


def _nearby(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _parse_yaml(text: str, sources: _Sources, mistakes: list[str]) -> Settings:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = _value(text)
    except Exception as error:  # a tag forces a value on its constructor, which fails in any way
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        problem = getattr(error, "problem", None) or str(error) or type(error).__name__
        raise UsageError(
            f"{sources.file}: not valid YAML: {_one_line(problem.splitlines()[0])}{where}"
        ) from error
    if value is None:
        return {}
    if not isinstance(node, yaml.MappingNode) or not isinstance(value, dict):
        raise UsageError(f"{sources.file}: must be a mapping of keys to values")
    _record_lines(node, "", sources, mistakes, set())
    return value


def _value(text: str) -> Any:
    value = yaml.safe_load(text)
    if "\\" in text:  # an escape can write what no file can hold
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.ScalarEvent) and _SURROGATE.search(event.value):
                mark: Any = event.start_mark
                raise yaml.MarkedYAMLError(
                    problem="half a character (lone surrogate)", problem_mark=mark
                )
    return value


def _record_lines(
    node: yaml.MappingNode, prefix: str, sources: _Sources, mistakes: list[str], done: set[int]
) -> None:
    # Through anchors a mapping may stand in many places, or in itself: once is enough.
    done.add(id(node))
    seen: set[str] = set()
    for key_node, value_node in node.value:
        key = prefix + str(key_node.value)
        line = key_node.start_mark.line + 1
        if key in seen:
            mistakes.append(f"{sources.file}: '{_shown(key)}' is written twice (line {line})")
        seen.add(key)
        sources.lines[key] = line
        if isinstance(value_node, yaml.MappingNode) and id(value_node) not in done:
            _record_lines(value_node, f"{key}.", sources, mistakes, done)


def _apply_override(
    settings: Settings, override: str, sources: _Sources, mistakes: list[str]
) -> None:
    key, separator, raw = override.partition("=")
    key = key.strip()
    if not separator or not key:
        mistakes.append(f"override: '{_shown(override)}' is not key=value")
        return
    try:
        value = _value(raw)
    except Exception:  # see _parse_yaml
        mistakes.append(f"override: {_shown(key)} = {_shown(raw)}: not a value in YAML")
        return
    if why := _why_not_settable(key, Recipe):
        mistakes.append(f"override: {why}")
        return
    if raw == "":
        value = ""
    _set(settings, key, value)
    sources.overrides[key] = None


def _set(settings: Settings, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = settings.get(parent)
        if inner is not None and not isinstance(inner, dict):
            return  # a mistake of the file's, that validation finds
        # Copied, never changed in place: cells share what they do not override.
        settings[parent] = dict(inner or {})
        settings = settings[parent]
    settings[last] = value


# --- explaining --------------------------------------------------------------------------------

_SAID = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be below 2^63",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be finite",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
    "model_attributes_type": "must be a mapping of keys to values",
    "string_pattern_mismatch": "must be of a-z, 0-9 and . _ -, a letter or digit first",
}
"""Mistakes in plain words, by pydantic's name for them."""


def _validated(
    model: type[_Model], settings: Settings, sources: _Sources, mistakes: list[str], place: str = ""
) -> _Model | None:
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        found: dict[str, str] = {}
        for each in error.errors(include_url=False):
            key, literal = _key_of(each["loc"], model)
            explained = _explained(dict(each), key, sources, place)
            # Of a union every branch has an error to tell: the first is enough, and of a list
            # or one certain word the list.
            if not literal or not any(other.startswith(key) for other in found):
                found.setdefault(key, explained)
        mistakes.extend(found.values())
        return None


def _key_of(location: tuple[int | str, ...], model: type[BaseModel]) -> tuple[str, bool]:
    """The dotted key at a place that pydantic tells, and whether it is that of a single word.

    Behind a key of several types pydantic names the type that it tried.
    """
    fields = dict(_fields(model))
    parts: list[str] = []
    literal = False
    for part in location:
        info = fields.get(".".join(parts))
        if isinstance(part, str) and info is not None and _is_union(info.annotation):
            literal = part.startswith("literal[")
        elif part != "[key]":
            parts.append(str(part))
    return ".".join(parts), literal


def _is_union(annotation: object) -> bool:
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return False
    return len([each for each in typing.get_args(annotation) if each is not type(None)]) > 1


def _explained(error: dict[str, Any], key: str, sources: _Sources, place: str) -> str:
    source = place or sources.explain(key)
    line = "" if place else sources.line(key)
    if error["type"] == "invalid_key" or "[key]" in error["loc"][-1:]:
        return f"{source}: {_shown(key)}: a key must be text{line}"
    if error["type"] == "extra_forbidden":
        keys = list(known_keys())
        section, _, last = key.rpartition(".")
        if key in keys:
            return f"{source}: '{key}' must be written as '{last}' under '{section}'{line}"
        return f"{source}: unknown key '{_shown(key)}'{line}{_did_you_mean(key, keys)}"
    if error["type"] == "missing":
        return f"{source}: '{key}' is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    message = _SAID.get(error["type"], message.replace("Input should be", "must be"))
    value = error["input"]
    if not key or isinstance(value, BaseModel | dict):
        return f"{source}: {f'{_shown(key)}: ' if key else ''}{message}{line}"
    hint = ""
    if error["type"] == "literal_error" and isinstance(value, str):
        choices = [
            c.strip(" '") for c in str(error["ctx"]["expected"]).replace(" or ", ",").split(",")
        ]
        close = difflib.get_close_matches(value, choices, n=1)
        hint = f"; did you mean '{close[0]}'?" if close else ""
    return f"{source}: {_shown(key)} = {_shown(value)}: {message}{line}{hint}"


_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 2


def _shown(value: object, most: int = 60) -> str:
    """A value as YAML would have it, short enough for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    try:
        text = value if isinstance(value, str) else _BRIEF.repr(value)
    except ValueError:  # Python prints no number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _one_line(text: str) -> str:
    # What is shown may come from a file: it must not break the line, nor the terminal.
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# --- cells -------------------------------------------------------------------------------------

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
    count = recipe.grid.count() * max(1, len(recipe.seeds))
    source = sources.explain("grid.cells" if recipe.grid.cells else "grid.axes")
    if count > MOST_CELLS:
        mistakes.append(f"{source}: {count} cells (with seeds); at most {MOST_CELLS}")
        return []
    grid = recipe.grid.settings()
    before = len(mistakes)
    for index, varied in enumerate(grid, start=1):
        for key in varied:
            if why := _why_not_settable(key, CellRecipe):
                mistakes.append(f"{source}: grid cell {index}: {why}")
    if recipe.seeds and any("seed" in varied for varied in grid):
        mistakes.append(f"{source}: the grid sets 'seed', and so do 'seeds'; leave one out")
    for key in sources.overrides:
        if all(key in varied for varied in grid) or (key == "seed" and recipe.seeds):
            by = "seeds" if key == "seed" and recipe.seeds else "grid"
            mistakes.append(f"override: {key} has no effect: '{by}' sets it in every cell")
    if len(mistakes) > before:
        return []
    shared = {name: value for name, value in settings.items() if name not in _NOT_IN_CELLS}
    cells = []
    # Seed-major, so that any finished prefix holds every setting equally often.
    for seed in recipe.seeds or (None,):
        for index, varied in enumerate(grid, start=1):
            own = dict(shared)
            chosen = varied if seed is None else {**varied, "seed": seed}
            for key, value in chosen.items():
                _set(own, key, value)
            cell = _validated(CellRecipe, own, sources, mistakes, f"{source}: grid cell {index}")
            if cell is not None:
                # As validated: `2e-4` is text in YAML, and a number here.
                values = {key: _value_at(cell, key) for key in chosen}
                cells.append(Cell(_cell_name(cell, values), values, cell))
    # Folders are named after cells, and some file systems take R8 for r8.
    times = Counter(cell.name.casefold() for cell in cells)
    for name in dict.fromkeys(cell.name for cell in cells):
        if times[name.casefold()] > 1:
            mistakes.append(f"{source}: the grid has the cell {name} more than once")
    return cells


def _value_at(cell: CellRecipe, key: str) -> Any:
    value: Any = cell
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def _cell_name(cell: CellRecipe, chosen: Mapping[str, Any]) -> str:
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
    if isinstance(value, list | tuple):
        return "+".join(map(str, value))
    if isinstance(value, float):
        return str(value).removesuffix(".0")
    return str(value)
