"""Split rows into test, validation and training sets.

Test and validation sets are drawn first, as whole groups of related rows, in the order of a
seeded hash of the group id. The remaining rows are ordered by a seeded hash of the row id, and
the training set is a prefix of them, so that a smaller one is contained in a larger one.
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
from slm_lora.data.dedup import DEFAULT_THRESHOLD, is_template, similar_groups
from slm_lora.errors import DataError
from slm_lora.records import Row

SPLIT_VERSION = 2
"""Version of the split hash, increased when its input changes. (A change of grouping needs no new
version: the hash covers ids, groups and tokens of all held-out rows, so that a different split
has a different hash.)"""

TRAINING_SHARE = 0.9
"""Share of ``data.size`` that is trained on: 0.9·N rows, as in 90/10 experiments."""


def _normalised(text: str) -> str:
    """Remove differences of case, character width, punctuation and spacing."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded)) or folded.strip()


def _instruction(row: Row) -> str:
    """Return the first question, or the text of a row without one.

    The system turn is left out, as all rows may share it.
    """
    questions = [turn.content for turn in row.turns if turn.role == "user"]
    texts = questions or [turn.content for turn in row.turns if turn.role != "system"]
    return texts[0]


_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_RUNS = re.compile(f"[{_UNSPACED}]+|[^{_UNSPACED}]+")


def _words(normalised: str) -> list[str]:
    """Split into words; Chinese and Japanese, written without spaces, into character pairs."""
    words = []
    for word in normalised.split():
        for run in _RUNS.findall(word):
            unspaced = len(run) > 2 and re.match(f"[{_UNSPACED}]", run)
            words += [run[i : i + 2] for i in range(len(run) - 1)] if unspaced else [run]
    return words


def prompt_words(row: Row) -> frozenset[str]:
    """Return the words of instruction and context, for the comparison of near-duplicates."""
    return frozenset(_words(_normalised(f"{_instruction(row)} {row.context}")))


@dataclass(frozen=True, slots=True)
class GroupingRule:
    """The relations by which rows are grouped.

    Attributes:
        by: relations that tie rows; see ``data.group_by`` of a recipe.
        with_context: whether prompts include contexts. If not, rows with equal instructions
            have equal prompts, whatever their contexts.
        threshold: Jaccard similarity from which prompts are near-duplicates.
    """

    by: tuple[Relation, ...] = RELATED_BY
    with_context: bool = True
    threshold: float = DEFAULT_THRESHOLD


@dataclass(frozen=True, slots=True)
class Groups:
    """Groups of related rows, which a split keeps together.

    Attributes:
        group_of: row id → group id, which is the smallest row id of the group and so does not
            depend on the order of rows.
        near_duplicates: number of rows in groups that near-duplicates extend, and of those
            groups.
        templates: for each detected prompt template, the number of its rows and of its words,
            which were left out of the comparison.
        openings: number of rows with a first question shared by more than a tenth of all, which
            are distinguished by system text and later questions.
    """

    group_of: dict[str, str]
    near_duplicates: tuple[int, int] = (0, 0)
    templates: tuple[tuple[int, int], ...] = ()
    openings: int = 0

    @property
    def count(self) -> int:
        """Number of groups."""
        return len(set(self.group_of.values()))


MIN_CONTEXT_WORDS = 5
"""Contexts of fewer words ("n/a", a language) do not relate rows."""


def group_rows(rows: Sequence[Row], rule: GroupingRule | None = None) -> Groups:
    """Group rows by union-find over the relations of the rule.

    Rows with a ``group`` value are tied by that alone, if the rule includes it.
    """
    rule = rule or GroupingRule()
    ties = _UnionFind([row.row_id for row in rows])
    ungrouped = rows
    if "group" in rule.by:
        ties.tie_equal((row.row_id, row.group_hint) for row in rows if row.group_hint)
        ungrouped = [row for row in rows if not row.group_hint]
    if "instruction" in rule.by:
        ties.tie_equal((row.row_id, _normalised(_instruction(row))) for row in ungrouped)
    if "context" in rule.by:
        contexts = ((row.row_id, _normalised(row.context)) for row in ungrouped)
        ties.tie_equal(pair for pair in contexts if len(_words(pair[1])) >= MIN_CONTEXT_WORDS)
    # (Near-duplicates depend on common first questions even if "prompt" ties no rows.)
    prompts = ties if "prompt" in rule.by else _UnionFind([row.row_id for row in ungrouped])
    words_after_opening = _tie_prompts(ungrouped, rule.with_context, len(rows), prompts)
    if "near" not in rule.by:
        return Groups(ties.groups(), openings=len(words_after_opening))
    before = ties.groups()
    words = [words_after_opening.get(row.row_id) or prompt_words(row) for row in ungrouped]
    near_groups, templates = similar_groups(words, rule.threshold, len(rows))
    for group in near_groups:
        for position in group[1:]:
            ties.tie(ungrouped[group[0]].row_id, ungrouped[position].row_id)
    after = ties.groups()
    parts: dict[str, set[str]] = defaultdict(set)
    for row_id, group_id in after.items():
        parts[group_id].add(before[row_id])
    merged = {group_id for group_id, group_parts in parts.items() if len(group_parts) > 1}
    return Groups(
        after,
        near_duplicates=(sum(group_id in merged for group_id in after.values()), len(merged)),
        templates=tuple((len(template.texts), len(template.words)) for template in templates),
        openings=len(words_after_opening),
    )


