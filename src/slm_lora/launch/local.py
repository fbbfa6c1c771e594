"""Launch several processes of one command on this machine, and end them together."""

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
from slm_lora.launch.command import SAVE_TIMEOUT_S, WATCHED
from slm_lora.runtime import distributed
from slm_lora.runtime.distributed import PeerLostError
from slm_lora.runtime.signals import ignore_repeats_within

KILL_TIMEOUT_S = 20.0
"""Time for the others to exit after one failed; `SAVE_TIMEOUT_S` after a stop request."""
_POLL = 0.05


def launch(n_processes: int, args: list[str]) -> int:
    """Run ``slm-lora`` with ``args`` in ``n_processes`` processes.

    Rank 0 writes to the terminal; of another rank that fails, the last line of output is shown.
    Signals are forwarded. If this process dies, the others stop gracefully.

    Returns:
        Exit code of the root failure (see `_report_failure`), 75 if all stopped on request.

    Raises:
        UsageError: fewer than one process.
    """
    if n_processes < 1:
        raise UsageError(f"--processes {n_processes}: must be 1 or more")
    with tempfile.TemporaryDirectory(prefix="slm-lora-") as folder:
        workers = [_start(rank, n_processes, args, Path(folder)) for rank in range(n_processes)]
        handlers = {
            stop_signal: handler
            for stop_signal in (signal.SIGINT, signal.SIGTERM)
            # Signals that nohup or a shell ignores stay ignored.
            if (handler := signal.getsignal(stop_signal)) is not signal.SIG_IGN
        }
        stop_requests = 0

        def forward_signal(number: int, frame: FrameType | None) -> None:
            nonlocal stop_requests
            stop_requests += 1
            _send_signal(workers, number)

        for stop_signal in handlers:
            signal.signal(stop_signal, forward_signal)
        try:
            failed = _wait_for_failure(workers, lambda: stop_requests > 1)
            stopping = bool(stop_requests) or STOPPED_RESUMABLE in failed.values()
            # Saving all weights is slow; a second request does not wait for it.
            failed |= _end_all(
                workers, SAVE_TIMEOUT_S if stopping and stop_requests < 2 else KILL_TIMEOUT_S
            )
        finally:
            for stop_signal, handler in handlers.items():
                signal.signal(stop_signal, handler)
            for worker in workers:
                worker.kill()
                worker.wait()
        return _report_failure(failed, workers, Path(folder), bool(stop_requests))


def watch_parent() -> None:
    """In a process started by `launch`: stop gracefully when the parent is gone."""
    if WATCHED not in os.environ:
        return

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        # Python handles no signal while torch waits for another rank.
        time.sleep(SAVE_TIMEOUT_S)
        os._exit(STOPPED_RESUMABLE)

    ignore_repeats_within(2.0)
    threading.Thread(target=watch, daemon=True).start()


def _start(rank: int, n_processes: int, args: list[str], folder: Path) -> subprocess.Popen[bytes]:
    threads = max(1, (os.cpu_count() or 1) // n_processes)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n_processes),
        distributed.STORE: str(folder / "store"),
        WATCHED: "1",
    }
    log = None if rank == 0 else (folder / f"{rank}.log").open("wb")
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "slm_lora", *args],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            # The parent alone receives the terminal's signals, and forwards each once.
            start_new_session=True,
        )
    finally:
        if log is not None:
            log.close()


def _failed_codes(workers: list[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Exit codes other than 0, by rank."""
    return {rank: code for rank, worker in enumerate(workers) if (code := worker.poll())}


def _wait_for_failure(
    workers: list[subprocess.Popen[bytes]], should_stop: Callable[[], bool]
) -> dict[int, int]:
    """Wait until a process fails, all succeed, or ``should_stop()``; exit codes as above."""
    while any(worker.poll() is None for worker in workers) and not should_stop():
        if failed := _failed_codes(workers):
            return failed
        time.sleep(_POLL)
    return _failed_codes(workers)


def _end_all(workers: list[subprocess.Popen[bytes]], timeout: float) -> dict[int, int]:
    """Wait for all to exit by themselves (ranks notice a lost peer), then terminate, then kill.

    Returns:
        Exit codes of those that failed before SIGTERM.
    """
    failed: dict[int, int] = {}
    for stop_signal in (None, signal.SIGTERM, signal.SIGKILL):
        if stop_signal is not None:
            _send_signal(workers, stop_signal)
        deadline = time.monotonic() + (timeout if stop_signal is None else KILL_TIMEOUT_S)
        while time.monotonic() < deadline and any(worker.poll() is None for worker in workers):
            time.sleep(_POLL)
        if stop_signal is None:
            failed = _failed_codes(workers)
    return failed


def _send_signal(workers: list[subprocess.Popen[bytes]], number: int) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(number)


def _report_failure(
    failed: dict[int, int],
    workers: list[subprocess.Popen[bytes]],
    folder: Path,
    stop_requested: bool,
) -> int:
    """Print the root failure, and return its exit code.

    Processes that failed because they lost a peer are secondary; of others, the lowest rank counts.
    """
    causes = {rank: code for rank, code in failed.items() if code != PeerLostError.exit_code}
    if all(worker.returncode == 0 for worker in workers):
        return 0
    if stop_requested and not causes:
        return STOPPED_RESUMABLE
    if not causes:
        print(
            "the processes lost contact with each other; the same command continues from the last "
            "checkpoint",
            file=sys.stderr,
        )
        return StorageError.exit_code
    # A stopped process is the cause only if no other failed.
    rank = min(causes, key=lambda rank: (causes[rank] == STOPPED_RESUMABLE, rank))
    code, process = causes[rank], f"process {rank + 1} of {len(workers)}"
    if code == STOPPED_RESUMABLE or (stop_requested and causes.get(0) == STOPPED_RESUMABLE):
        return STOPPED_RESUMABLE
    if code < 0:
        print(
            f"{process} was ended by {signal.Signals(-code).name}; the same command continues from "
            "the last checkpoint",
            file=sys.stderr,
        )
        return 128 - code
    if rank > 0:
        output = (folder / f"{rank}.log").read_text(encoding="utf-8", errors="replace").strip()
        print(
            f"{process}: {(output.splitlines() or ['exited without output'])[-1]}", file=sys.stderr
        )
    return code
