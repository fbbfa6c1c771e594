"""Read rows from a local file, the hub or the embedded data set, and handle malformed rows.

All malformed rows are reported, with their lines, before anything else runs. Messages never
quote the text of a row.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import slm_lora
from slm_lora.config.schema import DataSection
from slm_lora.data import column_kinds, formats
from slm_lora.data.files import is_known_suffix, read_file, read_folder, suffix_of
from slm_lora.data.formats import RejectedRowError
from slm_lora.data.hub import read_hub
from slm_lora.data.table import InvalidUtf8Error, Location, Record, Table, check_size
from slm_lora.data.text import RowError, list_names, printable_name
from slm_lora.errors import DataError, UsageError
from slm_lora.records import Row
from slm_lora.runtime import storage

SKIPPED_SHARE = 0.1
"""Share of malformed rows above which ``on_bad_row=skip`` is refused."""

_MAX_SHOWN = 5

_ML_QA_BUILT_FROM = ("scikit-learn", "scipy", "numpy", "numpydoc")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A malformed row: its location (``file:line``, ``file row 3``) and the reason."""

    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class RowSet:
    """The rows of one source, in its order.

    Attributes:
        rows: unique by ``row_id``; of exact duplicates the first is kept.
        format: name of the row format.
        origin: identity of the source, equal on every machine: hub id and commit, or file name
            and SHA-256, or ``ml-qa`` with library versions.
        bad_rows: malformed rows that were skipped.
        duplicates: number of exact duplicates that were removed.
        notes: messages on how the source was read, one line each.
    """

    rows: list[Row]
    format: str
    origin: str
    bad_rows: tuple[BadRow, ...]
    duplicates: int
    notes: tuple[str, ...] = ()


class MalformedRowsError(DataError):
    """Rows are malformed: ``bad_rows`` holds all of them, the message names a few."""

    bad_rows: tuple[BadRow, ...] = ()


def read_rows(section: DataSection) -> RowSet:
    """Read all rows of the source ``section.name``.

    Raises:
        DataError: no such file, no rows, no format fits, or rows are malformed
            (`MalformedRowsError`).
        StorageError: the file cannot be read, or the download failed.
        UsageError: ``data.columns`` names an unknown field, or a library that ``ml-qa`` is
            built from is not installed.
    """
    name = section.name
    # os.path, because methods of Path raise for a name that cannot be a path.
    path = Path(os.path.expanduser(name))  # noqa: PTH111
    if name == "ml-qa":
        table, digest = read_file(ensure_ml_qa(), section, label=name)
        origin = " ".join([name, digest, *_ml_qa_versions()])
        return _row_set(table, section, name, origin, _hub_only_notes(section))
    if os.path.isdir(path):  # noqa: PTH112
        table, digest = read_folder(path, section)
        folder = path.resolve().name
        return _row_set(table, section, folder, f"{folder} {digest}", _hub_only_notes(section))
    if os.path.exists(path):  # noqa: PTH110
        table, digest = read_file(path, section)
        origin = f"{path.name} {digest}"
        return _row_set(table, section, path.name, origin, _hub_only_notes(section))
    if is_known_suffix(suffix_of(path)) or not _HUB_ID.fullmatch(name):
        raise DataError(f"no such file: data.name={name} (nor is it ml-qa or a hub id owner/name)")
    table, commit = read_hub(section)
    return _row_set(table, section, name, f"{name}@{commit} split={section.split}")


def _hub_only_notes(section: DataSection) -> tuple[str, ...]:
    """Report keys that have no effect on a local file."""
    default = DataSection()
    keys = [key for key in ("split", "revision") if getattr(section, key) != getattr(default, key)]
    return tuple(f"data.{key} is for hub data sets, and has no effect here" for key in keys)


def ensure_ml_qa() -> Path:
    """Return the JSONL file of the embedded data set in the cache; it is built on first use.

    Raises:
        UsageError: a library whose documentation it is built from is not installed.
        StorageError: the cache folder cannot be written.
    """
    target = storage.cache_dir() / "data" / f"ml-qa-{'-'.join(_ml_qa_versions())}.jsonl"
    if not target.exists():
        # Imported here, as it loads the libraries that the data set is built from.
        from slm_lora import ml_qa

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


def _row_set(
    table: Table, section: DataSection, label: str, origin: str, notes: tuple[str, ...] = ()
) -> RowSet:
    if not table.records:
        raise DataError(f"{label}: no rows")
    parsed = [record for _, record in table.records if not isinstance(record, RowError)]
    format_name = ""
    if parsed:
        columns, lists = table.columns, table.lists
        if columns is None:
            columns, lists = _infer_columns(parsed, section)
        format_name = formats.detect_format(columns, section, lists)
    rows: dict[str, Row] = {}
    bad: list[tuple[Location, RowError]] = []
    unread: Counter[tuple[str, str]] = Counter()
    columns_seen = set(table.columns or ())
    for location, record in table.records:
        try:
            if isinstance(record, RowError):
                raise record
            row = formats.to_row(record, str(location), format_name, section)
            check_size(sum(len(t.content.encode()) for t in row.turns) + len(row.context.encode()))
        except RowError as error:
            bad.append((location, error))
        else:
            rows.setdefault(row.row_id, row)
            columns_seen.update(record)
            unread.update(set(formats.unread_content(record, format_name, section)))
    total = len(table.records)
    if bad and (section.on_bad_row == "fail" or _too_many(bad, total) or not rows):
        raise _malformed(label, bad, total, section, table.encoding)
    return RowSet(
        rows=list(rows.values()),
        format=format_name,
        origin=origin,
        bad_rows=_bad_rows(bad),
        duplicates=total - len(bad) - len(rows),
        notes=(
            *notes,
            *table.notes,
            *_unread_notes(columns_seen, total, format_name, section, unread),
        ),
    )


