"""Checks of a data set: leaks between splits, conflicting answers, lengths, categories, and text
that is tokenised in an unexpected way."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import get_args

from slm_lora.config.types import Relation
from slm_lora.data.splits import GroupingRule, count_cross_group_prompts, group_rows
from slm_lora.data.tokenization import RowTokenizer
from slm_lora.errors import SlmLoraError
from slm_lora.records import PIECE, Example, Row, Turn

HELD_OUT_SHARE = 0.1
"""Share of rows held out by a random 90/10 split, for the leak estimate."""

LENGTH_LIMITS = (128, 256, 512, 1024, 2048)
"""Values of max_length, in tokens, for which `LengthCost` is computed."""


@dataclass(frozen=True, slots=True)
class RelatedRows:
    """Rows tied by one relation, and the leak of a split that ignores it.

    Attributes:
        relation: the relation; None: all relations of the rule together.
        groups: number of groups of at least two rows.
        rows: number of rows in those groups.
        leak: expected share of held-out rows with a related row in the training set, for a
            random 90/10 split by row.
    """

    relation: Relation | None
    groups: int
    rows: int
    leak: float


@dataclass(frozen=True, slots=True)
class LengthCost:
    """Shares (0 to 1) of rows over a limit in tokens, and of tokens beyond it."""

    limit: int
    rows: float
    tokens: float


@dataclass(frozen=True, slots=True)
class DatasetStatistics:
    """Statistics of a data set.

    Attributes:
        related: for each relation of the rule that ties rows, and for all together; equal
            instructions are always counted.
        cross_group_prompts: rows whose prompt also occurs in another group, because of the
            ``group`` column or because the rule does not tie equal prompts.
        conflicts: number of prompts (instruction and context) with several different answers,
            and of their rows.
        categories: number of rows of each category, most frequent first.
        lengths: number of rows by length; keys are upper ends of bins, in tokens.
        costs: for each of `LENGTH_LIMITS` below the longest row.
    """

    related: tuple[RelatedRows, ...]
    cross_group_prompts: int
    conflicts: tuple[int, int]
    categories: tuple[tuple[str, int], ...]
    lengths: tuple[tuple[int, int], ...]
    costs: tuple[LengthCost, ...]


def dataset_statistics(
    rows: Sequence[Row], lengths: Sequence[int], rule: GroupingRule | None = None
) -> DatasetStatistics:
    """Compute the statistics of rows.

    Args:
        rows: at least one row.
        lengths: untruncated length of each row in tokens.
        rule: how rows are related; None: the default rule.
    """
    rule = rule or GroupingRule()
    names = [name for name in get_args(Relation) if name in rule.by or name == "instruction"]
    # Rows with a group of their own are not compared for near-duplicates.
    ungrouped = [row for row in rows if not (row.group_hint and "group" in rule.by)]
    by_relation = [
        _related(ungrouped if name == "near" else rows, replace(rule, by=(name,)), name)
        for name in names
    ]
    related = [entry for entry in by_relation if entry.groups]
    categories = Counter(row.category for row in rows if row.category)
    bins = Counter(1 << (length - 1).bit_length() for length in lengths)
    return DatasetStatistics(
        related=(*related, _related(rows, rule, None)) if related else (),
        cross_group_prompts=count_cross_group_prompts(rows, rule),
        conflicts=conflicting_prompts(rows),
        categories=tuple(categories.most_common()),
        lengths=tuple((end, bins[end]) for end in _doublings(min(bins), max(bins))),
        costs=tuple(
            LengthCost(
                limit,
                sum(length > limit for length in lengths) / len(lengths),
                sum(max(0, length - limit) for length in lengths) / sum(lengths),
            )
            for limit in LENGTH_LIMITS
            if limit < max(lengths)
        ),
    )


def _doublings(first: int, last: int) -> list[int]:
    ends = [first]
    while ends[-1] < last:
        ends.append(2 * ends[-1])
    return ends


def _related(rows: Sequence[Row], rule: GroupingRule, relation: Relation | None) -> RelatedRows:
    sizes = Counter(group_rows(rows, rule).group_of.values()).values()
    group_sizes = [size for size in sizes if size > 1]
    # A held-out row does not leak if all related rows are held out, too.
    leak = sum(size * (1 - HELD_OUT_SHARE ** (size - 1)) for size in group_sizes) / max(
        1, len(rows)
    )
    return RelatedRows(relation, len(group_sizes), sum(group_sizes), leak)


def conflicting_prompts(rows: Sequence[Row]) -> tuple[int, int]:
    """Count prompts with several different answers, and their rows."""
    answers: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for row in rows:
        *earlier, last = row.turns
        if earlier and last.role == "assistant":
            prompt = (row.context.strip(), *(f"{t.role}:{t.content.strip()}" for t in earlier))
            answers[prompt].append(last.content.strip())
    conflicting = [texts for texts in answers.values() if len(set(texts)) > 1]
    return len(conflicting), sum(map(len, conflicting))


_MARK = re.compile(r"<\|[^\s<>|]{1,40}\|>|</?[a-z]+_of_turn>|\[/?[A-Z_]{2,20}\]|<</?[A-Z]{2,20}>>")
_QUESTION, _ANSWER = "\ue000", "\ue001"


@dataclass(frozen=True, slots=True)
class TextRoleMark:
    """A role mark of a template that is not a special token, so that rows may contain it.

    Attributes:
        text: the mark, without white space at its ends.
        rows: number of rows that contain it.
        first: source of the first such row; empty if there is none.
    """

    text: str
    rows: int
    first: str


def text_role_marks(tokenize: RowTokenizer, rows: Sequence[Row]) -> tuple[TextRoleMark, ...]:
    """Find role marks of the template that are not special tokens, and the rows with them.

    A special token in row text is distinguished from the template's; such a mark cannot be.
    """
    marks = []
    for mark in _marks_in_template(tokenize):
        matches = [
            row
            for row in rows
            if any(mark in text for text in (row.context, *(turn.content for turn in row.turns)))
        ]
        marks.append(TextRoleMark(mark.strip(), len(matches), matches[0].source if matches else ""))
    return tuple(marks)


def _marks_in_template(tokenize: RowTokenizer) -> list[str]:
    sample = Row((Turn("user", _QUESTION), Turn("assistant", _ANSWER)))
    try:
        text = tokenize.render(sample).text
    except SlmLoraError:  # the template does not take one question and one answer
        return []
    marks: list[str] = []
    markers = {tokenize.specials.marker(i) for i in range(len(tokenize.specials.tokens))}
    special = "".join(markers) or "\0"
    # Split the template's own text at its special tokens and at the row's text.
    for piece in re.finditer(f"[^{special}{_QUESTION}{_ANSWER}]+", text):
        before = text[piece.start() - 1 : piece.start()]
        if matches := _MARK.findall(piece[0]):
            marks += matches
        elif piece[0].strip() and before not in markers:
            # (A role's name right after a special token has no meaning without it.)
            marks.append(piece[0])
    return list(dict.fromkeys(marks))


MIN_TEST_GROUPS = 30
"""Number of test groups below which bootstrap intervals are too unreliable."""


def few_test_rows(test: Sequence[Example]) -> str:
    """Return a warning of one line if the test rows are too few for an interval; else empty."""
    groups = len({example.group_id for example in test})
    if groups >= MIN_TEST_GROUPS:
        return ""
    rows = len({example.row_id.partition(PIECE)[0] for example in test})
    counts = f"{rows} test rows"
    if groups < rows:
        counts += f" in {groups} groups of related rows"
    return (
        f"{counts}: fewer than {MIN_TEST_GROUPS} give wide and unreliable intervals; raise "
        "data.test_rows, or give more rows"
    )


@dataclass(frozen=True, slots=True)
class SpecialTokensInRows:
    """Special tokens of the tokenizer that occur in row text.

    Attributes:
        rows: number of rows with any of them.
        first: source of the first such row.
        tokens: each token and its number of rows, most frequent first.
    """

    rows: int
    first: str
    tokens: tuple[tuple[str, int], ...]


def special_tokens_in_rows(
    tokenize: RowTokenizer, rows: Sequence[Row]
) -> tuple[SpecialTokensInRows | None, SpecialTokensInRows | None]:
    """Find special tokens in the text of responses, and of prompts; None where there are none."""
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
        _count_tokens(tokens, [(source, response) for source, response, _ in texts]),
        _count_tokens(tokens, [(source, prompt) for source, _, prompt in texts]),
    )


def _count_tokens(
    tokens: Sequence[str], texts: Sequence[tuple[str, str]]
) -> SpecialTokensInRows | None:
    counts: Counter[str] = Counter()
    sources = []
    for source, text in texts:
        tokens_in_text = []
        # Tokens are sorted longest first, so that one inside another is not counted.
        for token in tokens:
            if token in text:
                tokens_in_text.append(token)
                text = text.replace(token, "\0")
        if tokens_in_text:
            sources.append(source)
            counts.update(tokens_in_text)
    if not sources:
        return None
    return SpecialTokensInRows(len(sources), sources[0], tuple(counts.most_common()))


_SET_BY_PROGRAMS = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
_FUNCTIONS = frozenset({"raise_exception", "strftime_now"})


def undefined_names(source: str, special_tokens: Collection[str]) -> tuple[str, ...]:
    """Return undefined names in a chat template; Jinja treats them as empty or false.

    Names that the template itself tests (``is defined``, ``default``) are left out.

    Args:
        source: Jinja source of the template.
        special_tokens: names of the special tokens that the tokenizer sets (``eos_token``, …).
    """
    import jinja2
    from jinja2 import meta, nodes

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        # The generation tag is known to transformers only.
        tree = environment.parse(re.sub(r"\{%-?\s*(?:end)?generation\s*-?%\}", "", source))
    except jinja2.TemplateError:
        return ()  # reported where the template is rendered
    tested = set()
    for test in tree.find_all(nodes.Test):
        if test.name in ("defined", "undefined") and isinstance(test.node, nodes.Name):
            tested.add(test.node.name)
    for filter_ in tree.find_all(nodes.Filter):
        if filter_.name in ("default", "d") and isinstance(filter_.node, nodes.Name):
            tested.add(filter_.node.name)
    # (A name assigned in one branch counts as defined: the other branches may not read it.)
    assigned = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    defined = assigned | _SET_BY_PROGRAMS | _FUNCTIONS | environment.globals.keys()
    return tuple(
        sorted(meta.find_undeclared_variables(tree) - defined - set(special_tokens) - tested)
    )
