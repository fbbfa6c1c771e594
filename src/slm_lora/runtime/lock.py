"""One process at a time on an experiment, or a cell of it, by a lock that dies with the process."""

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
def only_process(folder: Path) -> Iterator[None]:
    """Hold the folder's lock while the block runs.

    The operating system drops it when the process ends, however it ends, so that no lock is
    ever left behind; a file that is left has no meaning.

    Raises:
        IntegrityError: another process holds it.
        StorageError: the folder cannot be written.
    """
    with _held(folder / LOCK_FILE) as held:
        if not held:
            raise IntegrityError(
                f"{folder}: another process is at work on this experiment; wait for it, or stop it"
            )
        yield


@contextmanager
def after_other_processes(path: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock file while the block runs; as `only_process`, but wait for one who holds it.

    Args:
        path: of the lock file.
        on_wait: called once, if there is someone to wait for.

    Raises:
        StorageError: its folder cannot be written.
    """
    while True:
        with _held(path) as held:
            if held:
                yield
                return
        on_wait()
        on_wait = _say_nothing
        time.sleep(_POLL)


def _say_nothing() -> None:
    pass


_POLL = 0.5


@contextmanager
def _held(path: Path) -> Iterator[bool]:
    """Whether the lock was to be had; if so, it is held inside."""
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
            # An open file cannot be removed there, and one that is closed is another's already.
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
            # Whoever held it until now has removed the file: then this is a lock on nothing.
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
    """Lock or raise BlockingIOError at once."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError from error
    else:
        import fcntl

        try:
            # Not flock: its locks live on in forked children that outlast the process.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except PermissionError as error:  # what some systems say for "held"
            raise BlockingIOError from error
        except OSError as error:
            # A file system without locks (some of a network's) is no reason not to work.
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
