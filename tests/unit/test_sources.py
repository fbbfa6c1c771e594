"""Rows from files, the hub and the embedded set; malformed rows are reported by line."""

from __future__ import annotations

import csv
import gzip
import hashlib
import importlib.metadata
import io
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
from slm_lora.config.schema import DataSection
from slm_lora.data import hub, sources, table
from slm_lora.data.sources import BadRow, MalformedRowsError, RowSet, ensure_ml_qa, read_rows
from slm_lora.errors import DataError, SlmLoraError, StorageError, UsageError
from slm_lora.runtime import checksums

SECRET = "xyzzy"
"""Text of malformed rows, which must not appear in messages."""


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


# --- malformed rows, by kind -------------------------------------------------------------------

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
def test_malformed_line_is_refused_with_its_reason(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = jsonl(tmp_path, good_line(1), line, *[good_line(n) for n in range(2, 11)])
    expected = f"rows.jsonl:2: {reason}. Fix it, or set data.on_bad_row=skip."
    if b"\xff" in line:
        expected = (
            "rows.jsonl:2: invalid UTF-8, in 1 of 11 rows: the file looks like Windows-1252; "
            "save it as UTF-8"
        )
    assert refusal(path) == expected


def test_a_row_over_the_size_limit_is_malformed(tmp_path: Path) -> None:
    long = json.dumps({"instruction": "q", "response": "é" * 6_150_000}, ensure_ascii=False)
    path = jsonl(tmp_path, good_line(1), long.encode(), good_line(2))
    assert refusal(path).startswith("rows.jsonl:2: row of 12.3 MB (at most 10 MB). Fix")


def test_row_of_exactly_the_size_limit_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = good_line(1)
    monkeypatch.setattr(table, "ROW_BYTES", len(line))
    assert len(read(jsonl(tmp_path, line)).rows) == 1
    monkeypatch.setattr(table, "ROW_BYTES", len(line) - 1)
    with pytest.raises(MalformedRowsError) as caught:
        read(jsonl(tmp_path, line, good_line(2)))
    assert [bad.source for bad in caught.value.bad_rows] == ["rows.jsonl:1", "rows.jsonl:2"]


def test_rows_with_one_fault_are_listed_by_line(tmp_path: Path) -> None:
    empty = b'{"instruction": "q", "response": ""}'
    path = jsonl(tmp_path, good_line(1), empty, good_line(2), empty, empty)
    assert refusal(path) == ("rows.jsonl:2: response is empty (3 rows in all: 2, 4, 5). Fix them.")


def test_malformed_rows_are_counted_by_kind(tmp_path: Path) -> None:
    empty, broken = b'{"instruction": "q", "response": ""}', b"{"
    path = jsonl(tmp_path, empty, *[good_line(n) for n in range(9)], *[broken] * 4, empty)
    assert refusal(path) == (
        "rows.jsonl: 6 malformed rows: response is empty (2 rows: 1, 15); "
        "bad JSON (4 rows: 11, 12, 13, 14). Fix them."
    )


def test_data_error_survives_pickling(tmp_path: Path) -> None:
    with pytest.raises(MalformedRowsError) as caught:
        read(jsonl(tmp_path, b"{", good_line(1)))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert copy.bad_rows == (BadRow("rows.jsonl:1", "bad JSON"),)
    assert copy.exit_code == 3


def test_on_bad_row_skip_counts_skipped_rows(tmp_path: Path) -> None:
    lines = [good_line(n) for n in range(9)]
    path = jsonl(tmp_path, *lines[:4], b"{", *lines[4:])
    row_set = read(path, on_bad_row="skip")
    assert [row.turns[0].content for row in row_set.rows] == [
        good(n)["instruction"] for n in range(9)
    ]
    assert row_set.bad_rows == (BadRow("rows.jsonl:5", "bad JSON"),)


def test_on_bad_row_skip_fails_above_a_tenth(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *[good_line(n) for n in range(8)], b"{")
    assert refusal(path, on_bad_row="skip") == (
        "rows.jsonl: 1 of 9 rows are malformed, more than the 10% that data.on_bad_row=skip "
        "lets pass: bad JSON (1 row: 9). Fix it."
    )


SHORT = [(line, reason) for line, reason in KINDS if len(line) < 1000]
LONG = json.dumps(good(0) | {"context": "a" * 1000}).encode()
LINES = st.sampled_from([None, b"", b"  ", LONG, *[line for line, _ in SHORT]])


@settings(max_examples=600, deadline=None)
@given(st.lists(LINES, min_size=1, max_size=40))
def test_exactly_the_bad_lines_of_a_jsonl_file_are_reported(lines: list[bytes | None]) -> None:
    """None is a good line; blank lines are neither good nor bad, but count as lines."""
    # A byte order mark is allowed on the first line, so that line is always good.
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
    """Check that both policies report exactly these rows, and skip at most a tenth."""
    for policy, fails in (("fail", bool(expected)), ("skip", 10 * len(expected) > total)):
        if fails:
            with pytest.raises(MalformedRowsError) as caught:
                read(path, format="dolly", on_bad_row=policy)
            assert caught.value.bad_rows == expected
            assert caught.value.exit_code == 3
            assert SECRET not in str(caught.value) and "\n" not in str(caught.value)
        else:
            row_set = read(path, format="dolly", on_bad_row=policy)
            assert row_set.bad_rows == expected
            assert len(row_set.rows) + row_set.duplicates == total - len(expected)


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
        questions = [f"xyzzy {n}" for n in range(len(answers))]
        pq.write_table(pa.table({"instruction": questions, "response": answers}), path)
        check_bad_rows(path, expected, len(answers))


@pytest.mark.parametrize(
    ("values", "fragment"),
    [
        (pa.array([1, 2]), "response must be text, is a number"),
        (pa.array([1.5, 2.5]), "response must be text, is a number"),
        (pa.array([True, False]), "response must be text, is true or false"),
        (pa.array([["a"], ["b"]]), "response must be text, is a list"),
        (pa.array([{"a": "b"}, {"a": "c"}]), "response must be text, is an object"),
        (pa.array([b"a", b"b"]), "response must be text, is of type bytes"),
    ],
)
def test_parquet_column_of_another_type_is_refused(
    tmp_path: Path, values: Any, fragment: str
) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"instruction": ["a", "b"], "response": values}), path)
    assert f"{fragment} (2 rows in all: 1, 2)" in refusal(path)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=100).map(lambda text: text.encode("utf-16", "surrogatepass")),
        st.recursive(
            st.one_of(st.none(), st.booleans(), st.integers(), st.sampled_from(["", "A", "é"])),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3),
                st.dictionaries(
                    st.sampled_from(["instruction", "response", "messages", "text", "data", "x"]),
                    inner,
                    max_size=3,
                ),
            ),
            max_leaves=8,
        ).map(lambda value: json.dumps(value, ensure_ascii=False).encode()),
    ),
    st.sampled_from([".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet"]),
    st.booleans(),
)
def test_any_data_file_is_read_or_explained(content: bytes, suffix: str, compressed: bool) -> None:
    if compressed:
        content, suffix = gzip.compress(content), f"{suffix}.gz"
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
def test_row_ids_do_not_depend_on_the_file_format(rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        row_sets = []
        for suffix, write in WRITERS.items():
            write(Path(folder) / f"rows{suffix}", rows)
            row_sets.append(read(Path(folder) / f"rows{suffix}"))
        write_jsonl(Path(folder) / "rows.jsonl", rows[::-1])
        reversed_rows = read(Path(folder) / "rows.jsonl")
    ids = [[row.row_id for row in row_set.rows] for row_set in row_sets]
    assert ids[0] == ids[1] == ids[2] == ids[3]
    assert set(ids[0]) == {row.row_id for row in reversed_rows.rows}
    assert {row_set.duplicates for row_set in row_sets} == {len(rows) - len(ids[0])}


@pytest.mark.parametrize("suffix", WRITERS)
def test_row_text_is_read_unchanged(tmp_path: Path, suffix: str) -> None:
    text = ' "quoted", é\u2028\u0085 漢字 🙂\r\nnext\rlast\x0b '
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, [{"instruction": text, "response": text}])
    (row,) = read(path).rows
    assert row.turns[0].content == row.turns[1].content == text.replace("\r\n", "\n")


