"""Start several processes of one command on this machine, and end them together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from slm_lora.errors import STOPPED_RESUMABLE, StorageError, UsageError
from slm_lora.launch.command import SAVING, WATCHED
from slm_lora.runtime import distributed
from slm_lora.runtime.distributed import PeerLostError
from slm_lora.runtime.signals import take_repeated_signals_for_one

KILL_TIMEOUT_S = 20.0
"""Seconds that the others have to end after one has failed; `SAVING` where all are to stop."""
_POLL = 0.05


def launch(many: int, words: list[str]) -> int:
    """Run ``slm-lora`` with ``words`` in ``many`` processes.

    The first speaks for all; of another only its last words are shown, if it fails. Signals are
    passed on. If this process dies, the others stop as if asked to.

    Returns:
        The exit code: of a process that failed by itself, see `_explained`; 75 where all stopped.

    Raises:
        UsageError: fewer than one process.
    """
    if many < 1:
        raise UsageError(f"--processes {many}: must be 1 or more")
    with tempfile.TemporaryDirectory(prefix="slm-lora-") as folder:
        workers = [_start(number, many, words, Path(folder)) for number in range(many)]
        before = {
            each: handler
            for each in (signal.SIGINT, signal.SIGTERM)
            # What nohup and shells ignore stays ignored.
            if (handler := signal.getsignal(each)) is not signal.SIG_IGN
        }
        asked = 0

        def pass_on(number: int, frame: FrameType | None) -> None:
            nonlocal asked
            asked += 1
            _signal(workers, number)

        for each in before:
            signal.signal(each, pass_on)
        try:
            failed = _until_one_fails(workers, lambda: asked > 1)
            stopping = bool(asked) or STOPPED_RESUMABLE in failed.values()
            # Saving all weights is slow; after a second request it is not waited for.
            failed |= _end(workers, SAVING if stopping and asked < 2 else KILL_TIMEOUT_S)
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)
            for worker in workers:
                worker.kill()
                worker.wait()
        return _explained(failed, workers, Path(folder), bool(asked))


def watch_starter() -> None:
    """In a process that `launch` started: stop as if asked to when the starter is gone."""
    if WATCHED not in os.environ:
        return

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        # One that waits in torch for another never sees the signal.
        time.sleep(SAVING)
        os._exit(STOPPED_RESUMABLE)

    take_repeated_signals_for_one(2.0)
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
        distributed.STORE: str(folder / "store"),
        WATCHED: "1",
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


def _failed(workers: list[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Exit codes of those that have failed, by their number."""
    return {number: code for number, each in enumerate(workers) if (code := each.poll())}


def _until_one_fails(
    workers: list[subprocess.Popen[bytes]], enough: Callable[[], bool]
) -> dict[int, int]:
    """Those that have failed by then; none if all have ended well, or it is ``enough``."""
    while any(worker.poll() is None for worker in workers) and not enough():
        if failed := _failed(workers):
            return failed
        time.sleep(_POLL)
    return _failed(workers)


def _end(workers: list[subprocess.Popen[bytes]], patience: float) -> dict[int, int]:
    """The others notice by themselves that one is gone; those that do not are made to end.

    Returns:
        The exit codes of those that failed before they were made to.
    """
    by_themselves: dict[int, int] = {}
    for wanted in (None, signal.SIGTERM, signal.SIGKILL):
        if wanted is not None:
            _signal(workers, wanted)
        until = time.monotonic() + (patience if wanted is None else KILL_TIMEOUT_S)
        while time.monotonic() < until and any(worker.poll() is None for worker in workers):
            time.sleep(_POLL)
        if wanted is None:
            by_themselves = _failed(workers)
    return by_themselves


def _signal(workers: list[subprocess.Popen[bytes]], number: int) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(number)


def _explained(
    failed: dict[int, int], workers: list[subprocess.Popen[bytes]], folder: Path, asked: bool
) -> int:
    """Say why the run ended, and return its exit code.

    Those that only miss another are not the reason; of others, the first process is, which writes.
    """
    reasons = {n: code for n, code in failed.items() if code != PeerLostError.exit_code}
    if all(worker.returncode == 0 for worker in workers):
        return 0
    if asked and not reasons:
        return STOPPED_RESUMABLE
    if not reasons:
        print("the processes lost each other", file=sys.stderr)
        return StorageError.exit_code
    # A process that was stopped is only the reason if no other has a better one.
    number = min(reasons, key=lambda n: (reasons[n] == STOPPED_RESUMABLE, n))
    code, who = reasons[number], f"process {number + 1} of {len(workers)}"
    if code == STOPPED_RESUMABLE or (asked and reasons.get(0) == STOPPED_RESUMABLE):
        return STOPPED_RESUMABLE
    if code < 0:
        print(
            f"{who} was ended by {signal.Signals(-code).name}; the same command continues from "
            "the last checkpoint",
            file=sys.stderr,
        )
        return 128 - code
    if number > 0:
        said = (folder / f"{number}.log").read_text(encoding="utf-8", errors="replace").strip()
        print(f"{who}: {(said.splitlines() or ['exited without output'])[-1]}", file=sys.stderr)
    return code
