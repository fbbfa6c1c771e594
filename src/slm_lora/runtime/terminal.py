"""Standard output and error that never raise: any encoding, closed pipes."""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
from pathlib import Path

BROKEN_PIPE = 141
"""Exit code of a program whose reader has gone (128 + SIGPIPE), as shells tell it."""

_ERRORS = "slm-lora-spelt"
_SPELT = {
    "·": "-", "–": "-", "—": "-", "−": "-", "→": "->", "±": "+/-", "×": "x", "…": "...",
    "█": "#", "“": '"', "”": '"', "‘": "'", "’": "'", "≥": ">=", "≤": "<=", "β": "beta",
    "ε": "epsilon", "₁": "1", "₂": "2",
}  # fmt: skip
"""Our own signs, for consoles that lack them."""


def make_safe() -> None:
    """Let both streams write any text: what their encoding lacks is spelt out, ``\\u4ec0``."""
    codecs.register_error(_ERRORS, _spelt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERRORS)


def _spelt(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    ascii_only = (_SPELT.get(c) or c.encode("ascii", "backslashreplace").decode() for c in lacking)
    return "".join(ascii_only), error.end


def nobody_reads(error: BaseException | None) -> bool:
    """Whether an exception comes of a reader of ours that has gone: ``slm-lora … | head -1``.

    Libraries turn it into an exit of their own, so it is looked for in what came before; and other
    pipes and sockets break, too, so the streams are asked.
    """
    while error is not None and not isinstance(error, BrokenPipeError):
        error = error.__context__
    return error is not None and any(map(_has_no_reader, (1, 2)))


def _has_no_reader(descriptor: int) -> bool:
    if not hasattr(select, "poll"):  # Windows
        return True
    # rich has already put that in the place of a pipe that broke.
    if os.path.samestat(os.fstat(descriptor), Path(os.devnull).stat()):
        return True
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def stop_writing() -> None:
    """What is still to be written goes nowhere: at its exit Python would complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if _has_no_reader(descriptor):
            os.dup2(nowhere, descriptor)


def printable(text: str) -> str:
    """Text that cannot steer the terminal: escape sequences show as what they are."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
