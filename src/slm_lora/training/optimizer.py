"""AdamW: parameter groups and weight decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from slm_lora.config.schema import TrainingSection
from slm_lora.errors import UsageError


def adamw(
    named: Mapping[str, torch.nn.Parameter],
    section: TrainingSection,
    model: torch.nn.Module | None = None,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) over the parameters that train.

    With ``loraplus_lr_ratio`` the B matrices are a group of their own, whose ``lr_scale``
    multiplies the learning rate (LoRA+, Hayou et al. 2024, arXiv 2402.12354).

    Args:
        named: the parameters, by their names in ``model``.
        section: how to train.
        model: what they belong to: its norms and biases do not decay, as with the
            `TrainingArguments` of the same name. None: all decay.

    Raises:
        UsageError: LoRA+ without B matrices, where its ratio would have no effect.
    """
    if section.loraplus_lr_ratio and not any("lora_B" in name for name in named):
        raise UsageError(
            f"training.loraplus_lr_ratio = {section.loraplus_lr_ratio:g}: the trained weights have "
            "no B matrices of LoRA, so it would have no effect; leave it out with this adapter.kind"
        )
    decaying = set(named)
    if section.weight_decay and model is not None:
        decaying &= _decaying(model)
    groups: list[dict[str, Any]] = []
    for faster in (False, True):
        for decays in (True, False):
            parameters = [
                parameter
                for name, parameter in named.items()
                if (bool(section.loraplus_lr_ratio) and "lora_B" in name) == faster
                and (name in decaying) == decays
            ]
            if parameters:
                groups.append(
                    {
                        "params": parameters,
                        "lr_scale": section.loraplus_lr_ratio if faster else 1.0,
                        "weight_decay": section.weight_decay if decays else 0.0,
                    }
                )
    return torch.optim.AdamW(
        groups,
        lr=section.peak_rate,
        betas=(section.adam_beta1, section.adam_beta2),
        eps=section.adam_epsilon,
        fused=True,
    )


def _decaying(model: torch.nn.Module) -> set[str]:
    """Names of the parameters that decay: `transformers.Trainer`'s rule."""
    from transformers import Trainer

    rule: Any = Trainer.get_decay_parameter_names
    return set(rule(None, model))  # it asks nothing of the trainer
