"""A model of a true architecture with random weights: FOLDER (config and tokenizer) → OUT.

Its losses mean nothing; its speed, memory and files are those of the real one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("out", type=Path)
    given = arguments.parse_args()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(given.folder))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    # One normal draw, repeated: billions of their own would take minutes.
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            for start in range(0, len(flat), len(noise)):
                part = flat[start : start + len(noise)]
                part.copy_(noise[: len(part)] * 0.02)
            if parameter.ndim == 1:
                parameter.fill_(1)
    model.save_pretrained(given.out)
    AutoTokenizer.from_pretrained(given.folder).save_pretrained(given.out)


main()
