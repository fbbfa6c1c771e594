"""Further held-out sets: rows of another source, checked against the training rows, tokenised."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slm_lora.config.forgetting import AlsoSection
from slm_lora.config.schema import DataSection
from slm_lora.data.sources import RowSet, read_rows
from slm_lora.data.splits import GroupingRule, group_rows, prompt_parts, seeded_order
from slm_lora.data.templates import Template, choose_template
from slm_lora.data.tokenization import RowTokenizer
from slm_lora.errors import DataError, SlmLoraError
from slm_lora.records import Example, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class FurtherSet:
    """A further held-out set.

    Attributes:
        examples: its rows, tokenised.
        origin: of its rows, as that of a `RowSet`.
        template: kind of the prompt template.
        notes: on what was read, one line each.
    """

    examples: tuple[Example, ...]
    origin: str
    template: str
    notes: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """SHA-256 of ids, groups and tokens: equal if losses are comparable."""
        digest = hashlib.sha256()
        for example in self.examples:
            digest.update(f"{example.row_id}\0{example.group_id}\0{example.length}\0".encode())
            digest.update(example.ids.tobytes())
            digest.update(example.response.tobytes())
        return digest.hexdigest()


def read_further_set(
    name: str,
    section: AlsoSection,
    trained: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    rule: GroupingRule,
    max_length: int,
) -> FurtherSet:
    """Read, check and tokenise a set.

    Args:
        name: of the set, for messages.
        section: of the recipe.
        trained: all rows that any cell is trained on.
        tokenizer: of the base.
        template: of the training.
        rule: by which the rows of the experiment are related.
        max_length: in tokens; longer rows are truncated, and counted in a note.

    Raises:
        SlmLoraError: as `read_rows` and `RowTokenizer.encode`, with the set's name.
        DataError: rows of the training set are in it.
    """
    place = f"forgetting.also.{name}"
    try:
        keys = set(AlsoSection.model_fields) & set(DataSection.model_fields) - {"template"}
        row_set = read_rows(DataSection(**section.model_dump(include=keys)))
        _check_leak(place, row_set, trained, rule.with_context)
        by_id = {row.row_id: row for row in row_set.rows}
        drawn = seeded_order(by_id, "forgetting", 0)[: section.rows]
        rows = [by_id[row_id] for row_id in drawn]
        own = _template(section, row_set, rows, template)
        groups = group_rows(rows, rule).group_of
        examples, long = RowTokenizer(tokenizer, own).encode(rows, groups, max_length)
    except SlmLoraError as error:
        message = str(error)
        raise type(error)(
            message if message.startswith(place) else f"{place}: {message}"
        ) from error
    notes = [f"{place}: {len(rows)} of {len(row_set.rows)} rows, template {own.kind}"]
    if section.rows is not None and len(rows) < section.rows:
        notes[0] += f" (fewer than rows = {section.rows})"
    if row_set.duplicates or row_set.bad_rows:
        notes[0] += (
            f"; {row_set.duplicates} duplicates and {len(row_set.bad_rows)} malformed left out"
        )
    if long.rows:
        notes.append(
            f"{place}: {long.rows} rows are truncated to data.max_length = {max_length} tokens"
        )
    notes += [f"{place}: {note}" for note in row_set.notes]
    return FurtherSet(tuple(examples), row_set.origin, own.kind, tuple(notes))


def _template(
    section: AlsoSection, row_set: RowSet, rows: Sequence[Row], trained: Template
) -> Template:
    with_context = any(row.context for row in rows)
    if section.template != "auto" or row_set.format == "text":
        return choose_template(section.template, row_set.format, with_context)
    return replace(trained, include_context=trained.include_context or with_context)


def _check_leak(place: str, row_set: RowSet, trained: Sequence[Row], with_context: bool) -> None:
    """Refuse a set with prompts of training rows, equal without case, punctuation and spacing, as
    in the split."""
    by_prompt: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in trained:
        by_prompt[prompt_parts(row, with_context)].append(row)
    leaked = [
        (row, matches[0])
        for row in row_set.rows
        if (matches := by_prompt.get(prompt_parts(row, with_context)))
    ]
    if not leaked:
        return
    named = ", ".join(f"{row.source} = {other.source}" for row, other in leaked[:_MOST_NAMED])
    more = ", …" if len(leaked) > _MOST_NAMED else ""
    raise DataError(
        f"{place}: {len(leaked)} of its {len(row_set.rows)} rows have the prompt of a training row "
        f"({named}{more}); remove them: their loss is that of training, not of forgetting"
    )
