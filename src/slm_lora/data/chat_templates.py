"""Chat templates as transformers renders them, but for the clock.

A template that writes today's date would change the training text at midnight, and the prompt of
whoever uses the adapter later. So one date is written into its source, and the source that is
rendered in training is the one that is handed on.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_lora.errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from jinja2 import nodes
    from transformers import PreTrainedTokenizerBase

TEMPLATE_DATE = datetime.date(2024, 7, 26)
"""Today, for templates that write the date: the day that those of Llama 3 and its kin write by
themselves where no clock is given."""

ChatRenderer = Callable[[list[dict[str, str]], bool], str]

_CLOCK = "strftime_now"
_FROZEN = f"{{% macro {_CLOCK}(format) %}}"
_DIRECTIVES = "aAwdbBmyYHIpMSfzZjUWcxXGuVCDeFhkRTr"


def default_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The chat template that transformers uses where none is named: of several, ``default``."""
    own: Any = tokenizer.chat_template
    found = own.get("default") if isinstance(own, Mapping) else own
    return str(found) if found else None


def read_template(path: Path) -> str | None:
    """The template in a file beside a model or an adapter; None where there is no file.

    Raises:
        IntegrityError: it is no text.
    """
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{path}: not UTF-8 ({error})") from error


def jinja_renderer(
    source: str, tokens: Mapping[str, Any], whose: str = "data.template"
) -> ChatRenderer:
    """A renderer of a chat template: transformers' own, in its sandbox, at `TEMPLATE_DATE`.

    Args:
        source: of the template.
        tokens: the tokenizer's special tokens by name (``eos_token`` …).
        whose: names the template in messages.

    Returns:
        The renderer. The template is a program of someone else's: it may raise anything.

    Raises:
        UsageError: the template is not valid Jinja.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    frozen = freeze(source, whose)

    def render(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        rendered: Any = render_jinja_template(
            [messages],
            chat_template=frozen,
            add_generation_prompt=add_generation_prompt,
            **tokens,
        )
        return str(rendered[0][0])

    return render


def freeze(source: str, whose: str = "data.template") -> str:
    """The template, with `TEMPLATE_DATE` for whatever it asks the clock; else as it is.

    Raises:
        UsageError: the template is not valid Jinja.
    """
    return clock(source, whose) + source


def clock(source: str, whose: str = "data.template") -> str:
    """What freezes the date when it stands before a template: a macro in place of transformers'
    function; empty where the template does not ask for the date.

    The line end after it belongs to it: transformers removes that, and nothing of the source.

    Raises:
        UsageError: the template is not valid Jinja.
    """
    from jinja2 import TemplateError, meta, nodes

    try:
        tree = _parse(source)
        if _CLOCK not in source or _CLOCK not in meta.find_undeclared_variables(tree):
            return ""
    except TemplateError as error:
        line = f"line {error.lineno}: " if hasattr(error, "lineno") else ""
        raise UsageError(f"{whose}: {line}{error.message}") from error
    calls = [call for call in tree.find_all(nodes.Call) if _is_clock(call.node)]
    tests = [test for test in tree.find_all(nodes.Test) if _is_clock(test.node)]
    names = [name for name in tree.find_all(nodes.Name) if _is_clock(name)]
    given = [value for call in calls for value in (*call.args, *(k.value for k in call.kwargs))]
    formats = [value.value for value in given if isinstance(value, nodes.Const)]
    known = (
        len(names) == len(calls) + len(tests)
        and len(formats) == len(given) == len(calls)
        and all(isinstance(each, str) for each in formats)
    )
    try:
        written = _each(dict.fromkeys(formats)) if known and formats else _ANY
    except ValueError as error:
        raise UsageError(f"{whose}: {_CLOCK} does not know a format ({error})") from error
    return f"{_FROZEN}{written}{{% endmacro %}}\n"


def is_frozen(source: str) -> bool:
    """Whether `freeze` put a date into it."""
    return source.startswith(_FROZEN)


def _is_clock(node: nodes.Node) -> bool:
    from jinja2 import nodes

    return isinstance(node, nodes.Name) and node.name == _CLOCK


def _each(formats: Mapping[str, None]) -> str:
    """Formats that a template spells, each with what it writes."""
    parts = [
        f"{{% {'elif' if number else 'if'} format == {_quoted(each)} %}}"
        f"{{{{ {_quoted(TEMPLATE_DATE.strftime(each))} }}}}"
        for number, each in enumerate(formats)
    ]
    return f"{''.join(parts)}{{% endif %}}"


def _quoted(text: str) -> str:
    return json.dumps(text)


def _any_format() -> str:
    """Formats that a template puts together as it runs: every directive, one after the other."""
    # No directive writes a percent sign; a doubled one is none until the end.
    parts = ['format | replace("%%", "\\u0000")']
    for directive in _DIRECTIVES:
        text = TEMPLATE_DATE.strftime(f"%{directive}")
        parts.append(f"replace({_quoted('%' + directive)}, {_quoted(text)})")
        if text.isdigit():  # the flag takes its zeros away
            text = text.lstrip("0") or "0"
        parts.append(f"replace({_quoted('%-' + directive)}, {_quoted(text)})")
    return f'{{{{ {" | ".join(parts)} | replace("\\u0000", "%") }}}}'


_ANY = _any_format()


def _parse(source: str) -> nodes.Template:
    from jinja2 import Environment
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        """The tags that mark answers, of transformers' own."""

        tags = {"generation"}  # noqa: RUF012 (Jinja's own way)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    return environment.parse(source)
