"""The whole way from a recipe's data section to the three tokenised sets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slm_lora.config.schema import DataSection
from slm_lora.data.sources import RowSet
from slm_lora.data.splits import SPLIT_VERSION, Groups, Rule, split_rows
from slm_lora.data.template_check import notes_on_template
from slm_lora.data.templates import Template, choose_template
from slm_lora.data.tokenization import LongRows, RowTokenizer
from slm_lora.errors import DataError, UsageError
from slm_lora.records import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Prepared:
    """Tokenised test, validation and training rows, and what was cut or left out.

    ``notes`` say what else was done with the rows, one line each.
    """

    test: tuple[Example, ...]
    validation: tuple[Example, ...]
    train: tuple[Example, ...]
    template: Template
    chat_template: str | None
    rows_available: int
    groups: int
    duplicates: int
    bad_rows: int
    long: dict[str, LongRows]
    rule: Rule
    notes: tuple[str, ...] = ()

    @property
    def held_out_hash(self) -> str:
        """SHA-256 over the tokens of test and validation set: equal if scores compare."""
        return _hash(self.test, self.validation)

    @property
    def train_hash(self) -> str:
        """SHA-256 over the tokens of the training set, in its order."""
        return _hash(self.train)


def _hash(*sets: Sequence[Example]) -> str:
    digest = hashlib.sha256(f"{SPLIT_VERSION}\0".encode())
    for examples in sets:
        digest.update(f"{len(examples)} rows\0".encode())
        for example in examples:
            digest.update(f"{example.row_id}\0{example.group_id}\0{example.length}\0".encode())
            digest.update(example.ids.tobytes())
            digest.update(example.response.tobytes())
    return digest.hexdigest()


def prepare(
    rows: RowSet, section: DataSection, data_seed: int, tokenizer: PreTrainedTokenizerBase
) -> Prepared:
    """Choose rows, render and tokenise them.

    Rows over ``max_length`` are dropped before the draw (so that every set has the size that
    was asked for) or truncated or split after it (so that the draw does not depend on the
    tokenizer; a set then has as many rows as was asked for, and more pieces).

    Raises:
        DataError: too few rows, a row that does not render or is refused.
        UsageError: a template that the tokenizer does not have, or rows that cannot be split.
    """
    with_context = sum(bool(row.context) for row in rows.rows)
    include_context = section.include_context
    if include_context == "auto":
        include_context = with_context > 0
    template = choose_template(section.template, rows.format, include_context)
    template = replace(
        template, special_in_responses=section.special_tokens_in_responses == "special"
    )
    if section.on_long_row == "split":
        _check_split(rows, template)
    tokenize = RowTokenizer(tokenizer, template)
    handed_on = notes_on_template(tokenizer, tokenize, rows.rows)
    usable = rows.rows
    long: dict[str, LongRows] = {}
    if section.on_long_row == "drop":
        whole = {row.row_id: row.row_id for row in usable}
        fitting, long["all"] = tokenize.encode(usable, whole, section.max_length, "drop")
        kept = {example.row_id for example in fitting}
        usable = [row for row in usable if row.row_id in kept]
        if not usable:
            raise DataError(f"data.max_length = {section.max_length}: every row is longer")
    rule = Rule(section.group_by, template.shows_context, section.near_duplicate_threshold)
    split = split_rows(
        usable,
        size=section.size,
        test_rows=section.test_rows,
        validation_rows=section.validation_rows,
        split_seed=section.split_seed,
        data_seed=data_seed,
        rule=rule,
    )
    by_id = {row.row_id: row for row in usable}
    sets: dict[str, tuple[Example, ...]] = {}
    for name, ids in (
        ("test", split.test),
        ("validation", split.validation),
        ("train", split.train),
    ):
        chosen = [by_id[row_id] for row_id in ids]
        examples, counted = tokenize.encode(
            chosen, split.groups.of, section.max_length, section.on_long_row
        )
        if section.on_long_row != "drop":  # counted over all rows above
            long[name] = counted
        sets[name] = tuple(examples)
    return Prepared(
        test=sets["test"],
        validation=sets["validation"],
        train=sets["train"],
        template=template,
        chat_template=tokenize.chat_template,
        rows_available=len(usable),
        groups=split.groups.count,
        duplicates=rows.duplicates,
        bad_rows=len(rows.bad_rows),
        long=long,
        rule=rule,
        notes=(
            *_context_note(with_context, len(rows.rows), template),
            *_group_notes(split.groups),
            *handed_on,
        ),
    )


def _context_note(many: int, rows: int, template: Template) -> tuple[str, ...]:
    """Says that contexts are no part of the prompts, where rows have some."""
    if not many or (template.include_context and template.kind != "plain"):
        return ()
    why = (
        "data.include_context=auto puts them in"
        if not template.include_context
        else "template plain has no place for them: data.template=instruction_response has one"
    )
    return (f"contexts are left out of the prompts, in {many} of {rows} rows ({why})",)


def _check_split(rows: RowSet, template: Template) -> None:
    """A piece without its prompt is another question: only text that has none can be cut."""
    kind, reason = "", ""
    if template.kind != "plain":
        kind, reason = f"data.template = {template.kind}", "puts a prompt before every response"
    elif asking := [row for row in rows.rows if len(row.turns) > 1]:
        kind, reason = asking[0].source, f"the row has a prompt (format {rows.format})"
    if kind:
        raise UsageError(
            f"data.on_long_row = split: {kind}: {reason}, which the later pieces would lose; only "
            "plain text (format text) can be split; use truncate, drop or refuse"
        )


def _group_notes(groups: Groups) -> tuple[str, ...]:
    """What kept rows together, or told them apart, other than that they ask the same."""
    notes = []
    rows, many = groups.near
    if rows:
        notes.append(
            f"near-duplicate prompts keep {rows} rows together, in {many} "
            f"group{'s' * (many > 1)} (data.near_duplicate_threshold; or leave 'near' out of "
            "data.group_by)"
        )
    for rows, words in groups.templates:
        notes.append(
            f"{rows} prompts share most of their words: {words} words that they have in common "
            "are taken for a template and not compared; if they are about one thing, say so by a "
            "column 'group'"
        )
    if groups.openings:
        notes.append(
            f"{groups.openings} rows begin with the same question as more than a tenth of all: "
            "they are told apart by system text and later questions (add 'instruction' to "
            "data.group_by to tie them)"
        )
    return tuple(notes)
