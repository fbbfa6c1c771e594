"""Atomic writes of files and folders, free space, the user's cache folder."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from slm_lora.errors import StorageError


def cache_dir() -> Path:
    """Cache folder of built models and data sets: ``$SLM_LORA_CACHE``, or the platform's."""
    if chosen := os.environ.get("SLM_LORA_CACHE"):
        return Path(chosen)
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData/Local")) / "slm-lora"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "slm-lora"


def _sync_folder(folder: Path) -> None:
    # Windows cannot open a folder; its renames are durable without.
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _translate_errors(target: Path) -> Iterator[None]:
    """Translate errors of writing to StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from error
    except SafetensorError as error:  # raised on a full disk
        raise StorageError(f"cannot write {target}: {error}") from error


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling file; it becomes ``target`` if the block succeeds.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
    """
    with _translate_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb+") as written:
                os.fsync(written.fileno())
            # mkstemp's files are readable by their owner only.
            temporary.chmod(0o666 & ~_umask())
            temporary.replace(target)
            _sync_folder(target.parent)
        finally:
            temporary.unlink(missing_ok=True)


_NEW, _OLD = "new", "old"


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder; it replaces ``target`` if the block succeeds.

    No portable system call exchanges two folders, so ``target`` is absent between two renames;
    `recover` completes the exchange if the process dies there. If two processes write the same
    folder (a cache), the last one wins.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
    """
    with _translate_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as name:
            filled, old = Path(name) / _NEW, Path(name) / _OLD
            filled.mkdir()
            yield filled
            for path in sorted(filled.rglob("*")):
                if path.is_file():
                    path.chmod(0o666 & ~_umask())
                    with path.open("rb+") as written:
                        os.fsync(written.fileno())
            for folder in (*filter(Path.is_dir, filled.rglob("*")), filled, Path(name)):
                _sync_folder(folder)
            try:
                if target.exists():
                    target.replace(old)
                filled.replace(target)
            except BaseException:  # including KeyboardInterrupt
                if old.exists() and not target.exists():
                    old.replace(target)
                raise
            _sync_folder(target.parent)


# Exactly the names made by `tempfile`.
_TEMPORARY_NAME = re.compile(r"\.(?P<target>.+)\.[a-z0-9_]{8}")


def recover(target: Path) -> None:
    """Remove temporary files that killed processes left beside ``target``; nobody may write it now.

    If a process died between the two renames of `atomic_folder`, the new folder, complete by then,
    becomes ``target``.

    Raises:
        StorageError: the folder cannot be written.
    """
    with _translate_errors(target):
        if not target.parent.is_dir():
            return
        for entry in sorted(target.parent.iterdir()):
            match = _TEMPORARY_NAME.fullmatch(entry.name)
            if match is None or match["target"] != target.name:
                continue
            if (entry / _OLD).exists() and (entry / _NEW).is_dir() and not target.exists():
                (entry / _NEW).replace(target)
                _sync_folder(target.parent)
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def recover_all(folder: Path) -> None:
    """`recover` every target in a folder.

    Raises:
        StorageError: the folder cannot be written.
    """
    if folder.is_dir():
        matches = [_TEMPORARY_NAME.fullmatch(entry.name) for entry in folder.iterdir()]
        for name in sorted({name_match["target"] for name_match in matches if name_match}):
            recover(folder / name)


def require_space(folder: Path, size: int, contents: str) -> None:
    """Check free disk space before long work.

    Args:
        folder: folder to write to; created if missing.
        size: bytes needed.
        contents: files to write, for the message.

    Raises:
        StorageError: less than ``size`` bytes are free, or the folder cannot be written.
    """
    with _translate_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        # Detect a read-only disk before hours of work.
        with tempfile.TemporaryFile(dir=folder):
            pass
    if free < size:
        raise StorageError(
            f"{folder}: {_megabytes(size)} needed for {contents}, {_megabytes(free)} free; make "
            "room, or choose another disk"
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def atomic_write_text(target: Path, text: str) -> None:
    """Write text as UTF-8 with Unix line ends, atomically."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
