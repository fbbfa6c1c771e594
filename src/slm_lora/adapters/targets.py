"""Which modules of a model get an adapter: decided on its configuration alone, before it is loaded.

PEFT matches names wherever they occur, also in a vision tower that text never enters, and it
cannot put adapters on everything that ``all-linear`` means. So the names are resolved here, on a
copy of the model without weights, and tried there with PEFT itself.
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
    """What PEFT is told.

    Attributes:
        modules: names, or parts of names, or ``all-linear``.
        exclude: full names that these would match besides.
        left_out: one line on what ``all-linear`` does not include here; empty where it is all.
    """

    modules: tuple[str, ...] | str
    exclude: tuple[str, ...] = ()
    left_out: str = ""


def resolve_targets(source: ModelSource, section: AdapterSection) -> Targets:
    """The modules of the text decoder that ``section.target_modules`` means.

    Raises:
        UsageError: the model has none of a name, or PEFT refuses the adapter.
    """
    if trains_all(section):
        return Targets(())
    return _resolved(source, trial_section(section, rank=2))


@functools.lru_cache(maxsize=256)
def _resolved(source: ModelSource, section: AdapterSection) -> Targets:
    model = skeleton(source)
    if model is None:  # PEFT judges when the model is loaded
        return Targets(section.target_modules)
    linear, others = _linear_modules(model)
    if section.target_modules == ALL_LINEAR:
        return _all_linear(source, section, linear, others, _fused_experts(model))
    return _named(source, section, linear, others, _fused_experts(model))


def without(
    targets: Targets,
    reached: Sequence[str],
    unreached: Sequence[str],
    section: AdapterSection,
    model: str,
) -> Targets:
    """The targets less those that no gradient reaches.

    Raises:
        UsageError: none would be left of a name in ``section.target_modules``.
    """
    if not unreached:
        return targets
    gone = set(unreached)
    if section.target_modules != ALL_LINEAR:
        for target in section.target_modules:
            if not any(_matches(name, (target,)) for name in reached):
                raise UsageError(
                    f"adapter.target_modules: no gradient of a text reaches {target} of {model}, "
                    "so an adapter there would not learn; leave it out"
                )
    if isinstance(targets.modules, str):
        kept: tuple[str, ...] | str = targets.modules
        exclude = (*targets.exclude, *unreached)
    elif section.target_modules == ALL_LINEAR:
        kept, exclude = tuple(name for name in targets.modules if name not in gone), ()
    else:
        kept, exclude = targets.modules, (*targets.exclude, *unreached)
    kinds = ", ".join(dict.fromkeys(map(_leaf, unreached)))
    told = (
        f"no gradient of a text reaches {len(gone)} modules of {model} ({kinds}): no adapter there"
    )
    return Targets(kept, exclude, "; ".join(filter(None, (targets.left_out, told))))


def skeleton(source: ModelSource) -> PreTrainedModel | None:
    """The model on the meta device: modules and shapes, no weights. None where it
    cannot be made without them."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        made: Any = AutoModelForCausalLM
        config = AutoConfig.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=False
        )
        config._name_or_path = source.name
        with torch.device("meta"):
            model: PreTrainedModel = made.from_config(config)
    except Exception:  # the model's code; loading it says what is wrong
        return None
    finally:
        logging.set_verbosity(before)
    return model


def _is_linear(module: nn.Module) -> bool:
    """A linear layer. (Some routers are subclasses by another name, and return more than it.)"""
    from transformers.pytorch_utils import Conv1D

    named = isinstance(module, nn.Linear) and type(module).__name__.endswith("Linear")
    return named or isinstance(module, Conv1D)


def _linear_modules(model: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Names of the linear layers that text goes through, and of all others. The output layer is
    among neither: the loss multiplies with its matrix itself."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    inside = {id(module) for module in text_decoder(model).modules()}
    linear: list[str] = []
    others: list[str] = []
    for name, module in model.named_modules():
        if module is head or not (_is_linear(module) or isinstance(module, nn.Linear)):
            continue
        (linear if id(module) in inside and _is_linear(module) else others).append(name)
    return linear, others


def _fused_experts(model: PreTrainedModel) -> list[str]:
    """Names of parameters that hold the matrices of all experts of a layer."""
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and "conv" not in name
    ]


