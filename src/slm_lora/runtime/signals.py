"""Graceful stop: Ctrl-C and SIGTERM take effect at the next point where no work is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequested(KeyboardInterrupt):
    """The work stopped on request, at a point where it can be resumed."""


class Stop:
    """Flag of a stop request."""

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        """Stop here if a stop was requested.

        Raises:
            StopRequested: a stop was requested.
        """
        if self.requested:
            raise StopRequested


_NOTICE = b"\n  stopping at the next safe point; a second signal stops at once\n"
_repeat_window_s = 0.0


def ignore_repeats_within(seconds: float) -> None:
    """Treat a second signal within ``seconds`` as the first: a scheduler may signal every process,
    and the parent forwards its signal in addition."""
    global _repeat_window_s
    _repeat_window_s = seconds


@contextmanager
def graceful_stop() -> Iterator[Stop]:
    """Within the block, the first signal only sets the flag that the work checks; the second
    interrupts at once. An unchecked request takes effect at the end of the block.

    Outside of the main thread, where Python handles no signals, the flag is never set.

    Raises:
        StopRequested: at the end of the block, if a stop was requested.
    """
    stop = Stop()
    requested_at = 0.0

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal requested_at
        if stop.requested:
            if time.monotonic() - requested_at >= _repeat_window_s:
                signal.default_int_handler(number, frame)
            return
        stop.requested, requested_at = True, time.monotonic()
        # Not print: the signal may have interrupted one.
        with contextlib.suppress(OSError):
            os.write(2, _NOTICE)

    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for stop_signal in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(stop_signal)
            # Signals that nohup or a shell ignores stay ignored.
            if handler is not None and handler is not signal.SIG_IGN:
                handlers[stop_signal] = handler
                signal.signal(stop_signal, on_signal)
    try:
        yield stop
    finally:
        for stop_signal, handler in handlers.items():
            signal.signal(stop_signal, handler)
    stop.check()
