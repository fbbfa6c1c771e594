"""Where rows come from: a local file, the hub, or the embedded set; and what to do with bad ones.

Every malformed row is found and named by its line before anything else happens; no message
ever quotes the text of a row.
"""

from __future__ import annotations

import csv
import importlib.metadata
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import slm_lora
from slm_lora import storage
from slm_lora.data import formats
from slm_lora.data.formats import RowError
from slm_lora.errors import DataError, SlmLoraError, StorageError, UsageError
from slm_lora.recipe import DataSection
from slm_lora.records import Row

ROW_BYTES = 10_000_000
"""Longest row that is read, in bytes of UTF-8; anything longer is a file gone wrong."""

SKIPPED_SHARE = 0.1
"""Share of bad rows above which even ``on_bad_row=skip`` gives up: the set is another one."""

HUB_TIMEOUT = 5.0
"""Seconds to wait for the hub's first answer."""

_ML_QA_BUILT_FROM = ("scikit-learn", "scipy", "numpy", "numpydoc")
_SPACE = re.compile(r"[ \t\r\n]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", re.ASCII)
_TRANSPORTS = {"requests", "httpx", "httpx2"}
_LOCAL_INSTEAD = "give a local file with data.name=path.jsonl"

Record = dict[str, Any]
_Numbered = tuple[int, Record | RowError]
"""A record, or why there is none, under the number that a message shows."""


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


@dataclass(frozen=True, slots=True)
class _Table:
    """What a reader found. ``columns`` and ``lists`` (those that hold lists) are None where only
    the records tell."""

    records: list[_Numbered]
    columns: frozenset[str] | None = None
    lists: frozenset[str] = frozenset()


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
    path = Path(os.path.expanduser(name))
    if name == "ml-qa":
        table, digest = _read_file(ensure_ml_qa(), section)
        return _row_set(table, section, name, " ".join([name, digest, *_ml_qa_versions()]))
    # Functions of os.path, as those of Path raise for a name that cannot be a path.
    if os.path.isdir(path):
        raise DataError(f"data.name={name} is a folder; name one file")
    if os.path.exists(path):
        table, digest = _read_file(path, section)
        return _row_set(table, section, path.name, f"{path.name} {digest}")
    if path.suffix.lower() in _READERS or not _HUB_ID.fullmatch(name):
        raise DataError(f"no such file: data.name={name} (nor is it ml-qa or a hub id owner/name)")
    table, commit = _hub(section)
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


def _row_set(table: _Table, section: DataSection, label: str, origin: str) -> RowSet:
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
            _check_size(sum(len(t.content.encode()) for t in row.turns) + len(row.context.encode()))
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


def _check_size(size: int) -> None:
    if size > ROW_BYTES:
        raise RowError(f"row of {size / 1e6:.1f} MB (at most {ROW_BYTES / 1e6:.0f} MB)")


# --- files ---------------------------------------------------------------------------------


def _read_file(path: Path, section: DataSection) -> tuple[_Table, str]:
    """What is in the file, and ``sha256:…`` of its bytes."""
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{path.name}: not one of the suffixes that are read: {_SUFFIXES}")
    try:
        return reader(path, section), f"sha256:{storage.sha256_file(path)}"
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error


def _json_decoder(faults: list[str]) -> json.JSONDecoder:
    """A decoder that notes in ``faults`` what Python accepts and JSON does not. It notes rather
    than raises, so that the end of the value is found and reading can go on behind it."""

    def unique_keys(pairs: list[tuple[str, Any]]) -> Record:
        value: Record = {}
        for key, item in pairs:
            if key in value:
                faults.append(f"duplicate key {key[:40]!a}")
            value[key] = item
        return value

    def no_constant(literal: str) -> None:
        faults.append(f"{literal} is not JSON")

    return json.JSONDecoder(object_pairs_hook=unique_keys, parse_constant=no_constant)


def _record(value: object, faults: list[str]) -> Record | RowError:
    if faults:
        return RowError(faults[0])
    return value if isinstance(value, dict) else RowError("not a JSON object")


