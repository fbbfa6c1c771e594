"""Negative log-likelihood (NLL) of labels, without all logits in memory at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slm_lora.ops import compilation, linear
from slm_lora.ops.kernels import build
from slm_lora.ops.output_head import HeadForm, OutputHead
from slm_lora.ops.token_metrics import TokenMetric

CHUNK = 256
"""Positions per chunk of logits: 256 × a vocabulary of 49,152 is 50 MB in fp32."""

TRAINED_HEAD_CHUNK = 4 * CHUNK
"""The same if the output embedding trains: each chunk then adds a gradient of the size of that
embedding, so chunks are larger."""

EAGER_BLOCK = 8
"""Positions per block of a chunk in eager mode on a CPU: 1.6 MB, which fit its cache."""


def total_dtype(device: torch.device) -> torch.dtype:
    """Data type of sums of losses: float64, or float32 on Apple's GPUs."""
    # Apple's GPUs have no float64.
    return torch.float32 if device.type == "mps" else torch.float64


def _sum_dtype(wide: Tensor, logits: Tensor) -> torch.dtype:
    # Compiled sums use few accumulators: over a vocabulary, fp32 would lose two digits. The
    # rounding of bf16 logits is larger than that.
    return total_dtype(logits.device) if logits.dtype == torch.float32 else wide.dtype


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _logsumexp(wide: Tensor, logits: Tensor) -> Tensor:
    """Log-sum-exp [positions, 1] of ``wide``, the logits in fp32 or fp64."""
    maximum = wide.amax(1, keepdim=True)
    total = (wide - maximum).exp().sum(1, keepdim=True, dtype=_sum_dtype(wide, logits))
    return total.log().to(wide.dtype) + maximum


@compilation.compilable
def _compiled_nll(logits: Tensor, labels: Tensor) -> Tensor:
    wide = _at_least_fp32(logits)
    return (_logsumexp(wide, logits) - wide.gather(1, labels.unsqueeze(1))).squeeze(1)


@compilation.compilable
def _compiled_nll_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    wide = _at_least_fp32(logits)
    logsumexp = _logsumexp(wide, logits)
    nll = (logsumexp - wide.gather(1, labels.unsqueeze(1))).squeeze(1)
    is_label = torch.arange(wide.shape[1], device=wide.device) == labels.unsqueeze(1)
    gradient = (wide - logsumexp).exp() - is_label.to(wide.dtype)
    return nll, gradient.to(logits.dtype)


def _eager_nll(logits: Tensor, labels: Tensor, gradient: bool) -> Tensor:
    """NLL [positions]; overwrites the logits, with the gradient of its sum if ``gradient``.

    In eager mode each operation is a pass over memory, so operations are few and in place, and on
    a CPU are applied to blocks that fit its cache.
    """
    losses = []
    block_size = EAGER_BLOCK if logits.device.type == "cpu" else len(logits)
    for logits_block, block_labels in zip(
        torch.split(logits, block_size), torch.split(labels, block_size), strict=True
    ):
        wide, label_index = _at_least_fp32(logits_block), block_labels.unsqueeze(1)
        maximum, label_logits = wide.amax(1, keepdim=True), wide.gather(1, label_index)
        wide.sub_(maximum).exp_()
        total = wide.sum(1, keepdim=True, dtype=_sum_dtype(wide, logits))
        losses.append((total.log().to(wide.dtype) + maximum - label_logits).squeeze(1))
        if gradient:
            wide.mul_(total.reciprocal().to(wide.dtype))
            wide.scatter_add_(1, label_index, wide.new_full(label_index.shape, -1))
            logits_block.copy_(wide)
    return torch.cat(losses)


def _has_kernel(logits: Tensor) -> bool:
    return logits.dtype == torch.bfloat16 and logits.device.type == "cpu" and build.available()


def _kernel_nll(logits: Tensor, labels: Tensor, gradient: bool) -> Tensor:
    """As `_eager_nll`; labels need no bounds check, as the embedding has checked the same ids."""
    nll = torch.empty(len(logits), dtype=torch.float32)
    build.call("negative_log_likelihood", logits, labels, nll, *logits.shape, gradient)
    return nll


def _should_compile(logits: Tensor) -> bool:
    # Dynamo would specialise on a single position.
    return compilation.is_enabled() and len(logits) > 1


def label_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """NLL [positions] of labels, in fp32 or fp64.

    Args:
        logits: [positions, vocab_size], contiguous, in any precision; may be overwritten.
        labels: int64 [positions], below vocab_size.
    """
    if _has_kernel(logits):
        return _kernel_nll(logits, labels, False)
    if _should_compile(logits):
        return _compiled_nll(logits, labels)
    return _eager_nll(logits, labels, False)


