"""Drift of a run from its base, and its losses on further sets:
``forgetting/<measure>/<run folder>.jsonl`` beside ``runs/``, where a measure is ``drift`` or a set.

The first line holds the settings and the SHA-256 of the other lines, one per prompt or row. The
base's replies, on which drift is measured, are in ``forgetting/replies/<base folder>.jsonl`` in the
same form. Texts of the sets are not in these files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from slm_lora.config.forgetting import DRIFT
from slm_lora.errors import IntegrityError
from slm_lora.records import RowScore
from slm_lora.runs.checked_lines import read_lines, write_lines
from slm_lora.runs.metrics import add_row_set_metric

FORGETTING_FORMAT = 1
REPLIES = "replies"


@dataclass(frozen=True, slots=True)
class RowChange:
    """What changed from the base to a run, on one prompt or row.

    Attributes:
        row: number of the prompt, or id of the row.
        group: of related rows.
        tokens: scored.
        nats: of a set, the NLL under the run; of drift, the KL divergence; summed over tokens.
        base_nats: of a set, the NLL under the base; of drift, 0.
    """

    row: str
    group: str
    tokens: int
    nats: float
    base_nats: float


@dataclass(frozen=True, slots=True)
class BaseReply:
    """A reply that was sampled from the base, with the token ids that are scored."""

    row: str
    prompt: str
    reply: str
    prompt_ids: list[int]
    ids: list[int]


class ForgettingHeader(BaseModel):
    """The first line.

    Attributes:
        run: hash of the run.
        settings: of the measurement.
        source: SHA-256 of what was scored: for drift the lines of the replies; for a set the tokens
            of its rows, and of a tuned run the lines of the base's file.
        margin: of non-inferiority, nats per token; 0 for drift.
        sha256: of the other lines.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    format: int
    run: str
    settings: dict[str, Any]
    source: str
    margin: float
    sha256: str = ""


@dataclass(frozen=True)
class RowSetScores:
    """Scores of a run on rows other than the test rows.

    Attributes:
        scores: with the change from the base under the name of the metric.
        margin: of non-inferiority, nats per token; 0: none.
        loss: of the run; nats per token; for drift its mean.
        base_loss: of its base.
        source, sha256: of the file's header.
    """

    scores: tuple[RowScore, ...]
    margin: float
    loss: float
    base_loss: float
    source: str
    sha256: str


Line = TypeVar("Line", RowChange, BaseReply)


def forgetting_file(run_folder: Path, measure: str) -> Path:
    """The file of a run's measure; the run is ``<results>/runs/<name>``."""
    return run_folder.parent.parent / "forgetting" / measure / f"{run_folder.name}.jsonl"


def write_forgetting(
    path: Path,
    run: str,
    settings: Mapping[str, Any],
    source: str,
    lines: Sequence[RowChange] | Sequence[BaseReply],
    margin: float = 0.0,
) -> str:
    """Write a file; ``run`` is the run's hash. Returns the SHA-256 of its lines."""
    header = ForgettingHeader(
        format=FORGETTING_FORMAT, run=run, settings=dict(settings), source=source, margin=margin
    )
    return write_lines(path, header, lines).sha256


def read_forgetting(path: Path, kind: type[Line]) -> tuple[ForgettingHeader, list[Line]] | None:
    """What `write_forgetting` wrote; None without a file.

    Raises:
        IntegrityError: the file is broken.
    """

    def items(values: list[Any]) -> list[Line]:
        lines = [_line(kind, value) for value in values]
        if not lines or len({line.row for line in lines}) < len(lines):
            raise ValueError("no rows, or one twice")
        return lines

    return read_lines(path, ForgettingHeader, FORGETTING_FORMAT, items)


def _line(kind: type[Line], values: Any) -> Line:
    if not isinstance(values, dict) or set(values) != {field.name for field in fields(kind)}:
        raise ValueError("a line has other keys")
    line = kind(**values)
    if isinstance(line, RowChange):
        numbers = (line.tokens, line.nats, line.base_nats)
        if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
            raise ValueError(f"row {line.row!r:.20} has a value that is no finite number")
        if line.tokens < 0 or not isinstance(line.row, str) or not isinstance(line.group, str):
            raise ValueError("a row has no id, group or count of tokens")
    return line


def read_row_sets(run_folder: Path, run: str) -> dict[str, RowSetScores]:
    """All that was measured of a run, by the name of its metric: ``drift``, ``forgetting:<set>``.

    Raises:
        IntegrityError: a file is broken, or of another run.
    """
    folder = run_folder.parent.parent / "forgetting"
    row_sets = {}
    for path in sorted(folder.glob(f"*/{run_folder.name}.jsonl")):
        measure = path.parent.name
        if measure == REPLIES:
            continue
        there = read_forgetting(path, RowChange)
        assert there is not None, "found above"
        header, lines = there
        if header.run != run:
            raise IntegrityError(f"{path}: of another run; remove it")
        row_sets[add_row_set_metric(measure).name] = _scores(measure, header, lines)
    return row_sets


def without_stale(
    row_sets: Mapping[str, RowSetScores], of_bases: Sequence[Mapping[str, RowSetScores]]
) -> dict[str, RowSetScores]:
    """What a tuned run has, without measures against other files than those that the bases have
    now: an interrupted measurement with other settings leaves some."""
    current: dict[str, set[str]] = {}
    for of_base in of_bases:
        for name, own in of_base.items():
            current.setdefault(name, set()).update((own.source, own.sha256))
    return {
        name: own
        for name, own in row_sets.items()
        if name not in current or own.source in current[name]
    }


def _scores(measure: str, header: ForgettingHeader, lines: Sequence[RowChange]) -> RowSetScores:
    name = add_row_set_metric(measure).name
    split = DRIFT if measure == DRIFT else f"also {measure}"
    scores = tuple(
        RowScore(
            line.row, line.group, "", split, line.nats, line.tokens, 0, 0.0, 0, 0,
            {name: (line.nats - line.base_nats, float(line.tokens))},
        )
        for line in lines
    )  # fmt: skip
    tokens = max(1, sum(line.tokens for line in lines))
    loss, base_loss = (
        math.fsum(values) / tokens
        for values in ([line.nats for line in lines], [line.base_nats for line in lines])
    )
    return RowSetScores(scores, header.margin, loss, base_loss, header.source, header.sha256)
