"""Refuse valid but unsupported adapters of other programs, with a reason and a remedy."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from slm_lora.adapters.methods import peft_types
from slm_lora.errors import IntegrityError, UsageError
from slm_lora.model.base import Base

MERGE_HINT = "merge it with PEFT (merge_and_unload), and name the merged folder in model.name"
_PEFT_HINT = "use it with PEFT itself: it cannot be merged"

_NOT_WEIGHTS = {
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT",
    "CPT", "CARTRIDGE", "XLORA", "POLY",
}  # fmt: skip
"""PEFT types that do not change weights, so cannot be merged."""
_BASE_CHANGING_INITS = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Initialisations that subtract a part of the base's weights; PEFT repeats that on loading, and the
base would no longer be the original one."""
_PREFIX = "base_model.model."


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse features in `adapter_config.json` that are not supported here.

    Raises:
        UsageError: one is enabled; the message names it and the remedy.
    """
    peft_type = config["peft_type"]
    known_types = peft_types()
    if peft_type not in known_types:
        remedy = _PEFT_HINT if peft_type in _NOT_WEIGHTS else MERGE_HINT
        raise UsageError(
            f"{path.parent}: an adapter of kind {peft_type!a:.40}; loaded are "
            f"{', '.join(sorted(known_types))}; {remedy}"
        )
    if config.get("megatron_config") is not None:
        raise UsageError(f"{path}: megatron_config has PEFT import a module; not loaded")
    init = str(config.get("init_lora_weights")).lower()
    unsupported = {
        "activated LoRA (alora_invocation_tokens), which applies after these tokens only": (
            config.get("alora_invocation_tokens"), _PEFT_HINT,
        ),
        "layer_replication: it repeats layers of the base": (
            config.get("layer_replication"), MERGE_HINT,
        ),
        "use_qalora: made for quantised weights": (config.get("use_qalora"), MERGE_HINT),
        "arrow_config: a router over several adapters": (
            config.get("arrow_config"), _PEFT_HINT,
        ),
        f"init_lora_weights = {init}: PEFT subtracts the initial adapter from the base": (
            init.startswith(_BASE_CHANGING_INITS), MERGE_HINT,
        ),
    }  # fmt: skip
    for feature, (enabled, remedy) in unsupported.items():
        if enabled:
            raise UsageError(f"{path.parent}: {feature}; not computed here: {remedy}")
    _check_known(path, config)


def _check_known(path: Path, config: Mapping[str, Any]) -> None:
    """PEFT ignores unknown keys of newer releases with a warning, and computes without them."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftType

    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(config["peft_type"])]
    known = {field.name for field in dataclasses.fields(config_class)}
    switched_on = [
        key
        for key, value in config.items()
        if key not in known and (value is True or (isinstance(value, dict | list) and value))
    ]
    if switched_on:
        raise UsageError(
            f"{path}: {', '.join(map(ascii, sorted(switched_on)))} is unknown to the installed "
            f"PEFT; pip install -U peft, or {MERGE_HINT}"
        )


def check_biases(folder: Path, config: Mapping[str, Any], names: Collection[str]) -> None:
    """Refuse trained biases of the base: PEFT loads them into the base itself, which would no
    longer be the original one.

    Raises:
        UsageError: the adapter has some.
    """
    biases = [name for name in names if name.endswith(".bias") and "lora_" not in name]
    if config.get("bias", "none") != "none" and biases:
        raise UsageError(
            f"{folder}: bias = {config['bias']!a:.20}: {len(biases)} biases of the base were "
            f"trained with it; not computed here: {MERGE_HINT}"
        )


def modules_outside_layers(names: Collection[str]) -> list[str]:
    """Modules outside the (numbered) layers that have an adapter or are trained fully."""
    modules = {
        re.split(r"\.(?:lora_|base_layer|token_adapter)", name)[0]
        .removeprefix(_PREFIX)
        .removesuffix(".weight")
        for name in names
        # Tensors that a method shares between layers are no modules of the base.
        if name.startswith(_PREFIX) and not re.search(r"\.\d+\.", name)
    }
    return sorted({name.rsplit(".", 1)[-1] for name in modules})


def copies_of_base(base: Base, weights: Path, folder: Path, extra: Collection[str]) -> set[str]:
    """Names of the extra tensors that are copies of the base's own, which PEFT saves with an
    adapter on embeddings.

    Args:
        base: without any adapter.
        weights: file of the adapter's tensors.
        folder: of the adapter, for messages.
        extra: names of tensors that are not the adapter's.

    Raises:
        IntegrityError: a copy differs from the base's tensor in shape or values.
    """
    base_tensors = base.model.state_dict()
    copies: set[str] = set()
    resized: dict[str, int] = {}
    different: list[str] = []
    with safe_open(weights, framework="pt") as file:
        for name in sorted(extra):
            module = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
            base_tensor = base_tensors.get(module)
            if "lora_" in name or base_tensor is None:
                continue
            saved = file.get_tensor(name)
            short = module.removesuffix(".weight").rsplit(".", 1)[-1]
            if saved.shape == base_tensor.shape:
                same = torch.equal(saved.to(base_tensor.device, base_tensor.dtype), base_tensor)
                copies.add(name)
                if not same:
                    different.append(short)
            elif saved.shape[1:] == base_tensor.shape[1:]:
                resized[short] = saved.shape[0]
                rows = base_tensor.shape[0]
    if resized:
        raise IntegrityError(
            f"{folder}: made after the vocabulary was changed: its {' and '.join(resized)} "
            f"{'has' if len(resized) == 1 else 'have'} {max(resized.values())} rows, "
            f"{base.source.name} has {rows}; give the base that many (resize_token_embeddings), "
            f"{MERGE_HINT}, with the adapter's tokenizer in it"
        )
    if different:
        raise IntegrityError(
            f"{folder}: contains {' and '.join(different)} that differ from those of "
            f"{base.source.name}: it was trained on another base, or they were changed; "
            f"{MERGE_HINT}"
        )
    return copies
