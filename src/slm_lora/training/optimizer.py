"""AdamW and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from slm_lora.recipe.schema import TrainingSection


def adamw(named: Mapping[str, torch.nn.Parameter], section: TrainingSection) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over the parameters that train.

    With ``loraplus_lr_ratio`` the B matrices are a group of their own, whose ``times`` says how
    much faster they learn (LoRA+, Hayou et al. 2024, arXiv 2402.12354).
    """
    faster = [p for name, p in named.items() if "lora_B" in name and section.loraplus_lr_ratio]
    others = [p for p in named.values() if not any(p is each for each in faster)]
    groups: list[dict[str, Any]] = [{"params": others, "times": 1.0}]
    if faster:
        groups.append({"params": faster, "times": section.loraplus_lr_ratio})
    return torch.optim.AdamW(
        groups,
        lr=section.learning_rate,
        betas=(section.adam_beta1, section.adam_beta2),
        eps=section.adam_epsilon,
        weight_decay=section.weight_decay,
        fused=True,
    )


def learning_rate(section: TrainingSection, step: int, total_steps: int) -> float:
    """Rate of optimizer step ``step`` (from 0) of ``total_steps``.

    Rises linearly over the warm-up, then follows the schedule to 0 at ``total_steps``; the same
    values as transformers' ``get_scheduler``.
    """
    warmup = math.ceil(section.warmup_ratio * total_steps)
    if step < warmup:
        return section.learning_rate * step / max(1, warmup)
    if section.lr_scheduler_type == "constant":
        return section.learning_rate
    progress = (step - warmup) / max(1, total_steps - warmup)
    if section.lr_scheduler_type == "cosine":
        return section.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return section.learning_rate * (1 - progress)
