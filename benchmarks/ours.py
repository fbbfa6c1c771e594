"""The base model and the rows, as the contenders of slm-lora take them."""

from __future__ import annotations

import torch
from contender import MAX_LENGTH, Work

from slm_lora.data.sources import read_rows
from slm_lora.data.templates import choose_template
from slm_lora.data.tokens import RowTokenizer
from slm_lora.model.base import Base
from slm_lora.model.load import load_base, load_tokenizer
from slm_lora.model.source import resolve
from slm_lora.recipe.schema import DataSection, ModelSection
from slm_lora.records import Example


def base_and_examples(given: Work) -> tuple[Base, list[Example]]:
    """Load in bf16 and tokenise."""
    source = resolve(ModelSection(name=str(given.model)))
    rows = read_rows(DataSection(name=str(given.rows), format="dolly"))
    template = choose_template("instruction_response", rows.format, include_context=False)
    examples, _ = RowTokenizer(load_tokenizer(source), template).encode(
        rows.rows, {row.row_id: row.row_id for row in rows.rows}, MAX_LENGTH
    )
    return load_base(source, device=torch.device("cpu"), precision="bf16"), list(examples)
