"""What a data set holds that an experiment should know: leaks, conflicts, lengths, categories."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from slm_lora.data.splits import RELATIONS, Relation, group_rows
from slm_lora.records import Row

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