@pytest.mark.parametrize("suffix", WRITERS)
def test_row_sources_have_line_item_or_row_numbers(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, [good(1), good(2)])
    first = 2 if suffix == ".csv" else 1  # lines of a CSV file begin with the header
    unit = {".json": " item ", ".parquet": " row "}.get(suffix, ":")
    assert [row.source for row in read(path).rows] == [
        f"rows{suffix}{unit}{first}",
        f"rows{suffix}{unit}{first + 1}",
    ]


@pytest.mark.parametrize("suffix", WRITERS)
def test_file_without_rows_is_refused(tmp_path: Path, suffix: str) -> None:
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
    row_set = read(path)
    assert [row.source for row in row_set.rows] == ["rows.jsonl:1", "rows.jsonl:2"]
    assert row_set.duplicates == 2


def test_data_origin_is_the_same_on_every_machine(tmp_path: Path) -> None:
    path = jsonl(tmp_path, good_line(1))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert read(path).origin == f"rows.jsonl sha256:{digest}"


# --- JSONL -------------------------------------------------------------------------------------


def test_byte_order_mark_and_crlf_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + good_line(1) + b"\r\n\r\n" + good_line(2))
    assert [row.source for row in read(path).rows] == ["rows.jsonl:1", "rows.jsonl:3"]


def test_a_stray_row_does_not_change_the_format(tmp_path: Path) -> None:
    stray = b'{"text": "a"}'
    path = jsonl(tmp_path, stray, *[good_line(n) for n in range(10)])
    row_set = read(path, on_bad_row="skip")
    assert row_set.format == "dolly"
    assert row_set.bad_rows == (BadRow("rows.jsonl:1", "instruction is missing"),)


