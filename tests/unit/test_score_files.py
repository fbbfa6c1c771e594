"""Score files of other programs: read, paired, compared."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from slm_lora.errors import UsageError
from slm_lora.runs.score_files import Columns, Scored, read_score_file
from slm_lora.stats.files import common_rows, compare_files

from ..support.lab import command

COLUMNS = Columns("doc_id", "acc")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the format that the file's suffix names."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps({"version": 2, "samples": rows}))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet", ".json"])
def test_score_files_of_every_format_give_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = [{"doc_id": n, "acc": n / 4, "subject": f"s{n // 2}", "bytes": n + 1} for n in range(4)]
    path = write(tmp_path / f"scores{suffix}", rows)
    scored = read_score_file(path, Columns("doc_id", "acc", "subject", "bytes"))
    assert scored == {f"{n}": Scored(n / 4, n + 1.0, f"s{n // 2}") for n in range(4)}


def test_nested_values_and_grades_of_inspect_are_read(tmp_path: Path) -> None:
    samples = [
        {"id": name, "scores": {"match": {"value": grade}}}
        for name, grade in (("a", "C"), ("b", "I"), ("c", "P"))
    ]
    scored = read_score_file(
        write(tmp_path / "log.json", samples), Columns("id", "scores.match.value")
    )
    assert [row.value for row in scored.values()] == [1.0, 0.0, 0.5]


def test_a_row_per_filter_is_chosen_by_where(tmp_path: Path) -> None:
    rows = [
        {"doc_id": n, "filter": name, "exact_match": float(name == "strict-match")}
        for n in range(3)
        for name in ("strict-match", "flexible-extract")
    ]
    path = write(tmp_path / "samples.jsonl", rows)
    with pytest.raises(
        UsageError,
        match=r"row 2: doc_id = 0 a second time \(filter: strict-match, "
        r"flexible-extract\); choose: --where filter=strict-match",
    ):
        read_score_file(path, Columns("doc_id", "exact_match"))
    where = {"filter": "strict-match"}
    scored = read_score_file(path, Columns("doc_id", "exact_match", where=where))
    assert [row.value for row in scored.values()] == [1.0] * 3


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"doc_id": 1}, r"row 1: no column acc \(columns: doc_id\)"),
        ({"doc_id": 1, "acc": None}, "row 1: acc = None is no number that can be summed"),
        ({"doc_id": 1, "acc": "yes"}, "row 1: acc = 'yes' is no number"),
        ({"doc_id": 1, "acc": float("nan")}, "row 1: acc = nan is no number"),
    ],
)
def test_score_that_is_no_number_is_refused_by_row(
    tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        read_score_file(write(tmp_path / "s.jsonl", [row]), COLUMNS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("s.txt", "x", r"not one of \.jsonl"),
        ("s.eval", "x", "inspect log convert"),
        ("s.jsonl", "{", "cannot be read"),
        ("s.jsonl", "", "no row"),
        ("s.jsonl", "[1]\n", "row 1: not an object"),
        ("s.json", "{}", "neither a list of rows"),
        ("s.parquet", "x", "cannot be read"),
        ("s.csv", "doc_id,acc,acc\n1,2,3\n", "two columns are named 'acc'"),
        ("s.csv", "doc_id,acc\n1,1,234.5\n", "line 2 has more cells than the header"),
        ("s.csv", "doc_id,acc\n,1\n", "row 1: doc_id is empty"),
        ("s.csv", "doc_id,acc\n1,1_0\n", "acc = '1_0' is no number"),
        ("s.jsonl", '{"doc_id": 1, "acc": 1}\n{"doc_id"', "line 2 is no JSON"),
        ("s.jsonl", '{"doc_id": 1, "acc": ' + "9" * 400 + "}", "is no number that can be summed"),
        ("s.json", "[" * 100_000, "cannot be read"),
    ],
)
def test_broken_score_files_are_refused_in_one_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UsageError, match=message) as refused:
        read_score_file(path, COLUMNS)
    assert "\n" not in str(refused.value)


def scores(values: np.ndarray) -> dict[str, Scored]:
    return {f"{n}": Scored(float(v), 1.0, f"{n}") for n, v in enumerate(values)}


def test_comparison_of_two_files_equals_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(size=40)
    second = first + rng.normal(0.2, 0.3, 40)
    _, (comparison,) = compare_files({"a": scores(first), "b": scores(second)}, 0.0)
    expected = stats.ttest_rel(second, first)
    interval = expected.confidence_interval()
    assert comparison.p_corrected == pytest.approx(expected.pvalue)
    difference = comparison.difference
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high))


def test_three_files_are_corrected_together_and_order_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    first = scores(rng.normal(size=30))
    second = scores(rng.normal(0.4, 1, size=30))
    _, both = compare_files({"a": first, "b": second, "c": second}, 0.0)
    _, (alone,) = compare_files({"a": first, "b": dict(reversed(second.items()))}, 0.0)
    assert both[0].p_corrected == pytest.approx(2 * alone.p_corrected)
    assert alone.difference.value == pytest.approx(both[0].difference.value)


def test_files_with_other_rows_are_refused_without_common() -> None:
    files = {"a": scores(np.arange(5.0)), "b": scores(np.arange(4.0))}
    with pytest.raises(UsageError, match="a and b differ in 1 rows: b has no 4; --common"):
        compare_files(files, 0.0)
    _, (comparison,) = compare_files(common_rows(files), 0.0)
    assert comparison.difference.groups == 4
    files["b"] = {**files["a"], "0": Scored(0.0, 2.0, "0")}
    with pytest.raises(UsageError, match="row 0 has weight 2 and group 0 in b, 1 and 0 in a"):
        compare_files(files, 0.0)


def test_compare_command_compares_score_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(2)
    values = rng.random(50) < 0.5
    paths = [
        write(tmp_path / name, [{"doc_id": n, "acc": float(v)} for n, v in enumerate(column)])
        for name, column in (("a.jsonl", values), ("b.jsonl", values | (rng.random(50) < 0.6)))
    ]
    assert command("compare", *paths, "--id", "doc_id", "--value", "acc", "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record["first"]["value"] == pytest.approx(values.mean())
    assert record["compared"][0]["verdict"] == "different"
    assert command("compare", *paths, "--id", "doc_id", "--value", "acc") == 0
    shown = capsys.readouterr().out
    assert "different" in shown and "50 rows, paired by doc_id" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.jsonl"], "at least two"),
        (["a.jsonl", "b.jsonl"], "--id COLUMN and --value COLUMN"),
        (["a.jsonl", "."], "not both at once"),
        (["a.jsonl", "typo.jsonl", "--id", "doc_id", "--value", "acc"], "typo.jsonl: no such file"),
        (["a.jsonl", "b.jsonl", "--id", "doc_id", "--value", "acc", "--margin", "nan"], "finite"),
        (["x" * 300, "a.jsonl"], "no such file"),
        (["a.jsonl", "a.jsonl", "--id", "doc_id", "--value", "acc"], "given twice"),
        (["a.jsonl", "b.jsonl", "--id", "doc_id", "--value", "acc", "--where", "x"], "COLUMN=TEXT"),
        ([".", ".", "--id", "doc_id"], "--id: for score files only"),
    ],
)
def test_compare_command_refuses_bad_arguments_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl"):
        write(tmp_path / name, [{"doc_id": 0, "acc": 1.0}, {"doc_id": 1, "acc": 0.0}])
    assert command("compare", *words) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_equal_differences_in_all_rows_are_not_significant() -> None:
    """Ten of ten equal rows leave a difference in one row of ten possible."""
    same = scores(np.ones(10))
    _, (comparison,) = compare_files({"a": same, "b": scores(np.ones(10))}, 0.05)
    assert comparison.p_corrected == 1
    assert comparison.p_equivalence_corrected == pytest.approx(0.95**10)
    _, (apart,) = compare_files({"a": scores(np.zeros(3)), "b": scores(np.ones(3))}, 0.0)
    assert apart.p_corrected == 2 * 0.5**3  # as the sign test


def test_other_documents_empty_groups_and_repeated_where_are_refused(tmp_path: Path) -> None:
    rows = [{"doc_id": n, "acc": 1.0, "doc_hash": f"a{n}", "group": "g"} for n in range(3)]
    first = read_score_file(write(tmp_path / "a.jsonl", rows), COLUMNS)
    other_documents = [{**row, "doc_hash": f"b{row['doc_id']}"} for row in rows]
    second = read_score_file(write(tmp_path / "b.jsonl", other_documents), COLUMNS)
    with pytest.raises(UsageError, match=r"another document than that of a \(doc_hash\)"):
        compare_files({"a": first, "b": second}, 0.0)
    empty = write(tmp_path / "c.jsonl", [{**rows[0], "group": None}])
    with pytest.raises(UsageError, match="row 1: group is empty"):
        read_score_file(empty, Columns("doc_id", "acc", "group"))
    where = ["--where", "group=g", "--where", "group=h"]
    words = [tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--id", "doc_id", "--value", "acc"]
    assert command("compare", *words, *where) == 2


def test_rounding_error_is_no_difference() -> None:
    first, second = scores(np.full(50, 0.3)), scores(np.full(50, 0.1 + 0.2))
    _, (comparison,) = compare_files({"a": first, "b": second}, 0.0)
    assert (comparison.difference.value, comparison.p_corrected) == (0.0, 1.0)


def test_epochs_of_inspect_are_chosen_by_epoch(tmp_path: Path) -> None:
    samples = [
        {"uuid": f"u{n}", "id": "a", "epoch": n, "scores": {"f": {"value": "C"}}} for n in (1, 2)
    ]
    path = write(tmp_path / "log.json", samples)
    with pytest.raises(UsageError, match="choose: --where epoch=1"):
        read_score_file(path, Columns("id", "scores.f.value"))
