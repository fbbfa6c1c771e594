"""Attach an adapter to a base and detach it, or unfreeze the whole base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn

from slm_lora.adapters.check import check_forward, reached_modules
from slm_lora.adapters.methods import method_of, peft_config, trial_section
from slm_lora.adapters.targets import Targets, drop_unreached, one_sentence, resolve_targets
from slm_lora.config.schema import AdapterSection
from slm_lora.errors import UsageError
from slm_lora.model.base import Base, text_decoder
from slm_lora.model.quantization import import_bitsandbytes
from slm_lora.ops.dropout import replace_dropout
from slm_lora.ops.linear import patch_linears

if TYPE_CHECKING:
    from peft import PeftModel

INITIAL_STATE = "slm_lora_initial_state"
"""Attribute of a model whose method modifies the base: the adapter's weights before training."""
UNADAPTED_NOTE = "slm_lora_unadapted_note"
"""Attribute of the trained model: one line on targeted modules without an adapter."""


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Trainable weights, and all weights (base and adapter)."""

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """Trainable share of all weights, in percent."""
        return 100 * self.trainable / self.total


def attach(base: Base, section: AdapterSection, seed: int) -> nn.Module:
    """Attach a new fp32 adapter, initialised from ``seed``; for full fine-tuning make all weights
    of the base fp32 and trainable.

    The base's modules are wrapped in place; `detach` reverts that, unless the method modifies the
    base's weights.

    Raises:
        UsageError: the base lacks a target module, or does not compute with the adapter.
    """
    method = method_of(section)
    if method.config is None:
        return _unfreeze_all(base)
    targets = resolve_targets(base.source, section)
    if not base.sharded:
        # A method that modifies the base is checked by its trial method, which leaves it intact.
        trial = trial_section(section) if method.modifies_base else section
        peft_model = _add_adapter(base, trial, seed, targets)
        check_forward(base, peft_model)
        reached, unreached = reached_modules(base, peft_model)
        if unreached or trial != section:
            peft_model.unload()
            targets = drop_unreached(targets, reached, unreached, section, base.source.name)
            peft_model = _add_adapter(base, section, seed, targets)
    else:
        peft_model = _add_adapter(base, section, seed, targets)
    setattr(peft_model, UNADAPTED_NOTE, targets.unadapted_note)
    if method.modifies_base:
        setattr(
            peft_model, INITIAL_STATE, {n: t.clone() for n, t in _peft_state(peft_model).items()}
        )
    return peft_model


def _unfreeze_all(base: Base) -> nn.Module:
    """Make the text model's weights fp32 and trainable; others (a vision tower) stay frozen."""
    model = base.model
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    text_parameters = {id(p) for module in (text_decoder(model), head) for p in module.parameters()}
    frozen = 0
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(id(parameter) in text_parameters)
        frozen += parameter.numel() * (id(parameter) not in text_parameters)
    note = f"{frozen} weights of {base.source.name} are outside its text model and stay frozen"
    setattr(model, UNADAPTED_NOTE, note if frozen else "")
    return model


def unadapted_note(peft_model: nn.Module) -> str:
    """One line on targeted modules that have no adapter; empty if there are none."""
    return str(getattr(peft_model, UNADAPTED_NOTE, ""))


def _add_adapter(base: Base, section: AdapterSection, seed: int, targets: Targets) -> PeftModel:
    import_bitsandbytes()
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft_model = get_peft_model(
                base.model,
                peft_config(section, base.source, targets, seed),
                autocast_adapter_dtype=True,
            )
        except (ValueError, TypeError, NotImplementedError, AttributeError, KeyError) as error:
            raise UsageError(
                f"adapter: PEFT refuses it on {base.source.name}: {one_sentence(error)}"
            ) from error
    replace_dropout(peft_model)
    if not base.sharded:
        patch_linears(peft_model, base.device)
    return peft_model


def detach(peft_model: nn.Module) -> None:
    """Remove the adapter and restore the base, unless the method modified its weights."""
    if not has_adapter(peft_model):
        return
    from peft.utils import ModulesToSaveWrapper

    # PEFT's unload leaves the trained copies (modules_to_save) in place of the base's modules.
    trained_copies = [
        (parent, name, child.original_module)
        for parent in list(peft_model.modules())
        for name, child in parent.named_children()
        if isinstance(child, ModulesToSaveWrapper)
    ]
    peft_model.unload()
    for parent, name, original in trained_copies:
        setattr(parent, name, original)


def has_adapter(peft_model: nn.Module) -> TypeGuard[PeftModel]:
    """Whether the model has an adapter; if not, all its weights were trained."""
    from peft import PeftModel

    return isinstance(peft_model, PeftModel)


def count_parameters(peft_model: nn.Module) -> ParameterCount:
    """Trainable and all parameters, as `PeftModel.print_trainable_parameters` counts them."""
    if has_adapter(peft_model):  # PEFT counts packed 4-bit weights correctly
        return ParameterCount(*peft_model.get_nb_trainable_parameters())
    parameters = list(peft_model.parameters())
    trainable = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return ParameterCount(trainable, sum(parameter.numel() for parameter in parameters))


def trainable_state(peft_model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the trainable weights, by name, on the CPU."""
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad
    }


def restore_state(peft_model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copy the weights of a `trainable_state` back into the model."""
    parameters = dict(peft_model.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)


def _peft_state(peft_model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's weights by the names under which PEFT saves them."""
    from peft import get_peft_model_state_dict

    # With save_embedding_layers="auto" PEFT queries the hub for the base's configuration.
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(
        peft_model, save_embedding_layers=False
    )
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
