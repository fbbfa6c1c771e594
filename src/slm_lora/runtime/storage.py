"""Files that are complete or absent, and the user's cache folder."""

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
def _explained(target: Path) -> Iterator[None]:
    """Failures to write become one line."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}") from error
    except SafetensorError as error:  # a full disk, in the words of its library
        raise StorageError(f"cannot write {target}: {error}") from error


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary sibling to write a file at; it becomes ``target`` when the block ends well.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
    """
    with _explained(target):
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


_NEW, _OLD = "new", "old"


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling folder to fill; it becomes ``target`` (which it replaces) at the end.

    No system call exchanges two folders everywhere, so there is a moment between two renames at
    which ``target`` is not there; `recover` ends what was begun, if the process dies in it. Two
    processes may write the same folder (a cache, say): the last one's stays.

    Raises:
        StorageError: the folder cannot be written, or the disk is full.
    """
    with _explained(target):
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
            except BaseException:  # Ctrl-C, too
                if old.exists() and not target.exists():
                    old.replace(target)
                raise
            _sync_folder(target.parent)


# Exactly the names that `tempfile` gives: others may merely look alike.
_LEFT = re.compile(r"\.(?P<target>.+)\.[a-z0-9_]{8}")


def recover(target: Path) -> None:
    """Remove what killed processes left of writing ``target``; call it where no other writes.

    Where one died between the two renames of `atomic_folder`, the new folder, which was whole
    by then, takes its place.

    Raises:
        StorageError: the folder cannot be written.
    """
    with _explained(target):
        if not target.parent.is_dir():
            return
        for found in sorted(target.parent.iterdir()):
            left = _LEFT.fullmatch(found.name)
            if left is None or left["target"] != target.name:
                continue
            if (found / _OLD).exists() and (found / _NEW).is_dir() and not target.exists():
                (found / _NEW).replace(target)
                _sync_folder(target.parent)
            if found.is_dir():
                shutil.rmtree(found)
            else:
                found.unlink()


def recover_all(folder: Path) -> None:
    """`recover` whatever was being written in a folder.

    Raises:
        StorageError: the folder cannot be written.
    """
    if folder.is_dir():
        left = [_LEFT.fullmatch(found.name) for found in folder.iterdir()]
        for name in sorted({each["target"] for each in left if each}):
            recover(folder / name)


def require_space(folder: Path, size: int, what: str) -> None:
    """Refuse to begin what will not fit.

    Args:
        folder: where it will be written; it need not exist yet.
        size: bytes that will be needed.
        what: for the message.

    Raises:
        StorageError: less than ``size`` bytes are free, or the folder cannot be written.
    """
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        # A disk that may be read only says so before hours of work, not after.
        with tempfile.TemporaryFile(dir=folder):
            pass
    if free < size:
        raise StorageError(
            f"{folder}: {what} need {_megabytes(size)}, and {_megabytes(free)} are free; "
            "make room, or choose another disk"
        )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def atomic_write_text(target: Path, text: str) -> None:
    """Write ``text`` as UTF-8 with Unix line ends; the file is whole or not there."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
