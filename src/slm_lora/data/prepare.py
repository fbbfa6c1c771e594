"""The whole way from a recipe's data section to the three tokenised sets."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_lora.data.handed_on import notes_on_template
from slm_lora.data.sources import RowSet
from slm_lora.data.splits import SPLIT_VERSION, split_rows
from slm_lora.data.templates import Template, choose_template
from slm_lora.data.tokens import LongRows, RowTokenizer
from slm_lora.errors import DataError
from slm_lora.recipe.schema import DataSection
from slm_lora.records import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Prepared:
    """Tokenised test, validation and training rows, and what was cut or left out.

    ``notes`` say what else of the rows is not in their tokens, one line each.
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
    was asked for) or truncated after it (so that the draw does not depend on the tokenizer).

    Raises:
        DataError: too few rows, a row that does not render or is refused.
        UsageError: a template that the tokenizer does not have.
    """
    with_context = sum(bool(row.context) for row in rows.rows)
    include_context = section.include_context
    if include_context == "auto":
        include_context = with_context > 0
    template = choose_template(section.template, rows.format, include_context)
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
    split = split_rows(
        usable,
        size=section.size,
        test_rows=section.test_rows,
        validation_rows=section.validation_rows,
        split_seed=section.split_seed,
        data_seed=data_seed,
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
            chosen, split.group_of, section.max_length, section.on_long_row
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
        groups=len(set(split.group_of.values())),
        duplicates=rows.duplicates,
        bad_rows=len(rows.bad_rows),
        long=long,
        notes=(*_context_note(with_context, len(rows.rows), template), *handed_on),
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
