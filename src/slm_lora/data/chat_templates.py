"""Render chat templates as transformers does, with a fixed date.

A template that writes today's date would change the training text at midnight, and every later
prompt. A fixed date is therefore written into the template's source, and that source is used in
training and saved with the adapter.
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
"""The date for templates that ask for today's: the default of the Llama 3 templates."""

ChatRenderer = Callable[[list[dict[str, str]], bool], str]

_CLOCK_FUNCTION = "strftime_now"
_MACRO_START = f"{{% macro {_CLOCK_FUNCTION}(format) %}}"
_DIRECTIVES = "aAwdbBmyYHIpMSfzZjUWcxXGuVCDeFhkRTr"


def default_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the chat template that transformers uses by default, or None without one.

    Of several named templates it is the one named ``default``.
    """
    templates: Any = tokenizer.chat_template
    template = templates.get("default") if isinstance(templates, Mapping) else templates
    return str(template) if template else None


def read_template(path: Path) -> str | None:
    """Read a template file of a model or adapter folder; None if it does not exist.

    Raises:
        IntegrityError: the file is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{path}: not UTF-8 ({error})") from error


def jinja_renderer(
    source: str, tokens: Mapping[str, Any], label: str = "data.template"
) -> ChatRenderer:
    """Make a renderer of a chat template: that of transformers, sandboxed, at `TEMPLATE_DATE`.

    Args:
        source: Jinja source of the template.
        tokens: the tokenizer's special tokens by name (``eos_token`` …).
        label: name of the template in messages.

    Returns:
        A function of messages and ``add_generation_prompt``. It may raise any exception, as the
        template is foreign code.

    Raises:
        UsageError: the template is not valid Jinja.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    frozen = freeze_date(source, label)

    def render(messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        rendered: Any = render_jinja_template(
            [messages],
            chat_template=frozen,
            add_generation_prompt=add_generation_prompt,
            **tokens,
        )
        return str(rendered[0][0])

    return render


def freeze_date(source: str, label: str = "data.template") -> str:
    """Return the template with `TEMPLATE_DATE` in place of today's date.

    Raises:
        UsageError: the template is not valid Jinja.
    """
    return date_macro(source, label) + source


def date_macro(source: str, label: str = "data.template") -> str:
    """Return the prefix that fixes the date of a template; empty if it does not use the date.

    It is a macro that shadows ``strftime_now`` of transformers. It ends with a line end, which
    transformers removes when it renders the template.

    Raises:
        UsageError: the template is not valid Jinja.
    """
    from jinja2 import TemplateError, meta, nodes

    try:
        tree = _parse(source)
        if _CLOCK_FUNCTION not in source or _CLOCK_FUNCTION not in meta.find_undeclared_variables(
            tree
        ):
            return ""
    except TemplateError as error:
        line = f"line {error.lineno}: " if hasattr(error, "lineno") else ""
        raise UsageError(f"{label}: {line}{error.message}") from error
    calls = [call for call in tree.find_all(nodes.Call) if _is_clock(call.node)]
    tests = [test for test in tree.find_all(nodes.Test) if _is_clock(test.node)]
    names = [name for name in tree.find_all(nodes.Name) if _is_clock(name)]
    args = [value for call in calls for value in (*call.args, *(k.value for k in call.kwargs))]
    formats = [value.value for value in args if isinstance(value, nodes.Const)]
    all_literal = (
        len(names) == len(calls) + len(tests)
        and len(formats) == len(args) == len(calls)
        and all(isinstance(format_, str) for format_ in formats)
    )
    try:
        body = _for_formats(dict.fromkeys(formats)) if all_literal and formats else _ANY_FORMAT
    except ValueError as error:
        raise UsageError(f"{label}: {_CLOCK_FUNCTION} does not know a format ({error})") from error
    return f"{_MACRO_START}{body}{{% endmacro %}}\n"


def has_frozen_date(source: str) -> bool:
    """Whether `freeze_date` put a date into the template."""
    return source.startswith(_MACRO_START)


def _is_clock(node: nodes.Node) -> bool:
    from jinja2 import nodes

    return isinstance(node, nodes.Name) and node.name == _CLOCK_FUNCTION


def _for_formats(formats: Mapping[str, None]) -> str:
    """Return a macro body for literal formats: one branch for each."""
    parts = [
        f"{{% {'elif' if number else 'if'} format == {_quoted(format_)} %}}"
        f"{{{{ {_quoted(TEMPLATE_DATE.strftime(format_))} }}}}"
        for number, format_ in enumerate(formats)
    ]
    return f"{''.join(parts)}{{% endif %}}"


def _quoted(text: str) -> str:
    return json.dumps(text)


def _any_format() -> str:
    """Return a macro body for formats built at run time: it replaces every directive in turn."""
    # No directive writes a percent sign; a doubled one is replaced last.
    parts = ['format | replace("%%", "\\u0000")']
    for directive in _DIRECTIVES:
        text = TEMPLATE_DATE.strftime(f"%{directive}")
        parts.append(f"replace({_quoted('%' + directive)}, {_quoted(text)})")
        if text.isdigit():  # the flag removes leading zeros
            text = text.lstrip("0") or "0"
        parts.append(f"replace({_quoted('%-' + directive)}, {_quoted(text)})")
    return f'{{{{ {" | ".join(parts)} | replace("\\u0000", "%") }}}}'


_ANY_FORMAT = _any_format()


def _parse(source: str) -> nodes.Template:
    from jinja2 import Environment
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        """The ``{% generation %}`` tag, which transformers defines to mark answers."""

        tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    return environment.parse(source)
