"""Contexts are part of the prompts where rows have some, or it is said that they are not."""

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


def spelt(found: PreparedData) -> str:
    tokenizer = tiny_tokenizer()
    return "".join(tokenizer.decode(each.ids) for each in (*found.train, *found.test))


def alpaca(tmp_path: Path) -> Path:
    rows = [
        {"instruction": row["instruction"], "input": row["context"], "output": row["response"]}
        for row in make_rows(60)
    ]
    return write_jsonl(tmp_path / "alpaca.jsonl", rows)


def on_contexts(found: PreparedData) -> list[str]:
    return [note for note in found.notes if note.startswith("contexts")]


def test_a_context_is_in_the_prompt_where_there_is_one(tmp_path: Path) -> None:
    path = alpaca(tmp_path)
    found, asked = prepared(path), prepared(path, include_context=True)
    assert found.template.include_context is True and not on_contexts(found)
    assert (found.held_out_hash, found.train_hash) == (asked.held_out_hash, asked.train_hash)
    assert "Context:\nA note on rivers, number 0." in spelt(found)


def test_rows_without_contexts_are_what_they_were(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "context"} for row in make_rows(60)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    found, without = prepared(path), prepared(path, include_context=False)
    assert found.template == without.template and found.template.include_context is False
    assert (found.held_out_hash, found.train_hash) == (without.held_out_hash, without.train_hash)
    assert not on_contexts(found)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"include_context": False}, "data.include_context=auto includes them"),
        ({"template": "plain"}, "template plain has no context"),
        ({"template": "plain", "include_context": True}, "template plain has no context"),
    ],
)
def test_contexts_that_are_left_out_are_told(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    found = prepared(alpaca(tmp_path), **options)
    (note,) = on_contexts(found)
    assert "contexts are left out of the prompts, in 20 of 60 rows" in note and said in note
    assert "A note on" not in spelt(found)
