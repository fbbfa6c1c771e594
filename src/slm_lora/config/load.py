"""Load a recipe: YAML file and dotted overrides; all errors are reported at once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from slm_lora.config.grid import Cell, expand_grid, set_key
from slm_lora.config.schema import Recipe
from slm_lora.config.validation import (
    Settings,
    Sources,
    escape_unprintable,
    format_value,
    unsettable_reason,
    validate,
)
from slm_lora.errors import UsageError

_SURROGATE = re.compile("[\ud800-\udfff]")


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> tuple[Recipe, list[Cell]]:
    """Read, override and validate a recipe, and expand its grid.

    Args:
        path: a YAML file.
        overrides: ``dotted.key=value``, the value in YAML.

    Returns:
        The recipe, and one cell per point of the grid and seed, seed-major.

    Raises:
        UsageError: the file cannot be read, or the recipe is invalid; one line per error.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such recipe{_suggest_file(path)}") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or an invalid path
        raise UsageError(escape_unprintable(f"{path}: cannot be read ({error})")) from error
    return parse_recipe(text, path.name, overrides)


def parse_recipe(text: str, file: str, overrides: Sequence[str] = ()) -> tuple[Recipe, list[Cell]]:
    """`load_recipe` from text; ``file`` is its name in messages.

    Raises:
        UsageError: the recipe is invalid; one line per error.
    """
    sources = Sources(file)
    errors: list[str] = []
    settings = _parse_yaml(text, sources, errors)
    override_errors: list[str] = []
    for override in overrides:
        _apply_override(settings, override, sources, override_errors)
    recipe = validate(Recipe, settings, sources, errors)
    errors.extend(override_errors)
    cells = [] if recipe is None or errors else expand_grid(recipe, settings, sources, errors)
    if recipe is None or errors:
        raise UsageError("\n".join(dict.fromkeys(map(escape_unprintable, errors))))
    return recipe, cells


def _suggest_file(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _parse_yaml(text: str, sources: Sources, errors: list[str]) -> Settings:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        value = _load_value(text)
    except Exception as error:  # constructors of explicit tags (!!int x) raise arbitrary errors
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        problem = getattr(error, "problem", None) or str(error) or type(error).__name__
        first_line = escape_unprintable(problem.splitlines()[0])
        raise UsageError(f"{sources.file}: not valid YAML: {first_line:.200}{line}") from error
    if value is None:
        return {}
    if not isinstance(node, yaml.MappingNode) or not isinstance(value, dict):
        raise UsageError(f"{sources.file}: must be a mapping of keys to values")
    _record_lines(node, "", sources, errors, set())
    return value


def _load_value(text: str) -> Any:
    value = yaml.safe_load(text)
    if "\\" in text:  # escapes can spell lone surrogates, which UTF-8 cannot encode
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.ScalarEvent) and _SURROGATE.search(event.value):
                mark: Any = event.start_mark
                raise yaml.MarkedYAMLError(
                    problem="half a character (lone surrogate)", problem_mark=mark
                )
    return value


def _record_lines(
    node: yaml.MappingNode, prefix: str, sources: Sources, errors: list[str], visited: set[int]
) -> None:
    # Anchors can repeat a mapping, or nest it in itself: visit each once.
    visited.add(id(node))
    seen: set[str] = set()
    for key_node, value_node in node.value:
        key = prefix + str(key_node.value)
        line = key_node.start_mark.line + 1
        if key in seen:
            errors.append(f"{sources.file}: '{format_value(key)}' is written twice (line {line})")
        seen.add(key)
        sources.lines[key] = line
        if isinstance(value_node, yaml.MappingNode) and id(value_node) not in visited:
            _record_lines(value_node, f"{key}.", sources, errors, visited)


def _apply_override(settings: Settings, override: str, sources: Sources, errors: list[str]) -> None:
    key, separator, raw = override.partition("=")
    key = key.strip()
    if not separator or not key:
        errors.append(f"override: '{format_value(override)}' is not key=value")
        return
    try:
        value = _load_value(raw)
    except Exception:  # see _parse_yaml
        errors.append(f"override: {format_value(key)} = {format_value(raw)}: not valid YAML")
        return
    if reason := unsettable_reason(key, Recipe):
        errors.append(f"override: {reason}")
        return
    if raw == "":
        value = ""
    set_key(settings, key, value)
    sources.overrides[key] = None
