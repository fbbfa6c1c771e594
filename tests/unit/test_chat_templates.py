"""Chat templates, and the copies saved with adapters, render as in transformers, at a fixed date.
The reference is always transformers alone."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from slm_lora.config.schema import DataSection
from slm_lora.data import template_check
from slm_lora.data.chat_templates import (
    TEMPLATE_DATE,
    date_macro,
    default_template,
    freeze_date,
    has_frozen_date,
    jinja_renderer,
)
from slm_lora.data.dataset import prepare_data
from slm_lora.data.sources import read_rows
from slm_lora.data.template_check import first_difference, template_notes
from slm_lora.data.templates import Template
from slm_lora.data.tokenization import RowTokenizer
from slm_lora.errors import UsageError
from slm_lora.records import Row, Turn

from ..support.tiny_model import CHAT_TEMPLATE, tiny_tokenizer

ASKED = {"role": "user", "content": "Which day?"}
ANSWERED = {"role": "assistant", "content": "That one."}
DATED = (
    "{{ '<|im_start|>system\\nToday Date: ' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}"
    + CHAT_TEMPLATE
)
ROW = Row((Turn("user", "Which day?"), Turn("assistant", "That one.")), source="rows.jsonl:7")


def rendered(source: str, *messages: dict[str, str]) -> str:
    """Render with transformers alone, at today's date."""
    text: Any = tiny_tokenizer().apply_chat_template(
        list(messages or (ASKED, ANSWERED)), chat_template=source, tokenize=False
    )
    return str(text)


@pytest.fixture
def on_template_date(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set the date of transformers to `TEMPLATE_DATE`."""

    class Still(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime.combine(TEMPLATE_DATE, datetime.time())

    monkeypatch.setattr(chat_template_utils, "datetime", Still)
    chat_template_utils._compile_jinja_template.cache_clear()
    yield
    monkeypatch.undo()
    chat_template_utils._compile_jinja_template.cache_clear()


def bos_tokenizer(source: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer that adds BOS to every text; its chat template does not write BOS."""
    plain = tiny_tokenizer()
    backend = plain.backend_tokenizer
    bos = "<|endoftext|>"
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token=bos,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=source or plain.chat_template,
    )


# --- rendering ---------------------------------------------------------------------------------

LIKE_SMOLLM3 = (
    "{%- set today = strftime_now('%d %B %Y') -%}\n"
    "{%- if xml_tools or python_tools %}{{ 'tools' }}{% endif %}\n"
    "{%- if enable_thinking is defined %}{{ 'thinks' }}{% endif %}\n"
    "{{- '<|im_start|>system\\n' + today + '<|im_end|>\\n' -}}\n"
    "{%- for message in messages %}\n"
    "  {%- if message.role == 'assistant' %}\n"
    "    {% generation %}{{- 'A: ' + message.content + '<|im_end|>\\n' }}{% endgeneration %}\n"
    "  {%- else %}\n"
    "    {{- message | tojson(ensure_ascii=False, separators=(',', ':')) }}\n"
    "  {%- endif %}\n"
    "{%- endfor %}"
)


@pytest.mark.parametrize(
    "source",
    [
        LIKE_SMOLLM3,
        DATED,
        CHAT_TEMPLATE,
        "{{ nobody }}{{ messages[0].nothing }}{% if switch %}x{% endif %}{{ messages[0].role }}",
        "{{ messages | tojson(ensure_ascii=True, indent=2, sort_keys=true) }}",
        "{% generation %}{{ messages[-1].content }}{%- endgeneration -%}\n ",
        "{%- if strftime_now is defined %}{{ strftime_now('%Y') | int + 1 }}{% endif %}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = loop.index %}"
        "{% if m.role == 'system' %}{% break %}{% endif %}{% endfor %}{{ ns.n }}",
    ],
)
@pytest.mark.usefixtures("on_template_date")
def test_chat_template_rendering_equals_transformers(source: str) -> None:
    messages = [ASKED | {"content": "Grüße <'>?"}, ANSWERED]
    render = jinja_renderer(source, tiny_tokenizer().special_tokens_map)
    assert render(messages, False) == rendered(source, *messages) != ""


def test_invalid_jinja_is_reported_with_its_line() -> None:
    with pytest.raises(UsageError, match=r"^data\.template: line 2: Encountered unknown tag 'x'"):
        jinja_renderer("a\n{% x %}", {})
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% generation %}"
    with pytest.raises(UsageError, match=r"the model's chat template: line 1: Unexpected end"):
        RowTokenizer(tokenizer, Template("chat"))


