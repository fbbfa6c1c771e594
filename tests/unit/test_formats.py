"""Which format the columns are, what a record becomes, and which records are refused."""

from __future__ import annotations

from typing import Any

import pytest

from slm_lora.data.formats import RowError, recognise, to_row, wanted
from slm_lora.errors import DataError, UsageError
from slm_lora.recipe.schema import DataSection
from slm_lora.records import Turn

AUTO = DataSection()


def section(**settings: Any) -> DataSection:
    return DataSection(**settings)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"instruction", "context", "response", "category"}, "dolly"),
        ({"instruction", "response", "category", "group"}, "dolly"),
        ({"instruction", "response"}, "dolly"),
        ({"instruction", "input", "output"}, "alpaca"),
        ({"instruction", "output"}, "alpaca"),
        ({"prompt", "completion"}, "prompt_completion"),
        ({"messages", "prompt", "prompt_id"}, "chat"),
        ({"conversations", "id"}, "chat"),
        ({"text", "meta"}, "text"),
        ({"instruction", "input", "output", "text"}, "alpaca"),
        ({"instruction", "context", "response", "category", "text"}, "dolly"),
        ({"prompt", "completion", "text"}, "prompt_completion"),
        ({"messages", "text"}, "chat"),
    ],
)
def test_the_columns_tell_the_format(columns: set[str], expected: str) -> None:
    assert recognise(columns, AUTO) == expected


def test_lists_of_messages_make_prompt_and_completion_a_chat() -> None:
    both = {"prompt", "completion"}
    assert recognise(both, AUTO, lists=both) == "chat"
    assert recognise(both, AUTO, lists=set()) == "prompt_completion"


def test_no_format_fits_lists_columns_and_formats() -> None:
    with pytest.raises(DataError) as caught:
        recognise({"question", "answer"}, AUTO)
    message = str(caught.value)
    assert "columns seen: answer, question" in message
    for name in ("dolly", "alpaca", "prompt_completion", "chat", "text"):
        assert f"{name} (" in message
    assert "\n" not in message


def test_several_formats_fit_is_an_error_until_one_is_named() -> None:
    columns = {"instruction", "output", "response", "text"}
    with pytest.raises(DataError, match=r"several formats, dolly and alpaca; .*data\.format"):
        recognise(columns, AUTO)
    assert recognise(columns, section(format="alpaca")) == "alpaca"


def test_text_beside_another_format_is_taken_when_asked_for() -> None:
    columns = {"instruction", "input", "output", "text"}
    assert recognise(columns, section(format="text")) == "text"
    # mapped, but the format that is recognised would drop it in silence
    with pytest.raises(UsageError, match=r"format alpaca has no field 'text'.*output"):
        recognise(columns | {"body"}, section(columns={"text": "body"}))


def test_a_column_name_cannot_break_the_message() -> None:
    with pytest.raises(DataError) as caught:
        recognise({"a\nb", "\ud800", "c" * 1000}, AUTO)
    message = str(caught.value)
    assert "\n" not in message
    assert "c" * 41 not in message
    message.encode()  # would fail on the surrogate


def test_named_format_without_its_columns_is_an_error() -> None:
    with pytest.raises(DataError, match=r"format alpaca needs instruction \+ output; .*response"):
        recognise({"instruction", "response"}, section(format="alpaca"))


def test_mapped_columns_answer_to_their_field_alone() -> None:
    chosen = section(columns={"response": "output", "context": "input"})
    columns = {"instruction", "input", "output"}
    assert recognise(columns, chosen) == "dolly"
    row = to_row({"instruction": "Q", "input": "C", "output": "A"}, "x", "dolly", chosen)
    assert row.context == "C"
    assert row.turns == (Turn("user", "Q"), Turn("assistant", "A"))


def test_a_mapped_field_hides_the_column_of_its_name() -> None:
    chosen = section(columns={"response": "better"})
    row = to_row({"instruction": "Q", "response": "A", "better": "B"}, "x", "dolly", chosen)
    assert row.turns[-1].content == "B"
    with pytest.raises(RowError, match="response is missing"):
        to_row({"instruction": "Q", "response": "A"}, "x", "dolly", chosen)


