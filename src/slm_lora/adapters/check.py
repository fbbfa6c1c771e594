"""Whether training and scoring compute what PEFT computes, asked of the adapter itself.

Hidden states come from the layers, and the loss multiplies with the output embedding itself: what
an adapter does elsewhere (at the output layer, before the embeddings, in `PeftModel.forward`) would
be left out silently. So the two are compared with an adapter whose numbers are not zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slm_lora.adapters.foreign import MERGE
from slm_lora.errors import UsageError
from slm_lora.model.base import Base
from slm_lora.model.forward import document_logits, mixed_precision

if TYPE_CHECKING:
    from peft import PeftModel

_LENGTHS = (29, 13)
"""Tokens of the two documents."""
_NOISE = 0.1
"""Added to every number of the adapter meanwhile: B is zero at first."""
_BOUND, _BOUND_HALF = 1e-3, 0.3
"""Distance to PEFT's logits as a share of what the adapter changes; what is left out altogether is
1. In half precision every layer rounds, in two orders of summation."""


def check_forward(
    base: Base, peft_model: PeftModel, what: str = "adapter", way_out: str = MERGE
) -> None:
    """Compare our logits with `PeftModel.forward`'s, for the adapter that is active.

    Args:
        base: with its adapter; both are unchanged afterwards.
        peft_model: the same, as PEFT has it.
        what: begins the message.
        way_out: ends it.

    Raises:
        UsageError: they differ by more than rounding.
    """
    documents = [_sample(base, length) for length in _LENGTHS]
    with _disturbed(peft_model), _explained(base, what), torch.no_grad():
        ours = document_logits(base, documents)
        theirs = _peft_logits(base, peft_model, documents)
        with peft_model.disable_adapter():
            without = _peft_logits(base, peft_model, documents)
    if not bool(torch.isfinite(theirs).all()):  # the first loss says so, and names its rows
        return
    changed = (theirs - without).float().norm()
    distance = float((ours - theirs).float().norm() / changed)
    if not distance <= (_BOUND_HALF if base.low_precision else _BOUND):
        raise UsageError(
            f"{what}: part of it works outside of the layers of {base.source.name} (on its output "
            f"layer or embeddings, say), where training and scoring do not compute: their logits "
            f"are {distance:.0%} of its effect away from PEFT's; {way_out}"
        )


def reached_modules(base: Base, peft_model: PeftModel) -> tuple[list[str], list[str]]:
    """Names of modules, within the base, whose adapter a gradient reaches, and of others.

    Raises:
        UsageError: the model does not compute with its adapter while it trains.
    """
    documents = [_sample(base, length) for length in _LENGTHS]
    prefix = _prefix(peft_model)
    with _disturbed(peft_model) as parameters:
        # (Some models run other code while they train. What is dropped out does not matter.)
        peft_model.train()
        with (
            _explained(base, "adapter"),
            torch.enable_grad(),
            torch.random.fork_rng(devices=[]),
        ):
            gradients = torch.autograd.grad(
                document_logits(base, documents).float().square().sum(),
                list(parameters.values()),
                allow_unused=True,
            )
        reached = {
            _module(parameter, prefix)
            for parameter, gradient in zip(parameters, gradients, strict=True)
            if gradient is not None and bool(gradient.any())
        }
        modules = {_module(parameter, prefix) for parameter in parameters}
    # (Of many experts some see none of so few tokens.)
    return sorted(reached), sorted(m for m in modules - reached if ".experts" not in m)


@contextmanager
def _explained(base: Base, what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, AttributeError, ValueError, TypeError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"{what}: {base.source.name} does not compute with it ({reason}); choose other "
            "adapter.target_modules"
        ) from error


def _module(parameter: str, prefix: str) -> str:
    """Name of the module, within the base, that a parameter of PEFT's belongs to; ``prefix`` as
    that of PEFT's tuner (``lora_``)."""
    return parameter.removeprefix("base_model.model.").split(f".{prefix}", 1)[0]


def _prefix(peft_model: Any) -> str:
    return str(peft_model.base_model.prefix)


def _sample(base: Base, length: int) -> Tensor:
    words = int(base.model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, words, (length,), generator=generator)


def _peft_logits(base: Base, peft_model: Any, documents: list[Tensor]) -> Tensor:
    """Logits [T, vocabulary] of documents, one after the other, by PEFT's own forward."""
    found = []
    for document in documents:
        ids = document.unsqueeze(0).to(base.device)
        more: dict[str, Tensor] = {}
        if base.packed:
            more["document_lengths"] = torch.tensor([len(document), 0])
        with mixed_precision(base):
            found.append(peft_model(input_ids=ids, use_cache=False, **more).logits[0])
    return torch.cat(found)


@contextmanager
def _disturbed(peft_model: PeftModel) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Parameters of the active adapter, with noise on them; as they were, afterwards."""
    active, prefix = set(peft_model.active_adapters), _prefix(peft_model)
    parameters = {
        name: parameter
        for name, parameter in peft_model.named_parameters()
        if prefix in name and active & set(name.split("."))
    }
    was_training = peft_model.training
    peft_model.eval()
    kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    wanted = {name: parameter.requires_grad for name, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            noise = torch.randn(parameter.shape, generator=generator) * _NOISE
            parameter.add_(noise.to(parameter.device, parameter.dtype))
            parameter.requires_grad_(True)
    try:
        yield parameters
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(kept[name])
                parameter.requires_grad_(wanted[name])
        peft_model.train(was_training)
