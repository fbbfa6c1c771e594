"""Small instruction rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

TOPICS = (
    "rivers", "bread", "sailing", "glass", "bridges", "bees", "maps", "clocks", "tea", "violins",
    "paper", "salt",
)  # fmt: skip


def make_rows(count: int) -> list[dict[str, str]]:
    """Small distinct instruction rows, in our own words."""
    rows = []
    for number in range(count):
        topic = TOPICS[number % len(TOPICS)]
        rows.append(
            {
                "instruction": f"Tell me fact {number} about {topic}.",
                "context": f"A note on {topic}, number {number}." if number % 3 == 0 else "",
                "response": f"Fact {number}: {topic} " + "matter a great deal. " * (number % 4 + 1),
                "category": "open_qa" if number % 2 else "closed_qa",
            }
        )
    return rows


def write_jsonl(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
