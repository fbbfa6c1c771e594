"""Detection of row formats, conversion of records, and refused records."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from slm_lora.config.schema import DataSection
from slm_lora.config.types import FormatName
from slm_lora.data.formats import FORMATS, columns_to_decode, detect_format, to_row, unread_content
from slm_lora.data.text import RowError
from slm_lora.errors import DataError, UsageError
from slm_lora.records import Turn

AUTO = DataSection()


def section(**settings: Any) -> DataSection:
    return DataSection(**settings)


def test_schema_lists_every_format() -> None:
    assert set(get_args(FormatName)) == {"auto", *FORMATS}


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
def test_the_format_is_detected_by_columns(columns: set[str], expected: str) -> None:
    assert detect_format(columns, AUTO) == expected


def test_lists_of_messages_make_prompt_and_completion_a_chat() -> None:
    both = {"prompt", "completion"}
    assert detect_format(both, AUTO, lists=both) == "chat"
    assert detect_format(both, AUTO, lists=set()) == "prompt_completion"


def test_no_format_fits_lists_columns_and_formats() -> None:
    with pytest.raises(DataError) as caught:
        detect_format({"problem", "solution"}, AUTO)
    message = str(caught.value)
    assert "columns seen: problem, solution" in message
    for name in ("dolly", "alpaca", "prompt_completion", "chat", "text"):
        assert f"{name} (" in message
    assert "\n" not in message


def test_several_formats_fit_is_an_error_until_one_is_named() -> None:
    columns = {"instruction", "output", "response", "text"}
    with pytest.raises(DataError, match=r"several formats, dolly and alpaca; .*data\.format"):
        detect_format(columns, AUTO)
    assert detect_format(columns, section(format="alpaca")) == "alpaca"


def test_text_beside_another_format_is_read_when_requested() -> None:
    columns = {"instruction", "input", "output", "text"}
    assert detect_format(columns, section(format="text")) == "text"
    # mapped, but the detected format would drop it silently
    with pytest.raises(UsageError, match=r"format alpaca has no field 'text'.*output"):
        detect_format(columns | {"body"}, section(columns={"text": "body"}))


def test_a_column_name_cannot_break_the_message() -> None:
    with pytest.raises(DataError) as caught:
        detect_format({"a\nb", "\ud800", "c" * 1000}, AUTO)
    message = str(caught.value)
    assert "\n" not in message
    assert "c" * 41 not in message
    message.encode()  # would fail on the surrogate


def test_named_format_without_its_columns_is_an_error() -> None:
    with pytest.raises(DataError, match=r"format alpaca needs instruction \+ output; .*response"):
        detect_format({"instruction", "response"}, section(format="alpaca"))


def test_a_mapped_column_loses_its_own_name() -> None:
    chosen = section(columns={"response": "output", "context": "input"})
    columns = {"instruction", "input", "output"}
    assert detect_format(columns, chosen) == "dolly"
    row = to_row({"instruction": "Q", "input": "C", "output": "A"}, "x", "dolly", chosen)
    assert row.context == "C"
    assert row.turns == (Turn("user", "Q"), Turn("assistant", "A"))


def test_a_mapped_field_hides_the_column_of_its_name() -> None:
    chosen = section(columns={"response": "better"})
    row = to_row({"instruction": "Q", "response": "A", "better": "B"}, "x", "dolly", chosen)
    assert row.turns[-1].content == "B"
    with pytest.raises(RowError, match="response is missing"):
        to_row({"instruction": "Q", "response": "A"}, "x", "dolly", chosen)


def test_a_column_may_be_both_group_and_text() -> None:
    chosen = section(columns={"group": "instruction"})
    assert detect_format({"instruction", "response"}, chosen) == "dolly"
    row = to_row({"instruction": "Q", "response": "A"}, "x", "dolly", chosen)
    assert (row.turns[0].content, row.group_hint) == ("Q", "Q")


def test_mistakes_in_data_columns_are_explained() -> None:
    columns = {"instruction", "answer"}
    with pytest.raises(UsageError, match=r"unknown field 'respnse'.*response"):
        detect_format(columns, section(columns={"respnse": "answer"}))
    with pytest.raises(DataError, match=r"takes 'response' from anwser.*columns seen: answer"):
        detect_format(columns, section(columns={"response": "anwser"}))
    # the context of alpaca is named input: mapped to context it would be dropped silently
    with pytest.raises(UsageError, match=r"format alpaca has no field 'context'.*input"):
        detect_format(
            {"instruction", "passage", "output"},
            section(format="alpaca", columns={"context": "passage"}),
        )


def test_only_columns_that_are_read_are_decoded() -> None:
    columns = ["id", "seen", "instruction", "answer", "category", "topic"]
    assert columns_to_decode(
        columns, section(columns={"response": "answer", "group": "topic"})
    ) == [
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


def test_prompt_completion_and_text_rows_become_turns() -> None:
    pair = to_row({"prompt": "P", "completion": "C"}, "x", "prompt_completion", AUTO)
    assert pair.turns == (Turn("user", "P"), Turn("assistant", "C"))
    assert to_row({"text": "T"}, "x", "text", AUTO).turns == (Turn("assistant", "T"),)


def test_alternative_chat_keys_give_equal_rows() -> None:
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


def test_row_text_is_unchanged_except_for_line_ends() -> None:
    text = "  a\tb \r\n c\u00a0\rd\u2028\ufeff\n"
    row = to_row({"instruction": text, "response": text}, "x", "dolly", AUTO)
    assert row.turns[0].content == row.turns[1].content == text.replace("\r\n", "\n")


@pytest.mark.parametrize("context", [None, "", "absent"])
def test_context_may_be_empty(context: str | None) -> None:
    record = {"instruction": "Q", "response": "A"}
    if context != "absent":
        record |= {"context": context}  # type: ignore[dict-item]
    assert to_row(record, "x", "dolly", AUTO).context == ""


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (3, "3"), (1.5, "1.5"), (True, "true"), (False, "false"), (["a", 1], '["a", 1]'),
        ({"é": None, "b": 2}, '{"é": null, "b": 2}'), (float("nan"), ""), ([], ""), ({}, ""),
        (None, ""), (b"x", "\"b'x'\""), ("\U000f0000", "\U000f0000"), ("null", "null"),
    ],
)  # fmt: skip
def test_labels_of_any_type_are_text(value: object, written: str) -> None:
    row = to_row({"text": "T", "category": value, "group": value}, "x", "text", AUTO)
    assert (row.category, row.group_hint) == (written, written)


def test_a_column_is_left_out_by_null() -> None:
    chosen = section(columns={"category": None, "tools": None})
    record = {"instruction": "Q", "response": "A", "category": "c", "tools": ["t"], "group": "g"}
    assert detect_format(record.keys(), chosen) == "dolly"
    row = to_row(record, "x", "dolly", chosen)
    assert (row.category, row.group_hint) == ("", "g")
    assert not list(unread_content(record, "dolly", chosen))
    assert columns_to_decode(record, chosen) == ["instruction", "response", "group"]
    with pytest.raises(DataError, match="leaves typo out, which is not a column"):
        detect_format(record.keys(), section(columns={"typo": None}))
    with pytest.raises(DataError, match="no format fits"):
        detect_format(record.keys(), section(columns={"response": None}))


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
def test_malformed_instruction_rows_are_refused_with_the_reason(
    change: dict[str, Any], reason: str
) -> None:
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
def test_valid_orders_of_roles_are_accepted(roles: tuple[str, ...]) -> None:
    row = to_row({"messages": turns(*roles)}, "x", "chat", AUTO)
    assert tuple(turn.role for turn in row.turns) == roles


def message(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (turns("user", "user", "assistant"), "two user turns in a row"),
        (turns("user", "assistant", "assistant"), "two assistant turns in a row"),
        (turns("user", "system", "assistant"), "a system turn after another turn"),
        (turns("system", "system", "assistant"), "a system turn after another turn"),
        (turns("system", "user"), "no assistant turn"),
        (turns("user", "assistant", "user"), "the last turn is not the assistant's"),
        ([], "messages is empty"),
        (None, "messages is null"),
        ("user: hello", "messages must be a list of messages, is text"),
        (["hello"], "a message in messages must be an object, is text"),
        ([{"role": "user"}], "a message in messages lacks role and content, or from and value"),
        ([message("user", "Q"), message("assistant", " ")], "the last assistant turn is empty"),
        ([message("user", " "), message("assistant", "A")], "a user turn is empty"),
        ([message("assistant", None)], "content of a message in messages is null"),
        (
            [message("assistant", ["A"])],
            "a part of content of a message in messages must be an object, is text",
        ),
        ([message("assistant", "\0")], "content of a message in messages has a NUL character"),
        (
            [message("robot", "A")],
            "a message in messages has the unknown role robot "
            "(known: system, user, human, assistant, gpt)",
        ),
        (
            [message([], "A")],  # type: ignore[arg-type]
            "a message in messages has an unknown role "
            "(known: system, user, human, assistant, gpt)",
        ),
    ],
)
def test_malformed_chats_are_refused_with_the_reason(messages: object, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        to_row({"messages": messages}, "x", "chat", AUTO)
    assert str(caught.value) == reason


def test_an_earlier_answer_may_be_empty() -> None:
    messages = [message("assistant", ""), message("user", "Q"), message("assistant", "A")]
    assert len(to_row({"messages": messages}, "x", "chat", AUTO).turns) == 3


def test_a_completion_needs_an_assistant_turn() -> None:
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


CALL = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {}}}]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tool_calls", CALL), ("tool_call_id", "c1"), ("function_call", {"name": "f"}),
        ("reasoning_content", "hm"), ("reasoning", "hm"), ("reasoning_details", [{"text": "hm"}]),
        ("thinking", "hm"), ("thought", "hm"), ("images", ["a.png"]), ("input_audio", {"a": "x"}),
        ("tools", CALL), ("refusal", "No."), ("prefix", True), ("loss_mask", [0, 1]),
        ("train_detail", [{"begin_offset": 0, "train": False}]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("spelt", [("role", "content"), ("from", "value")])
def test_keys_of_messages_that_change_the_text_are_refused(
    key: str, value: object, spelt: tuple[str, str]
) -> None:
    role, content = spelt
    messages = [{role: "user", content: "Q"}, {role: "assistant", content: "A", key: value}]
    with pytest.raises(RowError) as caught:
        to_row({"messages": messages}, "x", "chat", AUTO)
    assert str(caught.value) == f"a message in messages has {key}, which would be left out"


EMPTY = [None, "", [], {}, [None], {"name": None, "arguments": None}, [{"id": None}], float("nan")]


@pytest.mark.parametrize("value", EMPTY)
def test_null_keys_of_arrow_have_no_effect(value: object) -> None:
    padding = dict.fromkeys(
        ("tool_calls", "function_call", "reasoning_content", "name", "weight", "train", "images"),
        value,
    )
    messages = [{**message("user", "Q"), **padding}, {**message("assistant", "A"), **padding}]
    record = {"messages": messages, "tools": value, "images": value, "system": value}
    assert to_row(record, "x", "chat", AUTO).turns == (Turn("user", "Q"), Turn("assistant", "A"))
    assert not list(unread_content(record, "chat", AUTO))


def test_unread_keys_and_columns_are_reported() -> None:
    messages = [
        {**message("user", "Q"), "name": "ann", "timestamp": 3, "train": True},
        {**message("assistant", "A"), "loss": 2.5, "finish_reason": "stop", "toxic": False},
    ]
    record = {"messages": messages, "context": "C", "documents": [], "id": 1, "prompt": "Q"}
    assert set(unread_content(record, "chat", AUTO)) == {
        ("key", "name"), ("key", "timestamp"), ("key", "train"), ("key", "loss"),
        ("key", "finish_reason"), ("key", "toxic"), ("column", "context"), ("column", "prompt"),
    }  # fmt: skip
    record = {"instruction": "Q", "input": "C", "response": "A"}
    assert list(unread_content(record, "dolly", AUTO)) == [("column", "input")]
    assert not list(unread_content(record, "dolly", section(columns={"context": "input"})))
    record = {"instruction": "Be kind.", "question": "Q", "response": "A"}
    mapped = section(columns={"instruction": "question"})
    assert list(unread_content(record, "dolly", mapped)) == [("column", "instruction")]


@pytest.mark.parametrize("key", ["weight", "train", "trainable", "loss"])
@pytest.mark.parametrize("off", [False, 0, 0.0, "0", "false", "False"])
def test_an_excluded_assistant_turn_is_refused(key: str, off: object) -> None:
    if key == "loss" and not isinstance(off, bool):
        return  # a number that was measured
    messages = [
        message("user", "Q"), {**message("assistant", "Never."), key: off},
        message("user", "Q"), message("assistant", "A"),
    ]  # fmt: skip
    with pytest.raises(RowError, match=rf"excluded from training by {key}, which is not supported"):
        to_row({"messages": messages}, "x", "chat", AUTO)


@pytest.mark.parametrize("on", [True, 1, 1.0, "1", "true", None])
def test_marks_that_include_a_turn_have_no_effect(on: object) -> None:
    for key in ("weight", "train", "trainable"):
        messages = [{**message("user", "Q"), key: 0}, {**message("assistant", "A"), key: on}]
        assert len(to_row({"messages": messages}, "x", "chat", AUTO).turns) == 2
        assert not list(unread_content({"messages": messages}, "chat", AUTO))


def test_a_fractional_weight_is_refused() -> None:
    messages = [message("user", "Q"), {**message("assistant", "A"), "weight": 0.5}]
    with pytest.raises(RowError, match="has a weight other than 0 and 1"):
        to_row({"messages": messages}, "x", "chat", AUTO)


@pytest.mark.parametrize("role", ["tool", "function_call", "observation", "ipython"])
def test_tool_roles_are_refused_by_name(role: str) -> None:
    messages = [message("user", "Q"), message(role, "x"), message("assistant", "A")]
    with pytest.raises(RowError, match=f"has the role {role}: tools are not trained on"):
        to_row({"messages": messages}, "x", "chat", AUTO)


def part(text: object, **more: object) -> dict[str, object]:
    return {"type": "text", "text": text, **more}


def test_text_parts_are_joined() -> None:
    messages = [
        message("user", [part("a", image_url=None), part(" b\r\n", cache_control={"type": "x"})]),
        message("assistant", [part("A")]),
    ]
    row = to_row({"messages": messages}, "x", "chat", AUTO)
    assert row.turns == (Turn("user", "a b\n"), Turn("assistant", "A"))
    assert list(unread_content({"messages": messages}, "chat", AUTO)) == [("key", "cache_control")]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([{"type": "image_url", "image_url": {"url": "u"}}], "has a part of type image_url"),
        ([part("a"), {"type": "thinking", "thinking": "t"}], "has a part of type thinking"),
        ([{"text": "a"}], "has a part without a type that is known"),
        ([part("a", image={"bytes": b"x"})], "has a text part with 'image' beside its text"),
        ([part(None)], "must be text, is of type NoneType"),
        ([part("\ud800")], "has a lone surrogate"),
        (["a"], "must be an object, is text"),
        ({"type": "text", "text": "a"}, "must be text, is an object"),
        ([], "the last assistant turn is empty"),
    ],
)
def test_parts_other_than_text_are_refused_by_name(content: object, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        to_row(
            {"messages": [message("user", "Q"), message("assistant", content)]}, "x", "chat", AUTO
        )


def test_messages_may_be_json_text() -> None:
    row = to_row({"messages": '[{"role": "assistant", "content": "A"}]'}, "x", "chat", AUTO)
    assert row.turns == (Turn("assistant", "A"),)
    with pytest.raises(RowError, match="is text, but not JSON"):
        to_row({"messages": "[{'role': 'assistant', 'content': 'A'}]"}, "x", "chat", AUTO)


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_is_a_system_turn(column: str) -> None:
    system, rest = Turn("system", "S"), (Turn("user", "Q"), Turn("assistant", "A"))
    messages = [message("user", "Q"), message("assistant", "A")]
    for name, record in (
        ("dolly", {"instruction": "Q", "response": "A"}),
        ("alpaca", {"instruction": "Q", "output": "A"}),
        ("prompt_completion", {"prompt": "Q", "completion": "A"}),
        ("chat", {"messages": messages}),
        ("chat", {"messages": [message("system", "S"), *messages]}),
    ):
        assert to_row({**record, column: "S"}, "x", name, AUTO).turns == (system, *rest)
    with pytest.raises(RowError, match=f"the system turn differs from the column {column}"):
        to_row(
            {"messages": [message("system", "other"), *messages], column: "S"}, "x", "chat", AUTO
        )
    assert list(unread_content({"text": "T", column: "S"}, "text", AUTO)) == [("column", column)]
    both = {"system": "S", "system_prompt": "other"}
    with pytest.raises(RowError, match="the system turn differs from the column system_prompt"):
        to_row({"instruction": "Q", "response": "A", **both}, "x", "dolly", AUTO)


@pytest.mark.parametrize("column", ["tools", "functions", "image", "images", "audio", "videos"])
def test_columns_of_tools_and_media_are_refused(column: str) -> None:
    for name, record in (
        ("dolly", {"instruction": "Q", "response": "A"}),
        ("chat", {"messages": [message("user", "Q"), message("assistant", "A")]}),
    ):
        for nothing in (None, [], "", "[]", "null", [None], {"bytes": None, "path": None}):
            to_row({**record, column: nothing}, "x", name, AUTO)
        with pytest.raises(RowError, match=f"^column {column} has content.*{column}: null}}"):
            to_row({**record, column: [{"name": "f"}]}, "x", name, AUTO)
        to_row({**record, column: "x"}, "x", name, section(columns={column: None}))


def test_rows_excluded_from_training_are_refused() -> None:
    record = {"prompt": "Q", "completion": "A"}
    for mark in ({"label": False}, {"label": "False"}, {"kto_tag": False}, {"weight": 0},
                 {"train": False}):  # fmt: skip
        with pytest.raises(RowError, match="the row is excluded from training"):
            to_row({**record, **mark}, "x", "prompt_completion", AUTO)
    for mark in ({"label": True}, {"label": 0}, {"label": None}, {"label": "no"}, {"weight": 2}):
        to_row({**record, **mark}, "x", "prompt_completion", AUTO)
    # a class label of a text, not a rating of an answer
    to_row({"text": "T", "label": False}, "x", "text", AUTO)
    to_row({**record, "label": False}, "x", "prompt_completion", section(columns={"label": None}))
    by_label = section(columns={"category": "label"})
    assert (
        to_row({**record, "label": False}, "x", "prompt_completion", by_label).category == "false"
    )


@pytest.mark.parametrize(
    ("columns", "lists", "mapping"),
    [
        ({"prompt", "chosen", "rejected"}, set(), {"completion": "chosen"}),
        ({"chosen", "rejected"}, {"chosen", "rejected"}, {"messages": "chosen"}),
        ({"prompt", "chosen", "rejected"}, {"chosen", "rejected"}, {"messages": "chosen"}),
        ({"prompt", "chosen", "rejected"}, {"prompt", "chosen", "rejected"},
         {"completion": "chosen"}),
        ({"instruction", "input", "chosen", "rejected"}, set(), {"output": "chosen"}),
        ({"question", "chosen", "rejected"}, set(), {"prompt": "question", "completion": "chosen"}),
        ({"chosen", "rejected"}, set(), {"text": "chosen"}),
    ],
)  # fmt: skip
def test_preference_data_are_explained_with_a_working_mapping(
    columns: set[str], lists: set[str], mapping: dict[str, str | None]
) -> None:
    with pytest.raises(DataError) as caught:
        detect_format(columns, AUTO, lists)
    suggestion = ", ".join(f"{field}: {column}" for field, column in mapping.items())
    assert "preference data (columns chosen and rejected)" in str(caught.value)
    assert f"data.columns={{{suggestion}}}" in str(caught.value)
    detect_format(columns, section(columns=mapping), lists)


@pytest.mark.parametrize(
    ("columns", "explanation"),
    [
        ({"prompt", "completions", "labels"}, "several answers a row"),
        ({"input_ids", "attention_mask"}, "the rows are tokens already"),
        ({"prompt"}, "prompts without answers"),
        ({"problem", "solution"}, r"perhaps \{instruction: problem, response: solution\}"),
        ({"question", "response"}, r"perhaps \{instruction: question\}"),
    ],
)
def test_unsupported_data_are_explained(columns: set[str], explanation: str) -> None:
    with pytest.raises(DataError, match=explanation):
        detect_format(columns, AUTO)
