"""A real architecture with random weights: FOLDER (config and tokenizer) → OUT.

Speed, memory and files equal those of the real model; losses are meaningless.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.folder))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    # One block of noise, repeated: drawing billions of values takes minutes.
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            for start in range(0, len(flat), len(noise)):
                part = flat[start : start + len(noise)]
                part.copy_(noise[: len(part)] * 0.02)
            if parameter.ndim == 1:
                parameter.fill_(1)
    model.save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.folder).save_pretrained(args.out)


main()
