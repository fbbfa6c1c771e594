"""Rows from files, the hub and the embedded set; every malformed row is named by its line."""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import json
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import errors as hub_errors
from hypothesis import given, settings
from hypothesis import strategies as st

import slm_lora.data
from slm_lora import storage
from slm_lora.data import hub, sources, table
from slm_lora.data.sources import BadRow, MalformedRowsError, RowSet, ensure_ml_qa, read_rows
from slm_lora.errors import DataError, SlmLoraError, StorageError, UsageError
from slm_lora.recipe.schema import DataSection

SECRET = "xyzzy"
"""Stands in the text of malformed rows; no message may show it."""


def good(number: int) -> dict[str, str]:
    return {"instruction": f"Name the number {number}.", "response": f"It is {number}."}


def good_line(number: int) -> bytes:
    return json.dumps(good(number)).encode()


def read(path: Path, **options: Any) -> RowSet:
    return read_rows(DataSection(name=str(path), **options))


def jsonl(folder: Path, *lines: bytes) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(SlmLoraError) as caught:
        read(path, **options)
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    return str(caught.value)


# --- malformed rows, one kind at a time ------------------------------------------------------

KINDS: list[tuple[bytes, str]] = [
    (b'{"instruction": "xyzzy', "bad JSON"),
    (b'{"instruction": "xyzzy\t", "response": "a"}', "bad JSON"),
    (b'{"instruction": "a", "response": "b"} xyzzy', "bad JSON"),
    (b"[" * 100_000, "bad JSON"),
    (b'{"instruction": "a", "response": ' + b"9" * 5000 + b"}", "bad JSON"),
    (b'\xef\xbb\xbf{"instruction": "a", "response": "xyzzy"}', "byte order mark inside the file"),
    (b'["xyzzy"]', "not a JSON object"),
    (b'"xyzzy"', "not a JSON object"),
    (b"null", "not a JSON object"),
    (b'{"instruction": "xyzzy"}', "response is missing"),
    (b'{"instruction": "xyzzy", "response": null}', "response is null"),
    (b'{"instruction": "xyzzy", "response": 1}', "response must be text, is a number"),
    (b'{"instruction": "xyzzy", "response": " "}', "response is empty"),
    (b'{"instruction": "", "response": "xyzzy"}', "instruction is empty"),
    (b'{"instruction": "xyzzy", "response": "\xff"}', "invalid UTF-8"),
    (b'{"instruction": "xyzzy", "response": "\xed\xa0\x80"}', "invalid UTF-8"),
    (b'{"instruction": "xyzzy", "response": "\\u0000"}', "response has a NUL character"),
    (
        b'{"instruction": "xyzzy", "response": "\\ud83d"}',
        "response has a lone surrogate (half a character)",
    ),
    (b'{"instruction": "xyzzy", "response": NaN}', "NaN is not JSON"),
    (b'{"instruction": "xyzzy", "response": "a", "x": -Infinity}', "-Infinity is not JSON"),
    (
        b'{"instruction": "xyzzy", "response": "a", "response": "b"}',
        "duplicate key 'response'",
    ),
    (b'{"instruction": "a", "response": "b", "x": {"k": 1, "k": 2}}', "duplicate key 'k'"),
]


@pytest.mark.parametrize(("line", "reason"), KINDS)
def test_malformed_line(tmp_path: Path, line: bytes, reason: str) -> None:
    path = jsonl(tmp_path, good_line(1), line, *[good_line(n) for n in range(2, 11)])
    expected = f"rows.jsonl:2: {reason}. Mend it, or set data.on_bad_row=skip."
    if b"\xff" in line:
        expected = (
            "rows.jsonl:2: invalid UTF-8, in 1 of 11 rows: the file looks like Windows-1252; "
            "save it as UTF-8"
        )
    assert refusal(path) == expected


def test_a_row_too_long_is_a_bad_row_of_its_size(tmp_path: Path) -> None:
    long = json.dumps({"instruction": "q", "response": "é" * 6_150_000}, ensure_ascii=False)
    path = jsonl(tmp_path, good_line(1), long.encode(), good_line(2))
    assert refusal(path).startswith("rows.jsonl:2: row of 12.3 MB (at most 10 MB). Mend")


