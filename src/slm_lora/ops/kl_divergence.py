"""KL divergence between the next-token distributions of two models, over the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from slm_lora.ops.output_head import OutputHead, apply_form

_LOGITS = 1 << 22
"""Logits of a chunk of positions: 32 MiB each in fp64."""
_WEIGHT_ROWS = 1 << 14
"""Rows of the output embedding that are in fp32 at once."""


def kl_divergence(
    reference: Tensor, reference_head: OutputHead, other: Tensor, other_head: OutputHead
) -> Tensor:
    """KL(reference ‖ other) at every position, in nats.

    Products with the output embedding are in fp32 whatever its precision, probabilities in fp64
    (fp32 on Apple's GPUs). Memory does not depend on the number of positions.

    Args:
        reference: last hidden states of the reference, [positions, hidden_size].
        reference_head: its output layer.
        other: those of the other model.
        other_head: its output layer.

    Returns:
        [positions], fp64, on the CPU.
    """
    rows = max(1, _LOGITS // len(reference_head.weight))
    chunks = [
        _divergence(
            _log_probabilities(reference[start : start + rows], reference_head),
            _log_probabilities(other[start : start + rows], other_head),
        )
        for start in range(0, len(reference), rows)
    ]
    return torch.cat(chunks) if chunks else torch.zeros(0, dtype=torch.float64)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    # A logit of -inf has probability 0: 0 · (-inf - …) counts as 0.
    terms = log_p.exp() * (log_p - log_q)
    terms = torch.where(log_p == -torch.inf, torch.zeros_like(terms), terms)
    return terms.sum(1).to("cpu", torch.float64)


def _log_probabilities(hidden: Tensor, head: OutputHead) -> Tensor:
    wide = hidden.float()
    parts = torch.split(head.weight, _WEIGHT_ROWS)
    product = torch.cat([wide @ part.float().t() for part in parts], 1)
    bias = None if head.bias is None else head.bias.float()
    logits, _ = apply_form(product, bias, head.form)
    precision = torch.float32 if hidden.device.type == "mps" else torch.float64
    return torch.log_softmax(logits.to(precision), 1)
