"""What a data set holds that an experiment should know: leaks, conflicts, lengths, categories,
and what becomes other tokens than its author may think."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from slm_lora.config.types import Relation
from slm_lora.data.splits import Rule, group_rows, same_prompt_in_other_groups
from slm_lora.data.tokenization import RowTokenizer
from slm_lora.errors import SlmLoraError
from slm_lora.records import PIECE, Example, Row, Turn

HELD_OUT = 0.1
"""Share of the rows that a random split, as it is usually made, holds out."""

LIMITS = (128, 256, 512, 1024, 2048)
"""Values of max_length whose cost is told."""


@dataclass(frozen=True, slots=True)
class Related:
    """Rows that are related in one way, and what a random split would do to them.

    Attributes:
        relation: how they are related; None: in any way that the rule names.
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
        related: by each relation of the rule that ties any rows, and by all together; an equal
            instruction is counted in any case.
        parted: rows that ask exactly what a row of another group asks: they name their groups so,
            or the rule does not tie equal prompts.
        conflicts: prompts (instruction and context) that have several different answers, and
            the rows that answer them.
        categories: rows of every category, most frequent first.
        lengths: rows by length in tokens; keys are the upper ends of the bins.
        costs: of limits on length, as far as rows reach them.
    """

    related: tuple[Related, ...]
    parted: int
    conflicts: tuple[int, int]
    categories: tuple[tuple[str, int], ...]
    lengths: tuple[tuple[int, int], ...]
    costs: tuple[Cost, ...]


def facts(rows: Sequence[Row], lengths: Sequence[int], rule: Rule | None = None) -> Facts:
    """Look at rows, related by the rule, and their untruncated lengths in tokens."""
    rule = rule or Rule()
    names = [name for name in get_args(Relation) if name in rule.by or name == "instruction"]
    # No near-duplicates are looked for among rows that name their group.
    free = [row for row in rows if not (row.group_hint and "group" in rule.by)]
    by_each = [
        _related(free if name == "near" else rows, replace(rule, by=(name,)), name)
        for name in names
    ]
    found = [each for each in by_each if each.groups]
    counted = Counter(row.category for row in rows if row.category)
    bins = Counter(1 << (length - 1).bit_length() for length in lengths)
    return Facts(
        related=(*found, _related(rows, rule, None)) if found else (),
        parted=same_prompt_in_other_groups(rows, rule),
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


def _related(rows: Sequence[Row], rule: Rule, relation: Relation | None) -> Related:
    sizes = Counter(group_rows(rows, rule).of.values()).values()
    many = [size for size in sizes if size > 1]
    # A held-out row has no relative in training if all of them are held out, too.
    leak = sum(size * (1 - HELD_OUT ** (size - 1)) for size in many) / max(1, len(rows))
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


FEW = 30
"""Test rows, or groups of them, below which an interval says little: its own width is chance."""


def few_test_rows(test: Sequence[Example]) -> str:
    """One line if the test rows are too few for a useful interval; else empty."""
    groups = len({example.group_id for example in test})
    if groups >= FEW:
        return ""
    rows = len({example.row_id.partition(PIECE)[0] for example in test})
    what = f"{rows} test rows"
    if groups < rows:
        what += f" in {groups} groups of related rows"
    return (
        f"{what}: fewer than {FEW} give wide and unreliable intervals; raise data.test_rows, "
        "or give more rows"
    )


@dataclass(frozen=True, slots=True)
class SpeltSpecials:
    """Special tokens of the tokenizer that the rows spell.

    Attributes:
        rows: that spell any.
        first: source of the first of them.
        tokens: each, with the rows that spell it; most frequent first.
    """

    rows: int
    first: str
    tokens: tuple[tuple[str, int], ...]


def spelt_specials(
    tokenize: RowTokenizer, rows: Sequence[Row]
) -> tuple[SpeltSpecials | None, SpeltSpecials | None]:
    """Special tokens spelt in responses, and in what stands before them; None if there are none."""
    texts = [
        (
            row.source,
            "\n".join(turn.content for turn in row.turns if turn.role == "assistant"),
            "\n".join((row.context, *(t.content for t in row.turns if t.role != "assistant"))),
        )
        for row in rows
    ]
    tokens = tokenize.specials.tokens
    return (
        _spelt(tokens, [(source, response) for source, response, _ in texts]),
        _spelt(tokens, [(source, asked) for source, _, asked in texts]),
    )


def _spelt(tokens: Sequence[str], texts: Sequence[tuple[str, str]]) -> SpeltSpecials | None:
    counted: Counter[str] = Counter()
    sources = []
    for source, text in texts:
        found = []
        # Longest first, as they are taken: one that is part of another is not spelt by it.
        for token in tokens:
            if token in text:
                found.append(token)
                text = text.replace(token, "\0")
        if found:
            sources.append(source)
            counted.update(found)
    return (
        SpeltSpecials(len(sources), sources[0], tuple(counted.most_common())) if sources else None
    )


_SET_BY_PROGRAMS = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_FUNCTIONS = frozenset({"raise_exception", "strftime_now"})


def names_not_set(source: str, special_tokens: Collection[str]) -> tuple[str, ...]:
    """Names that a chat template uses and that are not set: each counts as empty, or as false.

    A name that the template itself asks for (``is defined``, ``default``) is no mistake.

    Args:
        source: of the template.
        special_tokens: names of the tokenizer's special tokens (``eos_token``, …) that are set.
    """
    import jinja2
    from jinja2 import meta, nodes

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        # Marks of what is the assistant's, known to transformers only.
        tree = environment.parse(re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", source))
    except jinja2.TemplateError:
        return ()  # found, and told, where it is rendered
    asked_for = set()
    for test in tree.find_all(nodes.Test):
        if test.name in ("defined", "undefined") and isinstance(test.node, nodes.Name):
            asked_for.add(test.node.name)
    for each in tree.find_all(nodes.Filter):
        if each.name in ("default", "d") and isinstance(each.node, nodes.Name):
            asked_for.add(each.node.name)
    # (Names set in one branch only are not counted: the other branches may not read them.)
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    known = own | _SET_BY_PROGRAMS | _FUNCTIONS | environment.globals.keys() | set(special_tokens)
    return tuple(sorted(meta.find_undeclared_variables(tree) - known - asked_for))
