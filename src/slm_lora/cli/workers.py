"""Start several processes of one command on this machine, and end them together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType

from slm_lora import processes
from slm_lora.errors import STOPPED_RESUMABLE, StorageError, UsageError

GRACE = 20.0
"""Seconds that the others have to end after one has failed."""
_POLL = 0.05
_WATCHED = "SLM_LORA_WATCHED"


def launch(many: int, words: list[str]) -> int:
    """Run ``slm-lora`` with ``words`` in ``many`` processes.

    The first speaks for all; of another only its last words are shown, if it fails. Signals are
    passed on. If this process dies, the others stop as if asked to.

    Returns:
        The exit code: that of the first that failed.

    Raises:
        UsageError: fewer than one process.
    """
    if many < 1:
        raise UsageError(f"--processes {many}: must be 1 or more")
    with tempfile.TemporaryDirectory(prefix="slm-lora-") as folder:
        workers = [_start(number, many, words, Path(folder)) for number in range(many)]
        before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
        asked = 0

        def pass_on(number: int, frame: FrameType | None) -> None:
            nonlocal asked
            asked += 1
            _signal(workers, number)

        for each in before:
            signal.signal(each, pass_on)
        try:
            first = _first_to_fail(workers)
            if first is not None and not asked:
                _end(workers)
            for worker in workers:
                worker.wait()
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
            for worker in workers:
                worker.kill()
                worker.wait()
        codes = [worker.returncode for worker in workers]
        if asked and any(code == STOPPED_RESUMABLE for code in codes):
            return STOPPED_RESUMABLE
        if first is None:
            return 0
        return _explained(first, workers, Path(folder))


def watch_starter() -> None:
    """In a process that `launch` started: stop as if asked to when the starter is gone."""
    if _WATCHED not in os.environ:
        return

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _start(number: int, many: int, words: list[str], folder: Path) -> subprocess.Popen[bytes]:
    threads = max(1, (os.cpu_count() or 1) // many)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        **os.environ,
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(many),
        processes.STORE: str(folder / "store"),
        _WATCHED: "1",
    }
    log = None if number == 0 else (folder / f"{number}.log").open("wb")
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "slm_lora", *words],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            # Signals of the terminal come to this process, which passes them on, once.
            start_new_session=True,
        )
    finally:
        if log is not None:
            log.close()


def _first_to_fail(workers: list[subprocess.Popen[bytes]]) -> int | None:
    """Wait until one fails, or all have ended well; its number. Those that only miss another
    are not the reason."""
    while True:
        codes = [worker.poll() for worker in workers]
        failed = [number for number, code in enumerate(codes) if code]
        if failed:
            return min(failed, key=lambda number: codes[number] == StorageError.exit_code)
        if all(code == 0 for code in codes):
            return None
        time.sleep(_POLL)


def _end(workers: list[subprocess.Popen[bytes]]) -> None:
    """The others notice by themselves that one is gone; those that do not are made to end."""
    for wanted in (None, signal.SIGTERM, signal.SIGKILL):
        if wanted is not None:
            _signal(workers, wanted)
        until = time.monotonic() + GRACE
        while time.monotonic() < until and any(worker.poll() is None for worker in workers):
            time.sleep(_POLL)


def _signal(workers: list[subprocess.Popen[bytes]], number: int) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(number)


def _explained(first: int, workers: list[subprocess.Popen[bytes]], folder: Path) -> int:
    """Say why the first that failed did; its exit code."""
    code: int = workers[first].returncode
    who = f"process {first + 1} of {len(workers)}"
    if code < 0:
        print(
            f"{who} was ended by {signal.Signals(-code).name}; the same command continues from "
            "the last checkpoint",
            file=sys.stderr,
        )
        return 128 - code
    if first > 0:
        said = (folder / f"{first}.log").read_text(encoding="utf-8", errors="replace").strip()
        print(f"{who}: {(said.splitlines() or ['ended without a word'])[-1]}", file=sys.stderr)
    return code
