"""A grid over base models with different tokenizers and architectures: bits per byte, replies."""

from __future__ import annotations

import math
from itertools import chain
from pathlib import Path

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from slm_lora.config.schema import DataSection
from slm_lora.data.sources import read_rows
from slm_lora.runs.folder import SCORES_FILE
from slm_lora.runs.scores import read_scores

from ..support.lab import Lab
from ..support.tiny_model import tiny_tokenizer


def neox_folder(folder: Path) -> Path:
    """A tiny GPT-NeoX with a smaller vocabulary than the tiny Llama."""
    tokenizer = tiny_tokenizer(300)
    torch.manual_seed(3)
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Lab:
    folder = tmp_path_factory.mktemp("bases")
    made = Lab(folder / "lab", tiny_folder)
    models = f"[{tiny_folder}, {neox_folder(folder / 'tiny-neox')}]"
    settings = (
        "grid.cells=[]",
        f"grid.axes=[{{model.name: {models}}}, {{adapter.r: [2, 4]}}]",
        "adapter.target_modules=all-linear",
        "data.size=40",
        "data.include_context=false",
        "seeds=[0, 1]",
    )
    assert made.run(*settings, "replies.rows=12", "replies.max_new_tokens=6") == 0
    return made


def bits_per_byte(lab: Lab, folder: str) -> float:
    """From the rows' scores and their text as the template writes it."""
    rows = {row.row_id: row for row in read_rows(DataSection(name=str(lab.rows))).rows}
    before = ("Instruction:\n", "\nResponse:\n")
    scores = read_scores(lab.results / "runs" / folder / SCORES_FILE)
    texts = [[turn.content for turn in rows[score.row_id].turns] for score in scores]
    size = sum(len("".join(chain(*zip(before, turns, strict=True))).encode()) for turns in texts)
    tokenizer = tiny_tokenizer(500 if "llama" in folder else 300)
    first = tokenizer.decode(tokenizer.encode(before[0])[0])  # not scored
    size -= len(first) * len(texts)
    return sum(score.nll_all for score in scores) / math.log(2) / size


def test_bases_are_compared_in_bits_per_byte(lab: Lab) -> None:
    between = lab.metrics()["bases"]
    assert (between["metric"], between["rows"], between["left_out"]) == ("bits_per_byte", 20, 0)
    compared = between["comparisons"]
    assert [pair["key"] for pair in compared] == ["model.name"] * 3  # untuned, r=2, r=4
    assert [pair["seeds"] for pair in compared] == [1, 2, 2]
    for pair in compared:
        differences = [
            bits_per_byte(lab, second) - bits_per_byte(lab, first)
            for first, second in pair["pairs"]
        ]
        assert pair["value"] == pytest.approx(sum(differences) / len(differences), abs=1e-6)
    assert {*between["other_metrics"]} == {"exact_match", "token_f1"}


def test_report_names_the_better_base(lab: Lab) -> None:
    report = (lab.results / "report.md").read_text()
    settings = report.split("## Settings")[1].split("## Base models")[0]
    bits = {
        cells[1].strip(" *").partition(" (")[0]: float(cells[5].strip(" *"))
        for line in settings.splitlines()
        if len(cells := line.split("|")) > 8 and "tiny-" in cells[1]
    }
    assert len(bits) == 6
    best = min(bits, key=lambda name: bits[name])
    facts = lab.metrics()["card"]["facts"]
    assert facts["Base model"].startswith(f"{best} has the lowest bits per byte, {bits[best]:.4f};")
    assert facts["Base model"].endswith("tokenizers do not compare.")
    assert facts["Recommended"].startswith(best.split(",")[0])
    assert "name=" not in report
