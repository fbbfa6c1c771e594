"""Where rows come from: a local file, the hub, or the embedded set; and what to do with bad ones.

Every malformed row is found and named by its line before anything else happens; no message
ever quotes the text of a row.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import slm_lora
from slm_lora import storage
from slm_lora.data import formats
from slm_lora.data.files import READERS, Record, Table, check_size, read_file
from slm_lora.data.formats import RowError
from slm_lora.data.hub import read_hub
from slm_lora.errors import DataError, UsageError
from slm_lora.recipe.schema import DataSection
from slm_lora.records import Row

SKIPPED_SHARE = 0.1
"""Share of bad rows above which even ``on_bad_row=skip`` gives up: the set is another one."""

_ML_QA_BUILT_FROM = ("scikit-learn", "scipy", "numpy", "numpydoc")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A malformed row: where (``file:line`` or ``hub id:index``), and why, for people."""

    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class RowSet:
    """The rows of one source, in its order.

    ``rows`` are unique by ``row_id``: of exact duplicates the first is kept and ``duplicates``
    counts the others. ``origin`` says what was read, the same on every machine: hub id and
    commit, or file name and SHA-256, or ``ml-qa`` and the versions it was built from.
    ``bad_rows`` are those skipped.
    """

    rows: list[Row]
    format: str
    origin: str
    bad_rows: tuple[BadRow, ...]
    duplicates: int


class MalformedRowsError(DataError):
    """Rows are malformed; ``bad_rows`` holds them all, where the message names a few."""

    bad_rows: tuple[BadRow, ...] = ()


def read_rows(section: DataSection) -> RowSet:
    """All rows of the source that ``section.name`` names.

    Raises:
        DataError: no such file, no rows, no format fits, or rows are malformed
            (`MalformedRowsError`).
        StorageError: the file cannot be read, or the hub does not hand the rows over.
        UsageError: ``data.columns`` names a field that does not exist, or a library that
            ``ml-qa`` is built from is not installed.
    """
    name = section.name
    # Functions of os.path, as those of Path raise for a name that cannot be a path.
    path = Path(os.path.expanduser(name))  # noqa: PTH111
    if name == "ml-qa":
        table, digest = read_file(ensure_ml_qa(), section)
        return _row_set(table, section, name, " ".join([name, digest, *_ml_qa_versions()]))
    if os.path.isdir(path):  # noqa: PTH112
        raise DataError(f"data.name={name} is a folder; name one file")
    if os.path.exists(path):  # noqa: PTH110
        table, digest = read_file(path, section)
        return _row_set(table, section, path.name, f"{path.name} {digest}")
    if path.suffix.lower() in READERS or not _HUB_ID.fullmatch(name):
        raise DataError(f"no such file: data.name={name} (nor is it ml-qa or a hub id owner/name)")
    table, commit = read_hub(section)
    return _row_set(table, section, name, f"{name}@{commit} split={section.split}")


def ensure_ml_qa() -> Path:
    """The embedded set as a JSONL file in the cache folder; it is built on first use.

    Raises:
        UsageError: a library whose documentation it is built from is not installed.
        StorageError: the cache folder cannot be written.
    """
    target = storage.cache_dir() / "data" / f"ml-qa-{'-'.join(_ml_qa_versions())}.jsonl"
    if not target.exists():
        # Imported here: it loads the libraries that the set is built from.
        from slm_lora.data import ml_qa

        with storage.atomic_path(target) as temporary:
            ml_qa.write_jsonl(temporary)
    return target


def _ml_qa_versions() -> list[str]:
    versions = [f"slm-lora={slm_lora.__version__}"]
    for library in _ML_QA_BUILT_FROM:
        try:
            versions.append(f"{library}={importlib.metadata.version(library)}")
        except importlib.metadata.PackageNotFoundError:
            raise UsageError(
                f"ml-qa is built from the documentation of {library}, which is not installed: "
                f"pip install {library}"
            ) from None
    return versions


def _row_set(table: Table, section: DataSection, label: str, origin: str) -> RowSet:
    if not table.records:
        raise DataError(f"{label}: no rows")
    readable = [record for _, record in table.records if not isinstance(record, RowError)]
    format_name = ""
    if readable:
        columns, lists = table.columns, table.lists
        if columns is None:
            columns, lists = _columns(readable, section)
        format_name = formats.recognise(columns, section, lists)
    rows: dict[str, Row] = {}
    bad: list[tuple[int, str]] = []
    for number, record in table.records:
        try:
            if isinstance(record, RowError):
                raise record
            row = formats.to_row(record, f"{label}:{number}", format_name, section)
            check_size(sum(len(t.content.encode()) for t in row.turns) + len(row.context.encode()))
        except RowError as error:
            bad.append((number, str(error)))
        else:
            rows.setdefault(row.row_id, row)
    total = len(table.records)
    if bad and (section.on_bad_row == "fail" or len(bad) > SKIPPED_SHARE * total):
        raise _malformed(label, bad, total, section)
    return RowSet(
        rows=list(rows.values()),
        format=format_name,
        origin=origin,
        bad_rows=_bad_rows(label, bad),
        duplicates=total - len(bad) - len(rows),
    )


def _columns(records: list[Record], section: DataSection) -> tuple[frozenset[str], frozenset[str]]:
    """Columns of records without a schema, and those that hold lists. One stray row must not
    change the format: a column counts when half of the records have it, or the recipe asks."""
    counts = Counter(column for record in records for column in record)
    lists = Counter(
        column for record in records for column, value in record.items() if isinstance(value, list)
    )
    asked = section.format != "auto"
    columns = frozenset(
        column
        for column, count in counts.items()
        if asked or 2 * count >= len(records) or column in section.columns.values()
    )
    return columns, frozenset(c for c in columns if 2 * lists[c] >= counts[c])


def _bad_rows(label: str, bad: list[tuple[int, str]]) -> tuple[BadRow, ...]:
    return tuple(BadRow(f"{label}:{number}", reason) for number, reason in bad)


def _malformed(
    label: str, bad: list[tuple[int, str]], total: int, section: DataSection
) -> MalformedRowsError:
    numbers: dict[str, list[int]] = {}
    for number, reason in bad:
        numbers.setdefault(reason, []).append(number)
    shown = {
        reason: ", ".join(map(str, found[:3])) + (", …" if len(found) > 3 else "")
        for reason, found in numbers.items()
    }
    kinds = "; ".join(
        f"{reason} ({len(found)} row{'s' * (len(found) > 1)}: {shown[reason]})"
        for reason, found in numbers.items()
    )
    mend = f"Mend {'them' if len(bad) > 1 else 'it'}"
    first, reason = bad[0]
    if section.on_bad_row == "skip":
        message = (
            f"{label}: {len(bad)} of {total} rows are malformed, more than the "
            f"{SKIPPED_SHARE:.0%} that data.on_bad_row=skip lets pass: {kinds}. {mend}."
        )
    else:
        if len(numbers) > 1:
            message = f"{label}: {len(bad)} malformed rows: {kinds}"
        elif len(bad) > 1:
            message = f"{label}:{first}: {reason} ({len(bad)} rows in all: {shown[reason]})"
        else:
            message = f"{label}:{first}: {reason}"
        message += f". {mend}, or set data.on_bad_row=skip."
    error = MalformedRowsError(message)
    error.bad_rows = _bad_rows(label, bad)
    return error
