"""Packed attention on CUDA GPUs: the FlashAttention for documents of many lengths that PyTorch
brings along (Dao 2023, arXiv 2307.08691).

It is believed only after it has computed what batched products compute, gradients included: once
a process, on a few small documents. Where it does not, `attention` takes the products.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from slm_lora.ops import attention_bmm

_WIDEST = 256
"""Widest head it has kernels for; widths are multiples of 8."""
_OLDEST = (8, 0)
"""Compute capability: Ampere."""
_TRIAL = (70, 9, 33)
"""Tokens of the documents of the trial: some fill a block, some do not."""
_failure = ""


def usable(q: Tensor) -> bool:
    """Whether it computes for such queries, [T, heads, head_dim], on this machine."""
    width = q.shape[-1]
    return (
        q.is_cuda
        and q.dtype in (torch.bfloat16, torch.float16)
        and width <= _WIDEST
        and width % 8 == 0
        and torch.cuda.get_device_capability(q.device) >= _OLDEST
        and is_proven(q.device, q.dtype, width)
    )


def failure() -> str:
    """Why it is not used though the GPU should have it; empty if it is, or was not tried."""
    return _failure


def forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """As `attention.packed_attention`; logarithms in the order [heads, T]."""
    starts, longest = _starts(tuple(lengths.tolist()), q.device)
    out, log_total, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, 0.0, True, False, scale=scale
    )
    return out, log_total.flatten()


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
    starts, longest = _starts(tuple(lengths.tolist()), q.device)
    # No dropout, so its generator's state is not needed.
    state, unused = (torch.zeros(n, dtype=torch.uint64, device=q.device) for n in (2, 0))
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        out_gradient.contiguous(), q, k, v, out, log_total.view(q.shape[1], -1),
        starts, starts, longest, longest, 0.0, True, state, unused, scale=scale,
    )  # fmt: skip
    return dq, dk, dv


@functools.lru_cache(maxsize=8)
def _starts(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    """Where documents begin and the last one ends, int32 on the device; the longest's tokens.
    Cached, as every layer of a pass asks for the same."""
    starts = torch.tensor((0, *lengths)).cumsum(0).to(device, torch.int32)
    return starts, max(lengths)


@functools.cache
def is_proven(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether a trial on this device gave what matrix products give, gradients included."""
    global _failure
    try:
        distance = _distance(device, dtype, width)
    except RuntimeError as error:  # PyTorch built without it, or without kernels for this GPU
        _failure = str(error).strip().splitlines()[0]
        return False
    # Twenty roundings of bf16.
    if not distance <= 0.05:
        _failure = f"FlashAttention differs from plain products by {distance:.1e}"
        return False
    return True


def _distance(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Largest relative distance of outputs and gradients from the products', on a trial."""
    generator = torch.Generator().manual_seed(0)
    heads, kv_heads, lengths = 4, 2, torch.tensor(_TRIAL)
    q, k, v, upstream = (
        torch.randn(sum(_TRIAL), many, width, generator=generator).to(device, dtype)
        for many in (heads, kv_heads, kv_heads, heads)
    )
    ways = ((forward, backward), (attention_bmm.forward, attention_bmm.backward))
    found, wanted = (
        _outputs_and_gradients(*way, (q, k, v, upstream), lengths, width**-0.5) for way in ways
    )
    return max(
        float((one.float() - other.float()).norm() / other.float().norm())
        for one, other in zip(found, wanted, strict=True)
    )


def _outputs_and_gradients(
    forward: Callable[..., tuple[Tensor, Tensor]],
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    given: tuple[Tensor, ...],
    lengths: Tensor,
    scale: float,
) -> tuple[Tensor, ...]:
    q, k, v, upstream = given
    out, log_total = forward(q, k, v, lengths, scale)
    return out, *backward(upstream, q, k, v, out, log_total, lengths, scale)
