"""Render a row to the string that is tokenised, with the character spans of its responses.

The special tokens of a template (such as ``<|im_end|>``) are special; the same characters in a
row's text are plain text. To distinguish them, each special token of the template is one
private-use character in the rendered string (``SpecialTokens.marker``), and special tokens in row
text are escaped by other such characters while the template is rendered.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slm_lora.data.chat_templates import (
    ChatRenderer,
    date_macro,
    default_template,
    jinja_renderer,
)
from slm_lora.data.formats import FORMATS
from slm_lora.errors import DataError, UsageError
from slm_lora.records import Row, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TemplateKind = Literal["instruction_response", "chat", "plain", "jinja"]
Span = tuple[int, int]

_MARKER, _ESCAPE = 0xF0000, 0xF8000
"""First private-use characters of markers for the template's special tokens, and of escapes for
special tokens in row text."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """Text with the character spans of its responses; special tokens are markers."""

    text: str
    responses: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The special tokens of a tokenizer, longest first, with their markers and escapes."""

    tokens: tuple[str, ...]

    @classmethod
    def from_tokens(cls, tokens: Sequence[str]) -> SpecialTokens:
        """Sort the tokens so that a longer one is replaced before one that it contains."""
        return cls(tuple(sorted(set(tokens), key=lambda token: (-len(token), token))))

    def marker(self, index: int) -> str:
        """Return the character of the template's special token ``index``."""
        return chr(_MARKER + index)

    def escape(self, text: str) -> str:
        """Replace special tokens in row text by escapes, which `mark` leaves as they are."""
        for index, token in enumerate(self.tokens):
            text = text.replace(token, chr(_ESCAPE + index))
        return text

    def mark(self, text: str) -> str:
        """Replace the template's special tokens in rendered text by markers."""
        for index, token in enumerate(self.tokens):
            text = text.replace(token, self.marker(index))
        return text

    def unescape(self, text: str) -> str:
        """Undo `escape`: special tokens of row text become plain text again."""
        for index, token in enumerate(self.tokens):
            text = text.replace(chr(_ESCAPE + index), token)
        return text

    def remove_markers(self, text: str) -> str:
        """Remove markers, which do not count as bytes of the text."""
        return "".join(c for c in text if not _MARKER <= ord(c) < _MARKER + len(self.tokens))


def check_private_use(row: Row) -> None:
    """Check that a row's text has none of the characters used as markers and escapes.

    Raises:
        DataError: it has one.
    """
    for turn in (*row.turns, Turn("user", row.context)):
        if any(ord(character) >= _MARKER for character in turn.content):
            raise DataError(
                f"{row.source}: text has private-use characters above U+F0000, "
                "which are needed to distinguish special tokens from text; remove the row"
            )


def _pair(row: Row, template: str) -> tuple[str, str, str]:
    roles = [turn.role for turn in row.turns]
    if roles == ["assistant"] and template == "plain":
        return "", "", row.turns[0].content
    if roles != ["user", "assistant"]:
        suggested = "plain" if roles == ["assistant"] else "chat"
        system_hint = (
            " (or, where the system turn is a column, leave it out: data.columns={system: null})"
        )
        raise DataError(
            f"{row.source}: template '{template}' takes one instruction and one response, "
            f"this row has the turns {', '.join(roles)}; set data.template={suggested}"
            f"{system_hint if roles == ['system', 'user', 'assistant'] else ''}"
        )
    return row.turns[0].content, row.context, row.turns[1].content


def render_instruction_response(row: Row, include_context: bool) -> Rendered:
    """Render ``Instruction:\\n…\\nResponse:\\n…``, with ``Context:\\n…`` between if included."""
    instruction, context, response = _pair(row, "instruction_response")
    middle = f"\nContext:\n{context}" if include_context and context else ""
    prompt = f"Instruction:\n{instruction}{middle}\nResponse:\n"
    return Rendered(prompt + response, ((len(prompt), len(prompt) + len(response)),))


def render_plain(row: Row) -> Rendered:
    """Concatenate prompt and completion; a text without prompt is all response."""
    instruction, _, response = _pair(row, "plain")
    return Rendered(instruction + response, ((len(instruction), len(instruction + response)),))