def _too_many(bad: list[tuple[Location, RowError]], total: int) -> bool:
    # Rows that are marked as excluded from training are not malformed.
    malformed = sum(not isinstance(error, RejectedRowError) for _, error in bad)
    return malformed > SKIPPED_SHARE * total


def _infer_columns(
    records: list[Record], section: DataSection
) -> tuple[frozenset[str], frozenset[str]]:
    """Infer the columns of records without a schema, and those of lists.

    A column counts if half of the records have it or the recipe names it, so that a single row
    does not change the format.
    """
    counts = Counter(column for record in records for column in record)
    list_counts = Counter(
        column for record in records for column, value in record.items() if isinstance(value, list)
    )
    explicit = section.format != "auto"
    mapped = {*section.columns.values(), *section.columns}
    columns = frozenset(
        column
        for column, count in counts.items()
        if explicit or 2 * count >= len(records) or column in mapped
    )
    return columns, frozenset(c for c in columns if 2 * list_counts[c] >= counts[c])


def _unread_notes(
    columns: set[str],
    rows: int,
    format_name: str,
    section: DataSection,
    unread: Counter[tuple[str, str]],
) -> list[str]:
    """Report columns and message keys that are not read, with row counts for prompt columns."""
    notes, reported, keys = [], set(), []
    for (kind, name), count in sorted(unread.items()):
        shown = printable_name(name)
        if kind == "column":
            reported.add(name)
            context = formats.unmapped_context(format_name, columns, section)
            fits = context and name in column_kinds.CONTEXT_COLUMNS
            read_by = f" (data.columns={{{context}: {name}}} reads it)" if fits else ""
            notes.append(
                f"column {shown} has content in {count} of {rows} rows, and is not read{read_by}"
            )
        else:
            keys.append(f"{shown} ({count} rows)")
    if keys:
        others = f", and {len(keys) - 10} others" if len(keys) > 10 else ""
        notes.append(f"keys of messages that are not read: {', '.join(keys[:10])}{others}")
    read = formats.read_columns(columns, format_name, section)
    # Prompt columns with content are reported or refused above: the others are empty.
    empty = {c for c in columns if c in column_kinds.PROMPT_COLUMNS or column_kinds.is_refused(c)}
    rest = columns - read - reported - empty - formats.excluded_columns(section)
    if rest:
        notes.append(f"columns that are not read: {list_names(rest, limit=10)}")
    return notes


def _bad_rows(bad: list[tuple[Location, RowError]]) -> tuple[BadRow, ...]:
    return tuple(BadRow(str(place), str(error)) for place, error in bad)


def _malformed(
    label: str,
    bad: list[tuple[Location, RowError]],
    total: int,
    section: DataSection,
    encoding: str,
) -> MalformedRowsError:
    by_reason: dict[str, list[Location]] = {}
    for location, error in bad:
        reason = str(error)
        if encoding and isinstance(error, InvalidUtf8Error):
            reason = f"invalid UTF-8 (the file looks like {encoding}; save it as UTF-8)"
        by_reason.setdefault(reason, []).append(location)
    remedy = f"Fix {'them' if len(bad) > 1 else 'it'}"
    first, count = bad[0][0], f"{len(bad)} of {total} rows"
    same_reason = len(by_reason) == 1
    rejected = all(isinstance(error, RejectedRowError) for _, error in bad)
    fault = "are excluded from training" if rejected else "are malformed"
    if same_reason and encoding and isinstance(bad[0][1], InvalidUtf8Error):
        message = (
            f"{first}: invalid UTF-8, in {count}: the file looks like {encoding}; save it as UTF-8"
        )
    elif section.on_bad_row == "skip" and len(bad) == total:
        message = f"{label}: all {total} rows {fault}: {_reasons(by_reason, label)}. {remedy}."
    elif section.on_bad_row == "skip":
        message = (
            f"{label}: {count} are malformed, more than the {SKIPPED_SHARE:.0%} that "
            f"data.on_bad_row=skip lets pass: {_reasons(by_reason, label)}. {remedy}."
        )
    else:
        (reason, locations), *_ = by_reason.items()
        if not same_reason:
            message = f"{label}: {len(bad)} malformed rows: {_reasons(by_reason, label)}"
        elif len(bad) > 1:
            message = f"{first}: {reason} ({len(bad)} rows in all: {_numbers(locations, label)})"
        else:
            message = f"{first}: {reason}"
        can_skip = not _too_many(bad, total) and len(bad) < total
        message += f". {remedy}{', or set data.on_bad_row=skip' if can_skip else ''}."
    malformed = MalformedRowsError(message)
    malformed.bad_rows = _bad_rows(bad)
    return malformed


def _reasons(by_reason: dict[str, list[Location]], label: str) -> str:
    shown = list(by_reason.items())[:_MAX_SHOWN]
    text = "; ".join(
        f"{reason} ({len(locations)} row{'s' * (len(locations) > 1)}: {_numbers(locations, label)})"
        for reason, locations in shown
    )
    others = list(by_reason.values())[_MAX_SHOWN:]
    if others:
        text += f"; and {sum(map(len, others))} rows for other reasons"
    return text


def _numbers(locations: list[Location], label: str) -> str:
    """List the first locations, as bare numbers if they are in the file ``label``."""
    shown = [
        str(place.number if place.file == label else place) for place in locations[:_MAX_SHOWN]
    ]
    return ", ".join(shown) + (", …" if len(locations) > _MAX_SHOWN else "")