def test_a_rare_label_may_be_mapped(tmp_path: Path) -> None:
    labelled = json.dumps(good(0) | {"topic": "sums"}).encode()
    path = jsonl(tmp_path, labelled, *[good_line(n) for n in range(1, 5)])
    row_set = read(path, columns={"category": "topic"})
    assert [row.category for row in row_set.rows] == ["sums", "", "", "", ""]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_prompt_and_completion_as_messages_are_a_chat(tmp_path: Path, suffix: str) -> None:
    row = {
        "prompt": [{"role": "user", "content": "Q"}],
        "completion": [{"role": "assistant", "content": "A"}],
    }
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, [row])
    row_set = read(path)
    assert row_set.format == "chat"
    assert [turn.content for turn in row_set.rows[0].turns] == ["Q", "A"]


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_column_of_rendered_text_is_ignored(tmp_path: Path, suffix: str) -> None:
    """Alpaca is published with a fourth column: a prompt rendered from the other three."""
    row = {"instruction": "Q", "input": "C", "output": "A", "text": "Below is: Q, C. Generation: A"}
    path = tmp_path / f"rows{suffix}"
    WRITERS[suffix](path, [row])
    row_set = read(path)
    assert row_set.format == "alpaca"
    assert [turn.content for turn in row_set.rows[0].turns] == ["Q", "A"]
    assert row_set.rows[0].context == "C"


def test_chats_that_end_on_a_question_are_bad_rows(tmp_path: Path) -> None:
    question = {"role": "user", "content": SECRET}
    answer = {"role": "assistant", "content": "A"}
    path = tmp_path / "rows.jsonl"
    write_jsonl(
        path, [{"messages": [question, answer]}, {"messages": [question, answer, question]}]
    )
    assert refusal(path).startswith("rows.jsonl:2: the last turn is not the assistant's. Fix it")


# --- JSON --------------------------------------------------------------------------------------


