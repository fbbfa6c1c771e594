"""What a data set holds that an experiment should know: leaks, conflicts, lengths, categories."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from slm_lora.data.splits import RELATIONS, Relation, group_rows
from slm_lora.data.tokens import RowTokenizer
from slm_lora.errors import SlmLoraError
from slm_lora.records import Row, Turn

HELD_OUT = 0.1
"""Share of the rows that a random split, as it is usually made, holds out."""

LIMITS = (128, 256, 512, 1024, 2048)
"""Values of max_length whose cost is told."""


@dataclass(frozen=True, slots=True)
class Related:
    """Rows that are related in one way, and what a random split would do to them.

    Attributes:
        relation: how they are related; None: in any way.
        groups: of two rows or more.
        rows: in those groups.
        leak: expected share of held-out rows that have a related row in training if 90/10 is
            drawn row by row.
    """

    relation: Relation | None
    groups: int
    rows: int
    leak: float


@dataclass(frozen=True, slots=True)
class Cost:
    """What a limit on length does: share of rows over it, and of tokens beyond it."""

    limit: int
    rows: float
    tokens: float


@dataclass(frozen=True, slots=True)
class Facts:
    """The findings.

    Attributes:
        related: by each relation that ties any rows, and by all together.
        conflicts: prompts (instruction and context) that have several different answers, and
            the rows that answer them.
        categories: rows of every category, most frequent first.
        lengths: rows by length in tokens; keys are the upper ends of the bins.
        costs: of limits on length, as far as rows reach them.
    """

    related: tuple[Related, ...]
    conflicts: tuple[int, int]
    categories: tuple[tuple[str, int], ...]
    lengths: tuple[tuple[int, int], ...]
    costs: tuple[Cost, ...]


def facts(rows: Sequence[Row], lengths: Sequence[int]) -> Facts:
    """Look at rows and their untruncated lengths in tokens."""
    by_each = [_related(rows, (relation,), relation) for relation in RELATIONS]
    found = [each for each in by_each if each.groups]
    counted = Counter(row.category for row in rows if row.category)
    bins = Counter(1 << (length - 1).bit_length() for length in lengths)
    return Facts(
        related=(*found, _related(rows, RELATIONS, None)) if found else (),
        conflicts=_conflicts(rows),
        categories=tuple(counted.most_common()),
        lengths=tuple((end, bins[end]) for end in _doublings(min(bins), max(bins))),
        costs=tuple(
            Cost(
                limit,
                sum(length > limit for length in lengths) / len(lengths),
                sum(max(0, length - limit) for length in lengths) / sum(lengths),
            )
            for limit in LIMITS
            if limit < max(lengths)
        ),
    )


def _doublings(first: int, last: int) -> list[int]:
    found = [first]
    while found[-1] < last:
        found.append(2 * found[-1])
    return found


def _related(rows: Sequence[Row], by: Sequence[Relation], relation: Relation | None) -> Related:
    sizes = Counter(group_rows(rows, by).values()).values()
    many = [size for size in sizes if size > 1]
    # A held-out row has no relative in training if all of them are held out, too.
    leak = sum(size * (1 - HELD_OUT ** (size - 1)) for size in many) / len(rows)
    return Related(relation, len(many), sum(many), leak)


def _conflicts(rows: Sequence[Row]) -> tuple[int, int]:
    answers: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for row in rows:
        *before, last = row.turns
        if before and last.role == "assistant":
            prompt = (row.context.strip(), *(f"{t.role}:{t.content.strip()}" for t in before))
            answers[prompt].append(last.content.strip())
    several = [each for each in answers.values() if len(set(each)) > 1]
    return len(several), sum(map(len, several))


_MARK = re.compile(r"<\|[^\s<>|]{1,40}\|>|</?[a-z]+_of_turn>|\[/?[A-Z_]{2,20}\]|<</?[A-Z]{2,20}>>")
_ASKED, _ANSWERED = "\ue000", "\ue001"


@dataclass(frozen=True, slots=True)
class PlainMark:
    """A role mark that is ordinary text to the tokenizer, so that rows can spell it.

    Attributes:
        text: as the template writes it, white space at its ends aside.
        rows: that spell it.
        first: source of the first of them; empty if there is none.
    """

    text: str
    rows: int
    first: str


def plain_marks(tokenize: RowTokenizer, rows: Sequence[Row]) -> tuple[PlainMark, ...]:
    """Role marks of the template that are no special tokens, and the rows that spell them.

    Special tokens in row text are told from the template's; such marks cannot be.
    """
    found = []
    for mark in _plain_marks(tokenize):
        spelling = [
            row
            for row in rows
            if any(mark in text for text in (row.context, *(turn.content for turn in row.turns)))
        ]
        found.append(PlainMark(mark.strip(), len(spelling), spelling[0].source if spelling else ""))
    return tuple(found)


def _plain_marks(tokenize: RowTokenizer) -> list[str]:
    sample = Row((Turn("user", _ASKED), Turn("assistant", _ANSWERED)))
    try:
        text = tokenize.render(sample).text
    except SlmLoraError:  # a template for other rows
        return []
    marks: list[str] = []
    owned = {tokenize.specials.owned(i) for i in range(len(tokenize.specials.tokens))}
    special = "".join(owned) or "\0"
    # What the template writes, cut at its special tokens and at the texts of the row.
    for piece in re.finditer(f"[^{special}{_ASKED}{_ANSWERED}]+", text):
        before = text[piece.start() - 1 : piece.start()]
        if spelt := _MARK.findall(piece[0]):
            marks += spelt
        elif piece[0].strip() and before not in owned:
            # (A role's name right behind a special token is nothing without that.)
            marks.append(piece[0])
    return list(dict.fromkeys(marks))
