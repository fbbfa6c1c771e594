"""Read a local file or a folder of files, and name the type of files that are not supported.

``READERS`` has one entry for each suffix. All readers but Parquet's take text, which may be
compressed (``.gz``) or UTF-16 (as Windows writes it), and is passed to the reader as UTF-8.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal, cast

from slm_lora.config.schema import DataSection
from slm_lora.data.arrow import read_parquet
from slm_lora.data.csv_files import read_csv
from slm_lora.data.json_files import read_json, read_json_lines
from slm_lora.data.table import InvalidUtf8Error, Table
from slm_lora.data.text_files import has_paragraphs, read_text
from slm_lora.errors import DataError, StorageError
from slm_lora.runtime import checksums

READERS: dict[str, Callable[[BinaryIO, str, DataSection, bool], Table]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".txt": read_text,
    ".parquet": read_parquet,
}
_SUFFIXES = f"{', '.join(READERS)} (text also with .gz)"

_OTHERS = {
    "a spreadsheet": ".xlsx .xls .ods .numbers",
    "an archive": ".zip .7z .tar .tgz .rar",
    "compressed, but not by gzip": ".bz2 .xz .zst .lz4 .br",
    "an Arrow file": ".arrow .feather .ipc",
    "a pickle, which can execute code": ".pkl .pickle .pt .pth .joblib",
    "a database": ".db .sqlite .sqlite3 .duckdb",
    "a table of another kind": ".orc .avro .npy .npz .h5 .hdf5 .tfrecord",
    "a document": ".md .html .htm .xml .pdf .docx .rtf .yaml .yml",
}
_UNSUPPORTED = {
    suffix: file_type for file_type, suffixes in _OTHERS.items() for suffix in suffixes.split()
}
_MAGIC = {
    b"PK\x03\x04": "a ZIP archive or a spreadsheet (.xlsx)",
    b"PK\x05\x06": "an empty ZIP archive",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet (.xls)",
    b"\x1f\x8b": "compressed by gzip: end its name in .gz",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ\0": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"PAR1": "a Parquet file: end its name in .parquet",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "a database",
    b"%PDF-": "a PDF document",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself (git lfs pull)",
}
_MAX_SHOWN = 5
_REMEDY = "save the rows as JSONL, JSON, CSV or Parquet"


def suffix_of(path: Path) -> str:
    """Return the suffix in lower case, with the inner one if compressed: ``.jsonl.gz``."""
    suffix = path.suffix.lower()
    return f"{path.with_suffix('').suffix.lower()}.gz" if suffix == ".gz" else suffix


def is_supported(suffix: str) -> bool:
    """Whether there is a reader for this suffix."""
    inner = suffix.removesuffix(".gz")
    return inner in READERS and (inner == suffix or inner != ".parquet")


def is_known_suffix(suffix: str) -> bool:
    """Whether the suffix is that of a supported or a known unsupported file type."""
    return is_supported(suffix) or suffix in _UNSUPPORTED or suffix.endswith(".gz")


def read_file(
    path: Path,
    section: DataSection,
    label: str = "",
    strings: bool = False,
    suffix: str = "",
) -> tuple[Table, str]:
    """Read a file.

    Args:
        path: the file.
        section: reading options.
        label: name of the file in locations and messages; empty: its file name.
        strings: whether JSON strings are records of one column, ``text``.
        suffix: selects the reader; empty: the suffix of the file name.

    Returns:
        The records, and ``sha256:…`` of the file's bytes.

    Raises:
        DataError: no reader for the suffix, or a file that is broken as a whole.
        StorageError: the file cannot be read.
    """
    label, suffix = label or path.name, suffix or suffix_of(path)
    if not is_supported(suffix):
        if file_type := _UNSUPPORTED.get(path.suffix.lower()):
            raise DataError(f"{label}: {file_type}, which is not read; {_REMEDY}")
        raise DataError(f"{label}: not one of the suffixes that are read: {_SUFFIXES}")
    try:
        with _open(path, label, suffix) as handle:
            table = READERS[suffix.removesuffix(".gz")](handle, label, section, strings)
        if any(isinstance(record, InvalidUtf8Error) for _, record in table.records):
            table = Table(
                table.records, table.columns, table.lists, table.notes,
                encoding="" if suffix == ".parquet" else _guess_encoding(path, label, suffix),
            )  # fmt: skip
        return table, f"sha256:{checksums.sha256_file(path)}"
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{label}: not a gzip file, or a broken one; write it again") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error


def read_folder(path: Path, section: DataSection, strings: bool = False) -> tuple[Table, str]:
    """Read the files of a folder, in the order of their names.

    Returns:
        The records of all files, and ``sha256:…`` of their names and contents.

    Raises:
        DataError: no supported file, files of several types, or a broken file.
        StorageError: the folder or a file cannot be read.
    """
    try:
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith((".", "_")))
        files = [entry for entry in entries if entry.is_file()]
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    if any(file.name == "dataset_info.json" for file in files) and any(
        file.suffix == ".arrow" for file in files
    ):
        raise DataError(
            f"data.name={path} was written by save_to_disk of datasets (Arrow), which is not read; "
            "write it by to_parquet or to_json"
        )
    shards = [file for file in files if is_supported(suffix_of(file))]
    if not shards:
        names = ", ".join(entry.name for entry in entries[:5]) or "nothing"
        raise DataError(
            f"data.name={path} is a folder without files that are read ({_SUFFIXES}); it holds "
            f"{names}"
        )
    counts = Counter(map(suffix_of, shards))
    if len(counts) > 1:
        types = ", ".join(f"{suffix} ({count})" for suffix, count in sorted(counts.items()))
        raise DataError(
            f"data.name={path} is a folder of several kinds of files, {types}; name one file, or "
            "a folder of one kind"
        )
    label, notes = path.resolve().name, [_describe_shards(shards)]
    if others := [entry for entry in entries if entry not in shards]:
        names = ", ".join(entry.name for entry in others[:5]) + (", …" if len(others) > 5 else "")
        notes.append(f"not read: {names}")
    if suffix_of(shards[0]).startswith(".txt") and section.text_rows == "auto":
        # All files are divided in the same way.
        by: Literal["lines", "paragraphs"] = (
            "paragraphs" if any(map(_has_paragraphs, shards)) else "lines"
        )
        section = section.model_copy(update={"text_rows": by})
        notes.append(f"a row is one of the {by} (data.text_rows)")
    tables, digest = [], hashlib.sha256()
    for shard in shards:
        table, sha = read_file(shard, section, strings=strings)
        tables.append(table)
        digest.update(f"{shard.name} {sha}\n".encode("utf-8", "surrogateescape"))
    table_notes = [note for table in tables for note in table.notes]
    if len(table_notes) > _MAX_SHOWN:
        table_notes[_MAX_SHOWN:] = [f"{len(table_notes) - _MAX_SHOWN} more of the kind"]
    columns = [table.columns for table in tables if table.columns is not None]
    combined = Table(
        [record for table in tables for record in table.records],
        frozenset().union(*columns) if len(columns) == len(tables) else None,
        frozenset().union(*(table.lists for table in tables)),
        (*(f"{label}: {note}" for note in notes), *table_notes),
        next((table.encoding for table in tables if table.encoding), ""),
    )
    return combined, f"sha256:{digest.hexdigest()}"


def _describe_shards(shards: list[Path]) -> str:
    count = f"{len(shards)} file{'s' * (len(shards) > 1)}"
    names = [shard.name for shard in shards]
    if len(shards) > _MAX_SHOWN:
        names = [*names[:2], "…", names[-1]]
    return f"{count} ({', '.join(names)})"


def _has_paragraphs(path: Path) -> bool:
    try:
        with _open(path, path.name, suffix_of(path)) as handle:
            return has_paragraphs(handle)
    except (OSError, EOFError, zlib.error):
        return False  # reported when the file is read


@contextmanager
def _open(path: Path, label: str, suffix: str) -> Iterator[BinaryIO]:
    """Open a file for its reader: decompressed, and UTF-16 or UTF-32 converted to UTF-8."""
    with gzip.open(path) if suffix.endswith(".gz") else path.open("rb") as handle:
        head = handle.peek(64)
        if suffix == ".parquet":
            yield cast(BinaryIO, handle)
            return
        for magic, file_type in _MAGIC.items():
            if head.startswith(magic):
                raise DataError(f"{label}: {file_type}; {_REMEDY}")
        if encoding := _wide_encoding(head):
            try:
                text = handle.read().decode(encoding)
            except UnicodeDecodeError:
                raise DataError(f"{label}: broken {encoding.upper()}; save it as UTF-8") from None
            yield BytesIO(text.encode())
        else:
            yield cast(BinaryIO, handle)


def _wide_encoding(head: bytes) -> str:
    """Detect UTF-16 or UTF-32 by the byte order mark or by the zero bytes of ASCII letters."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if len(head) >= 4 and not any(head[1::2]) and all(head[::2]):
        return "utf-16-le"
    if len(head) >= 4 and not any(head[::2]) and all(head[1::2]):
        return "utf-16-be"
    return ""


def _guess_encoding(path: Path, label: str, suffix: str) -> str:
    """Guess the 8-bit encoding of a file that is not UTF-8; empty if it may be broken UTF-8."""
    with _open(path, label, suffix) as handle:
        content = handle.read()
    if not content.decode("utf-8", "ignore").isascii():
        return ""
    try:
        content.decode("cp1252")
        content.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        return "" if error.encoding == "charmap" else "Windows-1252"
    return ""