def test_items_of_a_json_list_are_numbered(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    items = [good_line(1), b'{"instruction": "xyzzy", "response": NaN}', b"3", good_line(2)]
    items.append(b'{"response": "xyzzy", "response": "b"}')
    path.write_bytes(b"\xef\xbb\xbf [\n" + b" ,\n".join(items) + b"]\n")
    assert refusal(path) == (
        "rows.json: 3 malformed rows: NaN is not JSON (1 row: 2); not a JSON object (1 row: 3); "
        "duplicate key 'response' (1 row: 5). Fix them."
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
    assert refusal(path, on_bad_row="skip") == f"rows.json:{line}: bad JSON; fix the file"


def test_json_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(b'[\n{"text": "xyzzy\xff"}]')
    assert "the file looks like Windows-1252; save it as UTF-8" in refusal(path)
    path.write_bytes('[\n{"text": "é'.encode() + b'xyzzy\xff"}]')
    assert refusal(path) == "rows.json:2: invalid UTF-8. Fix it."


ROWS = [good(n) for n in range(12)]


def pretty_json(value: Any) -> str:
    return json.dumps(value, indent=1)


JSON_LAYOUTS: dict[str, str] = {
    "a list": pretty_json(ROWS),
    "one object a line": "".join(json.dumps(row) + "\n" for row in ROWS),
    "with a byte order mark": "\ufeff" + "".join(json.dumps(row) + "\r\n" for row in ROWS),
    "objects one after the other": "\n".join(map(pretty_json, ROWS)),
    "a list below a key": pretty_json({"version": 1, "data": ROWS, "tags": ["a"]}),
    "below any key": json.dumps({"examples": ROWS}),
    "columns": pretty_json({name: [row[name] for row in ROWS] for name in ROWS[0]}),
    "columns by row number": pretty_json(
        {name: {str(n): row[name] for n, row in enumerate(ROWS)} for name in ROWS[0]}
    ),
    "rows by their number": pretty_json({str(n): row for n, row in enumerate(ROWS)}),
    "split": pretty_json(
        {"columns": list(ROWS[0]), "index": [0], "data": [list(row.values()) for row in ROWS]}
    ),
    "table": pretty_json({"schema": {"fields": []}, "data": ROWS}),
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".ndjson", ".json.gz", ".JSONL.GZ"])
@pytest.mark.parametrize("shape", JSON_LAYOUTS)
def test_json_layouts_of_common_tools_are_read(tmp_path: Path, shape: str, suffix: str) -> None:
    path, content = tmp_path / f"rows{suffix}", JSON_LAYOUTS[shape].encode()
    path.write_bytes(gzip.compress(content) if suffix.lower().endswith(".gz") else content)
    if suffix not in (".json", ".json.gz") and shape in ("below any key", "one line"):
        # A line of JSON lines: an object without a known column.
        assert "columns seen: " in refusal(path)
        return
    row_set = read(path)
    assert [row.turns[0].content for row in row_set.rows] == [row["instruction"] for row in ROWS]
    assert row_set.bad_rows == ()


def test_a_chat_in_json_is_one_row_or_columns(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    path = tmp_path / "rows.json"
    for value, rows in (({"messages": chat}, 1), ({"messages": [chat, chat[1:]]}, 2),
                        ({"data": [{"messages": chat}]}, 1)):  # fmt: skip
        path.write_text(pretty_json(value))
        assert (len(read(path).rows), read(path).format) == (rows, "chat")


def test_bad_items_of_a_wrapped_list_are_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    items = [json.dumps(row) for row in ROWS]
    items[4] = '{"instruction": "xyzzy", "response": NaN}'
    path.write_text(f'{{"n": 1, "rows": [{", ".join(items)}], "m": {{}}}}')
    assert refusal(path).startswith("rows.json item 5: NaN is not JSON. Fix it, or set")
    row_set = read(path, on_bad_row="skip")
    assert row_set.bad_rows == (BadRow("rows.json item 5", "NaN is not JSON"),)
    assert row_set.notes == ("rows.json: its list rows is read; 2 keys beside it are not",)


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (pretty_json({"train": ROWS, "test": ROWS}), "holds several lists of rows (train, test)"),
        (
            pretty_json({"data": {"rows": ROWS}}),
            "neither a row nor a list of rows (its keys: data)",
        ),
        (pretty_json({"instruction": ["a"], "response": []}), "columns of different lengths"),
        ("{}", "neither a row nor a list of rows (its keys: none)"),
        ("3", "not a list of objects"),
        ('{"data": [{"text": "xyzzy"},]}', "rows.json:1: bad JSON; fix the file"),
        ('{"a": "xyzzy"}\n\n[3]', "rows.json"),
    ],
)
def test_json_of_unknown_layout_is_refused(tmp_path: Path, content: str, fragment: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    assert fragment in refusal(path)


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


def test_broken_csv_is_refused_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('text\na\n"xyzzy\nb\n')
    assert refusal(path, on_bad_row="skip").startswith("rows.csv:3: broken CSV")
    path.write_text('text\na\n"xyzzy" b\n')
    assert refusal(path, on_bad_row="skip").startswith("rows.csv:3: broken CSV")
    path.write_text("text,text\na,b\n")
    assert refusal(path) == "rows.csv:1: two columns have the same name"


def test_a_long_csv_field_is_read_and_the_limit_restored(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    path = tmp_path / "rows.csv"
    write_csv(path, [{"text": "a" * (before + 1)}])
    assert len(read(path).rows[0].turns[0].content) == before + 1
    write_csv(path, [{"text": "a" * 10_600_000}, {"text": "b"}])
    assert refusal(path).startswith("rows.csv:2: row of 10.6 MB")
    assert csv.field_size_limit() == before


EXCEL = [{"instruction": 'Say "é"; or, so.', "response": f"Line {n}\nand so\t."} for n in range(12)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(("suffix", "separator"), [
    (".csv", ","), (".csv", ";"), (".csv", "\t"), (".tsv", "\t"), (".TSV", "\t"), (".csv.gz", ";"),
])  # fmt: skip
@pytest.mark.parametrize("sep", [False, True])
def test_csv_in_the_encodings_and_separators_of_spreadsheets_is_read(
    tmp_path: Path, encoding: str, suffix: str, separator: str, sep: bool
) -> None:
    lines = io.StringIO(newline="")
    writer = csv.DictWriter(lines, list(EXCEL[0]), delimiter=separator)
    writer.writeheader()
    writer.writerows(EXCEL)
    text = (f"sep={separator}\r\n" if sep else "") + lines.getvalue()
    path, content = tmp_path / f"rows{suffix}", text.encode(encoding)
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    row_set = read(path)
    assert [(row.turns[0].content, row.turns[1].content) for row in row_set.rows] == [
        tuple(row.values()) for row in EXCEL
    ]
    assert row_set.rows[0].source == f"rows{suffix}:{2 + sep}"
    assert bool(row_set.notes) == (separator != ",")


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (b"instruction,response,,\na,b,,\n", "rows.tsv:1: two columns have no name"),
        (b"instruction, response\na, b\n", "columns seen: ' response', instruction"),
        (b'instruction\tresponse\n"q" xyzzy\tb\n', "rows.tsv:2: broken CSV ('a tab' expected"),
        ("Über;Antwort\na;b\n".encode("cp1252"), "rows.tsv:1: invalid UTF-8"),
    ],
)
def test_headers_and_quotes_that_are_wrong_are_named(
    tmp_path: Path, content: bytes, fragment: str
) -> None:
    path = tmp_path / "rows.tsv"
    path.write_bytes(content)
    assert fragment in refusal(path) and refusal(path).isprintable()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".txt", ".json"])
