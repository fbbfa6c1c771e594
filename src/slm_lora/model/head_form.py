"""Measure the function by which a model's output layer maps hidden states to logits.

Nearly every causal model multiplies by its output embedding; some add a bias, multiply by a
constant (Granite, Cohere, Falcon-H1) or soft-cap the logits (Gemma 2 to 4, nanochat):

    logits = cap · tanh(scale · (hidden Wᵀ + bias) / cap)

The constants have different names in each configuration, and some are in the code only. So they
are measured on the model's own output layer, and the form is then verified where the cap is active.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slm_lora.errors import UsageError
from slm_lora.model.base import trunk
from slm_lora.ops.output_head import HeadForm, OutputHead, apply_form

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def output_head(model: PreTrainedModel, form: HeadForm) -> OutputHead:
    """The model's output layer with its current weights."""
    module: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return OutputHead(module.weight, getattr(module, "bias", None), form)


def measure_head(model: PreTrainedModel, name: str) -> HeadForm:
    """Scale and cap of a model's logits, verified to describe its output layer completely.

    The output embedding is temporarily replaced by a layer that records its input, which must be
    the last hidden states times a constant, and returns chosen products in fp64, from far below any
    cap to far above.

    Args:
        model: the model; unchanged afterwards.
        name: of the model, for messages.

    Raises:
        UsageError: its logits are another function of its last hidden states.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    weight = getattr(head, "weight", None)
    if weight is None or weight.ndim != 2:
        raise _unsupported(name, model, "it has no matrix of output embeddings")
    generator = torch.Generator().manual_seed(0)
    products = torch.randn(_POSITIONS, 64, generator=generator, dtype=torch.float64)

    def logits(factor: float) -> Tensor:
        return _logits_from_products(model, head, products * factor, name)[0]

    scale = float((logits(1e-6) / (products * 1e-6)).median())
    if abs(scale - 1) < 1e-6:  # the model rounded it to a lower precision
        scale = 1.0
    largest = float(logits(1e9).abs().max())
    form = HeadForm(scale, largest if largest < 1e6 * abs(scale) else None)
    for factor in (1e-3, 1.0, 40.0 / max(abs(scale), 1e-6)):
        predicted = apply_form(products * factor, None, form)[0]
        # The model may compute in fp32, whose rounding is 6e-8.
        if not _close(predicted, logits(factor), 1e-6):
            raise _unsupported(name, model, "its logits are another function of the products")
    input_scale = _input_scale(model, head, products, name)
    if input_scale != 1 and getattr(head, "bias", None) is not None:
        raise _unsupported(name, model, "it scales its hidden states, and has a bias")
    return HeadForm(scale * input_scale, form.cap)


_POSITIONS = 6


def _input_scale(model: PreTrainedModel, head: Any, products: Tensor, name: str) -> float:
    """Constant by which the last hidden states are multiplied before the output layer."""
    hidden_size = int(head.weight.shape[1])
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randn(_POSITIONS, hidden_size, generator=generator, dtype=torch.float64)
    try:
        _, head_input, hidden, replaced = _logits_from_products(model, head, products, name, chosen)
    except RuntimeError:  # a layer in between does not support fp64
        _, head_input, hidden, replaced = _logits_from_products(model, head, products, name)
    actual, expected = (
        head_input.double(),
        (chosen if replaced else hidden.double()).to(head_input.device),
    )
    if actual.shape != expected.shape:
        raise _unsupported(name, model, "its output layer sees more than its last hidden states")
    scale = float((actual * expected).sum() / (expected * expected).sum())
    if abs(scale - 1) < 1e-6:
        scale = 1.0
    # Without replaced hidden states a scale would be exact to rounding only.
    if not _close(actual, scale * expected, 1e-6) or (scale != 1 and not replaced):
        raise _unsupported(name, model, "its output layer sees more than its last hidden states")
    return scale


def check_head(model: PreTrainedModel, form: HeadForm, ids: Tensor, name: str) -> None:
    """Compare the model's own logits of token ids [1, T] with those of its `OutputHead`.

    Raises:
        UsageError: they differ by more than rounding.
    """
    with torch.no_grad():
        hidden = trunk(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        actual = output_head(model, form).logits(hidden)
        expected = model(input_ids=ids, use_cache=False).logits[0]
    # In bf16 and fp16 product, bias, scale and cap may be rounded in another order.
    bound = 1e-5 if hidden.dtype == torch.float32 else 3e-2
    if actual.shape != expected.shape or not _close(actual, expected, bound):
        raise _unsupported(name, model, "its logits are another function of its last hidden states")


def _close(actual: Tensor, expected: Tensor, bound: float) -> bool:
    actual, expected = actual.double(), expected.double()
    # In this form a NaN fails.
    return bool((actual - expected).abs().max() <= bound * expected.abs().max())


class _RecordingHead(nn.Module):
    """Replaces an output layer: records its input and returns chosen products."""

    def __init__(self, head: Any, products: Tensor) -> None:
        super().__init__()
        # Some models cast their hidden states to this weight's dtype.
        self.weight, self.products = products.new_empty(1, head.weight.shape[1]), products
        self.input: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        self.input = hidden
        return self.products.to(hidden.device).expand(*hidden.shape[:-2], -1, -1)


def _logits_from_products(
    model: PreTrainedModel,
    head: nn.Module,
    products: Tensor,
    name: str,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Logits that the model's own code computes from given output products [positions, n].

    Args:
        model: the model.
        head: its output layer.
        products: replace the output layer's result.
        name: for messages.
        hidden: replaces the last hidden states [positions, hidden_size] if possible.

    Returns:
        Logits, input of the output layer, last hidden states, and whether these were replaced.
    """
    if products.device.type != "mps" and model.device.type != "mps":
        products = products.to(model.device)
    recorder = _RecordingHead(head, products)
    last_hidden: list[Tensor] = []
    replaced = False

    def record(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        nonlocal replaced
        last_hidden.append(output.last_hidden_state[0])
        if hidden is not None:
            output.last_hidden_state = hidden.to(products.device).unsqueeze(0)
            replaced = True
        return output

    swap = _swapper(model, head)
    hook = trunk(model).register_forward_hook(record)
    swap(recorder)
    ids = torch.arange(1, _POSITIONS + 1, device=model.device).unsqueeze(0)
    try:
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        swap(head)
        hook.remove()
    if recorder.input is None or logits.shape != products.shape:
        raise _unsupported(name, model, "they do not come from its output layer alone")
    if not last_hidden:  # some models call the trunk's submodules, not the trunk
        with torch.no_grad():
            last_hidden = [trunk(model)(input_ids=ids, use_cache=False).last_hidden_state[0]]
    return logits, recorder.input[0], last_hidden[0], replaced


def _swapper(model: nn.Module, head: nn.Module) -> Callable[[nn.Module], None]:
    """A function that replaces ``head`` by another module."""
    path = next(name for name, module in model.named_modules() if module is head)
    parent, _, attribute = path.rpartition(".")
    owner = model.get_submodule(parent)
    return lambda module: setattr(owner, attribute, module)


def _unsupported(name: str, model: PreTrainedModel, reason: str) -> UsageError:
    return UsageError(
        f"model {name}: the loss cannot be computed from its hidden states and its output "
        f"embedding: {reason} ({model.config.model_type}); such models are not supported"
    )