def _matches(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _named(
    source: ModelSource,
    section: AdapterSection,
    linear: list[str],
    others: list[str],
    experts: list[str],
) -> Targets:
    wanted = tuple(section.target_modules)
    exclude = tuple(name for name in others if _matches(name, wanted))
    unknown = [target for target in wanted if not any(_matches(name, (target,)) for name in linear)]
    if unknown and not experts:
        raise UsageError(
            f"adapter.target_modules: {source.name} has no {', '.join(unknown)}; "
            f"it has {', '.join(sorted(_kinds(linear)))}"
        )
    found, error = _try(source, section, wanted, exclude)
    if error:
        raise UsageError(f"adapter.target_modules: PEFT refuses them on {source.name}: {error}")
    # PEFT puts the names that experts once had on the matrices that hold them all.
    if unknown and set(found) <= set(linear):
        raise UsageError(
            f"adapter.target_modules: {source.name} has no {', '.join(unknown)} but inside its "
            f"experts ({', '.join(dict.fromkeys(map(_leaf, experts)))}), which PEFT does not find "
            f"by that name; it has {', '.join(sorted(_kinds(linear)))}"
        )
    return Targets(wanted, exclude)


def _all_linear(
    source: ModelSource,
    section: AdapterSection,
    linear: list[str],
    others: list[str],
    experts: list[str],
) -> Targets:
    if experts and not section.lora_dropout:
        found, error = _try(source, section, ALL_LINEAR, tuple(others))
        if not error and any(name not in linear for name in found):
            return Targets(ALL_LINEAR, tuple(others), _told(source, linear, others, ()))
    found, error = _try(source, section, tuple(linear), ())
    if not error and set(found) == set(linear):
        return Targets(tuple(linear), (), _told(source, linear, others, experts))
    # One kind after the other: PEFT refuses some by name, and takes others for experts.
    usable = []
    for kind, names in _kinds(linear).items():
        found, refused = _try(source, section, names, ())
        if refused or set(found) != set(names):
            error = refused or error
        else:
            usable.append(kind)
    if not usable:
        raise UsageError(
            f"adapter.target_modules = {ALL_LINEAR}: PEFT takes none of {source.name}'s linear "
            f"layers ({error})"
        )
    chosen = tuple(name for name in linear if _leaf(name) in usable)
    rest = [name for name in linear if _leaf(name) not in usable]
    return Targets(chosen, (), _told(source, chosen, others + rest, experts))


def _told(
    source: ModelSource, taken: Sequence[str], others: Sequence[str], experts: Sequence[str]
) -> str:
    """What ``all-linear`` leaves out, in one line."""
    parts = [f"{kind} ({many})" for kind, many in Counter(map(_leaf, others)).items()]
    if experts:
        kinds = ", ".join(dict.fromkeys(map(_leaf, experts)))
        parts.append(
            f"the experts ({kinds}; PEFT takes them with adapter.lora_dropout=0, if at all)"
        )
    if not parts:
        return ""
    return (
        f"all-linear is {', '.join(_kinds(taken))} of {source.name}; without adapters stay "
        f"{', '.join(parts)}"
    )


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _kinds(names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Full names by their last part."""
    kinds: dict[str, tuple[str, ...]] = {}
    for name in names:
        kinds[_leaf(name)] = (*kinds.get(_leaf(name), ()), name)
    return kinds


def _try(
    source: ModelSource,
    section: AdapterSection,
    modules: tuple[str, ...] | str,
    exclude: tuple[str, ...],
) -> tuple[list[str], str]:
    """Names of the modules that PEFT would put adapters on, or why it refuses."""
    import_bitsandbytes()
    from peft import get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = skeleton(source)
    assert model is not None
    try:
        peft_model = get_peft_model(
            model, peft_config(section, source, Targets(modules, exclude)), low_cpu_mem_usage=True
        )
    except Exception as error:  # PEFT raises all kinds
        return [], one_sentence(error)
    prefix = "base_model.model."
    return [
        name.removeprefix(prefix)
        for name, module in peft_model.named_modules()
        if isinstance(module, BaseTunerLayer)
    ], ""


def one_sentence(error: Exception) -> str:
    """The first line of an error of another library, without its own prefix."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[PEFT:[^\]]*\]\s*", "", first)
