"""The summed gradient and the gathered scores of the same rows, by 1, 2 and 4 processes.

FOLDER of a model, OUT. Each precision ("double", "single" and "sharded", which is FSDP2) is
written to OUT by the first process. The processes are forked, because an import of torch and
PEFT takes longer than what they compute.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (once, before the fork)
import torch
from safetensors.torch import save_file

from slm_lora.adapters import attach
from slm_lora.config.schema import AdapterSection, ModelSection
from slm_lora.evaluation.scoring import score
from slm_lora.model.loading import load_base
from slm_lora.model.resolve import resolve
from slm_lora.runtime import distributed
from slm_lora.training.step import StepRunner

from .examples import draw_lora_b, flat_gradient, make_examples

LENGTHS = [90, 7, 33, 52, 18, 64, 5, 41, 77, 12, 29]
"""Eleven rows: two or four processes get unequal shares."""


WORLD_SIZES = (1, 2, 4)
PRECISIONS = ("double", "single", "sharded")


def compute(folder: str, precision: str, out: Path) -> None:
    """Scores, losses and gradients of one process of a group; the first writes them to OUT."""
    source = resolve(ModelSection(name=folder))
    sharded = precision == "sharded" and not distributed.is_single()
    base = load_base(source, device=torch.device("cpu"), precision="fp32", sharded=sharded)
    if sharded:
        layer: Any = base.model.get_submodule("model.layers.0")
        local = layer.self_attn.q_proj.weight.to_local()
        assert local.numel() == layer.self_attn.q_proj.weight.numel() // distributed.world_size()
    scores = score(base, make_examples(LENGTHS), "test", 100)
    peft_model = attach.attach(
        base, AdapterSection(r=4, lora_dropout=0.1, target_modules=("q_proj", "v_proj")), 3
    )
    peft_model.train()
    draw_lora_b(peft_model)
    if precision == "double":
        peft_model.double()
    parameters = [p for p in peft_model.parameters() if p.requires_grad]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    runner = StepRunner(base, parameters, optimizer, scaler, "all", 1e9)
    examples = make_examples(LENGTHS)
    results = {}
    for rows in (11, 1):  # with one row, some processes have none
        pending = runner.step(examples[:rows], 60, "seed", False, 0, "step")
        loss = pending.result().loss
        results[f"loss-{rows}"] = torch.tensor([loss], dtype=torch.float64)
        results[f"gradient-{rows}"] = flat_gradient(peft_model)
    # Every process has the same bits.
    digest = float(results["gradient-11"].abs().sum())
    assert len(set(distributed.all_gather(digest))) == 1
    results["nll"] = torch.tensor([row.nll_all for row in scores], dtype=torch.float64)
    if distributed.is_main():
        save_file(results, out)


def start(rank: int, world_size: int, folder: str, out: Path) -> int:
    """Fork a process of a group, and return its id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        store = out / f"store-{world_size}"
        os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{world_size}"}
        os.environ[distributed.STORE] = f"{store}"
        with distributed.process_group():
            for precision in PRECISIONS:
                compute(folder, precision, out / f"{precision}-{world_size}.safetensors")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> None:
    folder, out = sys.argv[1:]
    torch.set_num_threads(1)
    for world_size in WORLD_SIZES:
        pids = [start(rank, world_size, folder, Path(out)) for rank in range(world_size)]
        for pid in pids:
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


if __name__ == "__main__":
    main()
