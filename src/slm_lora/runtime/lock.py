"""File locks of experiments and caches; the operating system releases them with the process."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from slm_lora.errors import IntegrityError, StorageError

LOCK_FILE = ".lock"


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock within the block.

    The operating system releases it when the process ends, even if killed; a lock file that
    remains does not lock anything.

    Raises:
        IntegrityError: another process holds it.
        StorageError: the folder cannot be written.
    """
    with _try_lock(folder / LOCK_FILE) as acquired:
        if not acquired:
            raise IntegrityError(
                f"{folder}: another process is working on this experiment; wait for it, or stop it"
            )
        yield


@contextmanager
def wait_for_lock(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock within the block, as `exclusive_lock`, but wait while another process holds it.

    Args:
        path: the lock file.
        on_wait: called once if another process holds the lock.

    Raises:
        StorageError: the file's folder cannot be written.
    """
    while True:
        with _try_lock(path) as acquired:
            if acquired:
                yield
                return
        on_wait()
        on_wait = _ignore
        time.sleep(_POLL)


def _ignore() -> None:
    pass


_POLL = 0.5


@contextmanager
def _try_lock(path: Path) -> Iterator[bool]:
    """Try to lock a file within the block; yields whether it is locked."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _open_locked(path)
    except BlockingIOError:
        yield False
        return
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield True
    finally:
        if sys.platform == "win32":
            # Windows cannot remove an open file, and once closed another process may lock it.
            os.close(descriptor)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)


def _open_locked(path: Path) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(descriptor)
            # The previous holder may have removed the file before this lock.
            if _same_file(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> None:
    """Lock without waiting; BlockingIOError if another process holds the lock."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError from error
    else:
        import fcntl

        try:
            # Not flock: forked children inherit its locks, and may outlive the process.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except PermissionError as error:  # EACCES for "held" on some systems
            raise BlockingIOError from error
        except OSError as error:
            # Some network file systems have no locks: work without.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
