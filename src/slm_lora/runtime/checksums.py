"""What a folder says of its own files: the SHA-256 of each, and one over the saying itself."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from slm_lora.errors import IntegrityError

FILES, SEAL = "files", "seal"
"""Keys of a sealed document: SHA-256 by file name, and that of the rest of the document."""


def sealed(about: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """``about`` with the SHA-256 of every file now in the folder, and a seal over all of it."""
    files = {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    whole = {**about, FILES: files}
    return {**whole, SEAL: content_hash(whole)}


def read_sealed(document: Path) -> dict[str, Any]:
    """The document, its seal unbroken; one from before there were seals as it is.

    Raises:
        FileNotFoundError: no document.
        IntegrityError: it is not as it was written.
    """
    try:
        found = json.loads(document.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{document}: broken ({error}); {_MEND}") from error
    if not isinstance(found, dict):
        raise IntegrityError(f"{document}: broken (not an object); {_MEND}")
    rest = {key: value for key, value in found.items() if key != SEAL}
    if SEAL in found or FILES in found:
        try:
            whole = found.get(SEAL) == content_hash(rest)
        except ValueError:  # half a character, which no JSON of ours holds
            whole = False
        if not whole:
            raise IntegrityError(
                f"{document}: broken (what it says does not match its seal); {_MEND}"
            )
    return found


_MEND = "fetch or make the folder again"


def check_files(folder: Path, about: Mapping[str, Any]) -> None:
    """Compare every file that a sealed document names with its SHA-256.

    Raises:
        IntegrityError: a file is missing, was changed, or does not lie in the folder.
    """
    files = about.get(FILES, {})
    if not isinstance(files, dict):
        raise IntegrityError(f"{folder}: its list of files is none; {_MEND}")
    for name, digest in files.items():
        path = inside(folder, name)
        if not path.is_file():
            raise IntegrityError(f"{path}: missing; {_MEND}")
        try:
            found = sha256_file(path)
        except OSError as error:
            raise IntegrityError(f"{path}: cannot be read ({error.strerror}); {_MEND}") from error
        if found != digest:
            raise IntegrityError(f"{path}: not as it was written (SHA-256 differs); {_MEND}")


def inside(folder: Path, name: str) -> Path:
    """The file of that name, which must lie in the folder (or in the hub's cache behind it).

    Raises:
        IntegrityError: the name leads elsewhere, by itself or through a link.
    """
    pure = PurePosixPath(name)
    if not pure.parts or pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name:
        raise IntegrityError(f"{folder}: names a file outside of itself ({name[:60]!a})")
    path = folder / pure
    allowed = [folder.resolve()]
    if folder.parent.name == "snapshots":
        # The hub's cache keeps snapshots as links into a folder of blobs beside them.
        allowed.append((folder.parent.parent / "blobs").resolve())
    if not any(path.resolve().is_relative_to(each) for each in allowed):
        raise IntegrityError(f"{path}: a link out of its folder; put the file itself there")
    return path


def content_hash(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
