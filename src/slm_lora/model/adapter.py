"""What is trained: an adapter put on a base and taken off again, or the whole base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn

from slm_lora.errors import UsageError
from slm_lora.model.base import Base
from slm_lora.model.dropout import replace_dropout
from slm_lora.model.four_bits import import_bitsandbytes
from slm_lora.model.linear import use_tiles
from slm_lora.model.methods import peft_config
from slm_lora.recipe.schema import AdapterSection

if TYPE_CHECKING:
    from peft import PeftModel

BEGINNING = "slm_lora_beginning"
"""Attribute of a PiSSA model: the adapter's weights before training."""


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Weights that train, and all weights (base and adapter)."""

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """Share that trains, in percent of all."""
        return 100 * self.trainable / self.total


def alters_base(section: AdapterSection) -> bool:
    """Whether the base is another one afterwards, and has to be loaded again."""
    return section.kind in ("full", "pissa")


def attach(base: Base, section: AdapterSection, seed: int) -> nn.Module:
    """Put a fresh adapter on the base, in fp32, initialised from ``seed``; or make all weights
    of the base fp32 and trainable.

    The base's modules are wrapped in place; `detach` undoes that, unless `alters_base`.

    Raises:
        UsageError: a target module that the base does not have.
    """
    if section.kind == "full":
        for parameter in base.causal.parameters():
            parameter.data = parameter.data.float()
        return base.causal.requires_grad_(True)
    import_bitsandbytes()
    from peft import get_peft_model

    _check_targets(base, section)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(
            base.causal, peft_config(section, base.source), autocast_adapter_dtype=True
        )
    replace_dropout(adapted)
    if not base.sharded:
        use_tiles(adapted, base.device)
    if section.kind == "pissa":
        setattr(adapted, BEGINNING, {n: t.clone() for n, t in _state(adapted).items()})
    return adapted


def detach(adapted: nn.Module) -> None:
    """Take the adapter off again; the base is as it was, unless `alters_base`."""
    if is_adapter(adapted):
        adapted.unload()


def is_adapter(adapted: nn.Module) -> TypeGuard[PeftModel]:
    """Whether it has an adapter; else all its weights were trained."""
    from peft import PeftModel

    return isinstance(adapted, PeftModel)


def _check_targets(base: Base, section: AdapterSection) -> None:
    if section.target_modules == "all-linear":
        return
    # The loss multiplies with the output embedding itself: an adapter on it would not train.
    head = base.causal.get_output_embeddings()  # type: ignore[no-untyped-call]
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in base.causal.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    if unknown := [name for name in section.target_modules if name not in names]:
        raise UsageError(
            f"adapter.target_modules: {base.source.name} has no {', '.join(unknown)}; "
            f"it has {', '.join(sorted(names))}"
        )


def count_parameters(adapted: nn.Module) -> ParameterCount:
    """Trainable and all parameters, as `PeftModel.print_trainable_parameters` counts them."""
    if is_adapter(adapted):  # which knows of weights that lie two in a byte
        return ParameterCount(*adapted.get_nb_trainable_parameters())
    parameters = list(adapted.parameters())
    trainable = sum(each.numel() for each in parameters if each.requires_grad)
    return ParameterCount(trainable, sum(each.numel() for each in parameters))


def trainable_state(adapted: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights that train, by name, on the CPU."""
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }


def restore_state(adapted: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Put back what `trainable_state` copied."""
    parameters = dict(adapted.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)


def _state(adapted: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's weights under the names that PEFT saves them by."""
    from peft import get_peft_model_state_dict

    # (Else PEFT asks the hub whether the base has other embeddings.)
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