def test_windows_1252_is_detected(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    rows = [{"text": f"Caf\xe9 {n}, “so”."} for n in range(12)]
    {".txt": lambda p, r: p.write_text("\n".join(e["text"] for e in r)),
     ".jsonl": lambda p, r: p.write_text("\n".join(json.dumps(e, ensure_ascii=False) for e in r)),
     }.get(suffix, WRITERS.get(suffix))(path, rows)  # type: ignore[misc]  # fmt: skip
    path.write_bytes(path.read_text(encoding="utf-8").encode("cp1252"))
    for policy in ("fail", "skip"):
        message = refusal(path, on_bad_row=policy)
        assert "the file looks like Windows-1252; save it as UTF-8" in message
        assert len(message) < 200
    # one broken row in a UTF-8 file is a bad row
    path.write_bytes("Café\n".encode() + b"caf\xe9\n")
    if suffix == ".txt":
        assert refusal(path) == "rows.txt:2: invalid UTF-8. Fix it."


# --- text --------------------------------------------------------------------------------------


def test_text_is_read_by_paragraphs_or_lines(tmp_path: Path) -> None:
    def texts(path: Path, **options: Any) -> list[tuple[str, str]]:
        return [(row.source, row.turns[0].content) for row in read(path, **options).rows]

    path = tmp_path / "rows.txt"
    path.write_bytes(b"\xef\xbb\xbf\n One,\r\ntwo.\r\n \t\r\n\r\nThree\xe2\x80\xa8.\nfour\n\n")
    paragraphs = [("rows.txt:2", " One,\ntwo."), ("rows.txt:6", "Three\u2028.\nfour")]
    lines = [("rows.txt:2", " One,"), ("rows.txt:3", "two."), ("rows.txt:6", "Three\u2028."),
             ("rows.txt:7", "four")]  # fmt: skip
    assert texts(path) == texts(path, text_rows="paragraphs") == paragraphs
    assert texts(path, text_rows="lines") == lines
    assert read(path).format == "text"
    assert (
        "a row is one of its paragraphs (data.text_rows=lines reads lines)" in read(path).notes[0]
    )
    assert not read(path, text_rows="lines").notes
    path.write_text("\n\nOne.\nTwo.\n\n\n")
    assert texts(path) == [("rows.txt:3", "One."), ("rows.txt:4", "Two.")]


def test_text_files_of_a_folder_are_all_divided_alike(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One,\ntwo.\n\nThree.\n")
    (tmp_path / "b.txt").write_text("Four,\nfive.\n")
    row_set = read(tmp_path)
    assert [row.turns[0].content for row in row_set.rows] == [
        "One,\ntwo.",
        "Three.",
        "Four,\nfive.",
    ]
    assert row_set.notes[1] == f"{tmp_path.name}: a row is one of the paragraphs (data.text_rows)"
    assert len(read(tmp_path, text_rows="lines").rows) == 5
    assert len(read(tmp_path, text_rows="lines").notes) == 1


# --- folders, compressed files, other files ----------------------------------------------------


def test_a_folder_of_shards_is_read_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, numbers in (("b.jsonl", (2, 3)), ("a.jsonl", (0, 1)), ("c.jsonl", ())):
        (folder / name).write_bytes(b"".join(good_line(n) + b"\n" for n in numbers))
    row_set = read(folder)
    assert [row.source for row in row_set.rows] == [
        "a.jsonl:1",
        "a.jsonl:2",
        "b.jsonl:1",
        "b.jsonl:2",
    ]
    assert row_set.notes == ("shards: 3 files (a.jsonl, b.jsonl, c.jsonl)",)
    origin = row_set.origin
    (folder / ".hidden").write_text("x")
    (folder / "_SUCCESS").write_text("")
    assert read(folder).origin == origin and origin.startswith("shards sha256:")
    (folder / "README.md").write_text("x")
    (folder / "sub").mkdir()
    assert read(folder).notes[1] == "shards: not read: README.md, sub"
    (folder / "b.jsonl").write_bytes(good_line(2) + b"\n{\n")
    assert refusal(folder) == "b.jsonl:2: bad JSON. Fix it."
    (folder / "a.jsonl").write_bytes(b"{\n")
    assert refusal(folder) == "a.jsonl:1: bad JSON (2 rows in all: a.jsonl:1, b.jsonl:2). Fix them."
    (folder / "d.csv").write_text("text\n")
    assert "several kinds of files, .csv (1), .jsonl (3)" in refusal(folder)


def test_folder_of_parquet_shards_is_read_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, n in (("b.parquet", 2), ("a.parquet", 1)):
        write_parquet(folder / name, [{**good(n), "id": n}])
    row_set = read(folder)
    assert [row.source for row in row_set.rows] == ["a.parquet row 1", "b.parquet row 1"]
    assert "columns that are not read: id" in row_set.notes
    (folder / "b.parquet").write_bytes(b"xyzzy")
    assert refusal(folder).startswith("b.parquet: broken, or not a Parquet file")


def test_the_output_of_save_to_disk_is_explained(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert "was written by save_to_disk of datasets (Arrow)" in refusal(tmp_path / "saved")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".txt"])
def test_compressed_files_are_read_and_broken_ones_refused(tmp_path: Path, suffix: str) -> None:
    path, packed = tmp_path / f"rows{suffix}", tmp_path / f"rows{suffix}.gz"
    (write_csv if suffix == ".txt" else WRITERS[suffix])(path, ROWS)
    content = gzip.compress(path.read_bytes())
    packed.write_bytes(content)
    assert [r.row_id for r in read(packed).rows] == [r.row_id for r in read(path).rows]
    digest = hashlib.sha256(content).hexdigest()
    assert read(packed).origin == f"rows{suffix}.gz sha256:{digest}"
    for broken in (b"xyzzy" * 9, content[:-9], content[:40], content[:-8] + b"\0" * 8):
        packed.write_bytes(broken)
        assert "not a gzip file, or a broken one" in refusal(packed)
    path.write_bytes(content)
    assert "compressed by gzip: end its name in .gz" in refusal(path)


@pytest.mark.parametrize(
    ("name", "fragment"),
    [
        ("rows.xlsx", "a spreadsheet"), ("rows.zip", "an archive"), ("rows.pkl", "a pickle"),
        ("rows.arrow", "an Arrow file"), ("rows.jsonl.zst", "but not by gzip"),
        ("rows.md", "a document"), ("rows.parquet.gz", "not one of the suffixes"),
        ("rows.gz", "not one of the suffixes"), ("rows", "not one of the suffixes"),
    ],
)  # fmt: skip
def test_unsupported_files_are_explained(tmp_path: Path, name: str, fragment: str) -> None:
    (tmp_path / name).write_bytes(b"xyzzy")
    assert fragment in refusal(tmp_path / name)
    with pytest.raises(DataError, match="no such file"):
        read_rows(DataSection(name=f"owner/{name}" if "." in name else f"./{name}"))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".txt"])
