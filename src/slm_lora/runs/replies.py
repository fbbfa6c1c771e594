"""Replies of a run to test rows, with the values of their metrics: ``replies/<run folder>.jsonl``
beside ``runs/``.

The first line holds the settings that they were generated with and the SHA-256 of the other lines,
one per row. Texts of the rows themselves are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from slm_lora.errors import IntegrityError
from slm_lora.records import RowScore
from slm_lora.runs.checked_lines import read_lines, write_lines
from slm_lora.runs.metrics import METRICS, add_own_metric

REPLIES_FORMAT = 1


@dataclass(frozen=True, slots=True)
class RowReply:
    """A reply to one test row.

    Attributes:
        row: id of the row.
        reply: its text.
        tokens: length, an end token included.
        finished: ``stop`` or ``length``.
        values: of metrics, by name; a metric that does not apply to the row is missing.
    """

    row: str
    reply: str
    tokens: int
    finished: str
    values: Mapping[str, float]


class RepliesHeader(BaseModel):
    """The first line: run, settings of the generation, names of all metrics."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: int
    run: str
    settings: dict[str, Any]
    metrics: list[str]
    sha256: str = ""


def replies_file(run_folder: Path) -> Path:
    """The file of a run's replies; the run is ``<results>/runs/<name>``."""
    return run_folder.parent.parent / "replies" / f"{run_folder.name}.jsonl"


def write_replies(
    path: Path,
    run: str,
    settings: Mapping[str, Any],
    metrics: Sequence[str],
    replies: Sequence[RowReply],
) -> None:
    """Write replies; ``run`` is the run's hash."""
    header = RepliesHeader(
        format=REPLIES_FORMAT, run=run, settings=dict(settings), metrics=list(metrics)
    )
    write_lines(path, header, replies)


def read_replies(path: Path) -> tuple[RepliesHeader, list[RowReply]] | None:
    """What `write_replies` wrote; None without a file.

    Raises:
        IntegrityError: the file is broken.
    """

    def items(values: list[Any]) -> list[RowReply]:
        return [RowReply(**value) for value in values]

    return read_lines(path, RepliesHeader, REPLIES_FORMAT, items)


def with_reply_values(scores: Sequence[RowScore], path: Path, run: str) -> tuple[RowScore, ...]:
    """Scores with the values of replies, where a file has them.

    Raises:
        IntegrityError: the file is broken, or of another run or other rows.
    """
    there = read_replies(path)
    if there is None:
        return tuple(scores)
    header, replies = there
    by_row = {reply.row: reply for reply in replies}
    if header.run != run or len(by_row) < len(replies):
        raise IntegrityError(f"{path}: replies of another run, or of a row twice; remove it")
    if by_row.keys() - {score.row_id for score in scores}:
        raise IntegrityError(f"{path}: replies to rows that the run was not scored on; remove it")
    for name in header.metrics:
        if name not in METRICS:
            add_own_metric(name)
    return tuple(
        replace(score, values={**score.values, **_values(by_row[score.row_id])})
        if score.row_id in by_row
        else score
        for score in scores
    )


def _values(reply: RowReply) -> dict[str, tuple[float, float]]:
    values = {name: (value, 1.0) for name, value in reply.values.items()}
    ended = float(reply.finished == "stop")
    return values | {"ended": (ended, 1.0), "reply_tokens": (float(reply.tokens), 1.0)}
