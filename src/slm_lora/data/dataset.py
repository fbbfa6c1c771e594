"""Prepare the tokenised test, validation and training sets of a recipe's data section."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slm_lora.config.schema import DataSection
from slm_lora.data.sources import RowSet
from slm_lora.data.splits import SPLIT_VERSION, GroupingRule, Groups, split_rows
from slm_lora.data.template_check import template_notes
from slm_lora.data.templates import Template, choose_template
from slm_lora.data.tokenization import LongRows, RowTokenizer
from slm_lora.errors import DataError, UsageError
from slm_lora.records import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class PreparedData:
    """The tokenised sets, with counts of truncated and excluded rows.

    Attributes:
        test: examples of the test set.
        validation: examples of the validation set.
        train: examples of the training set, in the order of the draw.
        template: the training template.
        chat_template: the chat template saved with adapters; None: none is saved.
        rows_available: number of unique rows before the split (after ``drop`` of long ones).
        groups: number of groups of related rows.
        duplicates: number of exact duplicates that were removed.
        bad_rows: number of malformed rows that were skipped.
        long: counts of long rows by set, or under ``all`` where they are dropped.
        rule: the rule by which rows are related.
        notes: messages about the data for the user, one line each.
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
    rule: GroupingRule
    notes: tuple[str, ...] = ()

    @property
    def held_out_hash(self) -> str:
        """SHA-256 of the tokens of test and validation set: equal if scores are comparable."""
        return _hash(self.test, self.validation)

    @property
    def train_hash(self) -> str:
        """SHA-256 of the tokens of the training set, in its order."""
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


def prepare_data(
    rows: RowSet, section: DataSection, data_seed: int, tokenizer: PreTrainedTokenizerBase
) -> PreparedData:
    """Draw, render and tokenise the three sets.

    Rows over ``max_length`` tokens are dropped before the draw, so that every set has the
    requested size, or truncated or split after it, so that the draw does not depend on the
    tokenizer. A split row counts as one row of its set.

    Args:
        rows: the rows of the source.
        section: the data section of the recipe.
        data_seed: seed of the choice and order of training rows.
        tokenizer: the base model's tokenizer.

    Raises:
        DataError: too few rows, or a row that cannot be rendered or is too long.
        UsageError: a template that the tokenizer lacks, or rows that cannot be split.
    """
    n_context = sum(bool(row.context) for row in rows.rows)
    include_context = section.include_context
    if include_context == "auto":
        include_context = n_context > 0
    template = choose_template(section.template, rows.format, include_context)
    template = replace(
        template, special_in_responses=section.special_tokens_in_responses == "special"
    )
    if section.on_long_row == "split":
        _check_split(rows, template)
    tokenize = RowTokenizer(tokenizer, template)
    chat_template_notes = template_notes(tokenizer, tokenize, rows.rows)
    usable = rows.rows
    long: dict[str, LongRows] = {}
    if section.on_long_row == "drop":
        own_groups = {row.row_id: row.row_id for row in usable}
        examples, long["all"] = tokenize.encode(usable, own_groups, section.max_length, "drop")
        kept_ids = {example.row_id for example in examples}
        usable = [row for row in usable if row.row_id in kept_ids]
        if not usable:
            raise DataError(f"data.max_length = {section.max_length}: every row is longer")
    rule = GroupingRule(section.group_by, template.shows_context, section.near_duplicate_threshold)
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
        examples, long_rows = tokenize.encode(
            chosen, split.groups.group_of, section.max_length, section.on_long_row
        )
        if section.on_long_row != "drop":  # counted over all rows above
            long[name] = long_rows
        sets[name] = tuple(examples)
    return PreparedData(
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
            *_context_note(n_context, len(rows.rows), template),
            *_group_notes(split.groups),
            *chat_template_notes,
        ),
    )


def _context_note(n_context: int, n_rows: int, template: Template) -> tuple[str, ...]:
    """Report that prompts leave out the contexts that rows have."""
    if not n_context or (template.include_context and template.kind != "plain"):
        return ()
    remedy = (
        "data.include_context=auto includes them"
        if not template.include_context
        else "template plain has no context: data.template=instruction_response has one"
    )
    return (f"contexts are left out of the prompts, in {n_context} of {n_rows} rows ({remedy})",)


def _check_split(rows: RowSet, template: Template) -> None:
    """Refuse to split rows with prompts: later pieces would lack the prompt."""
    place, reason = "", ""
    if template.kind != "plain":
        place, reason = f"data.template = {template.kind}", "puts a prompt before every response"
    elif with_prompt := [row for row in rows.rows if len(row.turns) > 1]:
        place, reason = with_prompt[0].source, f"the row has a prompt (format {rows.format})"
    if place:
        raise UsageError(
            f"data.on_long_row = split: {place}: {reason}, which the later pieces would lose; only "
            "plain text (format text) can be split; use truncate, drop or refuse"
        )


def _group_notes(groups: Groups) -> tuple[str, ...]:
    """Report how near-duplicates, templates and common first questions affect the groups."""
    notes = []
    rows, n_groups = groups.near_duplicates
    if rows:
        notes.append(
            f"near-duplicate prompts keep {rows} rows together, in {n_groups} "
            f"group{'s' * (n_groups > 1)} (data.near_duplicate_threshold; or leave 'near' out of "
            "data.group_by)"
        )
    for rows, words in groups.templates:
        notes.append(
            f"{rows} prompts share most of their words: {words} words that they have in common "
            "are taken for a template and not compared; if they are related, add a column 'group'"
        )
    if groups.openings:
        notes.append(
            f"{groups.openings} rows begin with the same question as more than a tenth of all: "
            "they are distinguished by system text and later questions (add 'instruction' to "
            "data.group_by to tie them)"
        )
    return tuple(notes)
