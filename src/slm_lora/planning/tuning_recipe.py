"""The recipe of `slm-lora tune`: its text, with a comment on every choice."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from slm_lora.config.schema import ModelSection
from slm_lora.config.validation import escape_unprintable
from slm_lora.planning.budget import BATCH, RANKS, RATES, USUAL_RATE, Sizes
from slm_lora.report.names import rate_name

TUNING_SEED = 1000
"""Of tuning runs; final runs have 0, 1, 2."""
ML_QA = "ml-qa"


@dataclass(frozen=True, slots=True)
class Request:
    """What `slm-lora tune` was asked for.

    Attributes:
        rows: a file, a folder, a hub id, or ml-qa.
        model: name of the base.
        budget: seconds.
        name: of the experiment; empty: after the rows.
    """

    rows: str = ML_QA
    model: str = ModelSection.model_fields["name"].default
    budget: int = 1800
    name: str = ""

    @property
    def experiment(self) -> str:
        """Name of the experiment."""
        return self.name or experiment_name(self.rows)

    @property
    def command(self) -> str:
        """The command without its defaults, as the first line of a recipe has it."""
        words = ["slm-lora", "tune"]
        if self.rows != ML_QA:
            words.append(self.rows)
        if self.model != ModelSection.model_fields["name"].default:
            words += ["--model", self.model]
        words += ["--budget", duration(self.budget)]
        if self.name:
            words += ["--name", self.name]
        return escape_unprintable(shlex.join(words))


def duration(seconds: float) -> str:
    """``30m``; ``2h``; ``90s`` where it is no whole number of minutes."""
    whole = round(seconds)
    for size, unit in ((3600, "h"), (60, "m")):
        if whole >= size and whole % size == 0:
            return f"{whole // size}{unit}"
    return f"{whole}s"


def experiment_name(rows: str) -> str:
    """``rows`` for ``data/Rows.jsonl.gz``, ``dolly`` for ``owner/dolly``."""
    last = Path(rows).name
    stem = re.sub(r"(\.[A-Za-z]{2,8}){1,2}$", "", last) or last
    slug = re.sub(r"[^a-z0-9._-]+", "-", stem.lower()).strip("._-")
    return slug[:60] or "tuned"


@dataclass(frozen=True, slots=True)
class DataChoices:
    """Treatment of the rows, and what is noted on them.

    Attributes:
        note: on format, number and length of the rows.
        max_length: limit in tokens.
        on_long_row: treatment of longer rows.
        skips_bad_rows: whether malformed rows are skipped.
        columns: value of ``data.columns``.
    """

    note: str = ""
    max_length: int = 512
    on_long_row: str = "truncate"
    skips_bad_rows: bool = False
    columns: Mapping[str, str] = field(default_factory=dict)


def recipe_text(request: Request, sizes: Sizes, data: DataChoices) -> str:
    """The recipe as YAML."""
    name, search = request.experiment, sizes.search
    ranks = " and ".join(map(str, RANKS))
    lines = [
        f"# {request.command}",
        "# wrote this recipe, and goes on with it. Change it as you like, and run it with",
        f"#   slm-lora experiment {name}.yaml",
        f"name: {_quoted(name)}",
        f"description: {_quoted(f'LoRA of rank {ranks}, each at its own learning rate')}",
        "",
        "model:",
        f"  name: {_quoted(request.model)}",
        "",
        "data:",
        _line(f"  name: {_quoted(request.rows)}", escape_unprintable(data.note)),
        *_columns_lines(data.columns),
        _line(f"  test_rows: {sizes.test_rows}", "the gain over the base is measured on them"),
        _line(f"  validation_rows: {sizes.validation_rows}", "learning rates are chosen on them"),
        _size_line(sizes),
        f"  max_length: {data.max_length}",
        f"  on_long_row: {data.on_long_row}",
        *(["  on_bad_row: skip"] if data.skips_bad_rows else []),
        "",
        "adapter:",
        _line("  target_modules: all-linear", "reaches a lower loss than q_proj and v_proj alone"),
        "  lora_alpha: 2r",
        "",
        "training:",
        f"  num_train_epochs: {sizes.epochs:g}",
        _line(f"  effective_batch_size: {BATCH}", f"{sizes.steps} steps"),
        "",
        _line("tuning:", "each rank at its own learning rate, chosen on the validation rows"),
        f"  values: [{', '.join(map(rate_name, RATES))}]",
        _line(f"  extend: {search.extend}", "further rates beyond an end where the loss is lowest"),
        _line(
            f"  refine: {search.refine}", "rounds of rates between the lowest and its neighbours"
        ),
        f"  seeds: [{TUNING_SEED}]",
        _line(f"  common_value: {rate_name(USUAL_RATE)}", "a usual rate, for comparison"),
        "",
        "grid:",
        "  axes:",
        _line(f"    - adapter.r: [{', '.join(map(str, RANKS))}]", "is the smaller one enough?"),
        "",
        _seeds_line(search.seeds),
    ]
    return "\n".join(lines) + "\n"


def _columns_lines(columns: Mapping[str, str]) -> list[str]:
    if not columns:
        return []
    pairs = ", ".join(f"{name}: {_quoted(column)}" for name, column in columns.items())
    return [_line(f"  columns: {{{pairs}}}", "no format has these columns: a guess")]


def _size_line(sizes: Sizes) -> str:
    rows = f"{sizes.training_rows} training rows"
    if sizes.size is None:
        return _line("  size: null", f"all others, {rows}")
    return _line(f"  size: {sizes.size}", f"{rows}, as the budget allows; null: all others")


def _seeds_line(count: int) -> str:
    seeds = f"seeds: [{', '.join(map(str, range(count)))}]"
    if count > 1:
        return _line(seeds, "every rank is trained so many times")
    return _line(seeds, "one: another seed may differ; [0, 1, 2] shows by how much")


def _line(setting: str, comment: str) -> str:
    return f"{setting:28}  # {comment}" if comment else setting


def _quoted(value: str) -> str:
    """A YAML string; quoted where it has to be."""
    words = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")
    simple = re.fullmatch(r"([A-Za-z/]|\.\.?/|~/)([\w./ ,-]*\w)?", value, re.ASCII)
    if simple and value.lower() not in words:
        return value
    quoted: str = yaml.safe_dump(value, default_style='"', allow_unicode=True, width=10**6)
    return quoted.strip()