def render_chat(
    row: Row, include_context: bool, render: ChatRenderer, ends: tuple[str, ...]
) -> Rendered:
    """Render a chat template: every assistant turn is a response, its end mark included.

    Args:
        row: the row, special tokens escaped.
        include_context: whether the context is put before the first user turn's text.
        render: renders messages, given ``add_generation_prompt``, to text with markers.
        ends: the markers, any of which may be the end mark of a turn.

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
                "so responses cannot be separated from prompts; give a template of your own "
                "(data.template=path.jinja)"
            )
        spans.append((len(start), _end_of_turn(upto, len(start), ends)))
    last = spans[-1][1]
    if not text[last:].strip():
        text = text[:last]
    return Rendered(text, tuple(spans))


def chat_messages(row: Row, include_context: bool) -> list[dict[str, str]]:
    """Convert a row to messages; an included context is put before the first user turn's text."""
    messages = [{"role": turn.role, "content": turn.content} for turn in row.turns]
    if include_context and row.context:
        first = next(m for m in messages if m["role"] == "user")
        first["content"] = f"{row.context}\n\n{first['content']}"
    return messages


def _before(content: str, text: str) -> str:
    """Return the text before a leading assistant turn: a header or a default system text.

    It is not part of the response.
    """
    start = text.rfind(content)
    if start < 0:  # many templates strip the white space around a turn
        start = text.rfind(content.strip())
    return text[: max(0, start)]


def _end_of_turn(text: str, start: int, ends: tuple[str, ...]) -> int:
    """Return the end of a turn: after its last special token if only white space follows."""
    stripped = text.rstrip()
    if len(stripped) > start and stripped.endswith(ends):
        return len(stripped)
    return len(text)


@dataclass(frozen=True, slots=True)
class Template:
    """The training template.

    Attributes:
        kind: a named template, or ``jinja``.
        include_context: whether contexts are part of the prompts.
        source: Jinja source for the kind ``jinja``.
        special_in_responses: whether special tokens in response text are encoded as such.
    """

    kind: TemplateKind
    include_context: bool = False
    source: str = ""
    special_in_responses: bool = False

    @property
    def shows_context(self) -> bool:
        """Whether prompts include the contexts of rows."""
        return self.include_context and self.kind != "plain"


def choose_template(name: str, row_format: str, include_context: bool) -> Template:
    """Return the template that a recipe names; ``auto`` depends on the row format.

    Raises:
        UsageError: unknown name, or a file that cannot be read.
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


def chat_renderer(
    template: Template, tokenizer: PreTrainedTokenizerBase, specials: SpecialTokens
) -> ChatRenderer | None:
    """Make the renderer of a chat or Jinja template, to text with markers; None for others.

    Raises:
        UsageError: the tokenizer has no default chat template, or the source is not valid Jinja.
    """
    if template.kind not in ("chat", "jinja"):
        return None
    tokens = tokenizer.special_tokens_map
    if template.kind == "jinja":
        render = jinja_renderer(template.source, tokens)
    else:
        source = default_template(tokenizer)
        if source is None:
            templates: Any = tokenizer.chat_template
            fault = (
                f"has the chat templates {', '.join(sorted(templates))}, and none named default"
                if templates
                else "has no chat template"
            )
            raise UsageError(
                f"data.template = chat: the model's tokenizer {fault}; "
                "use instruction_response, or a .jinja file"
            )
        render = jinja_renderer(source, tokens, "data.template = chat: the model's chat template")
    return lambda messages, prompt: specials.mark(render(messages, prompt))


def as_chat_template(
    template: Template,
    adds_bos: bool,
    own: str | None,
    space_after_bos: bool = False,
    frozen: bool = True,
) -> str | None:
    """Convert the training template to a chat template, so that other programs prompt alike.

    Programs that apply a chat template add no BOS; if training did and the template does not
    write one, it is added here.

    Args:
        template: the training template.
        adds_bos: whether training put BOS first.
        own: the tokenizer's chat template, for the template kind ``chat``.
        space_after_bos: see `RowTokenizer.space_after_bos`.
        frozen: whether dates are fixed; earlier versions saved templates that use today's date.

    Returns:
        The Jinja source; None if the tokenizer has no chat template.
    """
    bos = ""
    if adds_bos:
        bos = "{{ bos_token + ' ' }}" if space_after_bos else "{{ bos_token }}"
    if template.kind in ("chat", "jinja"):
        source = own if template.kind == "chat" else template.source
        if source is None:
            return None
        source = re.sub("\r\n?", "\n", source)  # as Jinja and reading the file do
        date = date_macro(source) if frozen else ""
        if not bos or "bos_token" in source:
            return date + source
        # The template may still write BOS literally, which is tested when it is rendered. Empty
        # expressions keep the white space at its ends, which Jinja removes next to statements;
        # leading indentation before a first statement is removed as after a line end.
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
