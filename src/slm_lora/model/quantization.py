"""A base in 4 bits, by bitsandbytes."""

from __future__ import annotations

import importlib.util
import logging
import sys
from typing import TYPE_CHECKING, Any

import torch

from slm_lora.errors import UsageError
from slm_lora.model.base import DTYPES, PrecisionName

if TYPE_CHECKING:
    from torch import nn

_HUB_KERNELS = "kernels"
"""A package that fetches compiled code from the hub."""


def import_bitsandbytes() -> bool:
    """Import it, if it is installed, and let it fetch nothing; whether it is.

    To be called before PEFT is imported, which imports it. On CPUs with AVX512-BF16 it (0.50) asks
    the hub for compiled code meanwhile if `kernels` is installed, and warns if that is not.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    if "bitsandbytes" in sys.modules:
        return True
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    before = {_HUB_KERNELS: sys.modules[_HUB_KERNELS]} if _HUB_KERNELS in sys.modules else {}
    sys.modules[_HUB_KERNELS] = None  # type: ignore[assignment]  # as if it were not installed
    try:
        import bitsandbytes  # noqa: F401
    finally:
        del sys.modules[_HUB_KERNELS]
        sys.modules.update(before)
    return True


def quantized_loading(precision: PrecisionName, device: torch.device) -> dict[str, Any]:
    """What transformers is told to load a model in 4 bits.

    Raises:
        UsageError: bitsandbytes is not installed.
    """
    if not import_bitsandbytes():
        raise UsageError(
            "model.quantization = nf4: bitsandbytes is not installed; "
            "pip install '.[nf4]' in a checkout, or leave it out"
        )
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[precision],
    )
    return {"quantization_config": config, "device_map": {"": device}}


def prepare_quantized(model: nn.Module) -> None:
    """Make what was loaded so fit for training, in place."""
    # What was not quantised lies in the file's pages still, and so keeps all of them.
    for parameter in model.parameters():
        if type(parameter) is torch.nn.Parameter:
            parameter.data = parameter.data.clone()
    # On CPUs with AVX512-BF16 bitsandbytes (0.50) repacks weights on first use
    # without gradients, and products with those have none: training would lack most of it.
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
