"""Which rows are tested on, validated on and trained on.

Test and validation set are drawn first, by groups of related rows, with a seeded hash of the
group's identity; what is left is ordered by a seeded hash of each row and cut from the front,
so that a smaller training set is always the beginning of a larger one.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from slm_lora.data.near_duplicates import similar_pairs
from slm_lora.errors import DataError
from slm_lora.records import Row

SPLIT_VERSION = 2
"""Raised when the same rows would be divided in another way."""

TRAINING_SHARE = 0.9
"""A data set of size N trains on 0.9·N rows, as in the described 90/10 experiments."""


@dataclass(frozen=True, slots=True)
class Split:
    """Row ids of the three sets, and the group of every row of the data set."""

    test: tuple[str, ...]
    validation: tuple[str, ...]
    train: tuple[str, ...]
    group_of: dict[str, str]


def _normalised(text: str) -> str:
    """Case, width, punctuation and spacing do not make a question another question."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or folded.strip()


def _instruction(row: Row) -> str:
    """The first question. Without one, the text itself; never the system turn, which a whole set
    may share."""
    asked = [turn.content for turn in row.turns if turn.role == "user"]
    own = asked or [turn.content for turn in row.turns if turn.role != "system"]
    return own[0]


def prompt_words(row: Row) -> frozenset[str]:
    """Words of instruction and context, which near-duplicates share most of."""
    return frozenset(_normalised(f"{_instruction(row)} {row.context}").split())


Relation = Literal["instruction", "context", "hint", "near"]
RELATIONS: tuple[Relation, ...] = ("instruction", "context", "hint", "near")
"""Equal normalised instruction; equal context; same named group; nearly the same prompt."""


def _keys(row: Row) -> Iterable[tuple[Relation, str]]:
    """What ties a row to others: its instruction, its context, and a group that it names."""
    yield "instruction", _normalised(_instruction(row))
    if context := _normalised(row.context):
        yield "context", context
    if row.group_hint:
        yield "hint", row.group_hint


def group_rows(rows: Sequence[Row], by: Sequence[Relation] = RELATIONS) -> dict[str, str]:
    """Row id → group id, by union-find over shared instruction, context or named group, and over
    prompts that are near-duplicates (`near_duplicates`), or over some of these. Rows that name
    their group know better which are related: among those no near-duplicates are looked for.

    A group's id is its smallest row id, so it does not depend on the order of the rows.
    """
    parent: dict[str, str] = {row.row_id: row.row_id for row in rows}

    def root(row_id: str) -> str:
        while parent[row_id] != row_id:
            parent[row_id] = parent[parent[row_id]]
            row_id = parent[row_id]
        return row_id

    def tie(one: str, other: str) -> None:
        # The smaller id becomes the root: the root is then the group's smallest id.
        low, high = sorted((root(one), root(other)))
        parent[high] = low

    first_with: dict[tuple[Relation, str], str] = {}
    for row in rows:
        for key in _keys(row):
            if key[0] not in by:
                continue
            tie(row.row_id, first_with.setdefault(key, row.row_id))
    unnamed = [row for row in rows if not row.group_hint and "near" in by]
    for one, other in similar_pairs([prompt_words(row) for row in unnamed]):
        tie(unnamed[one].row_id, unnamed[other].row_id)
    return {row_id: root(row_id) for row_id in parent}


def seeded_order(ids: Iterable[str], purpose: str, seed: int) -> list[str]:
    """Ids in the order of SHA-256(1, purpose, seed, id): random, and the same everywhere."""

    def key(identity: str) -> bytes:
        return hashlib.sha256(f"1:{purpose}:{seed}:{identity}".encode()).digest()

    return sorted(ids, key=key)


Group = Sequence[str]
"""The ids of rows that must not be parted."""