def test_the_longest_row_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = good_line(1)
    monkeypatch.setattr(table, "ROW_BYTES", len(line))
    assert len(read(jsonl(tmp_path, line)).rows) == 1
    monkeypatch.setattr(table, "ROW_BYTES", len(line) - 1)
    with pytest.raises(MalformedRowsError) as caught:
        read(jsonl(tmp_path, line, good_line(2)))
    assert [bad.source for bad in caught.value.bad_rows] == ["rows.jsonl:1", "rows.jsonl:2"]


def test_one_kind_names_its_lines(tmp_path: Path) -> None:
    empty = b'{"instruction": "q", "response": ""}'
    path = jsonl(tmp_path, good_line(1), empty, good_line(2), empty, empty)
    assert refusal(path) == ("rows.jsonl:2: response is empty (3 rows in all: 2, 4, 5). Mend them.")


def test_several_kinds_are_counted(tmp_path: Path) -> None:
    empty, broken = b'{"instruction": "q", "response": ""}', b"{"
    path = jsonl(tmp_path, empty, *[good_line(n) for n in range(9)], *[broken] * 4, empty)
    assert refusal(path) == (
        "rows.jsonl: 6 malformed rows: response is empty (2 rows: 1, 15); "
        "bad JSON (4 rows: 11, 12, 13, 14). Mend them."
    )


def test_the_error_survives_a_process_boundary(tmp_path: Path) -> None:
    with pytest.raises(MalformedRowsError) as caught:
        read(jsonl(tmp_path, b"{", good_line(1)))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert copy.bad_rows == (BadRow("rows.jsonl:1", "bad JSON"),)
    assert copy.exit_code == 3


def test_skip_counts_what_it_skips(tmp_path: Path) -> None:
    lines = [good_line(n) for n in range(9)]
    path = jsonl(tmp_path, *lines[:4], b"{", *lines[4:])
    found = read(path, on_bad_row="skip")
    assert [row.turns[0].content for row in found.rows] == [
        good(n)["instruction"] for n in range(9)
    ]
    assert found.bad_rows == (BadRow("rows.jsonl:5", "bad JSON"),)


def test_skip_gives_up_above_a_tenth(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *[good_line(n) for n in range(8)], b"{")
    assert refusal(path, on_bad_row="skip") == (
        "rows.jsonl: 1 of 9 rows are malformed, more than the 10% that data.on_bad_row=skip "
        "lets pass: bad JSON (1 row: 9). Mend it."
    )


SHORT = [(line, reason) for line, reason in KINDS if len(line) < 1000]
LONG = json.dumps(good(0) | {"context": "a" * 1000}).encode()
LINES = st.sampled_from([None, b"", b"  ", LONG, *[line for line, _ in SHORT]])


@settings(max_examples=600, deadline=None)
@given(st.lists(LINES, min_size=1, max_size=40))
def test_exactly_the_bad_lines_are_reported(lines: list[bytes | None]) -> None:
    """None stands for a good line; blank lines are neither good nor bad, yet count as lines."""
    # A byte order mark is allowed on the first line, so that line is always a good one.
    content = [good_line(0)] + [
        good_line(n) if line is None else line for n, line in enumerate(lines, start=1)
    ]
    reasons = dict(SHORT) | {LONG: "row of 0.0 MB (at most 0 MB)"}
    expected = tuple(
        BadRow(f"rows.jsonl:{number}", reasons[line])
        for number, line in enumerate(content, start=1)
        if line in reasons
    )
    total = sum(bool(line.strip()) for line in content)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "ROW_BYTES", 1000)
        check_bad_rows(jsonl(Path(folder), *content), expected, total)


def check_bad_rows(path: Path, expected: tuple[BadRow, ...], total: int) -> None:
    """Under either policy exactly these rows are reported; no more than a tenth is skipped."""
    for policy, fails in (("fail", bool(expected)), ("skip", 10 * len(expected) > total)):
        if fails:
            with pytest.raises(MalformedRowsError) as caught:
                read(path, format="dolly", on_bad_row=policy)
            assert caught.value.bad_rows == expected
            assert caught.value.exit_code == 3
            assert SECRET not in str(caught.value) and "\n" not in str(caught.value)
        else:
            found = read(path, format="dolly", on_bad_row=policy)
            assert found.bad_rows == expected
            assert len(found.rows) + found.duplicates == total - len(expected)


