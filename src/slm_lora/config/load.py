"""Read a recipe: YAML file, dotted overrides, and every mistake explained at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from slm_lora.config.grid import Cell, set_key, unfold
from slm_lora.config.schema import Recipe
from slm_lora.config.validation import (
    Settings,
    Sources,
    one_line,
    shown,
    validated,
    why_not_settable,
)
from slm_lora.errors import UsageError

_SURROGATE = re.compile("[\ud800-\udfff]")


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
        raise UsageError(one_line(f"{path}: cannot be read ({error})")) from error
    return parse_recipe(text, path.name, overrides)


def parse_recipe(text: str, file: str, overrides: Sequence[str] = ()) -> tuple[Recipe, list[Cell]]:
    """`load_recipe` for text that was read already; ``file`` names it in messages.

    Raises:
        UsageError: one line a mistake.
    """
    sources = Sources(file)
    mistakes: list[str] = []
    settings = _parse_yaml(text, sources, mistakes)
    in_overrides: list[str] = []
    for override in overrides:
        _apply_override(settings, override, sources, in_overrides)
    recipe = validated(Recipe, settings, sources, mistakes)
    mistakes.extend(in_overrides)
    cells = [] if recipe is None or mistakes else unfold(recipe, settings, sources, mistakes)
    if recipe is None or mistakes:
        raise UsageError("\n".join(dict.fromkeys(map(one_line, mistakes))))
    return recipe, cells


def _nearby(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _parse_yaml(text: str, sources: Sources, mistakes: list[str]) -> Settings:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = _value(text)
    except Exception as error:  # a tag forces a value on its constructor, which fails in any way
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        problem = getattr(error, "problem", None) or str(error) or type(error).__name__
        raise UsageError(
            f"{sources.file}: not valid YAML: {one_line(problem.splitlines()[0])}{where}"
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
    node: yaml.MappingNode, prefix: str, sources: Sources, mistakes: list[str], done: set[int]
) -> None:
    # Through anchors a mapping may stand in many places, or in itself: once is enough.
    done.add(id(node))
    seen: set[str] = set()
    for key_node, value_node in node.value:
        key = prefix + str(key_node.value)
        line = key_node.start_mark.line + 1
        if key in seen:
            mistakes.append(f"{sources.file}: '{shown(key)}' is written twice (line {line})")
        seen.add(key)
        sources.lines[key] = line
        if isinstance(value_node, yaml.MappingNode) and id(value_node) not in done:
            _record_lines(value_node, f"{key}.", sources, mistakes, done)


def _apply_override(
    settings: Settings, override: str, sources: Sources, mistakes: list[str]
) -> None:
    key, separator, raw = override.partition("=")
    key = key.strip()
    if not separator or not key:
        mistakes.append(f"override: '{shown(override)}' is not key=value")
        return
    try:
        value = _value(raw)
    except Exception:  # see _parse_yaml
        mistakes.append(f"override: {shown(key)} = {shown(raw)}: not a value in YAML")
        return
    if why := why_not_settable(key, Recipe):
        mistakes.append(f"override: {why}")
        return
    if raw == "":
        value = ""
    set_key(settings, key, value)
    sources.overrides[key] = None
