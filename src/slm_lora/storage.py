"""Files that are complete or absent, and the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slm_lora.errors import StorageError


def cache_dir() -> Path:
    """Folder for models and data sets that are built once: ``$SLM_LORA_CACHE`` or the
    platform's own cache folder."""
    if chosen := os.environ.get("SLM_LORA_CACHE"):
        return Path(chosen)
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "slm-lora"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "slm-lora"


def _sync_folder(folder: Path) -> None:
    # Windows cannot open a folder; there a rename is durable by itself.
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary sibling to write a file at; it becomes ``target`` when the block ends well.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            # mkstemp makes files for the owner alone; results are meant to be shared.
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(target)
            _sync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from error


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling folder to fill; it becomes ``target`` (which it replaces) at the end.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
            filled = Path(name) / "new"
            filled.mkdir()
            yield filled
            for path in sorted(filled.rglob("*")):
                if path.is_file():
                    path.chmod(0o666 & ~_umask())
                    with path.open("rb+") as written:
                        os.fsync(written.fileno())
            _sync_folder(filled)
            old = Path(name) / "old"
            if target.exists():
                target.replace(old)
            try:
                filled.replace(target)
            except BaseException:
                if old.exists():
                    old.replace(target)
                raise
            _sync_folder(target.parent)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from error


def atomic_write_text(target: Path, text: str) -> None:
    """Write ``text`` as UTF-8 with Unix line ends; the file is whole or not there."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