@pytest.mark.parametrize(
    ("head", "fragment"),
    [
        (b"PK\x03\x04", "a ZIP archive or a spreadsheet"), (b"PAR1", "a Parquet file"),
        (b"ARROW1", "an Arrow file"), (b"version https://git-lfs.github.com", "Git LFS"),
    ],
)  # fmt: skip
def test_files_with_a_wrong_suffix_are_explained(
    tmp_path: Path, suffix: str, head: bytes, fragment: str
) -> None:
    path = tmp_path / f"rows{suffix}"
    path.write_bytes(head + b"\0xyzzy" * 30)
    assert fragment in refusal(path)


# --- unread content ------------------------------------------------------------------------------


def test_columns_and_keys_that_are_not_read_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "Q", "name": "ann"}]
    write_jsonl(path, [
        {"messages": [*messages, {"role": "assistant", "content": f"A{n}", "id": n or None}],
         "context": "C" if n < 3 else "", "documents": None, "id": n, "seen": True}
        for n in range(5)
    ])  # fmt: skip
    assert read(path).notes == (
        "column context has content in 3 of 5 rows, and is not read",
        "keys of messages that are not read: id (4 rows), name (5 rows)",
        "columns that are not read: id, seen",
    )
    write_jsonl(path, [good(n) | {"input": "C"} for n in range(5)])
    assert read(path).notes == (
        "column input has content in 5 of 5 rows, and is not read "
        "(data.columns={context: input} reads it)",
    )
    assert read(path, columns={"context": "input"}).rows[0].context == "C"
    write_jsonl(path, [good(n) | {"category": "a", "group": "b"} for n in range(5)])
    assert read(path).notes == ()


def test_hub_keys_without_effect_are_reported(tmp_path: Path) -> None:
    path = jsonl(tmp_path, good_line(1))
    assert read(path, split="test", revision="v1").notes == (
        "data.split is for hub data sets, and has no effect here",
        "data.revision is for hub data sets, and has no effect here",
    )


def test_deeply_nested_values_are_read(tmp_path: Path) -> None:
    deep = "[" * 900 + "]" * 900
    path = tmp_path / "rows.jsonl"
    filled = f"{deep[:900]}1{deep[900:]}"
    for field, column in (
        (f'"tools": {deep}', ""), (f'"tools": {filled}', "tools"), (f'"category": {filled}', ""),
    ):  # fmt: skip
        path.write_text(
            "".join(f'{{"instruction": "q{n}", "response": "a", {field}}}\n' for n in range(3))
        )
        if column:
            assert f"column {column} has content" in refusal(path)
        else:
            assert len(read(path).rows) == 3


def test_images_in_parquet_are_refused_without_decoding(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for column in (
        pa.array([None, {"bytes": b"x", "path": None}], picture),
        pa.array([[], [{"bytes": b"x", "path": None}]], pa.list_(picture)),
        pa.array([None, ["a.png"]], pa.large_list(pa.string())),
        pa.array(["", "a.png"]), pa.array([None, b"x"]),
    ):  # fmt: skip
        table = {"instruction": ["a", "b"], "response": ["a", "b"], "images": column}
        pq.write_table(pa.table(table), path)
        assert refusal(path).startswith("rows.parquet row 2: column images has content")


def test_messages_that_arrow_pads_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    call = pa.struct([("id", pa.string()), ("function", pa.struct([("name", pa.string())]))])
    message = pa.struct([
        ("role", pa.string()), ("content", pa.large_string()), ("name", pa.string()),
        ("tool_calls", pa.list_(call)), ("reasoning_content", pa.string()),
    ])  # fmt: skip
    rows = [
        [{"role": "user", "content": f"Q{n}", "name": None if n else "ann"},
         {"role": "assistant", "content": "A"}] for n in range(40)
    ]  # fmt: skip
    for kind in (pa.list_(message), pa.large_list(message), pa.list_(message, 2)):
        table = {"messages": pa.array(rows, kind), "score": [float("nan")] * 40}
        pq.write_table(pa.table(table), path)
        row_set = read(path)
        assert (len(row_set.rows), row_set.format) == (40, "chat")
        assert row_set.notes == (
            "keys of messages that are not read: name (1 rows)",
            "columns that are not read: score",
        )


def test_rows_excluded_from_training_are_refused_or_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"Q{n}", "completion": "A", "label": n % 2 == 0} for n in range(300)]
    write_jsonl(path, rows)
    message = refusal(path)
    assert message.startswith("rows.jsonl:2: label is false: the row is excluded from training")
    assert message.endswith("(150 rows in all: 2, 4, 6, 8, 10, …). Fix them, or set "
                            "data.on_bad_row=skip.")  # fmt: skip
    row_set = read(path, on_bad_row="skip")
    assert (len(row_set.rows), len(row_set.bad_rows)) == (150, 150)
    write_jsonl(path, [row | {"label": False} for row in rows])
    assert "all 300 rows are excluded from training" in refusal(path, on_bad_row="skip")
    assert len(read(path, columns={"label": None}).rows) == 300


