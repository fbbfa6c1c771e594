"""Checksums of a folder: SHA-256 of each file, and a seal (SHA-256) over the document of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from slm_lora.errors import IntegrityError

FILES, SEAL = "files", "seal"
"""Keys of a sealed document: SHA-256 by file name, and the SHA-256 of the document's other keys."""


def sealed(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """``content`` with the SHA-256 of every file in the folder, and a seal over both."""
    files = {
        path.relative_to(folder).as_posix(): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    document = {**content, FILES: files}
    return {**document, SEAL: content_hash(document)}


def read_sealed(path: Path) -> dict[str, Any]:
    """The content of a document after its seal is verified; old documents have none.

    Raises:
        FileNotFoundError: there is no document.
        IntegrityError: it was changed, or is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: broken ({error}); {_REMEDY}") from error
    if not isinstance(content, dict):
        raise IntegrityError(f"{path}: broken (not an object); {_REMEDY}")
    rest = {key: value for key, value in content.items() if key != SEAL}
    if SEAL in content or FILES in content:
        try:
            intact = content.get(SEAL) == content_hash(rest)
        except ValueError:  # a lone surrogate, which sealed documents never hold
            intact = False
        if not intact:
            raise IntegrityError(f"{path}: broken (content does not match its seal); {_REMEDY}")
    return content


_REMEDY = "download or create the folder again"


def check_files(folder: Path, content: Mapping[str, Any]) -> None:
    """Verify the SHA-256 of every file that a sealed document lists.

    Raises:
        IntegrityError: a file is missing, changed, or outside of the folder.
    """
    files = content.get(FILES, {})
    if not isinstance(files, dict):
        raise IntegrityError(f"{folder}: its list of files is not an object; {_REMEDY}")
    for name, expected in files.items():
        path = resolve_inside(folder, name)
        if not path.is_file():
            raise IntegrityError(f"{path}: missing; {_REMEDY}")
        try:
            actual = sha256_file(path)
        except OSError as error:
            raise IntegrityError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from error
        if actual != expected:
            raise IntegrityError(f"{path}: changed (SHA-256 differs); {_REMEDY}")


def resolve_inside(folder: Path, name: str) -> Path:
    """The path of a file in the folder (or in the hub's cache that the folder links to).

    Raises:
        IntegrityError: the path is outside of the folder, directly or through a link.
    """
    relative = PurePosixPath(name)
    if (
        not relative.parts
        or relative.is_absolute()
        or ".." in relative.parts
        or "\\" in name
        or ":" in name
    ):
        raise IntegrityError(f"{folder}: names a file outside of itself ({name[:60]!a})")
    path = folder / relative
    roots = [folder.resolve()]
    if folder.parent.name == "snapshots":
        # Snapshots in the hub's cache are links into the sibling folder of blobs.
        roots.append((folder.parent.parent / "blobs").resolve())
    if not any(path.resolve().is_relative_to(root) for root in roots):
        raise IntegrityError(f"{path}: a link out of its folder; replace it with the file")
    return path


def content_hash(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
