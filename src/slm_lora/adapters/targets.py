"""Target modules of an adapter, resolved from the model's configuration before loading.

PEFT matches names anywhere, also in a vision tower that text never enters, and does not support
every module that ``all-linear`` includes. So names are resolved and tried with PEFT on a copy of
the model without weights (meta device).
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slm_lora.adapters.methods import peft_config, trains_all, trial_section
from slm_lora.config.schema import AdapterSection
from slm_lora.errors import UsageError
from slm_lora.model.base import text_decoder
from slm_lora.model.quantization import import_bitsandbytes
from slm_lora.model.resolve import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True)
class Targets:
    """Target modules in PEFT's terms.

    Attributes:
        modules: names, or parts of names, or ``all-linear``.
        exclude: full names that ``modules`` would match too, but must not.
        left_out: one line on targeted modules without an adapter; empty if there are none.
    """

    modules: tuple[str, ...] | str
    exclude: tuple[str, ...] = ()
    unadapted_note: str = ""


def resolve_targets(source: ModelSource, section: AdapterSection) -> Targets:
    """Resolve ``section.target_modules`` to modules of the text decoder.

    Raises:
        UsageError: a name matches no module, or PEFT refuses the adapter.
    """
    if trains_all(section):
        return Targets(())
    return _resolve(source, trial_section(section, rank=2))


@functools.lru_cache(maxsize=256)
def _resolve(source: ModelSource, section: AdapterSection) -> Targets:
    model = meta_model(source)
    if model is None:  # PEFT resolves them on the loaded model
        return Targets(section.target_modules)
    linear, others = _linear_modules(model)
    if section.target_modules == ALL_LINEAR:
        return _resolve_all_linear(source, section, linear, others, _fused_experts(model))
    return _resolve_named(source, section, linear, others, _fused_experts(model))


def drop_unreached(
    targets: Targets,
    reached: Sequence[str],
    unreached: Sequence[str],
    section: AdapterSection,
    model: str,
) -> Targets:
    """Remove the targets that no gradient reaches.

    Raises:
        UsageError: a name in ``section.target_modules`` would match no module any more.
    """
    if not unreached:
        return targets
    dropped = set(unreached)
    if section.target_modules != ALL_LINEAR:
        for target in section.target_modules:
            if not any(_matches(name, (target,)) for name in reached):
                raise UsageError(
                    f"adapter.target_modules: no gradient of a text reaches {target} of {model}, "
                    "so an adapter there would not learn; leave it out"
                )
    if isinstance(targets.modules, str):
        modules: tuple[str, ...] | str = targets.modules
        exclude = (*targets.exclude, *unreached)
    elif section.target_modules == ALL_LINEAR:
        modules, exclude = tuple(name for name in targets.modules if name not in dropped), ()
    else:
        modules, exclude = targets.modules, (*targets.exclude, *unreached)
    leaves = ", ".join(dict.fromkeys(map(_leaf, unreached)))
    note = f"no gradient of a text reaches {len(dropped)} modules of {model} ({leaves})"
    notes = filter(None, (targets.unadapted_note, f"{note}: no adapter there"))
    return Targets(modules, exclude, "; ".join(notes))


def meta_model(source: ModelSource) -> PreTrainedModel | None:
    """The model on the meta device: modules and shapes without weights; None if its code cannot
    build it there."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        factory: Any = AutoModelForCausalLM
        config = AutoConfig.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=False
        )
        config._name_or_path = source.name
        with torch.device("meta"):
            model: PreTrainedModel = factory.from_config(config)
    except Exception:  # any error of the model's code; loading reports it
        return None
    finally:
        logging.set_verbosity(verbosity)
    return model


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer; some routers subclass it and return more than a product."""
    from transformers.pytorch_utils import Conv1D

    is_plain = isinstance(module, nn.Linear) and type(module).__name__.endswith("Linear")
    return is_plain or isinstance(module, Conv1D)


def _linear_modules(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Names of the text decoder's linear layers, and of all other linear modules. The output layer
    is in neither list: the loss multiplies by its matrix directly."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    decoder_modules = {id(module) for module in text_decoder(model).modules()}
    linear: list[str] = []
    others: list[str] = []
    for name, module in model.named_modules():
        if module is head or not (_is_linear(module) or isinstance(module, nn.Linear)):
            continue
        (linear if id(module) in decoder_modules and _is_linear(module) else others).append(name)
    return linear, others


def _fused_experts(model: PreTrainedModel) -> list[str]:
    """Names of 3-D parameters, each with the matrices of all experts of a layer."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and "conv" not in name
    ]