def test_an_error_about_many_rows_is_one_short_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"messages": [{"role": "user", "content": f"Q{n}"}]} for n in range(300)])
    assert refusal(path) == (
        "rows.jsonl:1: no assistant turn (300 rows in all: 1, 2, 3, 4, 5, …). Fix them."
    )
    path.write_text("".join(f'{{"{n}": 1, "{n}": 2}}\n' for n in range(300)))
    message = refusal(path)
    assert "300 malformed rows" in message and "; and 295 rows for other reasons" in message
    write_jsonl(path, [
        {"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt"},
         "rejected": {"from": "gpt"}} for _ in range(300)
    ])  # fmt: skip
    assert "preference data, put the answer in chosen at the end" in refusal(path)


# --- Parquet -----------------------------------------------------------------------------------


def test_parquet_values_other_than_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"instruction": ["a", "b"], "response": [1, None]}), path)
    assert refusal(path) == (
        "rows.parquet: 2 malformed rows: response must be text, is a number (1 row: 1); "
        "response is null (1 row: 2). Fix them."
    )


def test_parquet_text_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    values = pa.array([b"a", b"xyzzy\xff", b"c"], pa.binary())
    invalid = pa.StringArray.from_buffers(3, values.buffers()[1], values.buffers()[2])
    pq.write_table(pa.table({"text": invalid}), tmp_path / "rows.parquet")
    message = refusal(tmp_path / "rows.parquet")
    assert message.startswith("rows.parquet row 2: invalid UTF-8. Fix it")


def test_parquet_decodes_only_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    beyond_python = pa.array([2**62], pa.timestamp("ms"))
    pq.write_table(pa.table({"text": ["a"], "seen": beyond_python}), path)
    assert len(read(path).rows) == 1
    pq.write_table(pa.table({"text": ["a"], "category": beyond_python}), path)
    assert refusal(path).startswith("rows.parquet row 1: a value cannot be read. Fix it")
    pq.write_table(pa.table({"question": ["a"]}), path)
    assert "columns seen: question" in refusal(path)


def test_broken_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"xyzzy" * 100)
    assert refusal(path).startswith("rows.parquet: broken, or not a Parquet file")
    write_parquet(path, [good(n) for n in range(100)])
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    assert refusal(path).startswith("rows.parquet: broken, or not a Parquet file")
    refused = 0
    for position in range(0, len(content), 23):
        path.write_bytes(content[:position] + b"\xff" * 4 + content[position + 4 :])
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
def test_missing_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"no such file: data.name={name} "):
        read_rows(DataSection(name=name))


def test_folder_without_data_files_and_unknown_suffix_are_refused(tmp_path: Path) -> None:
    assert "is a folder without files that are read" in refusal(tmp_path)
    (tmp_path / "rows.foo").write_bytes(b"")
    assert ".jsonl, .ndjson, .json, .csv" in refusal(tmp_path / "rows.foo")


def test_a_file_that_cannot_be_read_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jsonl(tmp_path, good_line(1))

    def denied(*_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checksums, "sha256_file", denied)
    with pytest.raises(StorageError, match=r"cannot read .*: Permission denied"):
        read(path)


# --- the hub -----------------------------------------------------------------------------------

COMMIT, OTHER = "a1" * 20, "b2" * 20
# Errors of the hub's HTTP library without a network; the library depends on the version.
TRANSPORT_ERROR = next(
    base for base in hub_errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"
)


def fake_hub(
    monkeypatch: pytest.MonkeyPatch,
    load: Callable[..., Any],
    info_error: Exception | None = None,
    offline: bool = False,
) -> list[tuple[Any, ...]]:
    """Replace the hub by one where every revision is COMMIT; return the list of its requests."""
    requests: list[tuple[Any, ...]] = []

    class Api:
        def dataset_info(self, name: str, revision: str | None, timeout: float) -> Any:
            requests.append((name, revision, timeout))
            if info_error:
                raise info_error
            return SimpleNamespace(sha=COMMIT)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", offline)
    return requests


