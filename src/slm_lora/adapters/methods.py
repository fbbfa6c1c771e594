"""Registry of training methods: PEFT configuration, effect on the base, saving, merging, exports.

A method is added by its name and label in `config.types` and one entry of `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from slm_lora.config.schema import AdapterSection
from slm_lora.config.types import MethodName
from slm_lora.errors import UsageError
from slm_lora.model.resolve import ModelSource

if TYPE_CHECKING:
    from peft import PeftConfig

    from slm_lora.adapters.targets import Targets

ConfigFactory = Callable[[AdapterSection, ModelSource, "Targets", int], "PeftConfig"]
"""Section, base, resolved targets and seed; what is drawn at random must follow from the seed."""


@dataclass(frozen=True, slots=True)
class Method:
    """A method of training.

    Attributes:
        config: its PEFT configuration; None: every weight trains, there is no adapter.
        peft_type: name of that configuration's `PeftType`.
        trial: method with the same modules and computation, used to check an adapter on a base
            before any work; itself if None.
        modifies_base: the base's weights change, so it is reloaded afterwards, and cannot be
            quantised or sharded.
        saved_rank: rank of the saved adapter, as a multiple of the trained one.
        unmergeable: why it cannot be merged into its base; empty if it can.
        loads_as_lora: vLLM and llama.cpp load it as a LoRA adapter; else it is merged for them.
    """

    config: ConfigFactory | None
    peft_type: str = "LORA"
    trial: MethodName | None = None
    modifies_base: bool = False
    saved_rank: int = 1
    unmergeable: str = ""
    loads_as_lora: bool = True


def _lora(
    section: AdapterSection, source: ModelSource, targets: Targets, seed: int, **options: Any
) -> PeftConfig:
    from peft import LoraConfig

    alpha = section.alpha
    # (PEFT draws A from torch's generator, which `attach` seeds.)
    return LoraConfig(
        r=section.r,
        # PEFT declares an integer, and other programs parse one; a fraction stays a fraction.
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,  # type: ignore[arg-type]
        lora_dropout=section.lora_dropout,
        bias=section.bias,
        **_common(source, targets),
        **options,
    )


def _common(source: ModelSource, targets: Targets) -> dict[str, Any]:
    """Arguments of every PEFT configuration."""
    modules = targets.modules
    exclude = {"exclude_modules": list(targets.exclude)} if targets.exclude else {}
    return {
        **exclude,
        "task_type": "CAUSAL_LM",
        "target_modules": modules if isinstance(modules, str) else list(modules),
        # Never a local path: whoever loads the adapter must find the base by this name.
        "base_model_name_or_path": source.name,
        "revision": source.revision,
    }


METHODS: dict[MethodName, Method] = {
    # Hu et al. 2021 (arXiv 2106.09685): scaling alpha/r.
    "lora": Method(_lora),
    # Kalajdzievski 2023 (arXiv 2312.03732): scaling alpha/√r.
    "rslora": Method(partial(_lora, use_rslora=True), trial="lora"),
    # Liu et al. 2024 (arXiv 2402.09353).
    "dora": Method(partial(_lora, use_dora=True), loads_as_lora=False),
    # Meng et al. 2024 (arXiv 2404.02948): starts from the largest singular values, which are
    # subtracted from the base; saved as the equivalent rank-2r LoRA adapter of the original base.
    "pissa": Method(
        partial(_lora, init_lora_weights="pissa"), trial="lora", modifies_base=True, saved_rank=2
    ),
    "full": Method(None, peft_type="", modifies_base=True),
}


def peft_types() -> frozenset[str]:
    """PEFT types that are trained here, and so can be loaded."""
    return frozenset(method.peft_type for method in METHODS.values() if method.config)


def method_of(section: AdapterSection) -> Method:
    """The method of an adapter section."""
    return METHODS[section.kind]


def trains_all(section: AdapterSection) -> bool:
    """Whether every weight trains, without an adapter."""
    return method_of(section).config is None


def trial_section(section: AdapterSection, rank: int | None = None) -> AdapterSection:
    """The section with its trial method, and ``rank`` if given. It shows which modules can be
    computed; initial values and scalings do not matter for that."""
    changes: dict[str, Any] = {"kind": method_of(section).trial or section.kind}
    return section.model_copy(update=changes | ({} if rank is None else {"r": rank}))


def peft_config(
    section: AdapterSection, source: ModelSource, targets: Targets, seed: int = 0
) -> PeftConfig:
    """The PEFT configuration of a section for the resolved target modules of a model.

    Raises:
        ValueError: the method has no adapter.
        UsageError: its configuration has no field that the model needs.
    """
    factory = method_of(section).config
    if factory is None:
        raise ValueError(f"adapter.kind = {section.kind} has no adapter")
    try:
        return factory(section, source, targets, seed)
    except TypeError as error:
        if not targets.exclude or "exclude_modules" not in str(error):
            raise
        raise UsageError(
            f"adapter.kind = {section.kind}: PEFT cannot exclude modules with it, and "
            f"{source.name} has some that must be ({targets.exclude[0]}, …); choose another method"
        ) from error


def unmergeable_reason(peft_type: str) -> str:
    """Why adapters of a `PeftType` cannot be merged; empty if they can."""
    methods = [method for method in METHODS.values() if method.peft_type == peft_type]
    if not methods:
        return f"peft_type {peft_type} is none of {', '.join(sorted(peft_types()))}"
    return next((method.unmergeable for method in methods if method.unmergeable), "")
