"""Tokenised examples, models of any configuration, and gradients of an adapter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers

from slm_lora.adapters import attach
from slm_lora.config.schema import AdapterSection, ModelSection
from slm_lora.data.collate import collate
from slm_lora.model.base import Base
from slm_lora.model.forward import batch_nll
from slm_lora.model.loading import load_base
from slm_lora.model.resolve import resolve
from slm_lora.records import Example

from .tiny_model import tiny_tokenizer


def make_examples(lengths: list[int], seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [
        Example(
            row_id=f"{index:04d}",
            group_id=f"{index:04d}",
            category="",
            ids=rng.integers(3, 256, length).astype(np.int32),
            response=np.arange(length) >= length // 2,
            bytes_all=length,
            bytes_response=length,
        )
        for index, length in enumerate(lengths)
    ]


def draw_lora_b(peft_model: torch.nn.Module) -> None:
    """Random in place of zero B, without which A has no gradient."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def flat_gradient(module: torch.nn.Module) -> torch.Tensor:
    """All gradients in fp64, one after the other."""
    parts = [p.grad.double().flatten() for p in module.parameters() if p.grad is not None]
    return torch.cat(parts)


def gradients(
    base: Base,
    examples: list[Example],
    double: bool = False,
    dropout: float = 0.0,
    micro_batch: int | None = None,
) -> torch.Tensor:
    """Adapter gradients of the summed NLL, over micro-batches of so many rows (None: all)."""
    peft_model = attach.attach(
        base, AdapterSection(r=4, lora_dropout=dropout, target_modules=("q_proj", "v_proj")), seed=3
    )
    peft_model.train()
    draw_lora_b(peft_model)
    if double:
        peft_model.double()
    rows = micro_batch or len(examples)
    for start in range(0, len(examples), rows):
        batch_nll(base, collate(examples[start : start + rows], "all")).backward()
    gradient = flat_gradient(peft_model)
    attach.detach(peft_model)
    return gradient


LENGTHS = [5, 17, 40, 38, 100, 2, 77, 39]


def save_model(config: transformers.PretrainedConfig, folder: Path, std: float = 0.5) -> None:
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)


def load(folder: Path) -> Base:
    """Without a tokenizer's files there is still the model to try."""
    tiny_tokenizer().save_pretrained(folder)
    source = resolve(ModelSection(name=str(folder)))
    return load_base(source, device=torch.device("cpu"), precision="fp32")


TRAINING_LENGTHS = [
    9, 31, 14, 50, 22, 8, 40, 17, 26, 11, 35, 12, 19, 44, 10, 28, 33, 21, 16, 13,
]  # fmt: skip
"""Tokens of twenty short examples: some steps of training."""
