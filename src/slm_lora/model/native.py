"""Packed attention in C++ for CPUs with AVX512-BF16: compiled on first use, kept in the cache.

Where it cannot be had (another CPU, no compiler, another precision) `attention` computes the
same with PyTorch's batched `products`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from slm_lora import machine
from slm_lora.storage import atomic_path, cache_dir

_SOURCE = Path(__file__).with_name("attention.cpp")
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
_WIDTHS = 16
"""Widths of a head are a multiple of this: whole vectors."""
_failure = ""


def usable(q: Tensor) -> bool:
    """Whether it computes for such queries, [T, heads, head_dim], on this machine."""
    return (
        q.dtype == torch.bfloat16
        and q.device.type == "cpu"
        and q.shape[-1] % _WIDTHS == 0
        and _library() is not None
    )


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """As `attention.packed_attention`."""
    q, k, v = (x.contiguous() for x in (q, k, v))
    out = torch.empty_like(q)
    log_total = torch.empty(q.shape[0] * q.shape[1], dtype=torch.float32)
    _call("attention_forward", (q, k, v, out, log_total), q, k, lengths, scale)
    return out, log_total


def backward(
    out_gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_total: Tensor,
    lengths: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attention.packed_attention_backward`."""
    given = [x.contiguous() for x in (out_gradient, q, k, v, out, log_total)]
    q, k, v = given[1:4]
    found = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _call("attention_backward", (*given, *found), q, k, lengths, scale)
    return found


def failure() -> str:
    """Why compiling it failed; empty if it did not, or was not tried."""
    return _failure


def _call(
    name: str, tensors: tuple[Tensor, ...], q: Tensor, k: Tensor, lengths: Tensor, scale: float
) -> None:
    library = _library()
    assert library is not None
    lengths = lengths.contiguous()
    sizes = len(lengths), q.shape[1], k.shape[1], q.shape[2]
    getattr(library, name)(
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (*tensors, lengths)),
        *map(ctypes.c_int64, sizes),
        ctypes.c_float(scale),
        ctypes.c_int(torch.get_num_threads()),
    )


@functools.cache
def _library() -> ctypes.CDLL | None:
    global _failure
    compiler = machine.cpp_compiler()
    here = sys.platform == "linux" and platform.machine() == "x86_64"
    if not here or compiler is None or not torch.cpu._is_avx512_bf16_supported():
        return None
    # Made for this very CPU; a home folder may be shared by machines.
    made_of = f"{machine.processor()}\0{compiler}\0{_FLAGS}\0".encode() + _SOURCE.read_bytes()
    path = cache_dir() / "compiled" / f"attention-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                subprocess.run(
                    [compiler, *_FLAGS, os.fspath(_SOURCE), "-o", os.fspath(temporary)],
                    check=True,
                    capture_output=True,
                )
        return ctypes.CDLL(os.fspath(path))
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip().splitlines()
        _failure = f"{compiler}: {said[0] if said else f'exit code {error.returncode}'}"
    except OSError as error:
        _failure = str(error)
    return None