def _draw(groups: Sequence[Group], wanted: int) -> list[Group]:
    """Whole groups, taken in order until ``wanted`` rows; one that no longer fits is passed
    over. Where no choice of groups in this order makes up ``wanted``, they hold fewer rows."""
    taken: list[Group] = []
    missing = wanted
    for group in groups:
        if len(group) <= missing:
            taken.append(group)
            missing -= len(group)
        if not missing:
            break
    return taken


def _that_fits(groups: Sequence[Group], taken: Sequence[Group], spared: int) -> int:
    """A number of rows that `_draw` does reach with at least ``spared`` groups left over: that
    of the groups it took, less those needed elsewhere. Fewer rows are not always possible."""
    return _rows(taken[: len(groups) - spared]) or min(map(len, groups))


def _rows(groups: Sequence[Group]) -> int:
    return sum(map(len, groups))


def default_test_rows(rows: int) -> int:
    """A tenth of the rows, at most 1,000: the described size for Dolly, less for small sets."""
    return max(1, min(1000, rows // 10))


def default_validation_rows(rows: int) -> int:
    """A twentieth of the rows, at most 300."""
    return max(1, min(300, rows // 20))


def training_rows_for(size: int) -> int:
    """Training rows of a data set of ``size``: 0.9·size, rounded half up (1500 → 1350)."""
    return math.floor(TRAINING_SHARE * size + 0.5)


def split_rows(
    rows: Sequence[Row],
    *,
    size: int | None,
    test_rows: int | None,
    validation_rows: int | None,
    split_seed: int,
    data_seed: int,
) -> Split:
    """Draw test, validation and training rows; see the module for the rule.

    Raises:
        DataError: the rows do not suffice; the message says what would fit.
    """
    wanted_test = default_test_rows(len(rows)) if test_rows is None else test_rows
    wanted_validation = (
        default_validation_rows(len(rows)) if validation_rows is None else validation_rows
    )
    group_of = group_rows(rows)
    members: dict[str, list[str]] = defaultdict(list)
    for row_id, group_id in sorted(group_of.items()):
        members[group_id].append(row_id)

    if len(members) < 3:
        raise DataError(
            f"data.name: the {len(rows)} rows are {len(members)} groups of related rows (the same "
            "instruction, context or group, or nearly the same prompt), and test, validation and "
            "training set need one each; give more rows"
        )
    groups = [members[group] for group in seeded_order(members, "held out", split_seed)]
    sets: list[list[Group]] = []
    # Groups to be left over: one for each set that is still to be drawn.
    for key, asked, wanted, spared in (
        ("test_rows", test_rows, wanted_test, 2),
        ("validation_rows", validation_rows, wanted_validation, 1),
    ):
        taken = _draw(groups, wanted)
        # A default is met as nearly as whole groups allow; what was asked for is met or refused.
        if asked is None and len(taken) > 0:
            wanted = _rows(taken)
        if _rows(taken) < wanted or len(groups) - len(taken) < spared:
            raise DataError(
                f"data.{key} = {wanted}: cannot be drawn from {_rows(groups)} rows in groups of "
                f"related rows, with rows left for the other sets; "
                f"data.{key} = {_that_fits(groups, taken, spared)} fits"
            )
        sets.append(taken)
        drawn = {group[0] for group in taken}
        groups = [group for group in groups if group[0] not in drawn]
    test, validation = ([row_id for group in taken for row_id in group] for taken in sets)
    left = [row_id for group in groups for row_id in group]
    wanted_train = len(left) if size is None else training_rows_for(size)
    if wanted_train > len(left):
        fits = math.floor(len(left) / TRAINING_SHARE)
        raise DataError(
            f"data.size = {size}: needs {wanted_train} training rows, but {len(left)} of "
            f"{len(rows)} are left after {len(test)} test and {len(validation)} validation rows; "
            f"data.size = {fits if fits > 1 else 'null'} fits"
        )
    train = seeded_order(left, "train", data_seed)[:wanted_train]
    return Split(tuple(sorted(test)), tuple(sorted(validation)), tuple(train), group_of)
