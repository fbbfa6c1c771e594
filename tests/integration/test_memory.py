"""A process's memory does not grow with the number of steps."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Matrix products of many shapes, as in micro-batches; prints the C library's MB in use.
PRODUCTS = """
import ctypes, sys
import torch
from slm_lora.runtime import hardware

class Heap(ctypes.Structure):
    _fields_ = [(str(n), ctypes.c_size_t) for n in range(10)]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Heap
hardware.disable_trim()
hardware.cap_onednn_cache()
weight = torch.ones(576, 576, dtype=torch.bfloat16)
for rows in range(100, 700):
    torch.nn.functional.linear(torch.ones(rows, 576, dtype=torch.bfloat16), weight)
    if rows in (299, 699):
        print(getattr(library.mallinfo2(), "7") / 1e6)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of the GNU C library")
def test_products_of_many_shapes_are_forgotten() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PRODUCTS], capture_output=True, text=True, check=True
    )
    early, late = map(float, ended.stdout.split())
    # With AVX512-BF16 an unlimited cache takes 254 MB more.
    assert late - early < 30