class _UnionFind:
    """Union-find of row ids; the root of a group is its smallest id."""

    def __init__(self, ids: Iterable[str]) -> None:
        self._parent = {row_id: row_id for row_id in ids}

    def _root(self, row_id: str) -> str:
        parent = self._parent
        while parent[row_id] != row_id:
            parent[row_id] = parent[parent[row_id]]
            row_id = parent[row_id]
        return row_id

    def tie(self, first: str, second: str) -> None:
        low, high = sorted((self._root(first), self._root(second)))
        self._parent[high] = low

    def tie_equal(self, keyed_ids: Iterable[tuple[str, Hashable]]) -> None:
        """Tie the rows of equal keys."""
        first_with: dict[Hashable, str] = {}
        for row_id, key in keyed_ids:
            self.tie(row_id, first_with.setdefault(key, row_id))

    def groups(self) -> dict[str, str]:
        return {row_id: self._root(row_id) for row_id in self._parent}


def _tie_prompts(
    rows: Sequence[Row], with_context: bool, total: int, ties: _UnionFind
) -> dict[str, frozenset[str]]:
    """Tie rows with equal prompts, and return the prompt words of rows with a common opening.

    Rows with equal first questions are tied, as they may be one conversation cut off at
    different turns. Where too many rows share an opening (`is_template`), they are distinguished
    by the next parts of their prompts, unless each is a prefix of the longest.
    """
    prompts = {row.row_id: prompt_parts(row, with_context) for row in rows}
    words_after_opening: dict[str, frozenset[str]] = {}
    pending = [(list(prompts), 0)]
    while pending:
        members, depth = pending.pop()
        by_next: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for row_id in members:
            by_next[prompts[row_id][depth : depth + 1]].append(row_id)
        for group in by_next.values():
            longest = max((prompts[row_id] for row_id in group), key=len)
            if is_template(len(group), total) and any(
                prompts[row_id] != longest[: len(prompts[row_id])] for row_id in group
            ):
                pending.append((group, depth + 1))
                for row_id in group:
                    text = " ".join(prompts[row_id]).replace("\0", " ")
                    words_after_opening[row_id] = frozenset(_words(text))
            else:
                ties.tie_equal((row_id, "") for row_id in group)
    return words_after_opening


def count_cross_group_prompts(rows: Sequence[Row], rule: GroupingRule) -> int:
    """Count the rows whose prompt also occurs in another group."""
    group_of = group_rows(rows, rule).group_of
    by_prompt: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for row in rows:
        by_prompt[prompt_parts(row, rule.with_context)].append(group_of[row.row_id])
    return sum(len(groups) for groups in by_prompt.values() if len(set(groups)) > 1)


def prompt_parts(row: Row, with_context: bool) -> tuple[str, ...]:
    """Return the normalised prompt: instruction (with context), system text, later questions."""
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
    """Sort ids by SHA-256 of purpose, seed and id: a shuffle that is equal on every machine."""

    def key(identity: str) -> bytes:
        return hashlib.sha256(f"1:{purpose}:{seed}:{identity}".encode()).digest()

    return sorted(ids, key=key)


Group = Sequence[str]
"""Row ids of one group."""


def draw_groups(groups: Sequence[Group], rows: int) -> list[Group]:
    """Take whole groups in order, without exceeding ``rows``; groups that do not fit are skipped.

    The groups taken may have fewer rows in all.
    """
    taken: list[Group] = []
    missing = rows
    for group in groups:
        if len(group) <= missing:
            taken.append(group)
            missing -= len(group)
        if not missing:
            break
    return taken


def _feasible_rows(groups: Sequence[Group], taken: Sequence[Group], reserved: int) -> int:
    """Return a number of rows that is drawn exactly, with ``reserved`` groups left over."""
    return _count_rows(taken[: len(groups) - reserved]) or min(map(len, groups))


def _count_rows(groups: Sequence[Group]) -> int:
    return sum(map(len, groups))


