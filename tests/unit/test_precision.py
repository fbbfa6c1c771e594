"""`precision: auto` on CPUs of different instruction sets."""

from __future__ import annotations

import pytest
import torch

from slm_lora.model import loading
from slm_lora.runtime import hardware


@pytest.mark.parametrize(
    ("amx", "avx512_bf16", "vendor", "precision"),
    [
        (True, True, "GenuineIntel", "bf16"),
        (False, True, "AuthenticAMD", "bf16"),
        (False, True, "GenuineIntel", "fp32"),  # slower than fp32
        (False, False, "AuthenticAMD", "fp32"),  # AVX2: emulated
    ],
)
def test_auto_is_the_precision_that_multiplies_faster(
    amx: bool, avx512_bf16: bool, vendor: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(hardware, "_cpu_info", {"vendor_id": vendor}.get)
    loading.cpu_is_faster_in_bf16.cache_clear()
    assert loading.choose_precision("auto", torch.device("cpu")) == precision
    assert loading.choose_precision("bf16", torch.device("cpu")) == "bf16"
    loading.cpu_is_faster_in_bf16.cache_clear()
