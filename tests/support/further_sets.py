"""A further held-out set as a file, and the override that names it."""

from __future__ import annotations

import json
from pathlib import Path

from .rows import write_jsonl


def german(folder: Path, count: int = 40) -> Path:
    """Small rows in Alpaca's format."""
    rows = [
        {
            "instruction": f"Wie heisst Fluss Nummer {number}?",
            "input": "",
            "output": f"Der Fluss heisst {'Elbe' if number % 2 else 'Donau'}, Nummer {number}.",
        }
        for number in range(count)
    ]
    return write_jsonl(folder / "german.jsonl", rows)


def also(path: Path, **keys: object) -> str:
    """The set ``german`` in a recipe; ``keys`` replace or add some of its own."""
    own = {"name": str(path), "format": "alpaca", "rows": 30, **keys}
    return f"forgetting.also={json.dumps({'german': own})}"