def default_test_rows(rows: int) -> int:
    """Default test set: a tenth of the rows, at least 1, at most 1,000."""
    return max(1, min(1000, rows // 10))


def default_validation_rows(rows: int) -> int:
    """Default validation set: a twentieth of the rows, at least 1, at most 300."""
    return max(1, min(300, rows // 20))


def training_rows_for(size: int) -> int:
    """Number of training rows for ``data.size``: 0.9·size, rounded half up (1500 → 1350)."""
    return math.floor(TRAINING_SHARE * size + 0.5)


def split_rows(
    rows: Sequence[Row],
    *,
    size: int | None,
    test_rows: int | None,
    validation_rows: int | None,
    split_seed: int,
    data_seed: int,
    rule: GroupingRule | None = None,
) -> Split:
    """Draw test, validation and training rows; the module's docstring describes the method.

    Args:
        rows: all rows of the data set.
        size: size N of the data set, of which 0.9·N are training rows; None: all other rows.
        test_rows: rows of the test set; None: `default_test_rows`.
        validation_rows: rows of the validation set; None: `default_validation_rows`.
        split_seed: seed of test and validation set.
        data_seed: seed of choice and order of the training rows.
        rule: how rows are related; None: the default rule.

    Raises:
        DataError: too few rows or groups; the message names a value that fits.
    """
    wanted_test = default_test_rows(len(rows)) if test_rows is None else test_rows
    wanted_validation = (
        default_validation_rows(len(rows)) if validation_rows is None else validation_rows
    )
    rule = rule or GroupingRule()
    related = group_rows(rows, rule)
    members: dict[str, list[str]] = defaultdict(list)
    for row_id, group_id in sorted(related.group_of.items()):
        members[group_id].append(row_id)

    if len(members) < 3:
        raise DataError(_too_few_groups(rows, rule, len(members)))
    largest = max(map(len, members.values()))
    groups = [members[group] for group in seeded_order(members, "held out", split_seed)]
    sets: list[list[Group]] = []
    # One group is reserved for each set that is drawn later.
    for key, requested, wanted, reserved in (
        ("test_rows", test_rows, wanted_test, 2),
        ("validation_rows", validation_rows, wanted_validation, 1),
    ):
        taken = draw_groups(groups, wanted)
        # A default is met as nearly as whole groups allow, a requested number exactly.
        if requested is None and len(taken) > 0:
            wanted = _count_rows(taken)
        if _count_rows(taken) < wanted or len(groups) - len(taken) < reserved:
            raise DataError(
                f"data.{key} = {wanted}: cannot be drawn from {_count_rows(groups)} rows in "
                f"groups of related rows (data.group_by; the largest has {largest}), with rows "
                f"left for the other sets; "
                f"data.{key} = {_feasible_rows(groups, taken, reserved)} fits"
            )
        sets.append(taken)
        drawn = {group[0] for group in taken}
        groups = [group for group in groups if group[0] not in drawn]
    test, validation = ([row_id for group in taken for row_id in group] for taken in sets)
    remaining = [row_id for group in groups for row_id in group]
    wanted_train = len(remaining) if size is None else training_rows_for(size)
    if wanted_train > len(remaining):
        fits = math.floor(len(remaining) / TRAINING_SHARE)
        raise DataError(
            f"data.size = {size}: needs {wanted_train} training rows, but {len(remaining)} of "
            f"{len(rows)} are left after {len(test)} test and {len(validation)} validation rows; "
            f"data.size = {fits if fits > 1 else 'null'} fits"
        )
    train = seeded_order(remaining, "train", data_seed)[:wanted_train]
    return Split(tuple(sorted(test)), tuple(sorted(validation)), tuple(train), related)


def _too_few_groups(rows: Sequence[Row], rule: GroupingRule, groups: int) -> str:
    """Explain why rows cannot be split, and name a setting that allows it."""
    message = (
        f"data.name: the {len(rows)} rows are {groups} group{'s' * (groups != 1)} of related rows "
        f"(data.group_by = {_listed(rule.by)}), and test, validation and training set need one "
        "each; give more rows, or a column 'group' that says which are related"
    )
    # The smallest change first: contexts in the prompts, then one relation less, the weakest
    # first, then none.
    candidates = [("data.include_context=true", replace(rule, with_context=True))]
    if rule.with_context or not any(row.context.strip() for row in rows):
        candidates = []
    for removed in ("near", "context", "instruction", "prompt", "group"):
        if removed in rule.by:
            by = tuple(relation for relation in rule.by if relation != removed)
            candidates.append((f"'data.group_by={_listed(by)}'", replace(rule, by=by)))
    candidates.append(("'data.group_by=[]'", replace(rule, by=())))
    for setting, candidate in candidates:
        if (n_groups := group_rows(rows, candidate).count) >= 3:
            return f"{message}; with {setting} they are {n_groups} groups"
    return message


def _listed(by: Sequence[Relation]) -> str:
    return f"[{', '.join(by)}]"
