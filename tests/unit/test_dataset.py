"""Contexts of rows are part of the prompts, or a note reports that they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slm_lora.config.schema import DataSection
from slm_lora.data.dataset import PreparedData, prepare_data
from slm_lora.data.sources import read_rows

from ..support.rows import make_rows, write_jsonl
from ..support.tiny_model import tiny_tokenizer


def prepared(path: Path, **options: Any) -> PreparedData:
    section = DataSection(name=str(path), test_rows=5, validation_rows=5, **options)
    return prepare_data(read_rows(section), section, 0, tiny_tokenizer())


def decoded_text(data: PreparedData) -> str:
    tokenizer = tiny_tokenizer()
    return "".join(tokenizer.decode(example.ids) for example in (*data.train, *data.test))


def alpaca(tmp_path: Path) -> Path:
    rows = [
        {"instruction": row["instruction"], "input": row["context"], "output": row["response"]}
        for row in make_rows(60)
    ]
    return write_jsonl(tmp_path / "alpaca.jsonl", rows)


def context_notes(data: PreparedData) -> list[str]:
    return [note for note in data.notes if note.startswith("contexts")]


def test_contexts_are_part_of_the_prompts(tmp_path: Path) -> None:
    path = alpaca(tmp_path)
    data, explicit = prepared(path), prepared(path, include_context=True)
    assert data.template.include_context is True and not context_notes(data)
    assert (data.held_out_hash, data.train_hash) == (explicit.held_out_hash, explicit.train_hash)
    assert "Context:\nA note on rivers, number 0." in decoded_text(data)


def test_rows_without_contexts_keep_their_hashes(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "context"} for row in make_rows(60)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data, without = prepared(path), prepared(path, include_context=False)
    assert data.template == without.template and data.template.include_context is False
    assert (data.held_out_hash, data.train_hash) == (without.held_out_hash, without.train_hash)
    assert not context_notes(data)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"include_context": False}, "data.include_context=auto includes them"),
        ({"template": "plain"}, "template plain has no context"),
        ({"template": "plain", "include_context": True}, "template plain has no context"),
    ],
)
def test_a_note_reports_contexts_that_are_left_out(
    tmp_path: Path, options: dict[str, Any], remedy: str
) -> None:
    data = prepared(alpaca(tmp_path), **options)
    (note,) = context_notes(data)
    assert "contexts are left out of the prompts, in 20 of 60 rows" in note and remedy in note
    assert "A note on" not in decoded_text(data)
