"""Replies of a run to test rows, with the values of their metrics: ``replies/<run folder>.jsonl``
beside ``runs/``.

The first line holds the settings that they were generated with and the SHA-256 of the other lines,
one per row. Texts of the rows themselves are not in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from slm_lora.errors import IntegrityError
from slm_lora.records import RowScore
from slm_lora.runs.metrics import METRICS, add_own_metric
from slm_lora.runtime.storage import atomic_write_text

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
    sha256: str


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
    lines = [json.dumps(asdict(reply), ensure_ascii=False, allow_nan=False) for reply in replies]
    body = "".join(f"{line}\n" for line in lines)
    header = RepliesHeader(
        format=REPLIES_FORMAT,
        run=run,
        settings=dict(settings),
        metrics=list(metrics),
        sha256=hashlib.sha256(body.encode()).hexdigest(),
    )
    atomic_write_text(path, f"{header.model_dump_json()}\n{body}")


def read_replies(path: Path) -> tuple[RepliesHeader, list[RowReply]] | None:
    """What `write_replies` wrote; None without a file.

    Raises:
        IntegrityError: the file is broken.
    """
    try:
        first, _, body = path.read_text(encoding="utf-8").partition("\n")
        header = RepliesHeader.model_validate_json(first)
        if header.format != REPLIES_FORMAT:
            raise ValueError(f"format {header.format}, not {REPLIES_FORMAT}")
        if hashlib.sha256(body.encode()).hexdigest() != header.sha256:
            raise ValueError("its lines do not have the SHA-256 of the first one")
        replies = [RowReply(**json.loads(line)) for line in body.split("\n")[:-1]]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise IntegrityError(
            f"{path}: broken ({reason}); remove it, and the same command makes it again"
        ) from error
    return header, replies


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
