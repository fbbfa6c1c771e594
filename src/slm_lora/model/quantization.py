"""4-bit quantization (NF4) of a base by bitsandbytes."""

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
"""Package that downloads compiled code from the hub."""


def import_bitsandbytes() -> bool:
    """Import bitsandbytes without downloads; returns whether it is installed.

    Call it before PEFT is imported, which imports bitsandbytes. On CPUs with AVX512-BF16 its import
    (0.50) downloads compiled code from the hub if `kernels` is installed, and warns if it is not.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    if "bitsandbytes" in sys.modules:
        return True
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    saved = {_HUB_KERNELS: sys.modules[_HUB_KERNELS]} if _HUB_KERNELS in sys.modules else {}
    sys.modules[_HUB_KERNELS] = None  # type: ignore[assignment]  # makes its import fail
    try:
        import bitsandbytes  # noqa: F401
    finally:
        del sys.modules[_HUB_KERNELS]
        sys.modules.update(saved)
    return True


def quantized_loading(precision: PrecisionName, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` for loading a model in 4 bits.

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
    """Prepare a model loaded in 4 bits for training, in place."""
    # Unquantised tensors are views of the mapped file, and would keep all of it in memory.
    for parameter in model.parameters():
        if type(parameter) is torch.nn.Parameter:
            parameter.data = parameter.data.clone()
    # On CPUs with AVX512-BF16 bitsandbytes (0.50) repacks weights at their first use without
    # gradients, and products with repacked weights have no backward pass.
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