def test_hub_rows_carry_commit_and_index(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load(name: str, **options: Any) -> Any:
        calls.append((name, options["revision"], options["split"]))
        return datasets.Dataset.from_list([good(1) | {"id": 1}, good(2) | {"id": 2}])

    requests = fake_hub(monkeypatch, load)
    row_set = read_rows(DataSection(name="owner/set", revision="main", split="train[:2]"))
    assert requests == [("owner/set", "main", hub.HUB_TIMEOUT)]
    assert calls == [("owner/set", COMMIT, "train[:2]")]
    assert row_set.origin == f"owner/set@{COMMIT} split=train[:2]"
    assert [row.source for row in row_set.rows] == ["owner/set row 0", "owner/set row 1"]
    assert row_set.format == "dolly"


def test_hub_rows_follow_a_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [good(n) for n in range(5)]
    dataset = datasets.Dataset.from_list(rows)
    fake_hub(monkeypatch, lambda *_, **__: dataset.select([3, 1]))
    row_set = read_rows(DataSection(name="owner/set"))
    assert [row.turns[0].content for row in row_set.rows] == [
        rows[3]["instruction"],
        rows[1]["instruction"],
    ]


def fail_if_called(*_: Any, **__: Any) -> Any:
    raise AssertionError("load_dataset retries for half a minute without a network")


def http_error(kind: type[Exception], status: int) -> Exception:
    error = kind.__new__(kind)
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "fragment"),
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
def test_hub_failures_are_explained_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, fragment: str
) -> None:
    fake_hub(monkeypatch, fail_if_called, info_error=error)
    with pytest.raises(StorageError) as caught:
        read_rows(DataSection(name="owner/set", revision="v9"))
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hub_data_that_cannot_be_read_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise ValueError('Unknown split "trian". Should be one of ["train"].\nxyzzy')

    fake_hub(monkeypatch, load)
    with pytest.raises(
        DataError, match='owner/set cannot be read: Unknown split "trian"'
    ) as caught:
        read_rows(DataSection(name="owner/set", split="trian"))
    assert SECRET not in str(caught.value)


def test_unknown_hub_error_is_raised_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, fail_if_called)
    with pytest.raises(AssertionError):
        read_rows(DataSection(name="owner/set"))


def test_offline_hub_data_without_a_copy_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    requests = fake_hub(monkeypatch, datasets.load_dataset, offline=True)
    with pytest.raises(StorageError, match=r"owner/set is not in the cache.*data\.name=path"):
        read_rows(DataSection(name="owner/set"))
    assert requests == []


def cached_copy(folder: Path, commit: str) -> Callable[..., Any]:
    datasets.Dataset.from_list([good(1)]).save_to_disk(folder / commit)
    return lambda *_, **__: datasets.load_from_disk(folder / commit)


def test_cached_hub_data_of_another_commit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failed download `load_dataset` silently uses any commit in its cache."""
    load = cached_copy(tmp_path, OTHER)
    fake_hub(monkeypatch, load)
    with pytest.raises(StorageError, match=f"cache as commit {OTHER}.*{COMMIT}"):
        read_rows(DataSection(name="owner/set"))
    fake_hub(monkeypatch, load, offline=True)
    with pytest.raises(StorageError, match=f"data.revision={OTHER}"):
        read_rows(DataSection(name="owner/set", revision="v1"))


def test_offline_hub_data_names_the_cached_commit_as_origin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub(monkeypatch, cached_copy(tmp_path, OTHER), offline=True)
    for revision in (None, OTHER):
        row_set = read_rows(DataSection(name="owner/set", revision=revision))
        assert row_set.origin == f"owner/set@{OTHER} split=train"


# --- ml-qa -------------------------------------------------------------------------------------


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace the module that builds the embedded set; return the paths that it wrote."""
    written: list[Path] = []

    def write_jsonl_file(path: Path) -> None:
        written.append(path)
        write_jsonl(path, [good(n) | {"category": "what", "group": f"g{n}"} for n in range(3)])

    module = ModuleType("slm_lora.ml_qa")
    module.write_jsonl = write_jsonl_file  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "slm_lora.ml_qa", module)
    monkeypatch.setattr(slm_lora, "ml_qa", module, raising=False)
    monkeypatch.setenv("SLM_LORA_CACHE", str(tmp_path / "cache"))
    return written


def test_ml_qa_is_built_once_and_read(builder: list[Path], tmp_path: Path) -> None:
    row_set = read_rows(DataSection())
    again = read_rows(DataSection())
    assert len(builder) == 1
    assert row_set == again
    assert row_set.format == "dolly"
    assert [row.source for row in row_set.rows] == ["ml-qa:1", "ml-qa:2", "ml-qa:3"]
    assert [row.group_hint for row in row_set.rows] == ["g0", "g1", "g2"]
    assert row_set.origin.startswith("ml-qa sha256:")
    assert "scikit-learn=" in row_set.origin
    assert str(tmp_path) not in row_set.origin
    assert [path.name for path in (tmp_path / "cache/data").iterdir()] == [ensure_ml_qa().name]


def test_ml_qa_is_rebuilt_for_other_versions(
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


# --- Dolly -------------------------------------------------------------------------------------

DOLLY = Path(__file__).resolve().parents[3] / "shared/data/databricks-dolly-15k.jsonl"


@pytest.mark.skipif(not DOLLY.exists(), reason=f"Dolly is not beside the repository: {DOLLY.name}")
def test_dolly_is_read_whole() -> None:
    row_set = read(DOLLY)
    assert len(row_set.rows) == 14_996
    assert (row_set.format, row_set.duplicates, row_set.bad_rows) == ("dolly", 0, ())
    assert "/" not in row_set.origin