def test_one_may_group_by_a_column_that_is_also_read() -> None:
    chosen = section(columns={"group": "instruction"})
    assert recognise({"instruction", "response"}, chosen) == "dolly"
    row = to_row({"instruction": "Q", "response": "A"}, "x", "dolly", chosen)
    assert (row.turns[0].content, row.group_hint) == ("Q", "Q")


def test_mapping_mistakes_are_explained() -> None:
    columns = {"instruction", "answer"}
    with pytest.raises(UsageError, match=r"unknown field 'respnse'.*response"):
        recognise(columns, section(columns={"respnse": "answer"}))
    with pytest.raises(DataError, match=r"takes 'response' from anwser.*columns seen: answer"):
        recognise(columns, section(columns={"response": "anwser"}))
    # alpaca calls its context input: mapped to context it would be dropped in silence
    with pytest.raises(UsageError, match=r"format alpaca has no field 'context'.*input"):
        recognise(
            {"instruction", "passage", "output"},
            section(format="alpaca", columns={"context": "passage"}),
        )


def test_only_columns_that_are_read_are_wanted() -> None:
    columns = ["id", "seen", "instruction", "answer", "category", "topic"]
    assert wanted(columns, section(columns={"response": "answer", "group": "topic"})) == [
        "instruction",
        "answer",
        "category",
        "topic",
    ]


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("dolly", {"instruction": "Q", "context": "C", "response": "A"}),
        ("alpaca", {"instruction": "Q", "input": "C", "output": "A"}),
    ],
)
def test_instruction_formats_agree_on_the_row(name: str, record: dict[str, str]) -> None:
    row = to_row(record | {"category": "c", "group": "g"}, "rows.jsonl:7", name, AUTO)
    assert row.turns == (Turn("user", "Q"), Turn("assistant", "A"))
    assert (row.context, row.category, row.group_hint) == ("C", "c", "g")
    assert row.source == "rows.jsonl:7"


def test_prompt_and_plain_text() -> None:
    pair = to_row({"prompt": "P", "completion": "C"}, "x", "prompt_completion", AUTO)
    assert pair.turns == (Turn("user", "P"), Turn("assistant", "C"))
    assert to_row({"text": "T"}, "x", "text", AUTO).turns == (Turn("assistant", "T"),)


def test_the_chat_spellings_agree() -> None:
    expected = (Turn("system", "S"), Turn("user", "Q"), Turn("assistant", "A"))
    openai = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
    ]
    sharegpt = [
        {"from": "system", "value": "S"},
        {"from": "human", "value": "Q"},
        {"from": "gpt", "value": "A"},
    ]
    for record in (
        {"messages": openai},
        {"conversations": sharegpt},
        {"conversations": openai},
        {"prompt": openai[:2], "completion": openai[2:]},
    ):
        assert to_row(record, "x", "chat", AUTO).turns == expected


def test_text_is_kept_exactly_but_for_line_ends() -> None:
    text = "  a\tb \r\n c\u00a0\rd\u2028\ufeff\n"
    row = to_row({"instruction": text, "response": text}, "x", "dolly", AUTO)
    assert row.turns[0].content == row.turns[1].content == text.replace("\r\n", "\n")


@pytest.mark.parametrize("context", [None, "", "absent"])
def test_context_may_be_empty(context: str | None) -> None:
    record = {"instruction": "Q", "response": "A"}
    if context != "absent":
        record |= {"context": context}  # type: ignore[dict-item]
    assert to_row(record, "x", "dolly", AUTO).context == ""


