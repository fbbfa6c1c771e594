"""From a row to the one string that is tokenised, and where in it the responses stand.

A template's special tokens (``<|im_end|>`` of a chat template, say) are special; the same
characters in a row's text are text. To keep the two apart, each special token of the template
is one private-use character in the rendered string (``Specials.owned``), and special tokens
spelt in row text are hidden from the template behind others while it renders.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from slm_lora.data.chat_templates import ChatRenderer, clock
from slm_lora.data.formats import FORMATS
from slm_lora.errors import DataError, UsageError
from slm_lora.records import Row, Turn

TemplateKind = Literal["instruction_response", "chat", "plain", "jinja"]
Span = tuple[int, int]

_OWNED, _QUOTED = 0xF0000, 0xF8000
"""First private-use characters for special tokens of the template, and for quoted ones."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text with the character spans of its responses; specials are `Specials.owned` characters."""

    text: str
    responses: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Specials:
    """The special tokens of a tokenizer, longest first, as the template and as rows spell them."""

    tokens: tuple[str, ...]

    @classmethod
    def of(cls, tokens: Sequence[str]) -> Specials:
        """Order the tokens so that a longer one is found before one that it contains."""
        return cls(tuple(sorted(set(tokens), key=lambda token: (-len(token), token))))

    def owned(self, index: int) -> str:
        """The character that stands for the template's own special token ``index``."""
        return chr(_OWNED + index)

    def hide(self, text: str) -> str:
        """Row text with the special tokens that it spells made invisible to `own`."""
        for index, token in enumerate(self.tokens):
            text = text.replace(token, chr(_QUOTED + index))
        return text

    def own(self, text: str) -> str:
        """Rendered text with the template's special tokens replaced by their characters."""
        for index, token in enumerate(self.tokens):
            text = text.replace(token, self.owned(index))
        return text

    def show(self, text: str) -> str:
        """Undo `hide`: what rows spelt stands as plain text again."""
        for index, token in enumerate(self.tokens):
            text = text.replace(chr(_QUOTED + index), token)
        return text

    def strip(self, text: str) -> str:
        """The text without its owned specials: what counts as bytes."""
        return "".join(c for c in text if not _OWNED <= ord(c) < _OWNED + len(self.tokens))


def check_private_use(row: Row) -> None:
    """Refuse a row whose text holds characters that stand for special tokens here.

    Raises:
        DataError: it does.
    """
    for turn in (*row.turns, Turn("user", row.context)):
        if any(ord(character) >= _OWNED for character in turn.content):
            raise DataError(
                f"{row.source}: text has private-use characters above U+F0000, "
                "which are needed to tell special tokens from text; remove the row"
            )


def _pair(row: Row, template: str) -> tuple[str, str, str]:
    roles = [turn.role for turn in row.turns]
    if roles == ["assistant"] and template == "plain":
        return "", "", row.turns[0].content
    if roles != ["user", "assistant"]:
        other = "plain" if roles == ["assistant"] else "chat"
        column = (
            " (or, where the system turn is a column, leave it out: data.columns={system: null})"
        )
        raise DataError(
            f"{row.source}: template '{template}' takes one instruction and one response, "
            f"this row has the turns {', '.join(roles)}; set data.template={other}"
            f"{column if roles == ['system', 'user', 'assistant'] else ''}"
        )
    return row.turns[0].content, row.context, row.turns[1].content


def render_instruction_response(row: Row, include_context: bool) -> Rendered:
    """``Instruction:\\n…\\nResponse:\\n…``, with ``Context:\\n…`` between when asked and there."""
    instruction, context, response = _pair(row, "instruction_response")
    middle = f"\nContext:\n{context}" if include_context and context else ""
    prompt = f"Instruction:\n{instruction}{middle}\nResponse:\n"
    return Rendered(prompt + response, ((len(prompt), len(prompt) + len(response)),))


def render_plain(row: Row) -> Rendered:
    """Prompt and completion end to end; plain text is all response."""
    instruction, _, response = _pair(row, "plain")
    return Rendered(instruction + response, ((len(instruction), len(instruction + response)),))


