"""Standard output and error that never raise: any encoding, closed pipes."""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
from pathlib import Path

BROKEN_PIPE = 141
"""Exit code after SIGPIPE in shells (128 + 13)."""

_ERROR_HANDLER = "slm-lora-ascii"
_ASCII = {
    "·": "-", "–": "-", "—": "-", "−": "-", "→": "->", "±": "+/-", "×": "x", "…": "...",
    "█": "#", "“": '"', "”": '"', "‘": "'", "’": "'", "≥": ">=", "≤": "<=", "β": "beta",
    "ε": "epsilon", "₁": "1", "₂": "2",
}  # fmt: skip
"""ASCII replacements of characters that this program prints."""


def configure_streams() -> None:
    """Let both streams write any text: characters missing in their encoding become ASCII or
    escapes such as ``\\u4ec0``."""
    codecs.register_error(_ERROR_HANDLER, _to_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_ERROR_HANDLER)


def _to_ascii(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    unencodable = error.object[error.start : error.end]
    replacements = (
        _ASCII.get(c) or c.encode("ascii", "backslashreplace").decode() for c in unencodable
    )
    return "".join(replacements), error.end


def is_broken_pipe(error: BaseException | None) -> bool:
    """Whether an exception comes from a closed output pipe: ``slm-lora … | head -1``.

    Libraries raise exits of their own after a BrokenPipeError, so the whole chain of contexts is
    searched; other pipes and sockets break as well, so the streams are polled.
    """
    while error is not None and not isinstance(error, BrokenPipeError):
        error = error.__context__
    return error is not None and any(map(_has_no_reader, (1, 2)))


def _has_no_reader(descriptor: int) -> bool:
    if not hasattr(select, "poll"):  # Windows
        return True
    # rich has already replaced a broken pipe with devnull.
    if os.path.samestat(os.fstat(descriptor), Path(os.devnull).stat()):
        return True
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def discard_output() -> None:
    """Redirect closed streams to devnull, or Python prints an error on flushing them at exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if _has_no_reader(descriptor):
            os.dup2(devnull, descriptor)


def printable(text: str) -> str:
    """Text with control characters escaped, so that it cannot steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
