"""A request to stop (Ctrl-C, SIGTERM) that waits for a place where nothing is lost."""

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
    """The work was asked to stop, and did so where it can be continued."""


class Stop:
    """Whether a stop was requested."""

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        """Stop here if it was requested.

        Raises:
            StopRequested: it was.
        """
        if self.requested:
            raise StopRequested


_SAYING = b"\n  stopping at the next safe place; once more stops at once\n"


_same_request = 0.0


def take_repeated_signals_for_one(seconds: float) -> None:
    """A second signal within so many seconds is the first one again: where a starter passes on what
    a scheduler sends to everybody."""
    global _same_request
    _same_request = seconds


@contextmanager
def gentle_stop() -> Iterator[Stop]:
    """Within, the first signal only sets the flag, for the work to look at; the second is
    Ctrl-C as usual. A request that was not checked counts when the block ends.

    Off the main thread, where Python handles no signals, the flag is never set.

    Raises:
        StopRequested: at the end, if a stop was requested.
    """
    stop = Stop()

    asked_at = 0.0

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked_at
        if stop.requested:
            if time.monotonic() - asked_at >= _same_request:
                signal.default_int_handler(number, frame)
            return
        stop.requested, asked_at = True, time.monotonic()
        # Not print: the signal may have come in the middle of one.
        with contextlib.suppress(OSError):
            os.write(2, _SAYING)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for each in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(each)
            # What nohup and shells ignore stays ignored.
            if handler is not None and handler is not signal.SIG_IGN:
                before[each] = handler
                signal.signal(each, ask)
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    stop.check()