def test_errors_of_a_template_name_the_row() -> None:
    template = Template("jinja", source="{{ raise_exception('users only') }}")
    with pytest.raises(UsageError, match=r"^data\.template: users only \(rows\.jsonl:7\)$"):
        RowTokenizer(tiny_tokenizer(), template).render(ROW)
    with pytest.raises(UsageError, match=r"refuses these turns \(users only\)"):
        RowTokenizer(tiny_tokenizer(), template).prompt(ROW.turns[:1])


# --- the date ----------------------------------------------------------------------------------

DIRECTIVES = [
    *(f"%{directive}" for directive in "aAwdbBmyYHIpMSfzZjUWcxXGuVCDeFhRTr%"),
    *(f"%-{directive}" for directive in "dmHIMSjUWyw"),
]


@pytest.mark.parametrize("spelt", [True, False])
@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(DIRECTIVES), st.sampled_from(list(" ,\"'\\/é{}Y-\n")))))
def test_a_frozen_template_writes_the_fixed_date(spelt: bool, parts: Any) -> None:
    form = "".join(parts)
    quoted = '"' + form.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    source = (
        f"[{{{{ strftime_now({quoted}) }}}}]"
        if spelt
        else f"{{% set form = {quoted} %}}[{{{{ strftime_now(form) }}}}]"
    )
    assert has_frozen_date(freeze_date(source))
    assert rendered(freeze_date(source)) == f"[{TEMPLATE_DATE.strftime(form)}]"


@pytest.mark.parametrize(
    "source",
    [
        "{% if strftime_now is defined %}{{ strftime_now(format='%Y') }}{% endif %}",
        "{% macro day() %}{{ strftime_now('%d') }}{% endmacro %}{{ day() }}",
        "{% set now = strftime_now %}{{ now('%A') }}",
        "{% for m in messages %}{{ strftime_now('%d') + strftime_now('%m') }}{% endfor %}",
        "{% set today %}{{ strftime_now('%d' ~ ' %B') | upper }}{% endset %}{{ today }}",
        "{{ strftime_now('%Y-%m-%d').split('-')[1] | int }}",
        "{% generation %}{{ strftime_now('%Y') }}{% endgeneration %}",
        "{% macro strftime_now(x) %}{{ 'mine' }}{% endmacro %}{{ strftime_now(1) }}",
    ],
)
@pytest.mark.usefixtures("on_template_date")
def test_freeze_date_fixes_the_date_in_every_construct(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = rendered(source)
    monkeypatch.undo()  # the clock goes on
    chat_template_utils._compile_jinja_template.cache_clear()
    assert rendered(freeze_date(source)) == expected
    assert freeze_date(freeze_date(source)) == freeze_date(source)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [" ", "\n", "\r\n", "\t", "x", "{% if true %}", "{%- if true %}", "{{ 'y' }}",
             "{# c #}", "{%- set a = 1 -%}", "{%+ set a = 1 %}"]
        ),
        max_size=8,
    )
)  # fmt: skip
def test_fixing_the_date_changes_no_other_text(parts: list[str]) -> None:
    ends = "{% endif %}" * sum("if true" in part for part in parts)
    source = "".join(parts) + ends + "{% if false %}{{ strftime_now('%Y') }}{% endif %}\n \n"
    assert has_frozen_date(freeze_date(source))
    assert rendered(freeze_date(source)) == rendered(source)
    # The same after a BOS that is written first.
    for tokenizer in (bos_tokenizer(source), bos_tokenizer(freeze_date(source))):
        handed = RowTokenizer(tokenizer, Template("chat")).chat_template
        text: Any = tokenizer.apply_chat_template([ASKED], chat_template=handed, tokenize=False)
        assert text == "<|endoftext|>" + rendered(source)


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, "strftime_now", "{# strftime_now() #}", ""])
def test_a_template_without_a_date_is_unchanged(source: str) -> None:
    assert freeze_date(source) == source
    assert date_macro(source) == ""


# --- saved templates -----------------------------------------------------------------------------


@pytest.mark.parametrize("source", [DATED, LIKE_SMOLLM3, CHAT_TEMPLATE])
@pytest.mark.parametrize("kind", ["chat", "jinja"])
@pytest.mark.parametrize("bos", [False, True])
def test_the_saved_template_gives_the_training_tokens(source: str, kind: Any, bos: bool) -> None:
    tokenizer = bos_tokenizer(source) if bos else tiny_tokenizer()
    tokenizer.chat_template = source if kind == "chat" else "{{ 'another' }}"
    template = Template(kind, source=source if kind == "jinja" else "")
    tokenize = RowTokenizer(tokenizer, template)
    holder = bos_tokenizer() if bos else tiny_tokenizer()
    holder.chat_template = tokenize.chat_template
    for turns in template_check.SAMPLES:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        (example,), _ = tokenize.encode([Row(turns)], {Row(turns).row_id: ""})
        ids: Any = holder.apply_chat_template(messages, return_dict=False)
        assert ids[: example.length] == example.ids.tolist()
        prompt: Any = holder.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=False
        )
        assert prompt == tokenize.prompt(turns[:-1])
    assert first_difference(tokenizer, tokenize, [ROW]) == ""


