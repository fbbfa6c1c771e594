"""What is trained: an adapter put on a base and taken off again, or the whole base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import nn

from slm_lora.adapters.check import check_forward, reached_modules
from slm_lora.adapters.methods import method_of, peft_config, trial_section
from slm_lora.adapters.targets import Targets, one_sentence, resolve_targets, without
from slm_lora.config.schema import AdapterSection
from slm_lora.errors import UsageError
from slm_lora.model.base import Base, text_decoder
from slm_lora.model.quantization import import_bitsandbytes
from slm_lora.ops.dropout import replace_dropout
from slm_lora.ops.linear import patch_linears

if TYPE_CHECKING:
    from peft import PeftModel

BEGINNING = "slm_lora_beginning"
"""Attribute of a PiSSA model: the adapter's weights before training."""
LEFT_OUT = "slm_lora_left_out"
"""Attribute of what is trained: one line on modules that were meant and are not."""


@dataclass(frozen=True, slots=True)
class ParameterCount:
    """Weights that train, and all weights (base and adapter)."""

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """Share that trains, in percent of all."""
        return 100 * self.trainable / self.total


def attach(base: Base, section: AdapterSection, seed: int) -> nn.Module:
    """Put a fresh adapter on the base, in fp32, initialised from ``seed``; or make all weights
    of the base fp32 and trainable.

    The base's modules are wrapped in place; `detach` undoes that, unless the method modifies it.

    Raises:
        UsageError: a target module that the base does not have.
    """
    method = method_of(section)
    if method.config is None:
        return _train_all(base)
    targets = resolve_targets(base.source, section)
    if not base.sharded:
        # Where the method modifies the base, its trial method shows what an adapter there does.
        trial = trial_section(section) if method.modifies_base else section
        peft_model = _put_on(base, trial, seed, targets)
        check_forward(base, peft_model)
        reached, unreached = reached_modules(base, peft_model)
        if unreached or trial != section:
            peft_model.unload()
            targets = without(targets, reached, unreached, section, base.source.name)
            peft_model = _put_on(base, section, seed, targets)
    else:
        peft_model = _put_on(base, section, seed, targets)
    setattr(peft_model, LEFT_OUT, targets.left_out)
    if method.modifies_base:
        setattr(peft_model, BEGINNING, {n: t.clone() for n, t in _state(peft_model).items()})
    return peft_model


def _train_all(base: Base) -> nn.Module:
    """All weights of the text model in fp32 and trainable; those of a vision tower, say, stay."""
    model = base.model
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    of_text = {id(p) for module in (text_decoder(model), head) for p in module.parameters()}
    frozen = 0
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(id(parameter) in of_text)
        frozen += parameter.numel() * (id(parameter) not in of_text)
    told = f"{frozen} weights of {base.source.name} are not its text model's, and stay as they are"
    setattr(model, LEFT_OUT, told if frozen else "")
    return model


def left_out(peft_model: nn.Module) -> str:
    """One line on modules that were meant and have no adapter; empty where all have."""
    return str(getattr(peft_model, LEFT_OUT, ""))


def _put_on(base: Base, section: AdapterSection, seed: int, targets: Targets) -> PeftModel:
    import_bitsandbytes()
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            peft_model = get_peft_model(
                base.model,
                peft_config(section, base.source, targets),
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
    """Take the adapter off again; the base is as it was, unless the method modifies it."""
    if not is_adapter(peft_model):
        return
    from peft.utils import ModulesToSaveWrapper

    # PEFT leaves modules that an adapter holds whole (modules_to_save) in the place of the base's.
    whole = [
        (parent, name, child.original_module)
        for parent in list(peft_model.modules())
        for name, child in parent.named_children()
        if isinstance(child, ModulesToSaveWrapper)
    ]
    peft_model.unload()
    for parent, name, original in whole:
        setattr(parent, name, original)


def is_adapter(peft_model: nn.Module) -> TypeGuard[PeftModel]:
    """Whether it has an adapter; else all its weights were trained."""
    from peft import PeftModel

    return isinstance(peft_model, PeftModel)


def count_parameters(peft_model: nn.Module) -> ParameterCount:
    """Trainable and all parameters, as `PeftModel.print_trainable_parameters` counts them."""
    if is_adapter(peft_model):  # which knows of weights that lie two in a byte
        return ParameterCount(*peft_model.get_nb_trainable_parameters())
    parameters = list(peft_model.parameters())
    trainable = sum(each.numel() for each in parameters if each.requires_grad)
    return ParameterCount(trainable, sum(each.numel() for each in parameters))


def trainable_state(peft_model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the weights that train, by name, on the CPU."""
    return {
        name: parameter.detach().to("cpu", copy=True)
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad
    }


def restore_state(peft_model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Put back what `trainable_state` copied."""
    parameters = dict(peft_model.named_parameters())
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)


def _state(peft_model: PeftModel) -> dict[str, torch.Tensor]:
    """The adapter's weights under the names that PEFT saves them by."""
    from peft import get_peft_model_state_dict

    # (Else PEFT asks the hub whether the base has other embeddings.)
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(
        peft_model, save_embedding_layers=False
    )
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
