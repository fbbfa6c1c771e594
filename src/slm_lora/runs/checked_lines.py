"""Files of JSON lines: a header with the SHA-256 of the other lines, then one line per item."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from slm_lora.errors import IntegrityError
from slm_lora.runtime.storage import atomic_write_text

Header = TypeVar("Header", bound=BaseModel)
"""A model with keys ``format`` and ``sha256`` among its own."""
Item = TypeVar("Item")


def write_lines(path: Path, header: Header, items: Iterable[Any]) -> Header:
    """Write a file; returns its header, with the SHA-256 of the lines.

    Args:
        path: of the file.
        header: its ``sha256`` is replaced.
        items: dataclasses whose values are JSON's, without infinities and NaN.
    """
    lines = [json.dumps(asdict(item), ensure_ascii=False, allow_nan=False) for item in items]
    body = "".join(f"{line}\n" for line in lines)
    header = header.model_copy(update={"sha256": hashlib.sha256(body.encode()).hexdigest()})
    atomic_write_text(path, f"{header.model_dump_json()}\n{body}")
    return header


def read_lines(
    path: Path,
    header_type: type[Header],
    file_format: int,
    read_items: Callable[[list[Any]], list[Item]],
    remedy: str = "the same command makes it again",
) -> tuple[Header, list[Item]] | None:
    """What `write_lines` wrote; None without a file.

    Args:
        path: of the file.
        header_type: model of the first line.
        file_format: the only one that is read.
        read_items: items from the values of the other lines; raises ValueError, TypeError or
            KeyError where they are wrong.
        remedy: end of the message.

    Raises:
        IntegrityError: the file is broken.
    """
    try:
        first, _, body = path.read_text(encoding="utf-8").partition("\n")
        header: Any = header_type.model_validate_json(first)
        if header.format != file_format:
            raise ValueError(f"format {header.format}, not {file_format}")
        if hashlib.sha256(body.encode()).hexdigest() != header.sha256:
            raise ValueError("its lines do not have the SHA-256 of the first one")
        items = read_items([json.loads(line) for line in body.split("\n")[:-1]])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, ValidationError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise IntegrityError(f"{path}: broken ({reason}); remove it, and {remedy}") from error
    return header, items
