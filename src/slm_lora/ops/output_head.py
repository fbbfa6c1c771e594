"""The output layer: from hidden states to logits, with scale, cap and bias where a model has them.

    logits = cap · tanh(scale · (hidden Wᵀ + bias) / cap)

`model.head_form` measures scale and cap of a given model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slm_lora.ops import compilation, linear


@dataclass(frozen=True, slots=True)
class HeadForm:
    """What a model's output layer does to the products with its output embedding, see
    `model.head_form`.

    Attributes:
        scale: factor of product and bias.
        cap: largest magnitude of a logit, or None.
    """

    scale: float = 1.0
    cap: float | None = None


IDENTITY_HEAD = HeadForm()
"""Of models whose logits are the products."""


@dataclass(frozen=True, slots=True)
class OutputHead:
    """An output layer.

    Attributes:
        weight: output embedding [vocabulary, width].
        bias: [vocabulary], or None.
        form: what is done to the products.
    """

    weight: Tensor
    bias: Tensor | None = None
    form: HeadForm = IDENTITY_HEAD

    def logits(self, hidden: Tensor) -> Tensor:
        """[…, vocabulary] of hidden states […, width], in the precision of the weight."""
        found = hidden.to(self.weight.dtype) @ self.weight.t()
        return transformed(found, self.bias, self.form)[0] if self.transforms else found

    @property
    def transforms(self) -> bool:
        """Whether logits are more than the product."""
        return self.bias is not None or self.form != IDENTITY_HEAD

    def to(self, dtype: torch.dtype) -> OutputHead:
        """The same in another precision; gradients pass."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return OutputHead(self.weight.to(dtype), bias, self.form)

    def chunk_logits(self, hidden: Tensor, room: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits [positions, vocabulary] that may be overwritten, and `transformed`'s slope.

        Args:
            hidden: [positions, width].
            room: see `linear.multiply`.
        """
        product = linear.multiply(hidden.to(self.weight.dtype), self.weight, False, True, room)
        return transformed(product, self.bias, self.form) if self.transforms else (product, None)


def transformed(
    product: Tensor, bias: Tensor | None, form: HeadForm
) -> tuple[Tensor, Tensor | None]:
    """Logits of products [positions, vocabulary], and their derivative where it is no constant.

    Returns:
        The logits, and where there is a cap their derivative with respect to the scaled products,
        in the same precision.
    """
    if form.cap is None:
        found = product if bias is None else product + bias
        return (found if form.scale == 1 else found * form.scale), None
    return _capped(product, bias, form.scale, form.cap)


@compilation.fused
def _capped(
    product: Tensor, bias: Tensor | None, scale: float, cap: float
) -> tuple[Tensor, Tensor]:
    # In fp32 or wider: the derivative is a small difference where the cap bends most.
    wide = product.to(torch.promote_types(product.dtype, torch.float32))
    bent = torch.tanh((wide if bias is None else wide + bias) * (scale / cap))
    return (bent * cap).to(product.dtype), (1 - bent * bent).to(product.dtype)