def nll_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """As `label_nll`, and the gradient of the NLL's sum (softmax minus one-hot) in the precision of
    the logits."""
    if _has_kernel(logits):
        return _kernel_nll(logits, labels, True), logits
    if _should_compile(logits):
        return _compiled_nll_and_gradient(logits, labels)
    return _eager_nll(logits, labels, True), logits


def _logits_buffer(weight: Tensor, positions: int) -> Tensor | None:
    """Logits buffer shared by all chunks, if the kernel computes them: allocating new pages would
    take as long as the product."""
    if not linear.usable(weight.dtype, weight.device):
        return None
    return weight.new_empty(positions, len(weight))


def token_nll(hidden: Tensor, head: OutputHead, labels: Tensor) -> Tensor:
    """NLL of each label, float32 [positions], in nats: see `token_scores`."""
    return token_scores(hidden, head, labels, {})[NLL]


NLL = "nll"
"""Name of the NLL among the scores of tokens."""


def token_scores(
    hidden: Tensor, head: OutputHead, labels: Tensor, metrics: Mapping[str, TokenMetric]
) -> dict[str, Tensor]:
    """NLL and further values of each label, for scoring, without gradient.

    Args:
        hidden: last hidden states [positions, hidden_size].
        head: the output layer.
        labels: int64 [positions].
        metrics: computed on the logits of each chunk, by name.

    Returns:
        [positions] by name; `NLL` in float32, nats.
    """
    chunks: dict[str, list[Tensor]] = {name: [] for name in (*metrics, NLL)}
    with torch.no_grad():
        buffer = _logits_buffer(head.weight, min(CHUNK, len(labels)))
        for hidden_chunk, label_chunk in zip(
            torch.split(hidden, CHUNK), torch.split(labels, CHUNK), strict=True
        ):
            logits = head.chunk_logits(hidden_chunk, buffer)[0]
            for name, metric in metrics.items():
                chunks[name].append(metric(logits, label_chunk))
            chunks[NLL].append(label_nll(logits, label_chunk))  # last: overwrites the logits
        empty = hidden.new_zeros(0, dtype=torch.float32)
        return {name: torch.cat(values) if values else empty for name, values in chunks.items()}


class _SummedNLL(torch.autograd.Function):
    """Sum of the NLL. The forward pass computes the gradient too, while a chunk's logits are in
    memory; the backward pass only scales it."""

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
        sum_dtype = total_dtype(hidden.device)
        total = torch.zeros((), dtype=sum_dtype, device=hidden.device)
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
        chunk_size = CHUNK if weight_gradient is None else TRAINED_HEAD_CHUNK
        buffer = _logits_buffer(weight, min(chunk_size, len(labels)))
        for start in range(0, len(labels), chunk_size):
            chunk = slice(start, start + chunk_size)
            logits, slope = head.chunk_logits(hidden[chunk], buffer)
            nll, gradient = nll_and_gradient(logits, labels[chunk])
            total += nll.sum(dtype=sum_dtype)
            if slope is not None:
                gradient = gradient.mul_(slope)
            if hidden_gradient is not None:
                hidden_gradient[chunk] = linear.multiply(gradient, weight, False, False)
            if weight_gradient is not None:
                rows = hidden[chunk].to(weight.dtype)
                weight_gradient += linear.multiply(gradient, rows, True, False)
                del rows
            if bias_gradient is not None:
                bias_gradient += gradient.sum(0, dtype=bias_gradient.dtype)
            del gradient, logits, slope  # frees them before the next chunk's are allocated
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        ctx.weight_dtype, ctx.scale = weight.dtype, form.scale
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient, bias_gradient = ctx.saved_tensors
        # The scale of the logits is also a factor of all gradients.
        factor = upstream[0] if ctx.scale == 1 else upstream[0] * ctx.scale
        return (
            None if hidden_gradient is None else _scale(hidden_gradient, factor),
            None if weight_gradient is None else (weight_gradient * factor).to(ctx.weight_dtype),
            None if bias_gradient is None else (bias_gradient * factor).to(ctx.weight_dtype),
            None,
            None,
        )


def _scale(gradient: Tensor, factor: Tensor) -> Tensor:
    # In fp32 or fp64: the factor would be rounded to 0.4 % in bf16, and may overflow in fp16.
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return (gradient.to(wide) * factor.to(wide)).to(gradient.dtype)


def summed_nll(hidden: Tensor, head: OutputHead, labels: Tensor) -> Tensor:
    """Sum of the NLL of the labels, differentiable in ``hidden`` and in a trainable weight and bias
    of the head.

    Args:
        hidden: last hidden states [positions, hidden_size].
        head: the output layer.
        labels: int64 [positions], none ignored.

    Returns:
        float64 scalar (float32 on Apple's GPUs), nats.
    """
    total: Tensor = _SummedNLL.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, labels, head.form
    )
    return total
