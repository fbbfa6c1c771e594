"""One of several processes: the summed gradient and the gathered scores of the same rows.

FOLDER of a model, "double", "single" or "sharded" (FSDP2), OUT. Process 1 writes what all have.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from slm_lora.adapters import attach
from slm_lora.config.schema import AdapterSection, ModelSection
from slm_lora.evaluation.scoring import score
from slm_lora.model.loading import load_base
from slm_lora.model.resolve import resolve
from slm_lora.runtime import distributed
from slm_lora.training.step import StepRunner

from .examples import make_examples

LENGTHS = [90, 7, 33, 52, 18, 64, 5, 41, 77, 12, 29]
"""Eleven rows: two or four processes get unequal shares."""


def main() -> None:
    folder, precision, out = sys.argv[1:]
    torch.set_num_threads(1)
    with distributed.process_group():
        source = resolve(ModelSection(name=folder))
        sharded = precision == "sharded" and not distributed.is_single()
        base = load_base(source, device=torch.device("cpu"), precision="fp32", sharded=sharded)
        if sharded:
            layer: Any = base.model.get_submodule("model.layers.0")
            local = layer.self_attn.q_proj.weight.to_local()
            assert (
                local.numel() == layer.self_attn.q_proj.weight.numel() // distributed.world_size()
            )
        scores = score(base, make_examples(LENGTHS), "test", 100)
        peft_model = attach.attach(base, AdapterSection(r=4, lora_dropout=0.1), 3)
        peft_model.train()
        generator = torch.Generator().manual_seed(1)
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        if precision == "double":
            peft_model.double()
        parameters = [p for p in peft_model.parameters() if p.requires_grad]
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        updater = StepRunner(
            base, parameters, torch.optim.SGD(parameters, lr=0.0), scaler, "all", 1e9
        )
        few = make_examples(LENGTHS)
        found = {}
        for rows in (11, 1):  # with one row, some processes have none
            launched = updater.step(few[:rows], 60, "seed", False, 0, "step")
            loss = launched.result().loss
            found[f"loss-{rows}"] = torch.tensor([loss], dtype=torch.float64)
            gradients = [p.grad.double().flatten() for p in parameters if p.grad is not None]
            found[f"gradient-{rows}"] = torch.cat(gradients)
        # All have the same bits.
        digest = float(found["gradient-11"].abs().sum())
        assert len(set(distributed.all_gather(digest))) == 1
        found["nll"] = torch.tensor([each.nll_all for each in scores], dtype=torch.float64)
        if distributed.is_main():
            save_file(found, Path(out))


main()
