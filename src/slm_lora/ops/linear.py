"""Linear layers by the matrix product of `kernels`, for bf16 on CPUs with AMX.

PyTorch's own products (oneDNN) reach most of its speed there, but half of it for some hundred rows
of some layers, which one thread alone then computes; docs/performance.md has the figures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slm_lora.ops.kernels import build

_FEW_ROWS = 64
"""Below which packing a weight takes longer than multiplying with it."""


@torch.library.custom_op("slm_lora::product", mutates_args=())
def product(a: Tensor, b: Tensor, a_turned: bool, b_turned: bool) -> Tensor:
    """`multiply`, as an operator that compiled code may hold."""
    return multiply(a, b, a_turned, b_turned)


@product.register_fake
def _(a: Tensor, b: Tensor, a_turned: bool, b_turned: bool) -> Tensor:
    return a.new_empty(a.shape[1 if a_turned else 0], b.shape[0 if b_turned else 1])


def multiply(
    a: Tensor, b: Tensor, a_turned: bool, b_turned: bool, room: Tensor | None = None
) -> Tensor:
    """Product of two matrices of one precision: by the kernel where it is `usable`.

    Args:
        a: [m, k], or [k, m] if ``a_turned``.
        b: [k, n], or [n, k] if ``b_turned``.
        a_turned: whether ``a`` is to be transposed.
        b_turned: whether ``b`` is.
        room: [m or more, n], that the kernel writes to.

    Returns:
        [m, n].
    """
    if not usable(a.dtype, a.device):
        return (a.t() if a_turned else a) @ (b.t() if b_turned else b)
    m, n = a.shape[1 if a_turned else 0], b.shape[0 if b_turned else 1]
    c = a.new_empty(m, n) if room is None else room[:m]
    if c.numel():
        a, b = _rows(a), _rows(b)
        at, by = (a.stride(0), a_turned), (b.stride(0), b_turned)
        k = a.shape[0 if a_turned else 1]
        build.call("matrix_product", a, *at, b, *by, c, c.stride(0), m, n, k)
    return c


def _rows(x: Tensor) -> Tensor:
    """The same with every row in one piece."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def usable(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel computes such matrices."""
    return dtype == torch.bfloat16 and device.type == "cpu" and build.has_tiles()


@torch.library.custom_op("slm_lora::linear", mutates_args=())
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` [T, k] times the transpose of ``weight`` [n, k]."""
    y: Tensor = product(x, weight, False, True)
    return y


@_linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, weight = inputs
    ctx.save_for_backward(x if weight.requires_grad else None, weight)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    return (
        product(upstream, weight, False, False) if ctx.needs_input_grad[0] else None,
        product(upstream, x, True, False) if ctx.needs_input_grad[1] else None,
    )


_linear.register_autograd(_backward, setup_context=_save)


class TiledLinear(nn.Linear):
    """A linear layer whose products are the kernel's where it computes in bf16 on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`, autocast heeded."""
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        few = not torch.compiler.is_compiling() and x.shape[:-1].numel() < _FEW_ROWS
        if few or dtype != torch.bfloat16 or x.device.type != "cpu":
            return super().forward(x)
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        y: Tensor = _linear(flat, self.weight.to(dtype)).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(dtype)


def patch_linears(model: nn.Module, device: torch.device) -> None:
    """Make `TiledLinear` of the linear layers, in place, where that is possible.

    Args:
        model: a model, or one with an adapter.
        device: where it computes.
    """
    if not usable(torch.bfloat16, device):
        return
    for module in model.modules():
        # (Of no other class: weights in 4 bits have one of their own.)
        if type(module) is nn.Linear:
            module.__class__ = TiledLinear