CSV_KINDS: dict[bytes, str] = {
    b"xyzzy": "1 field where the header has 2",
    b"xyzzy,b,c": "3 fields where the header has 2",
    b"xyzzy,\xff": "invalid UTF-8",
    b"xyzzy, ": "response is empty",
    b'"",xyzzy': "instruction is empty",
    b"xyzzy,\0": "response has a NUL character",
}


@settings(max_examples=250, deadline=None)
@given(st.lists(st.sampled_from([None, b"", *CSV_KINDS]), min_size=1, max_size=40))
def test_exactly_the_bad_rows_of_a_csv_file_are_reported(lines: list[bytes | None]) -> None:
    content = [b"q,a", *(b"q%d,a" % n if line is None else line for n, line in enumerate(lines))]
    expected = tuple(
        BadRow(f"rows.csv:{number}", CSV_KINDS[line])
        for number, line in enumerate(content, start=2)
        if line in CSV_KINDS
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        path.write_bytes(b"\n".join([b"instruction,response", *content]) + b"\n")
        check_bad_rows(path, expected, sum(bool(line) for line in content))


PARQUET_KINDS: dict[str | None, str] = {
    None: "response is null",
    " ": "response is empty",
    "xyzzy\0": "response has a NUL character",
}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["A", *PARQUET_KINDS]), min_size=1, max_size=40))
def test_exactly_the_bad_rows_of_a_parquet_file_are_reported(answers: list[str | None]) -> None:
    answers = ["A", *answers]
    expected = tuple(
        BadRow(f"rows.parquet row {number}", PARQUET_KINDS[answer])
        for number, answer in enumerate(answers, start=1)
        if answer in PARQUET_KINDS
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        asked = [f"xyzzy {n}" for n in range(len(answers))]
        pq.write_table(pa.table({"instruction": asked, "response": answers}), path)
        check_bad_rows(path, expected, len(answers))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (pa.array([1, 2]), "response must be text, is a number"),
        (pa.array([1.5, 2.5]), "response must be text, is a number"),
        (pa.array([True, False]), "response must be text, is true or false"),
        (pa.array([["a"], ["b"]]), "response must be text, is a list"),
        (pa.array([{"a": "b"}, {"a": "c"}]), "response must be text, is an object"),
        (pa.array([b"a", b"b"]), "response must be text, is of type bytes"),
    ],
)
def test_a_parquet_column_of_another_type(tmp_path: Path, values: Any, said: str) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"instruction": ["a", "b"], "response": values}), path)
    assert f"{said} (2 rows in all: 1, 2)" in refusal(path)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]))
def test_any_file_is_read_or_explained(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"rows{suffix}"
        path.write_bytes(content)
        try:
            read(path)
        except SlmLoraError as error:
            assert str(error).isprintable()  # noqa: PT017 - it may as well be read


# --- the same rows through every kind of file ------------------------------------------------


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8", newline="")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    ".jsonl": write_jsonl,
    ".json": write_json,
    ".csv": write_csv,
    ".parquet": write_parquet,
}
TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs", "Co"], exclude_characters="\0"),
        st.characters(min_codepoint=0xE000, max_codepoint=0xF8FF),
    )
)
FILLED = TEXT.filter(lambda text: bool(text.strip()))
ROW = st.fixed_dictionaries(
    {"instruction": FILLED, "context": TEXT, "response": FILLED, "category": TEXT}
)


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=8))
def test_ids_do_not_depend_on_the_file_format(rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = []
        for suffix, write in WRITERS.items():
            write(Path(folder) / f"rows{suffix}", rows)
            found.append(read(Path(folder) / f"rows{suffix}"))
        write_jsonl(Path(folder) / "rows.jsonl", rows[::-1])
        reversed_rows = read(Path(folder) / "rows.jsonl")
    ids = [[row.row_id for row in each.rows] for each in found]
    assert ids[0] == ids[1] == ids[2] == ids[3]
    assert set(ids[0]) == {row.row_id for row in reversed_rows.rows}
    assert {each.duplicates for each in found} == {len(rows) - len(ids[0])}


@pytest.mark.parametrize("suffix", WRITERS)
def test_text_arrives_whole(tmp_path: Path, suffix: str) -> None:
    text = ' "quoted", é\u2028\u0085 漢字 🙂\r\nnext\rlast\x0b '
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, [{"instruction": text, "response": text}])
    (row,) = read(path).rows
    assert row.turns[0].content == row.turns[1].content == text.replace("\r\n", "\n")


