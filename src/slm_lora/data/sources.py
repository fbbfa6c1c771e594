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
from slm_lora.config.schema import DataSection
from slm_lora.data import column_kinds, formats
from slm_lora.data.files import is_known, read_file, read_folder, suffix_of
from slm_lora.data.formats import RejectedRowError
from slm_lora.data.hub import read_hub
from slm_lora.data.table import InvalidUtf8Error, Place, Record, Table, check_size
from slm_lora.data.text import RowError
from slm_lora.errors import DataError, UsageError
from slm_lora.records import Row
from slm_lora.runtime import storage

SKIPPED_SHARE = 0.1
"""Share of bad rows above which even ``on_bad_row=skip`` gives up: the set is another one."""

_MOST_SHOWN = 5

_ML_QA_BUILT_FROM = ("scikit-learn", "scipy", "numpy", "numpydoc")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A malformed row: where (``file:line``, ``file row 3``), and why, for people."""

    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class RowSet:
    """The rows of one source, in its order.

    ``rows`` are unique by ``row_id``: of exact duplicates the first is kept and ``duplicates``
    counts the others. ``origin`` says what was read, the same on every machine: hub id and
    commit, or file name and SHA-256, or ``ml-qa`` and the versions it was built from.
    ``bad_rows`` are those skipped. ``notes`` say what was read how, and what of it was not, one
    line each.
    """

    rows: list[Row]
    format: str
    origin: str
    bad_rows: tuple[BadRow, ...]
    duplicates: int
    notes: tuple[str, ...] = ()


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
        table, digest = read_file(ensure_ml_qa(), section, label=name)
        origin = " ".join([name, digest, *_ml_qa_versions()])
        return _row_set(table, section, name, origin, _of_hub_only(section))
    if os.path.isdir(path):  # noqa: PTH112
        table, digest = read_folder(path, section)
        folder = path.resolve().name
        return _row_set(table, section, folder, f"{folder} {digest}", _of_hub_only(section))
    if os.path.exists(path):  # noqa: PTH110
        table, digest = read_file(path, section)
        origin = f"{path.name} {digest}"
        return _row_set(table, section, path.name, origin, _of_hub_only(section))
    if is_known(suffix_of(path)) or not _HUB_ID.fullmatch(name):
        raise DataError(f"no such file: data.name={name} (nor is it ml-qa or a hub id owner/name)")
    table, commit = read_hub(section)
    return _row_set(table, section, name, f"{name}@{commit} split={section.split}")


def _of_hub_only(section: DataSection) -> tuple[str, ...]:
    """Says which keys have no effect on what is no hub data set."""
    default = DataSection()
    keys = [key for key in ("split", "revision") if getattr(section, key) != getattr(default, key)]
    return tuple(f"data.{key} is for hub data sets, and has no effect here" for key in keys)


def ensure_ml_qa() -> Path:
    """The embedded set as a JSONL file in the cache folder; it is built on first use.

    Raises:
        UsageError: a library whose documentation it is built from is not installed.
        StorageError: the cache folder cannot be written.
    """
    target = storage.cache_dir() / "data" / f"ml-qa-{'-'.join(_ml_qa_versions())}.jsonl"
    if not target.exists():
        # Imported here: it loads the libraries that the set is built from.
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
    readable = [record for _, record in table.records if not isinstance(record, RowError)]
    format_name = ""
    if readable:
        columns, lists = table.columns, table.lists
        if columns is None:
            columns, lists = _columns(readable, section)
        format_name = formats.recognise(columns, section, lists)
    rows: dict[str, Row] = {}
    bad: list[tuple[Place, RowError]] = []
    left_out: Counter[tuple[str, str]] = Counter()
    seen = set(table.columns or ())
    for place, record in table.records:
        try:
            if isinstance(record, RowError):
                raise record
            row = formats.to_row(record, str(place), format_name, section)
            check_size(sum(len(t.content.encode()) for t in row.turns) + len(row.context.encode()))
        except RowError as error:
            bad.append((place, error))
        else:
            rows.setdefault(row.row_id, row)
            seen.update(record)
            left_out.update(set(formats.left_out(record, format_name, section)))
    total = len(table.records)
    if bad and (section.on_bad_row == "fail" or _too_many(bad, total) or not rows):
        raise _malformed(label, bad, total, section, table.encoding)
    return RowSet(
        rows=list(rows.values()),
        format=format_name,
        origin=origin,
        bad_rows=_bad_rows(bad),
        duplicates=total - len(bad) - len(rows),
        notes=(*notes, *table.notes, *_unread(seen, total, format_name, section, left_out)),
    )


def _too_many(bad: list[tuple[Place, RowError]], total: int) -> bool:
    # Rows that say of themselves that they are no examples are not malformed.
    malformed = sum(not isinstance(error, RejectedRowError) for _, error in bad)
    return malformed > SKIPPED_SHARE * total


def _columns(records: list[Record], section: DataSection) -> tuple[frozenset[str], frozenset[str]]:
    """Columns of records without a schema, and those that hold lists. One stray row must not
    change the format: a column counts when half of the records have it, or the recipe asks."""
    counts = Counter(column for record in records for column in record)
    lists = Counter(
        column for record in records for column, value in record.items() if isinstance(value, list)
    )
    asked = section.format != "auto"
    mapped = {*section.columns.values(), *section.columns}
    columns = frozenset(
        column
        for column, count in counts.items()
        if asked or 2 * count >= len(records) or column in mapped
    )
    return columns, frozenset(c for c in columns if 2 * lists[c] >= counts[c])


def _unread(
    columns: set[str],
    rows: int,
    format_name: str,
    section: DataSection,
    left_out: Counter[tuple[str, str]],
) -> list[str]:
    """What there is to say of columns and keys that are not read; those of a prompt by their
    rows, others by their names."""
    notes, told, keys = [], set(), []
    for (what, name), many in sorted(left_out.items()):
        shown = formats.shown(name)
        if what == "column":
            told.add(name)
            context = formats.context_of(format_name, columns, section)
            fits = context and name in column_kinds.CONTEXTS
            read_by = f" (data.columns={{{context}: {name}}} reads it)" if fits else ""
            notes.append(
                f"column {shown} has content in {many} of {rows} rows, and is not read{read_by}"
            )
        else:
            keys.append(f"{shown} ({many} rows)")
    if keys:
        more = f", and {len(keys) - 10} others" if len(keys) > 10 else ""
        notes.append(f"keys of messages that are not read: {', '.join(keys[:10])}{more}")
    read = formats.read_columns(columns, format_name, section)
    # What would be told or refused if it had content has none.
    empty = {c for c in columns if c in column_kinds.PROMPT_COLUMNS or column_kinds.refused(c)}
    rest = columns - read - told - empty - formats.dropped(section)
    if rest:
        notes.append(f"columns that are not read: {formats.listed(rest, most=10)}")
    return notes


def _bad_rows(bad: list[tuple[Place, RowError]]) -> tuple[BadRow, ...]:
    return tuple(BadRow(str(place), str(error)) for place, error in bad)


def _malformed(
    label: str,
    bad: list[tuple[Place, RowError]],
    total: int,
    section: DataSection,
    encoding: str,
) -> MalformedRowsError:
    paths: dict[str, list[Place]] = {}
    for place, error in bad:
        reason = str(error)
        if encoding and isinstance(error, InvalidUtf8Error):
            reason = f"invalid UTF-8 (the file looks like {encoding}; save it as UTF-8)"
        paths.setdefault(reason, []).append(place)
    mend = f"Mend {'them' if len(bad) > 1 else 'it'}"
    first, many = bad[0][0], f"{len(bad)} of {total} rows"
    only = len(paths) == 1
    rejected = all(isinstance(error, RejectedRowError) for _, error in bad)
    kind = "are marked not to be learnt" if rejected else "are malformed"
    if only and encoding and isinstance(bad[0][1], InvalidUtf8Error):
        message = (
            f"{first}: invalid UTF-8, in {many}: the file looks like {encoding}; save it as UTF-8"
        )
    elif section.on_bad_row == "skip" and len(bad) == total:
        message = f"{label}: all {total} rows {kind}: {_kinds(paths, label)}. {mend}."
    elif section.on_bad_row == "skip":
        message = (
            f"{label}: {many} are malformed, more than the {SKIPPED_SHARE:.0%} that "
            f"data.on_bad_row=skip lets pass: {_kinds(paths, label)}. {mend}."
        )
    else:
        (reason, found), *_ = paths.items()
        if not only:
            message = f"{label}: {len(bad)} malformed rows: {_kinds(paths, label)}"
        elif len(bad) > 1:
            message = f"{first}: {reason} ({len(bad)} rows in all: {_numbers(found, label)})"
        else:
            message = f"{first}: {reason}"
        skipped = not _too_many(bad, total) and len(bad) < total
        message += f". {mend}{', or set data.on_bad_row=skip' if skipped else ''}."
    malformed = MalformedRowsError(message)
    malformed.bad_rows = _bad_rows(bad)
    return malformed


def _kinds(paths: dict[str, list[Place]], label: str) -> str:
    shown = list(paths.items())[:_MOST_SHOWN]
    text = "; ".join(
        f"{reason} ({len(found)} row{'s' * (len(found) > 1)}: {_numbers(found, label)})"
        for reason, found in shown
    )
    others = list(paths.values())[_MOST_SHOWN:]
    if others:
        text += f"; and {sum(map(len, others))} rows for other reasons"
    return text


def _numbers(paths: list[Place], label: str) -> str:
    """The first places; by their numbers alone in the file that is spoken of."""
    shown = [str(p.number if p.file == label else p) for p in paths[:_MOST_SHOWN]]
    return ", ".join(shown) + (", …" if len(paths) > _MOST_SHOWN else "")
