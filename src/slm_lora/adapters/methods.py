"""From the recipe's adapter section to PEFT's configuration. A new method is added here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slm_lora.config.schema import AdapterSection
from slm_lora.model.resolve import ModelSource

if TYPE_CHECKING:
    from peft import LoraConfig

    from slm_lora.adapters.targets import Targets


def peft_config(section: AdapterSection, source: ModelSource, targets: Targets) -> LoraConfig:
    """The `peft.LoraConfig` of a recipe's adapter on the modules that it means here.

    LoRA: Hu et al. 2021 (arXiv 2106.09685), scaling alpha/r. rsLoRA: Kalajdzievski 2023
    (arXiv 2312.03732), alpha/√r. DoRA: Liu et al. 2024 (arXiv 2402.09353). PiSSA: Meng et al.
    2024 (arXiv 2404.02948), initialised from the largest singular values, which the base loses.
    """
    from peft import LoraConfig

    modules, exclude = targets.modules, targets.exclude
    alpha = section.alpha
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=section.r,
        # PEFT types it as an integer, and others parse it so; a fraction is kept as it is.
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]
        lora_dropout=section.lora_dropout,
        bias=section.bias,
        target_modules=modules if isinstance(modules, str) else list(modules),
        exclude_modules=list(exclude) or None,
        use_rslora=section.kind == "rslora",
        use_dora=section.kind == "dora",
        init_lora_weights="pissa" if section.kind == "pissa" else True,
        # Never a path of this machine: what people put on the adapter must exist for them.
        base_model_name_or_path=source.name,
        revision=source.revision,
    )