@pytest.mark.parametrize("suffix", WRITERS)
def test_numbers_in_sources(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, [good(1), good(2)])
    first = 2 if suffix == ".csv" else 1  # lines of a CSV file begin with the header
    unit = {".json": " item ", ".parquet": " row "}.get(suffix, ":")
    assert [row.source for row in read(path).rows] == [
        f"rows{suffix}{unit}{first}",
        f"rows{suffix}{unit}{first + 1}",
    ]


@pytest.mark.parametrize("suffix", WRITERS)
def test_no_rows(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    else:
        path.write_text("[]" if suffix == ".json" else "text\n" if suffix == ".csv" else "\n\n")
    with pytest.raises(DataError, match=f"^rows{suffix}: no rows$"):
        read(path)
    if suffix != ".parquet":
        path.write_bytes(b"")
        with pytest.raises(DataError, match=f"^rows{suffix}: no rows$"):
            read(path)


def test_exact_duplicates_are_left_out_and_counted(tmp_path: Path) -> None:
    path = jsonl(tmp_path, good_line(1), good_line(2), good_line(1), good_line(1))
    found = read(path)
    assert [row.source for row in found.rows] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert found.duplicates == 2


def test_origin_is_the_same_on_every_machine(tmp_path: Path) -> None:
    path = jsonl(tmp_path, good_line(1))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read(path).origin == f"rows.jsonl sha256:{digest}"


# --- JSONL -------------------------------------------------------------------------------------


def test_line_ends_and_a_mark_at_the_start(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + good_line(1) + b"\r\n\r\n" + good_line(2))
    assert [row.source for row in read(path).rows] == ["rows.jsonl:1", "rows.jsonl:3"]


def test_a_stray_row_does_not_change_the_format(tmp_path: Path) -> None:
    stray = b'{"text": "a"}'
    path = jsonl(tmp_path, stray, *[good_line(n) for n in range(10)])
    found = read(path, on_bad_row="skip")
    assert found.format == "dolly"
    assert found.bad_rows == (BadRow("rows.jsonl:1", "instruction is missing"),)


def test_a_rare_label_may_be_mapped(tmp_path: Path) -> None:
    labelled = json.dumps(good(0) | {"topic": "sums"}).encode()
    path = jsonl(tmp_path, labelled, *[good_line(n) for n in range(1, 5)])
    found = read(path, columns={"category": "topic"})
    assert [row.category for row in found.rows] == ["sums", "", "", "", ""]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_prompt_and_completion_as_messages_are_a_chat(tmp_path: Path, suffix: str) -> None:
    row = {
        "prompt": [{"role": "user", "content": "Q"}],
        "completion": [{"role": "assistant", "content": "A"}],
    }
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, [row])
    found = read(path)
    assert found.format == "chat"
    assert [turn.content for turn in found.rows[0].turns] == ["Q", "A"]


@pytest.mark.parametrize("suffix", WRITERS)
def test_rows_with_their_rendered_text_beside_them(tmp_path: Path, suffix: str) -> None:
    """Alpaca is published with a fourth column, the other three put into a prompt."""
    row = {"instruction": "Q", "input": "C", "output": "A", "text": "Below is: Q, C. Reply: A"}
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, [row])
    found = read(path)
    assert found.format == "alpaca"
    assert [turn.content for turn in found.rows[0].turns] == ["Q", "A"]
    assert found.rows[0].context == "C"


def test_chats_that_end_on_a_question_are_bad_rows(tmp_path: Path) -> None:
    question = {"role": "user", "content": SECRET}
    answer = {"role": "assistant", "content": "A"}
    path = tmp_path / "rows.jsonl"
    write_jsonl(
        path, [{"messages": [question, answer]}, {"messages": [question, answer, question]}]
    )
    assert refusal(path).startswith("rows.jsonl:2: the last turn is not the assistant's. Mend it")


# --- JSON --------------------------------------------------------------------------------------


