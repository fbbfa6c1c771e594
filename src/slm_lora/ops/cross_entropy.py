"""Negative log-likelihood over labelled positions, without ever holding all logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slm_lora.ops import compilation, linear
from slm_lora.ops.kernels import build
from slm_lora.ops.output_head import HeadForm, OutputHead

CHUNK = 256
"""Positions whose logits exist at once: 256 × a vocabulary of 49,152 is 50 MB in fp32."""

FULL_CHUNK = 4 * CHUNK
"""The same where the output embedding trains: every chunk then adds a gradient of the size of the
whole vocabulary, so fewer of them."""


BLOCK = 8
"""Positions that plain code on a CPU takes from there at once: 1.6 MB, which its cache holds."""


def total_dtype(device: torch.device) -> torch.dtype:
    """Of sums of losses."""
    # Apple's GPUs have no float64.
    return torch.float32 if device.type == "mps" else torch.float64


def _exact(wide: Tensor, logits: Tensor) -> torch.dtype:
    # Compiled sums have few accumulators: over a vocabulary, fp32 would lose two digits. What
    # bf16 logits lost before is more.
    return total_dtype(logits.device) if logits.dtype == torch.float32 else wide.dtype


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _log_total(wide: Tensor, logits: Tensor) -> Tensor:
    """Logarithm of the softmax's sum, [positions, 1], of logits and their wide copy."""
    largest = wide.amax(1, keepdim=True)
    total = (wide - largest).exp().sum(1, keepdim=True, dtype=_exact(wide, logits))
    return total.log().to(wide.dtype) + largest


@compilation.fused
def _fused_nll(logits: Tensor, labels: Tensor) -> Tensor:
    wide = _wide(logits)
    return (_log_total(wide, logits) - wide.gather(1, labels.unsqueeze(1))).squeeze(1)


@compilation.fused
def _fused_nll_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    wide = _wide(logits)
    log_total = _log_total(wide, logits)
    nll = (log_total - wide.gather(1, labels.unsqueeze(1))).squeeze(1)
    own = torch.arange(wide.shape[1], device=wide.device) == labels.unsqueeze(1)
    gradient = (wide - log_total).exp() - own.to(wide.dtype)
    return nll, gradient.to(logits.dtype)


def _plain_nll(logits: Tensor, labels: Tensor, gradient: bool) -> Tensor:
    """NLL [positions]; the logits are overwritten, by its sum's gradient if that is wanted.

    Without a compiler every operation is a pass over memory: fewer of them, in place, and block
    by block where the cache of a CPU holds a block.
    """
    found = []
    block = BLOCK if logits.device.type == "cpu" else len(logits)
    for part, y in zip(torch.split(logits, block), torch.split(labels, block), strict=True):
        wide, own = _wide(part), y.unsqueeze(1)
        largest, chosen = wide.amax(1, keepdim=True), wide.gather(1, own)
        wide.sub_(largest).exp_()
        total = wide.sum(1, keepdim=True, dtype=_exact(wide, logits))
        found.append((total.log().to(wide.dtype) + largest - chosen).squeeze(1))
        if gradient:
            wide.mul_(total.reciprocal().to(wide.dtype))
            wide.scatter_add_(1, own, wide.new_full(own.shape, -1))
            part.copy_(wide)
    return torch.cat(found)


def _kernel(logits: Tensor) -> bool:
    return logits.dtype == torch.bfloat16 and logits.device.type == "cpu" and build.available()


def _kernel_nll(logits: Tensor, labels: Tensor, gradient: bool) -> Tensor:
    """As `_plain_nll`. (Labels are ids of the batch: the embedding has refused others.)"""
    nll = torch.empty(len(logits), dtype=torch.float32)
    build.call("negative_log_likelihood", logits, labels, nll, *logits.shape, gradient)
    return nll


def _compiled(logits: Tensor) -> bool:
    # A position alone is not worth the code of its own that a compiler makes for sizes of one.
    return compilation.is_on() and len(logits) > 1


def label_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """NLL [positions] in fp32 or wider of logits [positions, vocabulary] in any precision, which
    have no use afterwards."""
    if _kernel(logits):
        return _kernel_nll(logits, labels, False)
    return _fused_nll(logits, labels) if _compiled(logits) else _plain_nll(logits, labels, False)