def _matches(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _resolve_named(
    source: ModelSource,
    section: AdapterSection,
    linear: list[str],
    others: list[str],
    experts: list[str],
) -> Targets:
    targets = tuple(section.target_modules)
    exclude = tuple(name for name in others if _matches(name, targets))
    unknown = [
        target for target in targets if not any(_matches(name, (target,)) for name in linear)
    ]
    if unknown and not experts:
        raise UsageError(
            f"adapter.target_modules: {source.name} has no {', '.join(unknown)}; "
            f"it has {', '.join(sorted(_by_leaf(linear)))}"
        )
    adapted, error = _try_peft(source, section, targets, exclude)
    if error:
        raise UsageError(f"adapter.target_modules: PEFT refuses them on {source.name}: {error}")
    # PEFT maps the experts' former module names to the fused parameters.
    if unknown and set(adapted) <= set(linear):
        raise UsageError(
            f"adapter.target_modules: {source.name} has no {', '.join(unknown)} outside of its "
            f"experts ({', '.join(dict.fromkeys(map(_leaf, experts)))}), and PEFT maps no such "
            f"name to these; it has {', '.join(sorted(_by_leaf(linear)))}"
        )
    return Targets(targets, exclude)


def _resolve_all_linear(
    source: ModelSource,
    section: AdapterSection,
    linear: list[str],
    others: list[str],
    experts: list[str],
) -> Targets:
    if experts and not section.lora_dropout:
        adapted, error = _try_peft(source, section, ALL_LINEAR, tuple(others))
        if not error and any(name not in linear for name in adapted):
            return Targets(ALL_LINEAR, tuple(others), _unadapted_note(source, linear, others, ()))
    adapted, error = _try_peft(source, section, tuple(linear), ())
    if not error and set(adapted) == set(linear):
        return Targets(tuple(linear), (), _unadapted_note(source, linear, others, experts))
    # One module type at a time: PEFT refuses some by name, and maps others to experts.
    usable_leaves = []
    for leaf, names in _by_leaf(linear).items():
        adapted, leaf_error = _try_peft(source, section, names, ())
        if leaf_error or set(adapted) != set(names):
            error = leaf_error or error
        else:
            usable_leaves.append(leaf)
    if not usable_leaves:
        raise UsageError(
            f"adapter.target_modules = {ALL_LINEAR}: PEFT supports none of {source.name}'s linear "
            f"layers ({error})"
        )
    modules = tuple(name for name in linear if _leaf(name) in usable_leaves)
    unsupported = [name for name in linear if _leaf(name) not in usable_leaves]
    return Targets(modules, (), _unadapted_note(source, modules, others + unsupported, experts))


def _unadapted_note(
    source: ModelSource, adapted: Sequence[str], others: Sequence[str], experts: Sequence[str]
) -> str:
    """One line on the modules that ``all-linear`` does not include."""
    parts = [f"{leaf} ({count})" for leaf, count in Counter(map(_leaf, others)).items()]
    if experts:
        leaves = ", ".join(dict.fromkeys(map(_leaf, experts)))
        parts.append(
            f"the experts ({leaves}; PEFT takes them with adapter.lora_dropout=0, if at all)"
        )
    if not parts:
        return ""
    return (
        f"all-linear is {', '.join(_by_leaf(adapted))} of {source.name}; without adapters stay "
        f"{', '.join(parts)}"
    )


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _by_leaf(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Full names by their last part (leaf)."""
    by_leaf: dict[str, tuple[str, ...]] = {}
    for name in names:
        by_leaf[_leaf(name)] = (*by_leaf.get(_leaf(name), ()), name)
    return by_leaf


def _try_peft(
    source: ModelSource,
    section: AdapterSection,
    modules: tuple[str, ...] | str,
    exclude: tuple[str, ...],
) -> tuple[list[str], str]:
    """Names of the modules that PEFT adapts, with an empty text; or none, with its error."""
    import_bitsandbytes()
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = meta_model(source)
    assert model is not None
    try:
        peft_model = get_peft_model(
            model, peft_config(section, source, Targets(modules, exclude)), low_cpu_mem_usage=True
        )
    except Exception as error:  # PEFT raises various types
        return [], one_sentence(error)
    prefix = "base_model.model."
    return [
        name.removeprefix(prefix)
        for name, module in peft_model.named_modules()
        if isinstance(module, BaseTunerLayer)
    ], ""


def one_sentence(error: Exception) -> str:
    """The first line of a library's error, without PEFT's prefix."""
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[PEFT:[^\]]*\]\s*", "", first_line)