def _jsonl(path: Path, section: DataSection) -> _Table:
    faults: list[str] = []
    decoder = _json_decoder(faults)

    def parse(line: bytes, size: int, first: bool) -> Record | RowError:
        faults.clear()
        try:
            _check_size(size)
            text = line.decode("utf-8-sig" if first else "utf-8")
            if text.startswith("\ufeff"):
                return RowError("byte order mark inside the file")
            return _record(decoder.decode(text), faults)
        except RowError as error:
            return error
        except UnicodeDecodeError:
            return RowError("invalid UTF-8")
        except (ValueError, RecursionError):  # a number of 5,000 digits is a plain ValueError
            return RowError("bad JSON")

    with path.open("rb") as handle:
        return _Table(
            [
                (number, parse(line, size, number == 1))
                for number, (line, size) in enumerate(_lines(handle), start=1)
                if line.strip()
            ]
        )


def _lines(handle: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """Lines with their sizes in bytes, without the line end; of a line too long only its
    beginning, so that a file without line ends does not fill the memory."""
    while line := handle.readline(ROW_BYTES + 2):
        size, end = len(line), line
        while not end.endswith(b"\n") and (end := handle.readline(1 << 20)):
            size += len(end)
        yield line, size - (end.endswith(b"\n"))


def _json(path: Path, section: DataSection) -> _Table:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path.name}:{line}: invalid UTF-8; save the file as UTF-8") from None

    def after_space(position: int) -> int:
        space = _SPACE.match(text, position)
        return space.end() if space else position

    def broken(position: int) -> DataError:
        # Where the list is broken, nobody knows where the next item begins: nothing to skip.
        line = text.count("\n", 0, position) + 1
        return DataError(f"{path.name}:{line}: bad JSON; mend the file")

    position = after_space(0)
    if position == len(text):
        return _Table([])
    if text[position] != "[":
        raise DataError(f"{path.name}: not a list of objects; one object a line is named .jsonl")
    faults: list[str] = []
    decoder = _json_decoder(faults)
    records: list[_Numbered] = []
    position = after_space(position + 1)
    more = not text.startswith("]", position)
    while more:
        faults.clear()
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else position
            raise broken(at) from None
        records.append((len(records) + 1, _record(value, faults)))
        position = after_space(end)
        more = text.startswith(",", position)
        if more:
            position = after_space(position + 1)
    if not text.startswith("]", position) or after_space(position + 1) < len(text):
        raise broken(position)
    return _Table(records)


def _csv(path: Path, section: DataSection) -> _Table:
    records: list[_Numbered] = []
    header: list[str] = []
    # Bytes that are no UTF-8 become surrogates, which valid UTF-8 cannot hold: they are found
    # in their row, where strict decoding would stop at a place unknown.
    with (
        path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle,
        _csv_fields_of_any_size(),
    ):
        reader = csv.reader(handle, strict=True)
        line = 1
        try:
            for fields in reader:
                if not header:
                    header = fields
                    if len(set(header)) < len(header):
                        raise DataError(f"{path.name}:{line}: two columns have the same name")
                elif fields:
                    records.append((line, _csv_record(header, fields)))
                line = reader.line_num + 1
        except csv.Error as error:
            # An unclosed quote changes the meaning of all that follows: nothing to skip.
            raise DataError(f"{path.name}:{line}: broken CSV ({error}); mend the file") from None
    return _Table(records)


def _csv_record(header: list[str], fields: list[str]) -> Record | RowError:
    try:
        "".join(fields).encode()
    except UnicodeEncodeError:
        return RowError("invalid UTF-8")
    if len(fields) != len(header):
        count = f"{len(fields)} field{'s' * (len(fields) > 1)}"
        return RowError(f"{count} where the header has {len(header)}")
    return dict(zip(header, fields, strict=True))


@contextmanager
def _csv_fields_of_any_size() -> Iterator[None]:
    # A field too long would end the reading (ours only ends the row). The limit belongs to the
    # whole process: it is put back as it was.
    before = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path, section: DataSection) -> _Table:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            read = formats.wanted(file.schema_arrow.names, section)
            batches = list(file.iter_batches(batch_size=1024, columns=read))
            return _arrow_table(file.schema_arrow, batches, section, first=1)
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise  # the disk's, not Arrow's
        raise DataError(f"{path.name}: broken, or not a Parquet file; write it again") from error


def _arrow_table(schema: Any, batches: list[Any], section: DataSection, first: int) -> _Table:
    """Rows of record batches, numbered from ``first``; only columns that a format reads."""
    import pyarrow

    lists = frozenset(
        field.name
        for field in schema
        if pyarrow.types.is_list(field.type) or pyarrow.types.is_large_list(field.type)
    )
    rows = itertools.chain.from_iterable(map(_batch_rows, batches))
    return _Table(list(enumerate(rows, start=first)), frozenset(schema.names), lists)


