"""Further held-out sets: rows, templates, notes, and leaks of training rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slm_lora.config.forgetting import AlsoSection
from slm_lora.data.further_sets import FurtherSet, read_further_set
from slm_lora.data.splits import GroupingRule
from slm_lora.data.templates import Template
from slm_lora.errors import DataError
from slm_lora.records import Row, Turn

from ..support.rows import make_rows, write_jsonl
from ..support.tiny_model import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TRAINED = Template("chat")


def read(
    path: Path, trained: list[Row] | None = None, limit: int = 512, **keys: object
) -> FurtherSet:
    section = AlsoSection.model_validate({"name": str(path), **keys})
    return read_further_set(
        "own", section, trained or [], TOKENIZER, TRAINED, GroupingRule(), limit
    )


def text_of(own: FurtherSet, index: int = 0) -> str:
    text: str = TOKENIZER.decode(own.examples[index].ids)
    return text


def pair(instruction: str, context: str = "") -> Row:
    turns = (Turn("user", instruction), Turn("assistant", "Yes."))
    return Row(turns, context=context, source="train.jsonl:7")


def test_rows_are_in_the_template_of_the_training_with_their_contexts(tmp_path: Path) -> None:
    own = read(write_jsonl(tmp_path / "rows.jsonl", make_rows(20)), rows=None)
    assert len(own.examples) == 20
    assert own.template == "chat"
    texts = [text_of(own, index) for index in range(20)]
    assert all(text.startswith("<|im_start|>user\n") and "Tell me fact" in text for text in texts)
    assert sum("A note on" in text for text in texts) == 7  # contexts are never left out
    assert own.notes == ("forgetting.also.own: 20 of 20 rows, template chat",)


def test_template_of_its_own(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", make_rows(20))
    assert text_of(read(path, template="instruction_response")).startswith("Instruction:\nTell me")


def test_text_is_plain(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("".join(f"Note {number} about tea.\n\n" for number in range(8)))
    own = read(path)
    assert own.template == "plain"
    assert text_of(own).startswith("Note ")
    assert own.notes[0].endswith("8 of 8 rows, template plain (fewer than rows = 200)")


def test_draw_is_a_prefix_of_a_larger_one_and_does_not_depend_on_the_order(tmp_path: Path) -> None:
    rows = make_rows(40)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    small, large = read(path, rows=10), read(path, rows=25)
    ids = [example.row_id for example in large.examples]
    assert [example.row_id for example in small.examples] == ids[:10]
    other = read(write_jsonl(tmp_path / "other.jsonl", rows[::-1]), rows=25)
    assert [example.row_id for example in other.examples] == ids
    assert other.digest == large.digest != small.digest


def test_nothing_is_left_out_silently(tmp_path: Path) -> None:
    rows = make_rows(30)
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, rows[0]])
    with path.open("a") as file:
        file.write(json.dumps({"instruction": "", "context": "", "response": ""}) + "\n")
    with pytest.raises(DataError, match=r"forgetting\.also\.own: .*rows\.jsonl:32"):
        read(path)
    own = read(path, on_bad_row="skip", limit=20)
    assert "1 duplicates and 1 malformed left out" in own.notes[0]
    assert "rows are truncated to data.max_length = 20 tokens" in own.notes[1]
    assert max(example.length for example in own.examples) == 20


def test_related_rows_are_one_group(tmp_path: Path) -> None:
    rows = [
        {"instruction": f"Question {number % 5}?", "context": "", "response": f"Answer {number}."}
        for number in range(10)
    ]
    own = read(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert len({example.group_id for example in own.examples}) == 5


@pytest.mark.parametrize(
    ("trained", "leaks"),
    [
        (pair("TELL me fact 4 about: bridges"), True),
        (pair("Tell me fact 4 about bridges.", "Another context."), False),
        (pair("Tell me fact 4 about bees."), False),
        (Row((Turn("assistant", "Tell me fact 4 about bridges."),), source="train.jsonl:7"), True),
    ],
)
def test_normalised_prompts_of_training_rows_are_refused(
    tmp_path: Path, trained: Row, leaks: bool
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", make_rows(12))
    if not leaks:
        assert len(read(path, [trained]).examples) == 12
        return
    with pytest.raises(DataError) as caught:
        read(path, [trained], rows=1)
    assert str(caught.value).startswith(
        "forgetting.also.own: 1 of its 12 rows have the prompt of a training row "
        "(rows.jsonl:5 = train.jsonl:7)"
    )