def nll_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """As `label_nll`, with the gradient of its sum, softmax minus one-hot, in the logits'
    precision."""
    if _kernel(logits):
        return _kernel_nll(logits, labels, True), logits
    if _compiled(logits):
        return _fused_nll_and_gradient(logits, labels)
    return _plain_nll(logits, labels, True), logits


def _room(weight: Tensor, positions: int) -> Tensor | None:
    """For the logits of one chunk after the other, where a kernel computes them: the system hands
    out fresh memory no faster than it is multiplied."""
    if not linear.usable(weight.dtype, weight.device):
        return None
    return weight.new_empty(positions, len(weight))


def token_nll(hidden: Tensor, head: OutputHead, labels: Tensor) -> Tensor:
    """NLL of each label, for scoring (no gradient).

    Args:
        hidden: final hidden states [positions, width].
        head: the output layer.
        labels: int64 [positions].

    Returns:
        float32 [positions], nats.
    """
    with torch.no_grad():
        room = _room(head.weight, min(CHUNK, len(labels)))
        parts = [
            label_nll(head.chunk_logits(h, room)[0], y)
            for h, y in zip(torch.split(hidden, CHUNK), torch.split(labels, CHUNK), strict=True)
        ]
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


class _SummedNLL(torch.autograd.Function):
    """Sum of the NLL. The gradient is computed with the loss, chunk by chunk, because the
    logits are at hand then; the backward pass only scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        form: HeadForm,
    ) -> Tensor:
        head = OutputHead(weight, bias, form)
        wide = total_dtype(hidden.device)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        weight_gradient = (
            torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
            if ctx.needs_input_grad[1]
            else None
        )
        bias_gradient = None
        if bias is not None and ctx.needs_input_grad[2]:
            bias_gradient = torch.zeros_like(
                bias, dtype=torch.promote_types(bias.dtype, torch.float32)
            )
        chunk = CHUNK if weight_gradient is None else FULL_CHUNK
        room = _room(weight, min(chunk, len(labels)))
        for start in range(0, len(labels), chunk):
            h, y = hidden[start : start + chunk], labels[start : start + chunk]
            logits, slope = head.chunk_logits(h, room)
            nll, low = nll_and_gradient(logits, y)
            total += nll.sum(dtype=wide)
            if slope is not None:
                low = low.mul_(slope)
            if hidden_gradient is not None:
                hidden_gradient[start : start + chunk] = linear.multiply(low, weight, False, False)
            if weight_gradient is not None:
                weight_gradient += linear.multiply(low, h.to(weight.dtype), True, False)
            if bias_gradient is not None:
                bias_gradient += low.sum(0, dtype=bias_gradient.dtype)
            del low, logits, slope  # or they would still be there beside the next chunk's
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        ctx.weight_dtype, ctx.scale = weight.dtype, form.scale
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient, bias_gradient = ctx.saved_tensors
        # (A factor of all logits is one of all gradients.)
        factor = upstream[0] if ctx.scale == 1 else upstream[0] * ctx.scale
        return (
            None if hidden_gradient is None else _scaled(hidden_gradient, factor),
            None if weight_gradient is None else (weight_gradient * factor).to(ctx.weight_dtype),
            None if bias_gradient is None else (bias_gradient * factor).to(ctx.weight_dtype),
            None,
            None,
        )


def _scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    # In fp32 or wider: 1/tokens itself would be rounded to 0.4 % in bf16, or overflow in fp16.
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return (gradient.to(wide) * factor.to(wide)).to(gradient.dtype)


def summed_nll(hidden: Tensor, head: OutputHead, labels: Tensor) -> Tensor:
    """Sum of the NLL of the labels, with gradients to ``hidden`` and, where they train, to weight
    and bias of the head.

    Args:
        hidden: final hidden states [positions, width].
        head: the output layer.
        labels: int64 [positions], none ignored.

    Returns:
        float64 scalar (float32 on Apple's GPUs), nats.
    """
    total: Tensor = _SummedNLL.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, labels, head.form
    )
    return total
