"""Answers of a judge that compared replies of adapters with the base's: ``judge.jsonl``.

The first line holds the settings, the SHA-256 of the compared replies, and that of the other lines,
one per pair of replies. Texts are not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from slm_lora.errors import IntegrityError
from slm_lora.records import RowScore
from slm_lora.runs.checked_lines import read_lines, write_lines
from slm_lora.runs.replies import read_replies, replies_file

JUDGE_FILE = "judge.jsonl"
JUDGE_FORMAT = 1
WIN_RATE = "win_rate"
Answer = Literal["A", "B", "tie"]
_FIRST_WINS: dict[Answer, float] = {"A": 1.0, "B": 0.0, "tie": 0.5}


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """The replies of an adapter and of its base to one test row, compared in both orders.

    Attributes:
        run: hash of the adapter's run.
        row: id of the row.
        base_first, adapter_first: answer where the reply of this one is A; None: unreadable.
        keys: of the two requests; empty where the replies are equal, which is a tie unasked.
    """

    run: str
    row: str
    base_first: Answer | None
    adapter_first: Answer | None
    keys: tuple[str, ...]

    @property
    def score(self) -> float | None:
        """Of the adapter, mean of both orders: 1 won, 0.5 tie, 0 lost; None: unreadable."""
        if self.base_first is None or self.adapter_first is None:
            return None
        return (1 - _FIRST_WINS[self.base_first] + _FIRST_WINS[self.adapter_first]) / 2

    @property
    def flips(self) -> bool:
        """Whether the orders have different winners: the same place wins in both."""
        return self.base_first == self.adapter_first and self.base_first in ("A", "B")

    @property
    def first_and_decided(self) -> tuple[int, int]:
        """Answers for the first place, and for either."""
        answers = (self.base_first, self.adapter_first) if self.keys else ()
        return answers.count("A"), answers.count("A") + answers.count("B")


class JudgeHeader(BaseModel):
    """The first line.

    Attributes:
        settings: of the section `judge` that affect answers.
        bases: hash of the base's run by that of the adapter's.
        replies: SHA-256 of the replies of each run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: int = JUDGE_FORMAT
    settings: dict[str, Any]
    bases: dict[str, str]
    replies: dict[str, str]
    sha256: str = ""


@dataclass(frozen=True)
class Judgement:
    """All answers of a judge on one experiment."""

    header: JudgeHeader
    pairs: tuple[JudgedPair, ...]

    @property
    def rows(self) -> frozenset[str]:
        """Rows with readable answers for every adapter, so that all are compared on the same."""
        unreadable = {pair.row for pair in self.pairs if pair.score is None}
        return frozenset(pair.row for pair in self.pairs) - unreadable


def write_judgement(path: Path, header: JudgeHeader, pairs: Sequence[JudgedPair]) -> None:
    """Write the answers, with the SHA-256 of their lines."""
    write_lines(path, header, pairs)


def read_judgement(path: Path) -> Judgement | None:
    """What `write_judgement` wrote; None without a file.

    Raises:
        IntegrityError: the file is broken.
    """

    def items(values: list[Any]) -> list[JudgedPair]:
        return [JudgedPair(**{**value, "keys": tuple(value["keys"])}) for value in values]

    there = read_lines(path, JudgeHeader, JUDGE_FORMAT, items, "slm-lora judge makes it again")
    return Judgement(there[0], tuple(there[1])) if there else None


def with_win_rate(scores: Sequence[RowScore], run_folder: Path, run: str) -> tuple[RowScore, ...]:
    """Scores with the metric ``win_rate``, where the experiment was judged; 0.5 for a base.

    Raises:
        IntegrityError: the file is broken, or the run has other replies than those compared.
    """
    path = run_folder.parent.parent / JUDGE_FILE
    judgement = read_judgement(path)
    if judgement is None or run not in judgement.header.replies:
        return tuple(scores)
    replies = read_replies(replies_file(run_folder))
    if replies is None or replies[0].sha256 != judgement.header.replies[run]:
        raise IntegrityError(
            f"{path}: compared other replies than those of {run_folder.name}; remove it, and "
            "slm-lora judge makes it again"
        )
    values: Mapping[str, float | None] = (
        dict.fromkeys(judgement.rows, 0.5)
        if run in judgement.header.bases.values()
        else {pair.row: pair.score for pair in judgement.pairs if pair.run == run}
    )
    return tuple(
        replace(score, values={**score.values, WIN_RATE: (value, 1.0)})
        if score.row_id in judgement.rows and (value := values.get(score.row_id)) is not None
        else score
        for score in scores
    )
