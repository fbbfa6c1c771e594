"""From rows to token ids with a mask of the response tokens.

The rendered string is tokenised once, whole, by a copy of the tokenizer in which special
tokens written in row text are text, and the template's own are private-use characters (see
``templates``). BOS is first where the tokenizer adds one; EOS is last, and is a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from slm_lora.data.chat_templates import ChatRenderer, default_template, jinja_renderer
from slm_lora.data.dropped_turns import LeftOut
from slm_lora.data.special_tokens import (
    added_bos,
    cut_at_responses,
    literal_backend,
    needs_space_after_bos,
    special_ids,
)
from slm_lora.data.templates import (
    Rendered,
    Specials,
    Template,
    as_chat_template,
    chat_messages,
    check_private_use,
    render_chat,
    render_instruction_response,
    render_plain,
)
from slm_lora.data.text import given
from slm_lora.errors import DataError, SlmLoraError, UsageError
from slm_lora.records import PIECE, Example, Row, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class LongRows:
    """What happened to rows longer than max_length."""

    rows: int
    tokens_cut: int
    longest: int


_Tokens = tuple[list[int], list[bool], list[int]]


@dataclass(frozen=True, slots=True)
class _Part:
    """Tokens that become an example: ids, response mask, last character of each in the text."""

    row_id: str
    ids: list[int]
    response: list[bool]
    ends: list[int]


class RowTokenizer:
    """Tokenises rows under one template; keeps the tokenizer's prepared copy.

    Args:
        tokenizer: a fast tokenizer of transformers; it is not changed.
        template: how rows become text.

    Attributes:
        bos_id: the BOS that is put first, or None.
        space_after_bos: whether text after a written-out BOS needs a space before it to become
            the same tokens as text that BOS is put before: some tokenizers begin every text
            with a space of their own, but not the text behind a special token.
        chat_template: the training template for programs that prompt through chat templates.

    Raises:
        UsageError: a slow tokenizer (no character offsets), or no chat template to use.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
        if not tokenizer.is_fast:
            raise UsageError("the model's tokenizer has no fast version (tokenizer.json)")
        self.template = template
        self.specials = Specials.of(
            [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
        )
        self.eos_id: int | None = tokenizer.eos_token_id
        self.bos_id = added_bos(tokenizer)
        self.space_after_bos = self.bos_id is not None and needs_space_after_bos(tokenizer)
        self._backend, self._id_of = literal_backend(tokenizer, self.specials)
        self._never_text = special_ids(tokenizer)
        self._first_new_id = min(self._id_of, default=len(tokenizer))
        # Not EOS alone: the mark that ends a turn is another token in some models.
        self._ends = tuple(map(self.specials.owned, range(len(self.specials.tokens))))
        self._render_chat = self._chat_renderer(tokenizer)
        self._left_out = LeftOut(self._render_chat) if self._render_chat else None
        self.chat_template = as_chat_template(
            template, self.bos_id is not None, default_template(tokenizer), self.space_after_bos
        )

    def _chat_renderer(self, tokenizer: PreTrainedTokenizerBase) -> ChatRenderer | None:
        if self.template.kind not in ("chat", "jinja"):
            return None
        named = tokenizer.special_tokens_map
        if self.template.kind == "jinja":
            plain = jinja_renderer(self.template.source, named)
        else:
            own = default_template(tokenizer)
            if own is None:
                several: Any = tokenizer.chat_template
                has = (
                    f"has the chat templates {', '.join(sorted(several))}, and none named default"
                    if several
                    else "has no chat template"
                )
                raise UsageError(
                    f"data.template = chat: the model's tokenizer {has}; "
                    "use instruction_response, or a .jinja file"
                )
            plain = jinja_renderer(own, named, "data.template = chat: the model's chat template")
        return lambda messages, prompt: self.specials.own(plain(messages, prompt))

    def render(self, row: Row) -> Rendered:
        """The row's text, its special tokens hidden or owned, with its response spans."""
        check_private_use(row)
        hidden = self._hidden(row)
        if self.template.kind == "instruction_response":
            rendered = render_instruction_response(hidden, self.template.include_context)
        elif self.template.kind == "plain":
            rendered = render_plain(hidden)
        else:
            rendered = self._rendered_chat(hidden)
        shown = [self.specials.show(part) for part in cut_at_responses(rendered)]
        ends = np.cumsum([len(part) for part in shown])
        # cut_at_responses alternates outside, response, outside, …: every odd part is a response.
        spans = tuple((int(ends[i - 1]), int(ends[i])) for i in range(1, len(shown), 2))
        return Rendered("".join(shown), spans)

    @property
    def holds_conversations(self) -> bool:
        """Whether the template has several turns; the named ones for instructions have one."""
        return self._render_chat is not None

    def prompt(self, turns: Sequence[Turn], context: str = "") -> list[int]:
        """Token ids of what stands before a response: the training text, up to where it begins.

        Args:
            turns: the conversation, a user's turn last.
            context: put where the template puts one, if it was trained with contexts.

        Raises:
            UsageError: the template has no place for such turns.
            DataError: the text spells what cannot be told from a special token.
        """
        # As rows are read: the same text is the same tokens.
        turns = [Turn(turn.role, _checked_content(turn)) for turn in turns]
        context = given(context, "context")
        roles = [turn.role for turn in turns]
        if self._render_chat is None and roles != ["user"]:
            raise UsageError(
                f"the template '{self.template.kind}' takes one instruction at a time, "
                f"not the turns {', '.join(roles)}; send the last one alone"
            )
        if roles[-1:] != ["user"]:
            raise UsageError("the last turn must be the user's: it is what is answered")
        if self._render_chat is None:
            asked = Row((*turns, Turn("assistant", "")), context=context, source="prompt")
            text = self.render(asked).text
        else:
            text = self._chat_prompt(turns, context)
        raw_ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        if not self._never_text.isdisjoint(raw_ids):
            raise DataError(
                "prompt: the text spells a special token, and this tokenizer has no other tokens "
                "for it; write it otherwise"
            )
        ids = [self._id_of[i] if i >= self._first_new_id else i for i in raw_ids]
        return [self.bos_id, *ids] if self.bos_id is not None and ids[:1] != [self.bos_id] else ids

    def _chat_prompt(self, turns: Sequence[Turn], context: str) -> str:
        assert self._render_chat is not None
        row = Row(tuple(turns), context=context, source="prompt")
        check_private_use(row)
        messages = chat_messages(self._hidden(row), self.template.include_context)
        try:
            text = self.specials.show(self._render_chat(messages, True))
        except Exception as error:  # many refuse a system turn, or roles out of turn
            raise UsageError(f"the chat template refuses these turns ({_reason(error)})") from error
        if lost := self._lost(row, True):
            raise UsageError(f"the chat template writes nothing of {lost}; leave it out")
        return text

    def _lost(self, row: Row, prompt: bool) -> str:
        """The turn that the chat template leaves out, if there is one."""
        assert self._left_out is not None
        for number in self._left_out.turns([turn.role for turn in row.turns], prompt):
            if row.turns[number].content.strip():
                return f"turn {number + 1} of {len(row.turns)} ({row.turns[number].role})"
        return ""

    def _hidden(self, row: Row) -> Row:
        return Row(
            tuple(Turn(turn.role, self._content(turn)) for turn in row.turns),
            context=self.specials.hide(row.context),
            source=row.source,
        )

    def _content(self, turn: Turn) -> str:
        """A turn's text with its special tokens as text, or as themselves where the recipe lets
        responses hold them (an earlier response of a conversation, too)."""
        if turn.role == "assistant" and self.template.special_in_responses:
            return self.specials.own(turn.content)
        return self.specials.hide(turn.content)

    def _rendered_chat(self, hidden: Row) -> Rendered:
        assert self._render_chat is not None
        try:
            rendered = render_chat(
                hidden, self.template.include_context, self._render_chat, self._ends
            )
        except SlmLoraError:
            raise
        except Exception as error:  # many refuse a system turn; a program may fail in any way
            if self.template.kind == "jinja":
                raise UsageError(f"data.template: {_reason(error)} ({hidden.source})") from error
            raise DataError(
                f"{hidden.source}: the model's chat template refuses the row ({_reason(error)}); "
                "mend or remove it, or give a template of your own (data.template=path.jinja)"
            ) from error
        if lost := self._lost(hidden, False):
            way = (
                "mend the template (a misspelt name is empty in Jinja)"
                if self.template.kind == "jinja"
                else "leave it out of the rows, or give a template of your own "
                "(data.template=path.jinja)"
            )
            raise DataError(f"{hidden.source}: the chat template writes nothing of {lost}; {way}")
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
            max_length: longest sequence in tokens, BOS and EOS included; None: any.
            on_long_row: ``truncate`` (the row then ends without EOS), ``drop``, ``refuse``, or
                ``split``: into pieces, see `_pieces`.

        Raises:
            DataError: a row has no tokens, cannot be rendered, or is too long under ``refuse``.
        """
        rendered = [self.render(row) for row in rows]
        encodings = self._backend.encode_batch(
            [text.text for text in rendered], add_special_tokens=False
        )
        whole = [
            self._tokens(row, text, encoding.ids, encoding.offsets)
            for row, text, encoding in zip(rows, rendered, encodings, strict=True)
        ]
        limit = max_length if max_length is not None else max(map(_length, whole), default=0)
        long = [(row, _length(t)) for row, t in zip(rows, whole, strict=True) if _length(t) > limit]
        counted = LongRows(
            rows=len(long),
            tokens_cut=sum(length - limit for _, length in long) * (on_long_row != "split"),
            longest=max(map(_length, whole), default=0),
        )
        if long and on_long_row == "refuse":
            raise DataError(
                f"{long[0][0].source}: {long[0][1]} tokens, over data.max_length = {limit} "
                f"({len(long)} rows in all); set data.on_long_row to truncate or drop, or, for "
                "plain text, to split"
            )
        examples: list[Example] = []
        for row, text, tokens in zip(rows, rendered, whole, strict=True):
            group = group_of[row.row_id]
            if _length(tokens) > limit and on_long_row == "split":
                examples += self._pieces(row, group, text, tokens, limit)
            elif _length(tokens) <= limit or on_long_row != "drop":
                ids, response, ends = tokens
                part = _Part(row.row_id, ids[:limit], response[:limit], ends[:limit])
                examples.append(self._example(row, group, text, part))
        return examples, counted

    def _pieces(
        self, row: Row, group_id: str, rendered: Rendered, tokens: _Tokens, limit: int
    ) -> list[Example]:
        """A row over the limit as the fewest pieces within it, of equal length.

        Every token but the first is the label of exactly one piece. What a piece begins with is
        no label: BOS, as models that have one expect it there, or else the token before it.
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

    def joined(self, rows: Sequence[Row]) -> list[bool]:
        """Of each row, whether a prompt in it ends in other tokens alone than before its response.

        The last letters of a prompt and the first of a response may be one token, or the white
        space between them be divided in another way. Trained is the whole text as it is
        tokenised; whoever prompts has the prompt alone.
        """
        rendered = [self.render(row) for row in rows]
        whole = self._backend.encode_batch([r.text for r in rendered], add_special_tokens=False)
        asked = [(at, a) for at, r in enumerate(rendered) for a, _ in r.responses if a]
        prompts = self._backend.encode_batch(
            [rendered[at].text[:a] for at, a in asked], add_special_tokens=False
        )
        joined = [False] * len(rows)
        for (at, _), prompt in zip(asked, prompts, strict=True):
            joined[at] |= prompt.ids != whole[at].ids[: len(prompt.ids)]
        return joined

    def _tokens(
        self, row: Row, rendered: Rendered, raw_ids: list[int], offsets: list[tuple[int, int]]
    ) -> _Tokens:
        """Ids, response mask and last character of every token, with BOS and EOS."""
        if not self._never_text.isdisjoint(raw_ids):
            raise DataError(
                f"{row.source}: the text spells a special token, and this tokenizer has no other "
                "tokens for it; remove the row"
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
        # The first token is not scored: BOS has no bytes, any other's bytes are left out.
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
        return len(self.specials.strip(text).encode("utf-8"))


def _checked_content(turn: Turn) -> str:
    """A turn's text, checked; an answer is the model's own, which may have written a NUL."""
    parts = turn.content.split("\0") if turn.role == "assistant" else [turn.content]
    return "\0".join(given(part, "prompt") for part in parts)


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _length(tokens: _Tokens) -> int:
    return len(tokens[0])
