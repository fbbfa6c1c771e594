"""Tokenise rows to ids with a mask of the response tokens.

The rendered string is tokenised as a whole, by a copy of the tokenizer in which special tokens
in row text are plain text and those of the template are private-use characters (see
``templates``). BOS comes first if the tokenizer adds one; EOS comes last and is a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from slm_lora.data.chat_templates import default_template
from slm_lora.data.dropped_turns import DroppedTurns
from slm_lora.data.special_tokens import (
    added_bos,
    literal_backend,
    needs_space_after_bos,
    special_ids,
    split_at_responses,
)
from slm_lora.data.templates import (
    Rendered,
    SpecialTokens,
    Template,
    as_chat_template,
    chat_messages,
    chat_renderer,
    check_private_use,
    render_chat,
    render_instruction_response,
    render_plain,
)
from slm_lora.data.text import prompt_text
from slm_lora.errors import DataError, SlmLoraError, UsageError
from slm_lora.records import PIECE, Example, Row, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class LongRows:
    """Rows longer than max_length.

    Attributes:
        rows: number of rows over the limit.
        tokens_cut: number of tokens beyond the limit; 0 if long rows are split.
        longest: length of the longest row in tokens.
    """

    rows: int
    tokens_cut: int
    longest: int


_Tokens = tuple[list[int], list[bool], list[int]]


@dataclass(frozen=True, slots=True)
class _Part:
    """Tokens of an example: ids, response mask, and end offset of each in the rendered text."""

    row_id: str
    ids: list[int]
    response: list[bool]
    ends: list[int]


class RowTokenizer:
    """Tokenises rows under one template.

    Args:
        tokenizer: a fast tokenizer of transformers; it is not changed.
        template: the training template.

    Attributes:
        template: the training template.
        specials: the tokenizer's special tokens.
        eos_id: id of EOS, or None.
        bos_id: id of the BOS that is put first, or None.
        space_after_bos: whether a BOS written in the text must be followed by a space to give
            the tokens of training: some tokenizers prepend a space to every text, but not to
            text after a special token.
        chat_template: the training template as a chat template, for other programs; or None.

    Raises:
        UsageError: a slow tokenizer (no character offsets), or no chat template to use.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        if not tokenizer.is_fast:
            raise UsageError("the model's tokenizer has no fast version (tokenizer.json)")
        self.template = template
        self.specials = SpecialTokens.from_tokens(
            [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
        )
        self.eos_id: int | None = tokenizer.eos_token_id
        self.bos_id = added_bos(tokenizer)
        self.space_after_bos = self.bos_id is not None and needs_space_after_bos(tokenizer)
        self._backend, self._id_of = literal_backend(tokenizer, self.specials)
        self._never_text = special_ids(tokenizer)
        self._first_new_id = min(self._id_of, default=len(tokenizer))
        # All special tokens: in some models the end-of-turn mark is not EOS.
        self._ends = tuple(map(self.specials.marker, range(len(self.specials.tokens))))
        self._render_chat = chat_renderer(template, tokenizer, self.specials)
        self._dropped_turns = DroppedTurns(self._render_chat) if self._render_chat else None
        self.chat_template = as_chat_template(
            template, self.bos_id is not None, default_template(tokenizer), self.space_after_bos
        )

    def render(self, row: Row) -> Rendered:
        """Render a row to text with markers, and its response spans.

        Raises:
            DataError: the template cannot render the row, or drops a turn.
            UsageError: a ``.jinja`` template fails.
        """
        check_private_use(row)
        escaped = self._escaped(row)
        if self.template.kind == "instruction_response":
            rendered = render_instruction_response(escaped, self.template.include_context)
        elif self.template.kind == "plain":
            rendered = render_plain(escaped)
        else:
            rendered = self._rendered_chat(escaped)
        parts = [self.specials.unescape(part) for part in split_at_responses(rendered)]
        ends = np.cumsum([len(part) for part in parts])
        # split_at_responses alternates outside, response, outside, …: odd parts are responses.
        spans = tuple((int(ends[i - 1]), int(ends[i])) for i in range(1, len(parts), 2))
        return Rendered("".join(parts), spans)

    @property
    def is_multi_turn(self) -> bool:
        """Whether the template takes conversations, not only one instruction."""
        return self._render_chat is not None

    def prompt(self, turns: Sequence[Turn], context: str = "") -> list[int]:
        """Tokenise a prompt: the training text up to the start of the response.

        Args:
            turns: the conversation; the last turn is the user's.
            context: the context, used if training included contexts.

        Raises:
            UsageError: the template does not take such turns.
            DataError: the text contains a special token that this tokenizer cannot escape.
        """
        # The checks of rows, so that the same text gives the same tokens.
        turns = [Turn(turn.role, _checked_content(turn)) for turn in turns]
        context = prompt_text(context, "context")
        roles = [turn.role for turn in turns]
        if self._render_chat is None and roles != ["user"]:
            raise UsageError(
                f"the template '{self.template.kind}' takes one instruction at a time, "
                f"not the turns {', '.join(roles)}; send the last one alone"
            )
        if roles[-1:] != ["user"]:
            raise UsageError("the last turn must be the user's: it is what is answered")
        if self._render_chat is None:
            row = Row((*turns, Turn("assistant", "")), context=context, source="prompt")
            text = self.render(row).text
        else:
            text = self._chat_prompt(turns, context)
        raw_ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if not self._never_text.isdisjoint(raw_ids):
            raise DataError(
                "prompt: the text contains a special token, which this tokenizer cannot "
                "encode as text; change it"
            )
        ids = [self._id_of[i] if i >= self._first_new_id else i for i in raw_ids]
        return [self.bos_id, *ids] if self.bos_id is not None and ids[:1] != [self.bos_id] else ids

    def _chat_prompt(self, turns: Sequence[Turn], context: str) -> str:
        assert self._render_chat is not None
        row = Row(tuple(turns), context=context, source="prompt")
        check_private_use(row)
        messages = chat_messages(self._escaped(row), self.template.include_context)
        try:
            text = self.specials.unescape(self._render_chat(messages, True))
        except Exception as error:  # many templates refuse system turns or unusual role orders
            raise UsageError(f"the chat template refuses these turns ({_reason(error)})") from error
        if turn_name := self._first_dropped(row, True):
            raise UsageError(f"the chat template drops {turn_name}; leave it out")
        return text

    def _first_dropped(self, row: Row, prompt: bool) -> str:
        """Describe the first non-empty turn that the chat template drops; empty if none is."""
        assert self._dropped_turns is not None
        for index in self._dropped_turns.turns([turn.role for turn in row.turns], prompt):
            if row.turns[index].content.strip():
                return f"turn {index + 1} of {len(row.turns)} ({row.turns[index].role})"
        return ""

    def _escaped(self, row: Row) -> Row:
        return Row(
            tuple(Turn(turn.role, self._content(turn)) for turn in row.turns),
            context=self.specials.escape(row.context),
            source=row.source,
        )

    def _content(self, turn: Turn) -> str:
        """Return a turn's text with its special tokens escaped, or marked in responses if the
        recipe allows special tokens there."""
        if turn.role == "assistant" and self.template.special_in_responses:
            return self.specials.mark(turn.content)
        return self.specials.escape(turn.content)

    def _rendered_chat(self, row: Row) -> Rendered:
        assert self._render_chat is not None
        try:
            rendered = render_chat(
                row, self.template.include_context, self._render_chat, self._ends
            )
        except SlmLoraError:
            raise
        except Exception as error:  # the template is foreign code; many refuse system turns
            if self.template.kind == "jinja":
                raise UsageError(f"data.template: {_reason(error)} ({row.source})") from error
            raise DataError(
                f"{row.source}: the model's chat template refuses the row ({_reason(error)}); "
                "fix or remove it, or give a template of your own (data.template=path.jinja)"
            ) from error
        if turn_name := self._first_dropped(row, False):
            remedy = (
                "fix the template (a misspelt name is empty in Jinja)"
                if self.template.kind == "jinja"
                else "leave it out of the rows, or give a template of your own "
                "(data.template=path.jinja)"
            )
            raise DataError(f"{row.source}: the chat template drops {turn_name}; {remedy}")
        return rendered

    def encode(
        self,
        rows: Sequence[Row],
        group_of: dict[str, str],
        max_length: int | None = None,
        on_long_row: str = "truncate",
    ) -> tuple[list[Example], LongRows]:
        """Tokenise rows, in their order.

        Args:
            rows: the rows.
            group_of: group id of every row id.
            max_length: maximum length in tokens, BOS and EOS included; None: no limit.
            on_long_row: ``truncate`` (the row then ends without EOS), ``drop``, ``refuse``, or
                ``split`` (see `_pieces`).

        Returns:
            The examples, and the counts of long rows.

        Raises:
            DataError: a row has no tokens, cannot be rendered, or is too long under ``refuse``.
            UsageError: a ``.jinja`` template fails.
        """
        rendered = [self.render(row) for row in rows]
        encodings = self._backend.encode_batch(
            [text.text for text in rendered], add_special_tokens=False
        )
        tokens_of = [
            self._tokens(row, text, encoding.ids, encoding.offsets)
            for row, text, encoding in zip(rows, rendered, encodings, strict=True)
        ]
        lengths = [_length(tokens) for tokens in tokens_of]
        limit = max_length if max_length is not None else max(lengths, default=0)
        long = [(row, n) for row, n in zip(rows, lengths, strict=True) if n > limit]
        long_rows = LongRows(
            rows=len(long),
            tokens_cut=sum(length - limit for _, length in long) * (on_long_row != "split"),
            longest=max(lengths, default=0),
        )
        if long and on_long_row == "refuse":
            raise DataError(
                f"{long[0][0].source}: {long[0][1]} tokens, over data.max_length = {limit} "
                f"({len(long)} rows in all); set data.on_long_row to truncate or drop, or, for "
                "plain text, to split"
            )
        examples: list[Example] = []
        for row, text, tokens in zip(rows, rendered, tokens_of, strict=True):
            group = group_of[row.row_id]
            if _length(tokens) > limit and on_long_row == "split":
                examples += self._pieces(row, group, text, tokens, limit)
            elif _length(tokens) <= limit or on_long_row != "drop":
                ids, response, ends = tokens
                part = _Part(row.row_id, ids[:limit], response[:limit], ends[:limit])
                examples.append(self._example(row, group, text, part))
        return examples, long_rows

    def _pieces(
        self, row: Row, group_id: str, rendered: Rendered, tokens: _Tokens, limit: int
    ) -> list[Example]:
        """Split a long row into the fewest pieces within the limit, of equal length.

        Every token but the first is a label in exactly one piece. A piece begins with BOS, if
        the row does, or else with the token before its first label.
        """
        ids, response, ends = tokens
        labels = len(ids) - 1
        count = -(-labels // (limit - 1))
        pieces = []
        for number in range(count):
            start, end = (1 + labels * k // count for k in (number, number + 1))
            first = ids[0] if ids[0] == self.bos_id else ids[start - 1]
            pieces.append(
                self._example(
                    row,
                    group_id,
                    rendered,
                    _Part(
                        f"{row.row_id}{PIECE}{number + 1}of{count}",
                        [first, *ids[start:end]],
                        [response[start - 1], *response[start:end]],
                        ends[start - 1 : end],
                    ),
                )
            )
        return pieces

    def differs_from_prompt(self, rows: Sequence[Row]) -> list[bool]:
        """Return for each row whether a prompt alone gives other tokens than within the row.

        The end of a prompt and the start of a response may form one token, or the white space
        between them may be tokenised differently. Training tokenises the whole text, generation
        the prompt alone.
        """
        rendered = [self.render(row) for row in rows]
        whole = self._backend.encode_batch([r.text for r in rendered], add_special_tokens=False)
        starts = [(i, start) for i, r in enumerate(rendered) for start, _ in r.responses if start]
        prompts = self._backend.encode_batch(
            [rendered[i].text[:start] for i, start in starts], add_special_tokens=False
        )
        differs = [False] * len(rows)
        for (i, _), prompt in zip(starts, prompts, strict=True):
            differs[i] |= prompt.ids != whole[i].ids[: len(prompt.ids)]
        return differs

    def _tokens(
        self, row: Row, rendered: Rendered, raw_ids: list[int], offsets: list[tuple[int, int]]
    ) -> _Tokens:
        """Return ids, response mask and end offset of every token, BOS and EOS added."""
        if not self._never_text.isdisjoint(raw_ids):
            raise DataError(
                f"{row.source}: the text contains a special token, which this tokenizer cannot "
                "encode as text; remove the row"
            )
        ids = [self._id_of[i] if i >= self._first_new_id else i for i in raw_ids]
        ends = [end for _, end in offsets]
        # A token is a response token if it ends past the prompt's last character.
        spans = rendered.responses
        response = [any(a < end <= b for a, b in spans) for end in ends]
        if self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids, response, ends = [self.bos_id, *ids], [False, *response], [0, *ends]
        if not ids:
            raise DataError(f"{row.source}: the row has no tokens")
        if self.eos_id is not None and ids[-1] != self.eos_id:
            after_response = bool(spans) and spans[-1][1] == len(rendered.text)
            ids, response = [*ids, self.eos_id], [*response, after_response]
            ends = [*ends, len(rendered.text)]
        return ids, response, ends

    def _example(self, row: Row, group_id: str, rendered: Rendered, part: _Part) -> Example:
        # The first token is not scored, so its bytes do not count (BOS has none).
        first, last = part.ends[0], part.ends[-1]
        return Example(
            row_id=part.row_id,
            group_id=group_id,
            category=row.category,
            ids=np.array(part.ids, dtype=np.int32),
            response=np.array(part.response, dtype=np.bool_),
            bytes_all=self._bytes(rendered.text[first:last]),
            bytes_response=sum(
                self._bytes(rendered.text[max(a, first) : min(b, last)])
                for a, b in rendered.responses
            ),
        )

    def _bytes(self, text: str) -> int:
        return len(self.specials.remove_markers(text).encode("utf-8"))


def _checked_content(turn: Turn) -> str:
    """Check a turn's text; an assistant turn may contain NUL, which a model can generate."""
    parts = turn.content.split("\0") if turn.role == "assistant" else [turn.content]
    return "\0".join(prompt_text(part, "prompt") for part in parts)


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _length(tokens: _Tokens) -> int:
    return len(tokens[0])
