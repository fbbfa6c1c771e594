"""Linear layers that multiply with the C++ kernel, for bf16 on CPUs with AMX.

PyTorch's own products (oneDNN) reach most of the kernel's speed, but half of it for a few hundred
rows in some layers, where it uses a single thread; see docs/performance.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slm_lora.ops.kernels import build

_MIN_ROWS = 64
"""With fewer rows, packing the weight takes longer than multiplying."""


@torch.library.custom_op("slm_lora::product", mutates_args=())
def product(a: Tensor, b: Tensor, transpose_a: bool, transpose_b: bool) -> Tensor:
    """`multiply` as a custom operator, for compiled code."""
    return multiply(a, b, transpose_a, transpose_b)


@product.register_fake
def _(a: Tensor, b: Tensor, transpose_a: bool, transpose_b: bool) -> Tensor:
    return a.new_empty(a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1])


def multiply(
    a: Tensor, b: Tensor, transpose_a: bool, transpose_b: bool, buffer: Tensor | None = None
) -> Tensor:
    """Product of two matrices of one dtype, by the kernel if it is `usable`, else by PyTorch.

    Args:
        a: [m, k], or [k, m] if ``transpose_a``.
        b: [k, n], or [n, k] if ``transpose_b``.
        transpose_a: whether to transpose ``a``.
        transpose_b: whether to transpose ``b``.
        buffer: [m or more, n], receives the kernel's result; PyTorch allocates instead.

    Returns:
        [m, n].
    """
    if not usable(a.dtype, a.device):
        return (a.t() if transpose_a else a) @ (b.t() if transpose_b else b)
    m, n = a.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1]
    c = a.new_empty(m, n) if buffer is None else buffer[:m]
    if c.numel():
        a, b = _with_contiguous_rows(a), _with_contiguous_rows(b)
        a_layout, b_layout = (a.stride(0), transpose_a), (b.stride(0), transpose_b)
        k = a.shape[0 if transpose_a else 1]
        build.call("matrix_product", a, *a_layout, b, *b_layout, c, c.stride(0), m, n, k)
    return c


def _with_contiguous_rows(x: Tensor) -> Tensor:
    """The same matrix with contiguous rows."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()


def usable(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel supports this dtype and device."""
    return dtype == torch.bfloat16 and device.type == "cpu" and build.has_amx()


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


class AmxLinear(nn.Linear):
    """A linear layer that multiplies with the kernel in bf16 on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`, also under autocast."""
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        too_few_rows = not torch.compiler.is_compiling() and x.shape[:-1].numel() < _MIN_ROWS
        if too_few_rows or dtype != torch.bfloat16 or x.device.type != "cpu":
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        y: Tensor = _linear(rows, self.weight.to(dtype)).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(dtype)


def patch_linears(model: nn.Module, device: torch.device) -> None:
    """Turn linear layers into `AmxLinear`, in place, if the device supports the kernel.

    Args:
        model: a model with or without an adapter.
        device: device of the model.
    """
    if not usable(torch.bfloat16, device):
        return
    for module in model.modules():
        # Not subclasses: layers quantised to 4 bits are one.
        if type(module) is nn.Linear:
            module.__class__ = AmxLinear