def render_chat(
    row: Row, include_context: bool, render: ChatRenderer, ends: tuple[str, ...]
) -> Rendered:
    """Through a chat template: every assistant turn is a response, up to and with its end mark.

    Args:
        row: the row; a context, if asked for, stands before the instruction in the user turn.
        include_context: whether to do so.
        render: messages and add_generation_prompt → text with owned specials.
        ends: the characters of special tokens, any of which may mark the end of a turn.

    Raises:
        DataError: the template changes earlier turns when later ones follow.
    """
    messages = chat_messages(row, include_context)
    text = render(messages, False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        upto = render(messages[: index + 1], False)
        start = render(messages[:index], True) if index else _before(message["content"], upto)
        if not (text.startswith(upto) and upto.startswith(start)):
            raise DataError(
                f"{row.source}: the chat template does not extend earlier turns by later ones, "
                "so responses cannot be told from prompts; give a template of your own "
                "(data.template=path.jinja)"
            )
        spans.append((len(start), _end_of_turn(upto, len(start), ends)))
    last = spans[-1][1]
    if not text[last:].strip():
        text = text[:last]
    return Rendered(text, tuple(spans))


def chat_messages(row: Row, include_context: bool) -> list[dict[str, str]]:
    """A row's turns as a chat template takes them; a context stands before the instruction."""
    messages = [{"role": turn.role, "content": turn.content} for turn in row.turns]
    if include_context and row.context:
        first = next(m for m in messages if m["role"] == "user")
        first["content"] = f"{row.context}\n\n{first['content']}"
    return messages


def _before(content: str, text: str) -> str:
    """What a template writes before a first turn that nothing prompts: a header, a system text
    of its own. No answer to anything, so it is no response."""
    at = text.rfind(content)
    if at < 0:  # many templates strip the white space around a turn
        at = text.rfind(content.strip())
    return text[: max(0, at)]


def _end_of_turn(text: str, start: int, ends: tuple[str, ...]) -> int:
    """Where a turn ends: after its last special token if only white space follows that."""
    stripped = text.rstrip()
    if len(stripped) > start and stripped.endswith(ends):
        return len(stripped)
    return len(text)


@dataclass(frozen=True, slots=True)
class Template:
    """How rows become text: a named template, or the source of a Jinja one.

    ``special_in_responses``: special tokens that responses spell are these tokens, not text.
    """

    kind: TemplateKind
    include_context: bool = False
    source: str = ""
    special_in_responses: bool = False

    @property
    def shows_context(self) -> bool:
        """Whether the context of a row that has one is part of its prompt."""
        return self.include_context and self.kind != "plain"


def choose_template(name: str, row_format: str, include_context: bool) -> Template:
    """The template that a recipe names; ``auto`` follows the row format.

    Raises:
        UsageError: unknown name, or a missing file.
    """
    if name == "auto":
        return Template(FORMATS[row_format].template, include_context)
    if name in ("instruction_response", "chat", "plain"):
        kind: TemplateKind = name  # type: ignore[assignment]
        return Template(kind, include_context)
    if name.endswith(".jinja"):
        try:
            return Template("jinja", include_context, Path(name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"data.template = {name}: cannot be read ({error})") from error
    raise UsageError(
        f"data.template = {name}: not one of auto, instruction_response, chat, plain, "
        "and not the path of a .jinja file"
    )


def as_chat_template(
    template: Template,
    adds_bos: bool,
    own: str | None,
    space_after_bos: bool = False,
    frozen: bool = True,
) -> str | None:
    """The template as a tokenizer's chat template, so that others prompt as was trained.

    Programs that apply a chat template put no BOS before it; where training had one that the
    template does not write itself, it is written here.

    Args:
        template: the training template.
        adds_bos: whether training put BOS first.
        own: the tokenizer's chat template, for the template kind ``chat``.
        space_after_bos: see `RowTokenizer.space_after_bos`.
        frozen: whether it writes the date that training wrote; earlier versions handed on one
            that asks the clock.
    """
    bos = ""
    if adds_bos:
        bos = "{{ bos_token + ' ' }}" if space_after_bos else "{{ bos_token }}"
    if template.kind in ("chat", "jinja"):
        source = own if template.kind == "chat" else template.source
        if source is None:
            return None
        source = re.sub("\r\n?", "\n", source)  # Jinja does so, and so does reading the file
        date = clock(source) if frozen else ""
        if not bos or "bos_token" in source:
            return date + source
        # It may still spell the token out, which shows when it is rendered. Empty expressions
        # keep the white space at its ends, which Jinja removes next to statements; but before
        # a statement that begins the template it is removed, behind a line end as there.
        inner = source.removesuffix("\n")
        begin = "\n" if inner[:1] in (" ", "\t") else "{{ '' }}"
        return (
            f"{date}{{% set text %}}{begin}{inner}{{{{ '' }}}}{{% endset %}}"
            f"{{% if not text.startswith(bos_token) %}}{bos}{{% endif %}}{{{{ text }}}}"
        )
    before, after = ("Instruction:\\n", "\\nResponse:\\n") if template.kind != "plain" else ("", "")
    return (
        f"{bos}{{% for message in messages %}}"
        f"{{% if message['role'] == 'user' %}}"
        f"{{{{ '{before}' + message['content'] + '{after}' }}}}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ message['content'] }}{{ eos_token }}"
        "{% endif %}{% endfor %}"
    )
