"""Sound adapters of others that are not computed with here: what they are, and what to do."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from slm_lora.adapters.methods import PEFT_TYPES
from slm_lora.errors import IntegrityError, UsageError
from slm_lora.model.base import Base

MERGE = "merge it with PEFT (merge_and_unload), and name the merged folder in model.name"
_ONLY_PEFT = "use it with PEFT itself: it cannot be merged"

_PROMPTS = {
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT",
    "CPT", "CARTRIDGE", "XLORA", "POLY",
}  # fmt: skip
"""Kinds of adapters that are no change of weights."""
_ALTERS_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Initialisations that take something from the base, which PEFT does again on loading: what is
called the base would then be another one."""
_PREFIX = "base_model.model."


def check_config(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse, by name, what `adapter_config.json` asks for and is not computed here.

    Raises:
        UsageError: it does.
    """
    kind = config["peft_type"]
    if kind not in PEFT_TYPES:
        way_out = _ONLY_PEFT if kind in _PROMPTS else MERGE
        raise UsageError(
            f"{path.parent}: an adapter of kind {kind!a:.40}; only LoRA's are loaded; {way_out}"
        )
    if config.get("megatron_config") is not None:
        raise UsageError(f"{path}: megatron_config has PEFT import a module; not loaded")
    start = str(config.get("init_lora_weights")).lower()
    found = {
        "activated LoRA (alora_invocation_tokens), which works behind these tokens only": (
            config.get("alora_invocation_tokens"), _ONLY_PEFT,
        ),
        "layer_replication: the base has more layers under it": (
            config.get("layer_replication"), MERGE,
        ),
        "use_qalora: made for quantised weights": (config.get("use_qalora"), MERGE),
        "arrow_config: a router over several adapters": (
            config.get("arrow_config"), _ONLY_PEFT,
        ),
        f"init_lora_weights = {start}: it belongs to a base from which PEFT took its beginning": (
            start.startswith(_ALTERS_BASE), MERGE,
        ),
    }  # fmt: skip
    for what, (there, way_out) in found.items():
        if there:
            raise UsageError(f"{path.parent}: {what}; not computed here: {way_out}")
    _check_known(path, config)


def _check_known(path: Path, config: Mapping[str, Any]) -> None:
    """PEFT leaves out what it does not know of newer releases, and computes without it."""
    from peft import LoraConfig

    known = {field.name for field in dataclasses.fields(LoraConfig)}
    switched_on = [
        key
        for key, value in config.items()
        if key not in known and (value is True or (isinstance(value, dict | list) and value))
    ]
    if switched_on:
        raise UsageError(
            f"{path}: {', '.join(map(ascii, sorted(switched_on)))} is nothing that this PEFT "
            f"knows; pip install -U peft, or {MERGE}"
        )


def check_biases(folder: Path, config: Mapping[str, Any], names: Collection[str]) -> None:
    """Refuse trained biases of the base, which PEFT writes into the base itself: what is called
    the base would then be another one.

    Raises:
        UsageError: there are some.
    """
    biases = [name for name in names if name.endswith(".bias") and "lora_" not in name]
    if config.get("bias", "none") != "none" and biases:
        raise UsageError(
            f"{folder}: bias = {config['bias']!a:.20}: {len(biases)} biases of the base were "
            f"trained with it; not computed here: {MERGE}"
        )


def ends(names: Collection[str]) -> list[str]:
    """Modules with an adapter, or trained whole, that are none of the (numbered) layers."""
    found = {
        re.split(r"\.(?:lora_|base_layer|token_adapter)", name)[0]
        .removeprefix(_PREFIX)
        .removesuffix(".weight")
        for name in names
        if not re.search(r"\.\d+\.", name)
    }
    return sorted({name.rsplit(".", 1)[-1] for name in found})


def copies_of_base(base: Base, weights: Path, folder: Path, extra: Collection[str]) -> set[str]:
    """Of tensors that are no adapter's, those that are the base's own, which PEFT saves beside an
    adapter on embeddings.

    Args:
        base: without any adapter.
        weights: the file that holds them.
        folder: of the adapter, for messages.
        extra: their names.

    Raises:
        IntegrityError: one is the base's in another shape, or with other numbers.
    """
    own = base.model.state_dict()
    found: set[str] = set()
    larger: dict[str, int] = {}
    other: list[str] = []
    with safe_open(weights, framework="pt") as file:
        for name in sorted(extra):
            module = name.removeprefix(_PREFIX).replace(".base_layer.", ".")
            there = own.get(module)
            if "lora_" in name or there is None:
                continue
            saved = file.get_tensor(name)
            short = module.removesuffix(".weight").rsplit(".", 1)[-1]
            if saved.shape == there.shape:
                same = torch.equal(saved.to(there.device, there.dtype), there)
                found.add(name)
                if not same:
                    other.append(short)
            elif saved.shape[1:] == there.shape[1:]:
                larger[short] = saved.shape[0]
                rows = there.shape[0]
    if larger:
        raise IntegrityError(
            f"{folder}: made after the vocabulary was changed: its {' and '.join(larger)} "
            f"{'has' if len(larger) == 1 else 'have'} {max(larger.values())} rows, "
            f"{base.source.name} has {rows}; give the base that many (resize_token_embeddings), "
            f"{MERGE}, with the adapter's tokenizer in it"
        )
    if other:
        raise IntegrityError(
            f"{folder}: brings {' and '.join(other)} of its own, not those of {base.source.name}: "
            f"it was trained on another base, or they were changed; {MERGE}"
        )
    return found
