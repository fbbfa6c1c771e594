"""Prompt files: one question a row, read as data files are."""

from __future__ import annotations

import gzip
import json
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_lora.data.prompts import Prompt, read_prompts
from slm_lora.errors import DataError, SlmLoraError, UsageError
from slm_lora.records import Turn


def read(path: Path, content: str | bytes) -> list[Prompt]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_prompts(path)


def questions(prompts: list[Prompt]) -> list[str]:
    return [prompt.turns[-1].content for prompt in prompts]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "One?\n\n \nTwo?\r\n"),
        ("p", "One?\nTwo?"),
        ("p.md", "One?\nTwo?"),
        ("p.questions", "One?\nTwo?"),
        ("p.jsonl", '{"prompt": "One?"}\n\n"Two?"\n'),
        ("p.JSONL", '{"instruction": "One?"}\n{"question": "Two?"}'),
        ("p.ndjson", '{"text": "One?"}\n{"prompt": "Two?"}'),
        ("p.json", '["One?", "Two?"]'),
        ("p.json", '[{"prompt": "One?"}, {"instruction": "Two?"}]'),
        ("p.json", '{"prompts": ["One?", "Two?"]}'),
        ("p.json", '{"prompt": "One?"}\n{"prompt": "Two?"}\n'),
        ("p.jsonl", '[\n"One?",\n"Two?"\n]'),
        ("p.csv", "question\nOne?\nTwo?\n"),
        ("p.csv", "question;answer\nOne?;a\nTwo?;b\n"),
        ("p.txt", "One?\nTwo?\n".encode("utf-16")),
        ("p.jsonl.gz", gzip.compress(b'{"prompt": "One?"}\n{"prompt": "Two?"}', mtime=0)),
        ("p.txt.gz", gzip.compress(b"One?\nTwo?\n", mtime=0)),
    ],
)
def test_prompt_files_of_every_kind_are_read(
    tmp_path: Path, name: str, content: str | bytes
) -> None:
    assert questions(read(tmp_path / name, content)) == ["One?", "Two?"]


def test_prompts_in_parquet_are_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["One?"], "completion": ["Yes."]}), tmp_path / "p.parquet")
    (prompt,) = read_prompts(tmp_path / "p.parquet")
    assert (questions([prompt]), prompt.reference) == (["One?"], "Yes.")


def test_only_a_newline_ends_a_line_of_prompts(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\u2029d\x0be\x0cf\x1cg"
    lines = "".join(json.dumps({"prompt": text}, ensure_ascii=False) + "\n" for _ in range(3))
    # (JSON escapes control characters, but not Unicode separators)
    assert questions(read(tmp_path / "p.jsonl", lines)) == [text] * 3
    assert questions(read(tmp_path / "p.txt", f"{text}\n{text}")) == [text] * 2


def test_context_system_and_reference_of_a_prompt_are_read(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "Q"}, {"type": "text", "text": "?"}]
    user, answer = {"role": "user", "content": parts}, {"role": "assistant", "content": "A"}
    system = {"role": "system", "content": "S"}
    rows = [
        {"instruction": "Q?", "input": "C", "output": "A", "system": "S"},
        {"prompt": "Q?", "context": "C", "completion": "A", "system_prompt": "S"},
        {"messages": [system, user, answer], "context": "", "input": "C"},
        {"instruction": " ", "question": "Q?", "prompt": "Q?", "text": "Q? A", "context": "C",
         "input": None, "response": "", "answer": "A", "system": "S", "rationale": "so"},
        {"messages": [user], "system": "S", "context": "C", "answer": "A"},
        {"prompt": [system, user], "completion": [answer], "context": "C", "weight": 0},
        {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A"}],
         "system": "S", "context": "C", "tools": "[]", "images": None},
    ]  # fmt: skip
    content = "\n".join(map(json.dumps, rows))
    prompts = read(tmp_path / "p.jsonl", content)
    assert len(prompts) == len(rows)
    for prompt in prompts:
        assert prompt.turns == (Turn("system", "S"), Turn("user", "Q?"))
        assert (prompt.context, prompt.reference) == ("C", "A")


@pytest.mark.parametrize(
    ("record", "fragment"),
    [
        ({"prompt": "half \ud83d"}, "prompt has a lone surrogate"),
        ({"prompt": "a\0b"}, "prompt has a NUL character"),
        ({"prompt": "\U000f0000"}, "prompt has a private-use character"),
        ({"prompt": "Q", "completion": "\ud83d"}, "completion has a lone surrogate"),
        ({"prompt": "Q", "context": "\ud83d"}, "context has a lone surrogate"),
        ({"prompt": "Q", "tools": [{"name": "f"}]}, "tools has content"),
        ({"prompt": "Q", "images": ["a.png"]}, "images has content"),
        ({"prompt": "Q", "documents": ["d"]}, "documents has content"),
        ({"prompt": "Q", "history": [["a", "b"]]}, "history has content"),
        ({"prompt": "Q", "question": "R"}, "has prompt and question, of which one is read"),
        ({"prompt": "Q", "context": "C", "input": "D"}, "has context and input, of which one"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type image_url"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}, "tool_calls"),
        ({"messages": []}, "messages is empty"),
        ({"other": "Q"}, "has none of instruction, prompt, question, messages"),
    ],
)
def test_invalid_prompts_are_reported_with_their_location(
    tmp_path: Path, record: dict[str, object], fragment: str
) -> None:
    path = tmp_path / "p.jsonl"
    with pytest.raises(DataError) as caught:
        read(path, f'{{"prompt": "Q"}}\n{json.dumps(record)}\n')
    assert str(caught.value).startswith(f"{path}:2: ") and fragment in str(caught.value)
    path = tmp_path / "p.json"
    with pytest.raises(DataError) as caught:
        read(path, json.dumps([{"prompt": "Q"}, record, record]))
    assert str(caught.value).startswith(f"{path} item 2: ")
    assert str(caught.value).endswith(" (and 1 more that are not prompts)")


def test_files_without_prompts_are_refused(tmp_path: Path) -> None:
    for name, content, fragment in (
        ("p.txt", b"\n \n", "no prompt in it"), ("p.json", b"[]", "no prompt in it"),
        ("p.txt", b"caf\xe9\n", "looks like Windows-1252, save the file as UTF-8"),
        ("p.xlsx", b"x", "a spreadsheet, which is not read"),
        ("p.txt", b"PK\x03\x04", "a ZIP archive"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=fragment):
            read(tmp_path / name, content)
    with pytest.raises(UsageError, match="No such file"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(UsageError, match="Is a directory"):
        read_prompts(tmp_path)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100), st.sampled_from(["", ".txt", ".json", ".jsonl", ".csv", ".gz"]))
def test_any_prompt_file_is_read_or_explained(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"prompts{suffix}"
        path.write_bytes(content)
        try:
            read_prompts(path)
        except SlmLoraError as error:
            assert str(error).isprintable()  # noqa: PT017 - it may as well be read
