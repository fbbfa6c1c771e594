"""From hidden states to logits: which function of them a model's output layer is.

Nearly every causal model multiplies with its output embedding; some add a bias, multiply by a
constant (Granite, Cohere, Falcon-H1) or cap the logits smoothly (Gemma 2 to 4, nanochat):

    logits = cap · tanh(scale · (hidden Wᵀ + bias) / cap)

The constants have another name in every configuration, and some stand in the code alone. They are
measured on the model's own output layer instead, and the form is then proved where it bends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from slm_lora.errors import UsageError
from slm_lora.model.base import trunk
from slm_lora.ops.output_head import HeadForm, OutputHead, transformed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def output_head(model: PreTrainedModel, form: HeadForm) -> OutputHead:
    """The model's output layer as it is now."""
    module: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return OutputHead(module.weight, getattr(module, "bias", None), form)


def measure_head(model: PreTrainedModel, name: str) -> HeadForm:
    """Scale and cap of a model's output layer, proved to be all there is.

    Another layer takes the place of the output embedding meanwhile. What it is given must be the
    last hidden states, but for a constant; what it returns are products of chosen size, from ones
    too small to bend to ones far beyond any cap, in fp64.

    Args:
        model: the model; unchanged afterwards.
        name: of the model, for messages.

    Raises:
        UsageError: its logits are no such function of its last hidden states.
    """
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    weight = getattr(head, "weight", None)
    if weight is None or weight.ndim != 2:
        raise _unknown(name, model, "it has no matrix of output embeddings")
    generator = torch.Generator().manual_seed(0)
    products = torch.randn(_POSITIONS, 64, generator=generator, dtype=torch.float64)

    def logits(size: float) -> Tensor:
        return _own_logits(model, head, products * size, name)[0]

    scale = float((logits(1e-6) / (products * 1e-6)).median())
    if abs(scale - 1) < 1e-6:  # rounded, where the model leaves fp64
        scale = 1.0
    largest = float(logits(1e9).abs().max())
    form = HeadForm(scale, largest if largest < 1e6 * abs(scale) else None)
    for size in (1e-3, 1.0, 40.0 / max(abs(scale), 1e-6)):
        found = transformed(products * size, None, form)[0]
        # (Should the model leave fp64: rounding in fp32 is 6e-8.)
        if not _close(found, logits(size), 1e-6):
            raise _unknown(name, model, "its logits are another function of the products")
    before = _scale_before(model, head, products, name)
    if before != 1 and getattr(head, "bias", None) is not None:
        raise _unknown(name, model, "it scales its hidden states, and has a bias")
    return HeadForm(scale * before, form.cap)


_POSITIONS = 6


def _scale_before(model: PreTrainedModel, head: Any, products: Tensor, name: str) -> float:
    """What the last hidden states are multiplied by before they come to the output layer."""
    width = int(head.weight.shape[1])
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randn(_POSITIONS, width, generator=generator, dtype=torch.float64)
    try:
        _, given, hidden, replaced = _own_logits(model, head, products, name, chosen)
    except RuntimeError:  # layers in between take no fp64
        _, given, hidden, replaced = _own_logits(model, head, products, name)
    found, wanted = given.double(), (chosen if replaced else hidden.double()).to(given.device)
    if found.shape != wanted.shape:
        raise _unknown(name, model, "its output layer sees more than its last hidden states")
    scale = float((found * wanted).sum() / (wanted * wanted).sum())
    if abs(scale - 1) < 1e-6:
        scale = 1.0
    # Where hidden states are not replaced, a scale would be known to rounding only.
    if not _close(found, scale * wanted, 1e-6) or (scale != 1 and not replaced):
        raise _unknown(name, model, "its output layer sees more than its last hidden states")
    return scale


def check_head(model: PreTrainedModel, form: HeadForm, ids: Tensor, name: str) -> None:
    """Compare the model's own logits of some tokens, [1, T], with those of its `OutputHead`.

    Raises:
        UsageError: they differ by more than rounding.
    """
    with torch.no_grad():
        hidden = trunk(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        found = output_head(model, form).logits(hidden)
        wanted = model(input_ids=ids, use_cache=False).logits[0]
    # In half precision each of product, bias, scale and cap may round in an order of its own.
    bound = 1e-5 if hidden.dtype == torch.float32 else 3e-2
    if found.shape != wanted.shape or not _close(found, wanted, bound):
        raise _unknown(name, model, "its logits are another function of its last hidden states")


def _close(found: Tensor, wanted: Tensor, bound: float) -> bool:
    found, wanted = found.double(), wanted.double()
    # (Written so that a NaN fails.)
    return bool((found - wanted).abs().max() <= bound * wanted.abs().max())


class _StandIn(nn.Module):
    """In the place of an output layer: keeps what it is given, and returns chosen products."""

    def __init__(self, head: Any, products: Tensor) -> None:
        super().__init__()
        # (Some models cast to its precision.)
        self.weight, self.products = products.new_empty(1, head.weight.shape[1]), products
        self.given: Tensor | None = None

    def forward(self, hidden: Tensor) -> Tensor:
        self.given = hidden
        return self.products.to(hidden.device).expand(*hidden.shape[:-2], -1, -1)


def _own_logits(
    model: PreTrainedModel,
    head: nn.Module,
    products: Tensor,
    name: str,
    hidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """What the model's own code makes of products [positions, n] with its output embedding.

    Args:
        model: the model.
        head: its output layer.
        products: in place of those.
        name: for messages.
        hidden: in place of its last hidden states [positions, width], where that can be.

    Returns:
        Its logits, what the output layer was given, the last hidden states, and whether they were
        replaced.
    """
    if products.device.type != "mps" and model.device.type != "mps":
        products = products.to(model.device)
    stand_in = _StandIn(head, products)
    seen: list[Tensor] = []
    replaced = False

    def note(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        nonlocal replaced
        seen.append(output.last_hidden_state[0])
        if hidden is not None:
            output.last_hidden_state = hidden.to(products.device).unsqueeze(0)
            replaced = True
        return output

    swap = _swapper(model, head)
    hook = trunk(model).register_forward_hook(note)
    swap(stand_in)
    ids = torch.arange(1, _POSITIONS + 1, device=model.device).unsqueeze(0)
    try:
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids, use_cache=False).logits[0]
    finally:
        swap(head)
        hook.remove()
    if stand_in.given is None or logits.shape != products.shape:
        raise _unknown(name, model, "they do not come from its output layer alone")
    if not seen:  # some call what is inside of it
        with torch.no_grad():
            seen = [trunk(model)(input_ids=ids, use_cache=False).last_hidden_state[0]]
    return logits, stand_in.given[0], seen[0], replaced


def _swapper(model: nn.Module, head: nn.Module) -> Callable[[nn.Module], None]:
    """Puts another module in the place of ``head``."""
    path = next(name for name, module in model.named_modules() if module is head)
    parent, _, attribute = path.rpartition(".")
    owner = model.get_submodule(parent)
    return lambda module: setattr(owner, attribute, module)


def _unknown(name: str, model: PreTrainedModel, why: str) -> UsageError:
    return UsageError(
        f"model {name}: the loss cannot be computed from its hidden states and its output "
        f"embedding: {why} ({model.config.model_type}); such models are not supported"
    )
