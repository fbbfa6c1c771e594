"""Output layer: logits of hidden states, with a model's bias, scale and cap.

    logits = cap · tanh(scale · (hidden Wᵀ + bias) / cap)

`model.head_form` measures the scale and the cap of a model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slm_lora.ops import compilation, linear


@dataclass(frozen=True, slots=True)
class HeadForm:
    """Scale and cap of a model's logits, see `model.head_form`.

    Attributes:
        scale: factor of product and bias.
        cap: upper bound of a logit's magnitude, or None.
    """

    scale: float = 1.0
    cap: float | None = None


IDENTITY_FORM = HeadForm()
"""Form of most models: logits without scale and cap."""


@dataclass(frozen=True, slots=True)
class OutputHead:
    """An output layer.

    Attributes:
        weight: output embedding [vocab_size, hidden_size].
        bias: [vocab_size], or None.
        form: scale and cap of the logits.
    """

    weight: Tensor
    bias: Tensor | None = None
    form: HeadForm = IDENTITY_FORM

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits […, vocab_size] of hidden states […, hidden_size], in the weight's precision."""
        product = hidden.to(self.weight.dtype) @ self.weight.t()
        return apply_form(product, self.bias, self.form)[0] if self.transforms else product

    @property
    def transforms(self) -> bool:
        """Whether it has a bias, a scale or a cap."""
        return self.bias is not None or self.form != IDENTITY_FORM

    def to(self, dtype: torch.dtype) -> OutputHead:
        """The same layer in another precision; differentiable."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return OutputHead(self.weight.to(dtype), bias, self.form)

    def chunk_logits(self, hidden: Tensor, buffer: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits [positions, vocab_size], which may be overwritten, and their derivative (see
        `apply_form`).

        Args:
            hidden: [positions, hidden_size].
            buffer: see `linear.multiply`.
        """
        product = linear.multiply(hidden.to(self.weight.dtype), self.weight, False, True, buffer)
        return apply_form(product, self.bias, self.form) if self.transforms else (product, None)


def apply_form(
    product: Tensor, bias: Tensor | None, form: HeadForm
) -> tuple[Tensor, Tensor | None]:
    """Logits of products [positions, vocab_size] with the output embedding, and their derivative.

    Returns:
        Logits, and with a cap their derivative with respect to the scaled products, in the same
        precision; without a cap None.
    """
    if form.cap is None:
        biased = product if bias is None else product + bias
        return (biased if form.scale == 1 else biased * form.scale), None
    return _capped(product, bias, form.scale, form.cap)


@compilation.compilable
def _capped(
    product: Tensor, bias: Tensor | None, scale: float, cap: float
) -> tuple[Tensor, Tensor]:
    # In fp32 or fp64: near the cap the derivative is a small difference.
    wide = product.to(torch.promote_types(product.dtype, torch.float32))
    ratio = torch.tanh((wide if bias is None else wide + bias) * (scale / cap))
    return (ratio * cap).to(product.dtype), (1 - ratio * ratio).to(product.dtype)
