"""Adapters with a visible effect, created without training, for the tests of exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from slm_lora.adapters import attach
from slm_lora.adapters import io as adapter_io
from slm_lora.config.schema import AdapterSection
from slm_lora.data.templates import Template
from slm_lora.data.tokenization import RowTokenizer
from slm_lora.model.loading import load_base, load_tokenizer
from slm_lora.model.resolve import ModelSource
from slm_lora.runtime.checksums import FILES, SEAL, sealed

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj")


def make_adapter(
    source: ModelSource,
    folder: Path,
    kind: str = "lora",
    *,
    r: int = 4,
    scale: float = 0.1,
    template: str = "instruction_response",
    seed: int = 3,
) -> Path:
    """An adapter in the format of training, with random instead of trained B."""
    base = load_base(source, device=torch.device("cpu"), precision="fp32", padded=True)
    section = AdapterSection(kind=kind, r=r, target_modules=TARGETS)
    peft_model = attach.attach(base, section, seed=1)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
        elif "magnitude" in name:
            parameter.data *= 1.1
    template_ = Template(template)  # type: ignore[arg-type]
    metadata: dict[str, Any] = {
        "experiment": "toy",
        "cell": kind,
        "base": {"name": source.name, "revision": None, "sha256": source.sha256},
        "template": asdict(template_),
        "recipe": {
            "model": {"name": source.name, "revision": None},
            "data": {"name": "ml-qa"},
            "adapter": section.model_dump(mode="json"),
            "training": {"num_train_epochs": 3.0, "learning_rate": 2e-4},
        },
        "run": "0" * 64,
        "versions": {},
    }
    chat_template = RowTokenizer(load_tokenizer(source), template_).chat_template
    adapter_io.save(base, peft_model, folder, metadata, chat_template)
    return folder


def change_metadata(
    folder: Path, change: Callable[[dict[str, Any]], None] = lambda metadata: None
) -> None:
    """Edit the metadata of a folder and renew its checksums."""
    path = folder / adapter_io.ABOUT
    metadata = json.loads(path.read_text())
    for key in (FILES, SEAL):
        del metadata[key]
    change(metadata)
    path.unlink()
    path.write_text(json.dumps(sealed(metadata, folder)))