def test_items_of_a_json_list_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    items = [good_line(1), b'{"instruction": "xyzzy", "response": NaN}', b"3", good_line(2)]
    items.append(b'{"response": "xyzzy", "response": "b"}')
    path.write_bytes(b"\xef\xbb\xbf [\n" + b" ,\n".join(items) + b"]\n")
    assert refusal(path) == (
        "rows.json: 3 malformed rows: NaN is not JSON (1 row: 2); not a JSON object (1 row: 3); "
        "duplicate key 'response' (1 row: 5). Mend them."
    )


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('[\n{"text": "xyzzy"}\n{"text": "b"}]', 3),
        ('[\n{"text": "xyzzy"},\n]', 3),
        ('[{"text": "xyzzy"}]\n\nxyzzy', 1),
        ('[\n{"text": "xyzzy', 2),
        ('[\n{"text": "xyzzy"}', 2),
        ("[" * 100_000, 1),
        ("[,]", 1),
        ("[", 1),
    ],
)
def test_a_broken_json_list_is_refused_whole(tmp_path: Path, content: str, line: int) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    assert refusal(path, on_bad_row="skip") == f"rows.json:{line}: bad JSON; mend the file"


def test_json_that_is_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'[\n{"text": "xyzzy\xff"}]')
    assert "the file looks like Windows-1252; save it as UTF-8" in refusal(path)
    path.write_bytes('[\n{"text": "é'.encode() + b'xyzzy\xff"}]')
    assert refusal(path) == "rows.json:2: invalid UTF-8. Mend it."


# --- CSV ---------------------------------------------------------------------------------------


def test_csv_rows_are_named_by_the_line_they_begin_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(
        b"\xef\xbb\xbfinstruction,response\r\n"
        b'"two\r\nlines",a\r\n'
        b"xyzzy\r\n"  # line 4
        b"\r\n"
        b"xyzzy,b,c\r\n"  # line 6
        b"xyzzy,\xff\r\n"  # line 7
        b"xyzzy,\r\n"  # line 8
        b"q,a\r\n"
    )
    with pytest.raises(MalformedRowsError) as caught:
        read(path)
    assert SECRET not in str(caught.value)
    assert [(bad.source, bad.reason) for bad in caught.value.bad_rows] == [
        ("rows.csv:4", "1 field where the header has 2"),
        ("rows.csv:6", "3 fields where the header has 2"),
        ("rows.csv:7", "invalid UTF-8"),
        ("rows.csv:8", "response is empty"),
    ]


def test_csv_that_cannot_be_taken_apart_is_refused_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text\na\n"xyzzy\nb\n')
    assert refusal(path, on_bad_row="skip").startswith("rows.csv:3: broken CSV")
    path.write_text('text\na\n"xyzzy" b\n')
    assert refusal(path, on_bad_row="skip").startswith("rows.csv:3: broken CSV")
    path.write_text("text,text\na,b\n")
    assert refusal(path) == "rows.csv:1: two columns have the same name"


def test_a_long_csv_field_is_read_and_the_limit_put_back(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = tmp_path / "rows.csv"
    write_csv(path, [{"text": "a" * (before + 1)}])
    assert len(read(path).rows[0].turns[0].content) == before + 1
    write_csv(path, [{"text": "a" * 10_600_000}, {"text": "b"}])
    assert refusal(path).startswith("rows.csv:2: row of 10.6 MB")
    assert csv.field_size_limit() == before


# --- Parquet -----------------------------------------------------------------------------------


def test_parquet_types_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"instruction": ["a", "b"], "response": [1, None]}), path)
    assert refusal(path) == (
        "rows.parquet: 2 malformed rows: response must be text, is a number (1 row: 1); "
        "response is null (1 row: 2). Mend them."
    )


def test_parquet_text_that_is_no_utf8_is_a_bad_row(tmp_path: Path) -> None:
    values = pa.array([b"a", b"xyzzy\xff", b"c"], pa.binary())
    invalid = pa.StringArray.from_buffers(3, values.buffers()[1], values.buffers()[2])
    pq.write_table(pa.table({"text": invalid}), tmp_path / "rows.parquet")
    message = refusal(tmp_path / "rows.parquet")
    assert message.startswith("rows.parquet row 2: invalid UTF-8. Mend it")


def test_parquet_decodes_only_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    beyond_python = pa.array([2**62], pa.timestamp("ms"))
    pq.write_table(pa.table({"text": ["a"], "seen": beyond_python}), path)
    assert len(read(path).rows) == 1
    pq.write_table(pa.table({"text": ["a"], "category": beyond_python}), path)
    assert refusal(path).startswith("rows.parquet row 1: a value cannot be read. Mend it")
    pq.write_table(pa.table({"question": ["a"]}), path)
    assert "columns seen: question" in refusal(path)


