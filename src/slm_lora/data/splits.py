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
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

from slm_lora.config.types import RELATED_BY, Relation
from slm_lora.data.dedup import THRESHOLD, is_template, similar_groups
from slm_lora.errors import DataError
from slm_lora.records import Row

SPLIT_VERSION = 2
"""Raised when what is hashed of a split changes. (How rows are grouped needs no new one: the hash
of a run's rows is over ids, groups and tokens of all that are held out, so that another division
is another hash by itself, and rows that are divided as before keep theirs.)"""

TRAINING_SHARE = 0.9
"""A data set of size N trains on 0.9·N rows, as in the described 90/10 experiments."""


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


_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_RUNS = re.compile(f"[{_UNSPACED}]+|[^{_UNSPACED}]+")


def _words(normalised: str) -> list[str]:
    """The words; of Chinese and Japanese, which put no space between them, pairs of characters."""
    found = []
    for word in normalised.split():
        for run in _RUNS.findall(word):
            unspaced = len(run) > 2 and re.match(f"[{_UNSPACED}]", run)
            found += [run[i : i + 2] for i in range(len(run) - 1)] if unspaced else [run]
    return found


def prompt_words(row: Row) -> frozenset[str]:
    """Words of instruction and context, which near-duplicates share most of."""
    return frozenset(_words(_normalised(f"{_instruction(row)} {row.context}")))


@dataclass(frozen=True, slots=True)
class Rule:
    """What makes rows related.

    Attributes:
        by: the relations that tie them; see `data.group_by` of a recipe.
        with_context: whether contexts are part of the prompts. Where they are not, rows of one
            instruction ask the model the same, whatever their contexts.
        threshold: share of words from which prompts are nearly the same.
    """

    by: tuple[Relation, ...] = RELATED_BY
    with_context: bool = True
    threshold: float = THRESHOLD


@dataclass(frozen=True, slots=True)
class Groups:
    """Rows that must not be parted, and what was done to find them.

    Attributes:
        of: row id → group id: the smallest row id of its group, so that it does not depend on the
            order of the rows.
        near: rows that stand in a group because their prompts are nearly the same, and the number
            of those groups.
        templates: for each template that prompts come of: its rows, and the words that therefore
            were not compared.
        openings: rows that begin as more than a tenth of all do, and are told apart by what
            follows: the system text, the later questions.
    """

    of: dict[str, str]
    near: tuple[int, int] = (0, 0)
    templates: tuple[tuple[int, int], ...] = ()
    openings: int = 0

    @property
    def count(self) -> int:
        """How many groups there are."""
        return len(set(self.of.values()))


LEAST_CONTEXT_WORDS = 5
"""A context of fewer words ("n/a", a language) is no document that questions are asked about."""


def group_rows(rows: Sequence[Row], rule: Rule | None = None) -> Groups:
    """Tie related rows, by union-find over what the rule names.

    Rows that name a group know best which are related: they are tied by that alone.
    """
    rule = rule or Rule()
    ties = _Ties([row.row_id for row in rows])
    free = rows
    if "group" in rule.by:
        ties.equal((row.row_id, row.group_hint) for row in rows if row.group_hint)
        free = [row for row in rows if not row.group_hint]
    if "instruction" in rule.by:
        ties.equal((row.row_id, _normalised(_instruction(row))) for row in free)
    if "context" in rule.by:
        contexts = ((row.row_id, _normalised(row.context)) for row in free)
        ties.equal(each for each in contexts if len(_words(each[1])) >= LEAST_CONTEXT_WORDS)
    # (What is near depends on how conversations begin, whether or not that ties them.)
    prompts = ties if "prompt" in rule.by else _Ties([row.row_id for row in free])
    opened = _tie_prompts(free, rule.with_context, len(rows), prompts)
    if "near" not in rule.by:
        return Groups(ties.groups(), openings=len(opened))
    before = ties.groups()
    words = [opened.get(row.row_id) or prompt_words(row) for row in free]
    alike, templates = similar_groups(words, rule.threshold, len(rows))
    for group in alike:
        for position in group[1:]:
            ties.tie(free[group[0]].row_id, free[position].row_id)
    after = ties.groups()
    parts: dict[str, set[str]] = defaultdict(set)
    for row_id, group_id in after.items():
        parts[group_id].add(before[row_id])
    joined = {group_id for group_id, many in parts.items() if len(many) > 1}
    return Groups(
        after,
        near=(sum(group_id in joined for group_id in after.values()), len(joined)),
        templates=tuple((len(each.texts), len(each.words)) for each in templates),
        openings=len(opened),
    )


