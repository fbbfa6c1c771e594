"""Turns that a chat template drops are refused, in rows and in prompts."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_lora.data.dropped_turns import DroppedTurns
from slm_lora.data.templates import Template
from slm_lora.data.tokenization import RowTokenizer
from slm_lora.errors import DataError, UsageError
from slm_lora.records import Role, Row, Turn

from ..support.tiny_model import CHAT_TEMPLATE, tiny_tokenizer

EACH = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
PAIR = (Turn("user", "Is it far?"), Turn("assistant", "Two days."))
SYSTEM = (Turn("system", "Be brief."), *PAIR)
FOUR = (*PAIR, Turn("user", "By river?"), Turn("assistant", "One."))


def rendered(source: str, turns: tuple[Turn, ...], kind: Any = "jinja") -> str:
    tokenizer = tiny_tokenizer()
    template = Template("jinja", source=source)
    if kind == "chat":
        tokenizer.chat_template, template = source, Template("chat")
    return RowTokenizer(tokenizer, template).render(Row(turns, source="rows.jsonl:7")).text


@pytest.mark.parametrize("kind", ["jinja", "chat"])
@pytest.mark.parametrize(
    ("source", "turns", "lost"),
    [
        ("{% for m in messages %}{{ m.role }}: {{ m.contents }}{% endfor %}", PAIR, "1 of 2 (user"),
        ("{% for m in mesages %}{{ m.content }}{% endfor %}", PAIR, "1 of 2 (user"),
        (EACH.replace("%}{{", "%}{% if m.role != 'assistant' %}{{").replace(
            "{% endfor", "{% endif %}{% endfor"), PAIR, "2 of 2 (assistant"),
        (EACH.replace("in messages", "in messages if m.role != 'system'"), SYSTEM, "1 of 3 (sys"),
        (EACH.replace("in messages", "in messages[:2]"), FOUR, "3 of 4 (user"),
        (EACH.replace("in messages", "in messages[:3]"), FOUR, "4 of 4 (assistant"),
    ],
)  # fmt: skip
def test_rows_with_a_dropped_turn_are_refused(
    source: str, turns: tuple[Turn, ...], lost: str, kind: Any
) -> None:
    with pytest.raises(DataError) as caught:
        rendered(source, turns, kind)
    assert str(caught.value).startswith("rows.jsonl:7: the chat template drops turn ")
    assert lost in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        EACH,
        EACH.replace("m.content", "(m.content | trim | upper)"),
        EACH.replace("m.content", "m.content.split('</think>')[-1]"),
        EACH.replace("m.content", "m.content[-1:]"),
        EACH.replace("in messages", "in messages if m.content"),
    ],
)
@pytest.mark.parametrize("turns", [PAIR, SYSTEM, FOUR])
def test_templates_that_change_a_turn_render(source: str, turns: tuple[Turn, ...]) -> None:
    assert rendered(source, turns).count(": ") == len(turns)


def test_an_empty_turn_is_never_reported_as_dropped() -> None:
    source = EACH.replace("in messages", "in messages if m.role != 'system'")
    assert "Two days." in rendered(source, (Turn("system", " \n"), *PAIR))


def test_a_template_that_refuses_the_marks_is_accepted() -> None:
    source = "{% if messages[0].content != 'Is it far?' %}{{ raise_exception('no') }}{% endif %}"
    assert "Two days." in rendered(source + EACH, PAIR)


def test_prompts_with_a_dropped_turn_are_refused() -> None:
    source = EACH.replace("in messages", "in messages if m.role != 'system'")
    tokenize = RowTokenizer(tiny_tokenizer(), Template("jinja", source=source))
    assert tokenize.prompt(PAIR[:1])
    with pytest.raises(UsageError, match=r"drops turn 1 of 2 \(system\); leave it out"):
        tokenize.prompt(SYSTEM[:2])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(("system", "user", "assistant")), min_size=1, max_size=40))
def test_dropped_turns_are_detected(roles: list[Role]) -> None:
    def render(messages: list[dict[str, str]], prompt: bool) -> str:
        kept = [m["content"] for m in messages if m["role"] != "system"]
        return "".join(kept) + "?" * prompt

    expected = tuple(number for number, role in enumerate(roles) if role == "system")
    dropped_turns = DroppedTurns(render)
    for _ in range(2):
        assert dropped_turns.turns(roles, False) == dropped_turns.turns(roles, True) == expected


def test_conversation_longer_than_the_marks_is_rendered() -> None:
    tokenize = RowTokenizer(tiny_tokenizer(), Template("jinja", source=CHAT_TEMPLATE))
    turns = PAIR * 700
    assert tokenize.prompt(turns[:-1])