def test_broken_parquet(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"xyzzy" * 100)
    assert refusal(path).startswith("rows.parquet: broken, or not a Parquet file")
    write_parquet(path, [good(n) for n in range(100)])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert refusal(path).startswith("rows.parquet: broken, or not a Parquet file")
    refused = 0
    for position in range(0, len(whole), 23):
        path.write_bytes(whole[:position] + b"\xff" * 4 + whole[position + 4 :])
        try:
            read(path)
        except DataError:  # anything else is a traceback
            refused += 1
    assert refused > 10


# --- names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["rows.jsonl", "data/rows.csv", "./rows", "/a/b", "a/b/c", "set", "~nobody/x", "x" * 5000],
)
def test_no_such_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"no such file: data.name={name} "):
        read_rows(DataSection(name=name))


def test_names_that_are_no_row_files(tmp_path: Path) -> None:
    assert "is a folder without files that are read" in refusal(tmp_path)
    (tmp_path / "rows.foo").write_bytes(b"")
    assert ".jsonl, .ndjson, .json, .csv" in refusal(tmp_path / "rows.foo")


def test_a_file_that_cannot_be_read_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path, good_line(1))

    def denied(*_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(storage, "sha256_file", denied)
    with pytest.raises(StorageError, match=r"cannot read .*: Permission denied"):
        read(path)


# --- the hub -----------------------------------------------------------------------------------

COMMIT, OTHER = "a1" * 20, "b2" * 20
# What the hub's HTTP library raises without a network; which library it is depends on versions.
TRANSPORT_ERROR = next(
    base for base in hub_errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"
)


def stand_in_hub(
    monkeypatch: pytest.MonkeyPatch,
    load: Callable[..., Any],
    info_error: Exception | None = None,
    offline: bool = False,
) -> list[tuple[Any, ...]]:
    """A hub whose every revision is COMMIT; returns the list of questions it gets."""
    asked: list[tuple[Any, ...]] = []

    class Api:
        def dataset_info(self, name: str, revision: str | None, timeout: float) -> Any:
            asked.append((name, revision, timeout))
            if info_error:
                raise info_error
            return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    return asked


def test_hub_rows_carry_commit_and_index(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(name: str, **options: Any) -> Any:
        calls.append((name, options["revision"], options["split"]))
        return datasets.Dataset.from_list([good(1) | {"id": 1}, good(2) | {"id": 2}])

    asked = stand_in_hub(monkeypatch, load)
    found = read_rows(DataSection(name="owner/set", revision="main", split="train[:2]"))
    assert asked == [("owner/set", "main", hub.HUB_TIMEOUT)]
    assert calls == [("owner/set", COMMIT, "train[:2]")]
    assert found.origin == f"owner/set@{COMMIT} split=train[:2]"
    assert [row.source for row in found.rows] == ["owner/set row 0", "owner/set row 1"]
    assert found.format == "dolly"


def test_hub_rows_follow_a_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [good(n) for n in range(5)]
    whole = datasets.Dataset.from_list(rows)
    stand_in_hub(monkeypatch, lambda *_, **__: whole.select([3, 1]))
    found = read_rows(DataSection(name="owner/set"))
    assert [row.turns[0].content for row in found.rows] == [
        rows[3]["instruction"],
        rows[1]["instruction"],
    ]


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("load_dataset retries for half a minute without a network")


def http_error(kind: type[Exception], status: int) -> Exception:
    error = kind.__new__(kind)
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (TRANSPORT_ERROR("no route"), "no network for hub data set owner/set: give a local"),
        (ConnectionError("no route"), "no network for hub data set owner/set: give a local file"),
        (TimeoutError(), "no network for hub data set owner/set"),
        (http_error(hub_errors.GatedRepoError, 403), "is gated: accept its terms"),
        (http_error(hub_errors.RepositoryNotFoundError, 401), "was not found"),
        (http_error(hub_errors.RevisionNotFoundError, 404), "has no revision 'v9'"),
        (http_error(hub_errors.HfHubHTTPError, 503), "the hub answered 503"),
        (OSError(28, "No space left on device"), "cannot be stored: No space left on device"),
    ],
)
def test_hub_failures(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    stand_in_hub(monkeypatch, never, info_error=error)
    with pytest.raises(StorageError) as caught:
        read_rows(DataSection(name="owner/set", revision="v9"))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hub_data_that_cannot_be_read_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise ValueError('Unknown split "trian". Should be one of ["train"].\nxyzzy')

    stand_in_hub(monkeypatch, load)
    with pytest.raises(
        DataError, match='owner/set cannot be read: Unknown split "trian"'
    ) as caught:
        read_rows(DataSection(name="owner/set", split="trian"))
    assert SECRET not in str(caught.value)


def test_a_bug_is_not_explained_away(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in_hub(monkeypatch, never)
    with pytest.raises(AssertionError):
        read_rows(DataSection(name="owner/set"))


def test_offline_without_a_copy_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    asked = stand_in_hub(monkeypatch, datasets.load_dataset, offline=True)
    with pytest.raises(StorageError, match=r"owner/set is not in the cache.*data\.name=path"):
        read_rows(DataSection(name="owner/set"))
    assert asked == []


def cached_copy(folder: Path, commit: str) -> Callable[..., Any]:
    datasets.Dataset.from_list([good(1)]).save_to_disk(folder / commit)
    return lambda *_, **__: datasets.load_from_disk(folder / commit)


def test_another_commit_from_the_cache_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`load_dataset` hides a failed download behind whatever it has in its cache."""
    load = cached_copy(tmp_path, OTHER)
    stand_in_hub(monkeypatch, load)
    with pytest.raises(StorageError, match=f"cache as commit {OTHER}.*{COMMIT}"):
        read_rows(DataSection(name="owner/set"))
    stand_in_hub(monkeypatch, load, offline=True)
    with pytest.raises(StorageError, match=f"data.revision={OTHER}"):
        read_rows(DataSection(name="owner/set", revision="v1"))


def test_offline_the_cached_commit_is_the_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in_hub(monkeypatch, cached_copy(tmp_path, OTHER), offline=True)
    for revision in (None, OTHER):
        found = read_rows(DataSection(name="owner/set", revision=revision))
        assert found.origin == f"owner/set@{OTHER} split=train"


# --- ml-qa -------------------------------------------------------------------------------------


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stands in for the module that builds the embedded set; returns the paths it wrote."""
    written: list[Path] = []

    def write_jsonl_file(path: Path) -> None:
        written.append(path)
        write_jsonl(path, [good(n) | {"category": "what", "group": f"g{n}"} for n in range(3)])

    module = ModuleType("slm_lora.data.ml_qa")
    module.write_jsonl = write_jsonl_file  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "slm_lora.data.ml_qa", module)
    monkeypatch.setattr(slm_lora.data, "ml_qa", module, raising=False)
    monkeypatch.setenv("SLM_LORA_CACHE", str(tmp_path / "cache"))
    return written


def test_ml_qa_is_built_once_and_read(builder: list[Path], tmp_path: Path) -> None:
    found = read_rows(DataSection())
    again = read_rows(DataSection())
    assert len(builder) == 1
    assert found == again
    assert found.format == "dolly"
    assert [row.source for row in found.rows] == ["ml-qa:1", "ml-qa:2", "ml-qa:3"]
    assert [row.group_hint for row in found.rows] == ["g0", "g1", "g2"]
    assert found.origin.startswith("ml-qa sha256:")
    assert "scikit-learn=" in found.origin
    assert str(tmp_path) not in found.origin
    assert [path.name for path in (tmp_path / "cache/data").iterdir()] == [ensure_ml_qa().name]


def test_ml_qa_of_other_versions_is_built_anew(
    builder: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ensure_ml_qa()
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "99.1")
    assert ensure_ml_qa() != first
    assert len(builder) == 2


def test_ml_qa_names_the_library_that_is_missing(
    builder: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "_ML_QA_BUILT_FROM", ("no-such-library",))
    with pytest.raises(UsageError, match="pip install no-such-library"):
        read_rows(DataSection())
    assert builder == []


# --- the real thing ----------------------------------------------------------------------------

DOLLY = Path(__file__).resolve().parents[3] / "shared/data/databricks-dolly-15k.jsonl"


@pytest.mark.skipif(not DOLLY.exists(), reason=f"Dolly is not beside the repository: {DOLLY.name}")
def test_dolly_is_read_whole() -> None:
    found = read(DOLLY)
    assert len(found.rows) == 14_996
    assert (found.format, found.duplicates, found.bad_rows) == ("dolly", 0, ())
    assert "/" not in found.origin
