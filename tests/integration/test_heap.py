"""Memory of a process does not grow with its work."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Matrix products of varying shapes, as in micro-batches; prints MB allocated by the C library.
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
def test_heap_does_not_grow_with_the_number_of_product_shapes() -> None:
    completed = subprocess.run(
        [sys.executable, "-c", PRODUCTS], capture_output=True, text=True, check=True
    )
    early, late = map(float, completed.stdout.split())
    # With AVX512-BF16, 254 MB more if all primitives are kept.
    assert late - early < 30
