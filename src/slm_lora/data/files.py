"""Rows of a local file, or of a folder of them; a file that is not read is named for what it is.

``READERS`` has one entry a suffix. All of them but Parquet's read text, which may be compressed
(``.gz``) or UTF-16 (as Windows writes it), and is UTF-8 by the time that a reader sees it.
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
    "compressed in another way than gzip": ".bz2 .xz .zst .lz4 .br",
    "an Arrow file": ".arrow .feather .ipc",
    "a pickle, which may run programs": ".pkl .pickle .pt .pth .joblib",
    "a database": ".db .sqlite .sqlite3 .duckdb",
    "a table of another kind": ".orc .avro .npy .npz .h5 .hdf5 .tfrecord",
    "a document": ".md .html .htm .xml .pdf .docx .rtf .yaml .yml",
}
_FOREIGN = {suffix: what for what, suffixes in _OTHERS.items() for suffix in suffixes.split()}
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
_MOST_SHOWN = 5
_INSTEAD = "save the rows as JSONL, JSON, CSV or Parquet"


def suffix_of(path: Path) -> str:
    """What the name says of the kind of file: ``.jsonl``, or ``.jsonl.gz`` if compressed."""
    last = path.suffix.lower()
    return f"{path.with_suffix('').suffix.lower()}.gz" if last == ".gz" else last


def is_read(suffix: str) -> bool:
    """Whether files of this suffix are read."""
    inner = suffix.removesuffix(".gz")
    return inner in READERS and (inner == suffix or inner != ".parquet")


def is_known(suffix: str) -> bool:
    """Whether the suffix is that of a file, read or not."""
    return is_read(suffix) or suffix in _FOREIGN or suffix.endswith(".gz")


def read_file(
    path: Path,
    section: DataSection,
    label: str = "",
    strings: bool = False,
    suffix: str = "",
) -> tuple[Table, str]:
    """What is in the file, and ``sha256:…`` of its bytes.

    Args:
        path: the file.
        section: how it is read.
        label: names it in places and messages; its name, if empty.
        strings: JSON texts are records, too: of one column, ``text``.
        suffix: the kind of file that it is taken for; that of its name, if empty.

    Raises:
        DataError: no reader for the suffix, or a file that is broken as a whole.
        StorageError: the file cannot be read.
    """
    label, suffix = label or path.name, suffix or suffix_of(path)
    if not is_read(suffix):
        if what := _FOREIGN.get(path.suffix.lower()):
            raise DataError(f"{label}: {what}, which is not read; {_INSTEAD}")
        raise DataError(f"{label}: not one of the suffixes that are read: {_SUFFIXES}")
    try:
        with _opened(path, label, suffix) as handle:
            table = READERS[suffix.removesuffix(".gz")](handle, label, section, strings)
        if any(isinstance(record, InvalidUtf8Error) for _, record in table.records):
            table = Table(
                table.records, table.columns, table.lists, table.notes,
                encoding="" if suffix == ".parquet" else _looks_like(path, label, suffix),
            )  # fmt: skip
        return table, f"sha256:{checksums.sha256_file(path)}"
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{label}: no gzip file, or a broken one; write it again") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error


def read_folder(path: Path, section: DataSection, strings: bool = False) -> tuple[Table, str]:
    """The files of a folder, in the order of their names, as one; and ``sha256:…`` of them all.

    Raises:
        DataError: no file in it is read, several kinds of files are, or one of them is broken.
        StorageError: it cannot be read.
    """
    try:
        found = sorted(each for each in path.iterdir() if not each.name.startswith((".", "_")))
        files = [each for each in found if each.is_file()]
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    if any(each.name == "dataset_info.json" for each in files) and any(
        each.suffix == ".arrow" for each in files
    ):
        raise DataError(
            f"data.name={path} is what save_to_disk of datasets wrote (Arrow), which is not read; "
            "write it by to_parquet or to_json"
        )
    shards = [each for each in files if is_read(suffix_of(each))]
    if not shards:
        named = ", ".join(each.name for each in found[:5]) or "nothing"
        raise DataError(
            f"data.name={path} is a folder without files that are read ({_SUFFIXES}); it holds "
            f"{named}"
        )
    kinds = Counter(map(suffix_of, shards))
    if len(kinds) > 1:
        counted = ", ".join(f"{kind} ({many})" for kind, many in sorted(kinds.items()))
        raise DataError(
            f"data.name={path} is a folder of several kinds of files, {counted}; name one file, or "
            "a folder of one kind"
        )
    label, notes = path.resolve().name, [_named(shards)]
    if others := [each for each in found if each not in shards]:
        left = ", ".join(each.name for each in others[:5]) + (", …" if len(others) > 5 else "")
        notes.append(f"not read: {left}")
    if suffix_of(shards[0]).startswith(".txt") and section.text_rows == "auto":
        # One way for all of them.
        by: Literal["lines", "paragraphs"] = (
            "paragraphs" if any(map(_has_paragraphs, shards)) else "lines"
        )
        section = section.model_copy(update={"text_rows": by})
        notes.append(f"a row is one of the {by} (data.text_rows)")
    tables, digest = [], hashlib.sha256()
    for each in shards:
        table, sha = read_file(each, section, strings=strings)
        tables.append(table)
        digest.update(f"{each.name} {sha}\n".encode("utf-8", "surrogateescape"))
    inside = [note for table in tables for note in table.notes]
    if len(inside) > _MOST_SHOWN:
        inside[_MOST_SHOWN:] = [f"{len(inside) - _MOST_SHOWN} more of the kind"]
    columns = [table.columns for table in tables if table.columns is not None]
    whole = Table(
        [record for table in tables for record in table.records],
        frozenset().union(*columns) if len(columns) == len(tables) else None,
        frozenset().union(*(table.lists for table in tables)),
        (*(f"{label}: {note}" for note in notes), *inside),
        next((table.encoding for table in tables if table.encoding), ""),
    )
    return whole, f"sha256:{digest.hexdigest()}"


def _named(shards: list[Path]) -> str:
    many = f"{len(shards)} file{'s' * (len(shards) > 1)}"
    names = [each.name for each in shards]
    if len(shards) > _MOST_SHOWN:
        names = [*names[:2], "…", names[-1]]
    return f"{many} ({', '.join(names)})"


def _has_paragraphs(path: Path) -> bool:
    try:
        with _opened(path, path.name, suffix_of(path)) as handle:
            return has_paragraphs(handle)
    except (OSError, EOFError, zlib.error):
        return False  # reading it will say why


@contextmanager
def _opened(path: Path, label: str, suffix: str) -> Iterator[BinaryIO]:
    """The bytes of a file as a reader wants them: text is UTF-8 unless it is none."""
    with gzip.open(path) if suffix.endswith(".gz") else path.open("rb") as handle:
        head = handle.peek(64)
        if suffix == ".parquet":
            yield cast(BinaryIO, handle)
            return
        for magic, what in _MAGIC.items():
            if head.startswith(magic):
                raise DataError(f"{label}: {what}; {_INSTEAD}")
        if encoding := _wide(head):
            try:
                text = handle.read().decode(encoding)
            except UnicodeDecodeError:
                raise DataError(f"{label}: broken {encoding.upper()}; save it as UTF-8") from None
            yield BytesIO(text.encode())
        else:
            yield cast(BinaryIO, handle)


def _wide(head: bytes) -> str:
    """UTF-16 or UTF-32, by a mark at the beginning or by the zeros of plain letters."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    if len(head) >= 4 and not any(head[1::2]) and all(head[::2]):
        return "utf-16-le"
    if len(head) >= 4 and not any(head[::2]) and all(head[1::2]):
        return "utf-16-be"
    return ""


def _looks_like(path: Path, label: str, suffix: str) -> str:
    """The 8-bit encoding of a file that is no UTF-8 anywhere; empty if it may be UTF-8, broken."""
    with _opened(path, label, suffix) as handle:
        content = handle.read()
    if not content.decode("utf-8", "ignore").isascii():
        return ""
    try:
        content.decode("cp1252")
        content.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        return "" if error.encoding == "charmap" else "Windows-1252"
    return ""