class _Ties:
    """Union-find over row ids; the root of a group is its smallest id."""

    def __init__(self, ids: Iterable[str]) -> None:
        self._parent = {row_id: row_id for row_id in ids}

    def _root(self, row_id: str) -> str:
        parent = self._parent
        while parent[row_id] != row_id:
            parent[row_id] = parent[parent[row_id]]
            row_id = parent[row_id]
        return row_id

    def tie(self, one: str, other: str) -> None:
        low, high = sorted((self._root(one), self._root(other)))
        self._parent[high] = low

    def equal(self, keyed: Iterable[tuple[str, Hashable]]) -> None:
        """Tie the rows of equal keys."""
        first_with: dict[Hashable, str] = {}
        for row_id, key in keyed:
            self.tie(row_id, first_with.setdefault(key, row_id))

    def groups(self) -> dict[str, str]:
        return {row_id: self._root(row_id) for row_id in self._parent}


def _tie_prompts(
    rows: Sequence[Row], with_context: bool, of: int, ties: _Ties
) -> dict[str, frozenset[str]]:
    """Tie rows that ask the same, and return all words asked by those that only begin alike.

    A conversation is known by how it begins: its rows may be the same one, cut off at different
    turns. Where more rows begin alike than one conversation has (`is_template`), they are told
    apart by what follows, unless they are one conversation after all.
    """
    paths = {row.row_id: _asked(row, with_context) for row in rows}
    opened: dict[str, frozenset[str]] = {}
    waiting = [(list(paths), 0)]
    while waiting:
        members, depth = waiting.pop()
        by_next: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for row_id in members:
            by_next[paths[row_id][depth : depth + 1]].append(row_id)
        for group in by_next.values():
            longest = max((paths[row_id] for row_id in group), key=len)
            if is_template(len(group), of) and any(
                paths[row_id] != longest[: len(paths[row_id])] for row_id in group
            ):
                waiting.append((group, depth + 1))
                for row_id in group:
                    opened[row_id] = frozenset(_words(" ".join(paths[row_id]).replace("\0", " ")))
            else:
                ties.equal((row_id, "") for row_id in group)
    return opened


def same_prompt_in_other_groups(rows: Sequence[Row], rule: Rule) -> int:
    """Rows that ask exactly what a row of another group asks, under the rule."""
    groups = group_rows(rows, rule).of
    of_prompt: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for row in rows:
        of_prompt[_asked(row, rule.with_context)].append(groups[row.row_id])
    return sum(len(found) for found in of_prompt.values() if len(set(found)) > 1)


def _asked(row: Row, with_context: bool) -> tuple[str, ...]:
    """All that a row asks: instruction (with its context), system text, later questions."""
    system = " ".join(turn.content for turn in row.turns if turn.role == "system")
    later = [turn.content for turn in row.turns if turn.role == "user"][1:]
    first = _normalised(_instruction(row))
    if with_context:
        first += f"\0{_normalised(row.context)}"
    return (first, _normalised(system), *map(_normalised, later))


@dataclass(frozen=True, slots=True)
class Split:
    """Row ids of the three sets, and the groups of all rows of the data set."""

    test: tuple[str, ...]
    validation: tuple[str, ...]
    train: tuple[str, ...]
    groups: Groups


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
    rule: Rule | None = None,
) -> Split:
    """Draw test, validation and training rows; see the module for the rule.

    Raises:
        DataError: the rows do not suffice; the message says what would fit.
    """
    wanted_test = default_test_rows(len(rows)) if test_rows is None else test_rows
    wanted_validation = (
        default_validation_rows(len(rows)) if validation_rows is None else validation_rows
    )
    rule = rule or Rule()
    related = group_rows(rows, rule)
    members: dict[str, list[str]] = defaultdict(list)
    for row_id, group_id in sorted(related.of.items()):
        members[group_id].append(row_id)

    if len(members) < 3:
        raise DataError(_too_few_groups(rows, rule, len(members)))
    largest = max(map(len, members.values()))
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
                f"related rows (data.group_by; the largest has {largest}), with rows left for the "
                f"other sets; "
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
    return Split(tuple(sorted(test)), tuple(sorted(validation)), tuple(train), related)


def _too_few_groups(rows: Sequence[Row], rule: Rule, groups: int) -> str:
    """Why rows cannot be divided, and what would part them."""
    message = (
        f"data.name: the {len(rows)} rows are {groups} group{'s' * (groups != 1)} of related rows "
        f"(data.group_by = {_listed(rule.by)}), and test, validation and training set need one "
        "each; give more rows, or a column 'group' that says which are related"
    )
    # What asks least of the rows first: the context that the model is not shown, then one
    # relation less, the vaguest first, then none.
    tried = [("data.include_context=true", replace(rule, with_context=True))]
    if rule.with_context or not any(row.context.strip() for row in rows):
        tried = []
    for given_up in ("near", "context", "instruction", "prompt", "group"):
        if given_up in rule.by:
            by = tuple(each for each in rule.by if each != given_up)
            tried.append((f"'data.group_by={_listed(by)}'", replace(rule, by=by)))
    tried.append(("'data.group_by=[]'", replace(rule, by=())))
    for setting, other in tried:
        if (found := group_rows(rows, other).count) >= 3:
            return f"{message}; with {setting} they are {found} groups"
    return message


def _listed(by: Sequence[Relation]) -> str:
    return f"[{', '.join(by)}]"