def _batch_rows(batch: Any) -> list[Record | RowError]:
    try:
        rows: list[Record | RowError] = batch.to_pylist()
        return rows
    except (ValueError, OverflowError) as error:
        if len(batch) > 1:
            return [row for i in range(len(batch)) for row in _batch_rows(batch.slice(i, 1))]
        invalid = isinstance(error, UnicodeDecodeError)
        return [RowError("invalid UTF-8" if invalid else "a value cannot be read")]


_READERS: dict[str, Callable[[Path, DataSection], _Table]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}
_SUFFIXES = ", ".join(_READERS)


# --- hub -----------------------------------------------------------------------------------


def _hub(section: DataSection) -> tuple[_Table, str]:
    """The rows of a hub data set, numbered from 0 as the hub does, and the commit they are of."""
    import datasets
    import huggingface_hub

    name, offline, commit = section.name, datasets.config.HF_HUB_OFFLINE, None
    try:
        if not offline:
            # Asked first, and once: `load_dataset` would try for half a minute without a network.
            api = huggingface_hub.HfApi()
            commit = api.dataset_info(name, revision=section.revision, timeout=HUB_TIMEOUT).sha
        loaded = datasets.load_dataset(
            name, revision=commit or section.revision, split=section.split, keep_in_memory=False
        )
        table = loaded.select_columns(formats.wanted(loaded.column_names, section))
        batches = table.with_format("arrow")[:].to_batches()
    except Exception as error:
        raise _hub_failure(section, error) from error
    # When loading fails, `load_dataset` falls back to whatever commit lies in its cache, whose
    # folder is named after it.
    folders = [Path(file["filename"]).parent.name for file in loaded.cache_files]
    cached = next((folder for folder in folders if _COMMIT.fullmatch(folder)), None)
    expected = commit or section.revision
    if expected and cached and cached != expected:
        raise StorageError(
            f"hub data set {name} is in the cache as commit {cached}, which is not known to be "
            f"{expected}, and that could not be loaded; go online, or set data.revision={cached}"
        )
    schema = loaded.features.arrow_schema
    return _arrow_table(schema, batches, section, first=0), commit or cached or "unknown"


def _hub_failure(section: DataSection, error: Exception) -> SlmLoraError:
    """What to tell of a failed download; an error that is none of the hub's is raised again."""
    import datasets
    from huggingface_hub import errors as hub

    what = f"hub data set {section.name}"
    modules = {base.__module__.partition(".")[0] for base in type(error).__mro__}
    first_line = (str(error).splitlines() or [type(error).__name__])[0][:200]
    if isinstance(error, hub.GatedRepoError):
        return StorageError(
            f"{what} is gated: accept its terms at https://huggingface.co/datasets/{section.name}"
            f" and log in with `hf auth login`, or {_LOCAL_INSTEAD}"
        )
    if isinstance(error, hub.RevisionNotFoundError):
        return StorageError(f"{what} has no revision {section.revision!r}; mend data.revision")
    if isinstance(error, hub.RepositoryNotFoundError):
        return StorageError(
            f"{what} was not found (nor a file of that name), or is private: mend data.name, log "
            f"in with `hf auth login`, or {_LOCAL_INSTEAD}"
        )
    if isinstance(error, hub.HfHubHTTPError):
        status = error.response.status_code
        return StorageError(f"{what}: the hub answered {status}; try later, or {_LOCAL_INSTEAD}")
    if datasets.config.HF_HUB_OFFLINE and isinstance(error, OSError):
        return StorageError(
            f"{what} is not in the cache, and HF_HUB_OFFLINE forbids the network: {_LOCAL_INSTEAD}"
        )
    # The hub's transport has changed its name over the versions.
    if isinstance(error, ConnectionError | TimeoutError) or modules & _TRANSPORTS:
        return StorageError(
            f"no network for {what}: {_LOCAL_INSTEAD}, or set HF_HUB_OFFLINE=1 to use a cached copy"
        )
    if isinstance(error, OSError):
        return StorageError(f"{what} cannot be stored: {error.strerror or first_line}")
    if isinstance(error, ValueError | RuntimeError | datasets.exceptions.DatasetsError):
        return DataError(f"{what} cannot be read: {first_line}")
    raise error