def test_numbers_as_labels_are_their_digits() -> None:
    row = to_row({"text": "T", "category": 3, "group": None}, "x", "text", AUTO)
    assert (row.category, row.group_hint) == ("3", "")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"response": ...}, "response is missing"),
        ({"response": None}, "response is null"),
        ({"response": ""}, "response is empty"),
        ({"response": " \n\t\u3000"}, "response is empty"),
        ({"instruction": " "}, "instruction is empty"),
        ({"instruction": None}, "instruction is null"),
        ({"response": 5}, "response must be text, is a number"),
        ({"response": True}, "response must be text, is true or false"),
        ({"response": ["a"]}, "response must be text, is a list"),
        ({"response": {"a": 1}}, "response must be text, is an object"),
        ({"response": b"a"}, "response must be text, is of type bytes"),
        ({"context": 1.5}, "context must be text, is a number"),
        ({"response": "a\0b"}, "response has a NUL character"),
        ({"context": "\0"}, "context has a NUL character"),
        ({"category": "\0"}, "category has a NUL character"),
        ({"instruction": "a\ud83d"}, "instruction has a lone surrogate (half a character)"),
    ],
)
def test_malformed_instruction_rows(change: dict[str, Any], reason: str) -> None:
    record = {"instruction": "Q", "context": "", "response": "A"} | change
    record = {field: value for field, value in record.items() if value is not ...}
    with pytest.raises(RowError) as caught:
        to_row(record, "x", "dolly", AUTO)
    assert str(caught.value) == reason


def turns(*roles: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": "words"} for role in roles]


@pytest.mark.parametrize(
    "roles",
    [
        ("user", "assistant"),
        ("assistant",),
        ("system", "assistant", "user", "assistant"),
    ],
)
def test_orders_of_roles_that_are_taken(roles: tuple[str, ...]) -> None:
    row = to_row({"messages": turns(*roles)}, "x", "chat", AUTO)
    assert tuple(turn.role for turn in row.turns) == roles


def said(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (turns("user", "user", "assistant"), "two user turns in a row"),
        (turns("user", "assistant", "assistant"), "two assistant turns in a row"),
        (turns("user", "system", "assistant"), "a system turn stands after another turn"),
        (turns("system", "system", "assistant"), "a system turn stands after another turn"),
        (turns("system", "user"), "no assistant turn"),
        (turns("user", "assistant", "user"), "the last turn is not the assistant's"),
        ([], "messages is empty"),
        (None, "messages is null"),
        ("user: hello", "messages must be a list of messages, is text"),
        (["hello"], "a message in messages must be an object, is text"),
        ([{"role": "user"}], "a message in messages lacks role and content, or from and value"),
        ([said("user", "Q"), said("assistant", " ")], "the last assistant turn is empty"),
        ([said("user", " "), said("assistant", "A")], "a user turn is empty"),
        ([said("assistant", None)], "content of a message in messages is null"),
        (
            [said("assistant", ["A"])],
            "a part of content of a message in messages must be an object, is text",
        ),
        ([said("assistant", "\0")], "content of a message in messages has a NUL character"),
        (
            [said("robot", "A")],
            "a message in messages has the unknown role robot "
            "(known: system, user, human, assistant, gpt)",
        ),
        (
            [said([], "A")],  # type: ignore[arg-type]
            "a message in messages has an unknown role "
            "(known: system, user, human, assistant, gpt)",
        ),
    ],
)
def test_malformed_chats(messages: object, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        to_row({"messages": messages}, "x", "chat", AUTO)
    assert str(caught.value) == reason


def test_an_earlier_empty_answer_is_taken() -> None:
    messages = [said("assistant", ""), said("user", "Q"), said("assistant", "A")]
    assert len(to_row({"messages": messages}, "x", "chat", AUTO).turns) == 3


def test_a_chat_completion_must_answer() -> None:
    record = {"prompt": turns("user", "assistant"), "completion": turns("user")}
    with pytest.raises(RowError, match="completion has no assistant turn"):
        to_row(record, "x", "chat", AUTO)
    record = {"prompt": turns("user"), "completion": turns("assistant", "user")}
    with pytest.raises(RowError, match="the last turn is not the assistant's"):
        to_row(record, "x", "chat", AUTO)
    with pytest.raises(RowError, match="prompt is missing"):
        to_row({"completion": turns("assistant")}, "x", "chat", AUTO)
    with pytest.raises(RowError, match=r"messages \(or conversations\) is missing"):
        to_row({}, "x", "chat", AUTO)