@pytest.mark.parametrize("kind", ["instruction_response", "plain", "chat"])
@pytest.mark.parametrize("bos", [False, True])
def test_saved_template_of_any_kind_gets_no_note(kind: Any, bos: bool, dolly_file: Path) -> None:
    tokenizer = bos_tokenizer() if bos else tiny_tokenizer()
    section = DataSection(
        name=str(dolly_file), template=kind, include_context=kind == "chat", test_rows=30
    )
    prepared = prepare_data(read_rows(section), section, 0, tokenizer)
    assert prepared.chat_template is not None
    assert not [note for note in prepared.notes if "chat template" in note]


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        (CHAT_TEMPLATE.replace("'\\n' + m", "' ' + m"), "of a text of 2 turns"),
        ("{{ strftime_now('%Y') }}" + CHAT_TEMPLATE, "from token 1 of a text of 2 turns"),
        (CHAT_TEMPLATE + "{{ 'x' }}", "of a text of 2 turns"),
        (CHAT_TEMPLATE.replace("assistant\\n", "assistant"), "of a prompt of 1 turns"),
        ("{{ messages[7].role.x }}" + CHAT_TEMPLATE, "(it fails: UndefinedError)"),
        (CHAT_TEMPLATE.replace("['content'] +", "['content'] | trim +"), "of a text of 2 turns"),
        (CHAT_TEMPLATE.replace("for message in messages", "for message in messages[:3]"), "of 4"),
    ],
)
def test_a_template_with_other_tokens_is_not_saved(changed: str, difference: str) -> None:
    assert changed != CHAT_TEMPLATE
    tokenizer = tiny_tokenizer()
    tokenize = RowTokenizer(tokenizer, Template("chat"))
    spaced = Row((Turn("user", " Which day? "), Turn("assistant", "That one.")))
    assert first_difference(tokenizer, tokenize, [spaced]) == ""
    tokenize.chat_template = changed
    assert difference in first_difference(tokenizer, tokenize, [spaced])
    (note,) = template_notes(tokenizer, tokenize, [spaced])
    assert note.startswith("no chat_template.jinja is saved: ")
    assert "\n" not in note
    assert tokenize.chat_template is None


def test_a_note_reports_the_fixed_date(dolly_file: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = DATED
    section = DataSection(name=str(dolly_file), template="chat", test_rows=30)
    prepared = prepare_data(read_rows(section), section, 0, tokenizer)
    assert prepared.chat_template is not None
    assert "Today Date: 26 Jul 2024" in rendered(prepared.chat_template)
    assert "Today Date: 26 Jul 2024" not in rendered(DATED)
    assert [n for n in prepared.notes if "26 Jul 2024 is used instead, in training and" in n]


@pytest.mark.parametrize(
    ("marked", "noted"),
    [
        ("{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}\n", False),
        ("{%- generation -%}{{ m.content + '<|im_end|>\\n' }}{%- endgeneration -%}", False),
        ("{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>\n", True),
        ("{% generation %}{{ m.content }}{% endgeneration %}", False),  # training ends it
    ],
)
def test_a_note_reports_other_generation_tags(marked: str, noted: bool) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
        f"{marked}{{% else %}}{{{{ m.content }}}}{{% endif %}}{{% endfor %}}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    for tokenizer in (tiny_tokenizer(), bos_tokenizer()):
        tokenize = RowTokenizer(tokenizer, Template("jinja", source=source))
        notes = template_notes(tokenizer, tokenize, [ROW])
        assert [("{% generation %} tags" in note) for note in notes] == [True] * noted


# --- several templates -------------------------------------------------------------------------


def test_of_several_templates_the_default_is_used_and_saved() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"tool_use": "{{ 'tools' }}", "default": CHAT_TEMPLATE}  # type: ignore[assignment]
    assert default_template(tokenizer) == CHAT_TEMPLATE
    tokenize = RowTokenizer(tokenizer, Template("chat"))
    alone = RowTokenizer(tiny_tokenizer(), Template("chat"))
    assert tokenize.chat_template == alone.chat_template == CHAT_TEMPLATE
    assert tokenize.render(ROW) == alone.render(ROW)
    assert first_difference(tokenizer, tokenize, [ROW]) == ""


def test_several_templates_without_a_default_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"tool_use": "{{ 1 }}", "rag": "{{ 2 }}"}  # type: ignore[assignment]
    with pytest.raises(UsageError, match=r"has the chat templates rag, tool_use, and none named"):
        RowTokenizer(tokenizer, Template("chat"))
