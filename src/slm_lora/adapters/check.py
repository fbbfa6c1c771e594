"""Check that training and scoring compute what PEFT computes with the same adapter.

Hidden states come from the decoder layers, and the loss multiplies them by the output embedding
directly. An adapter's effect elsewhere (output layer, embeddings, `PeftModel.forward`) would be
missed silently, so both logits are compared, with noise on the adapter because B starts at zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slm_lora.adapters.foreign import MERGE_HINT
from slm_lora.errors import UsageError
from slm_lora.model.base import Base
from slm_lora.model.forward import document_logits, mixed_precision

if TYPE_CHECKING:
    from peft import PeftModel

_LENGTHS = (29, 13)
"""Lengths of the two sample documents, in tokens."""
_NOISES = (0.1, 0.3, 1.0)
"""Standard deviations of the noise on the adapter's weights, tried in this order until the adapter
changes the logits by `_LEAST_EFFECT`."""
_LEAST_EFFECT = 0.05
"""Effect of an adapter, relative to the base's logits, that rounding in bf16 does not hide."""
_BOUND_FP32, _BOUND_LOW_PRECISION = 1e-3, 0.3
"""Largest distance to PEFT's logits, relative to the adapter's effect (1: no effect computed); in
fp32, and in bf16 or fp16, where every layer rounds and the orders of summation differ."""


def check_forward(
    base: Base, peft_model: PeftModel, subject: str = "adapter", remedy: str = MERGE_HINT
) -> None:
    """Compare our logits with `PeftModel.forward`'s, for the adapter that is active.

    Args:
        base: with its adapter; both are unchanged afterwards.
        peft_model: PEFT's wrapper of the same model.
        subject: start of the error message.
        remedy: end of the error message.

    Raises:
        UsageError: they differ by more than rounding.
    """
    documents = [_sample(base, length) for length in _LENGTHS]
    for noise in _NOISES:
        with _with_noise(peft_model, noise), _named_errors(base, subject), torch.no_grad():
            ours = document_logits(base, documents)
            theirs = _peft_logits(base, peft_model, documents)
            with peft_model.disable_adapter():
                without = _peft_logits(base, peft_model, documents)
        if not bool(torch.isfinite(theirs).all()):  # reported by the first loss, with its rows
            return
        changed = (theirs - without).float().norm()
        if changed > _LEAST_EFFECT * without.float().norm():
            break
    distance = float((ours - theirs).float().norm() / changed)
    if not distance <= (_BOUND_LOW_PRECISION if base.low_precision else _BOUND_FP32):
        raise UsageError(
            f"{subject}: part of it works outside of the layers of {base.source.name} (on its "
            f"output layer or embeddings, say), which training and scoring do not compute: "
            f"their logits differ from PEFT's by {distance:.0%} of its effect; {remedy}"
        )


def reached_modules(base: Base, peft_model: PeftModel) -> tuple[list[str], list[str]]:
    """Names of the base's modules whose adapter receives a gradient, and of those without one.

    Raises:
        UsageError: the model does not compute with its adapter while it trains.
    """
    documents = [_sample(base, length) for length in _LENGTHS]
    prefix = _prefix(peft_model)
    with _with_noise(peft_model) as parameters:
        # Some models run other code in training mode; dropout does not affect the result here.
        peft_model.train()
        with (
            _named_errors(base, "adapter"),
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
    # A router may send none of these few tokens to an expert, so experts are never unreached.
    return sorted(reached), sorted(m for m in modules - reached if ".experts" not in m)


@contextmanager
def _named_errors(base: Base, subject: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, AttributeError, ValueError, TypeError, IndexError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"{subject}: {base.source.name} does not compute with it ({reason}); choose other "
            "adapter.target_modules"
        ) from error


def _module(parameter: str, prefix: str) -> str:
    """Name of the base's module that a PEFT parameter belongs to; ``prefix`` is that of PEFT's
    tuner (``lora_``)."""
    return parameter.removeprefix("base_model.model.").split(f".{prefix}", 1)[0]


def _prefix(peft_model: Any) -> str:
    return str(peft_model.base_model.prefix)


def _sample(base: Base, length: int) -> Tensor:
    vocab_size = int(base.model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(length)
    return torch.randint(0, vocab_size, (length,), generator=generator)


def _peft_logits(base: Base, peft_model: Any, documents: list[Tensor]) -> Tensor:
    """Logits [T, vocab_size] of the documents in turn, by PEFT's own forward."""
    logits = []
    for document in documents:
        ids = document.unsqueeze(0).to(base.device)
        extra_inputs: dict[str, Tensor] = {}
        if base.packed:
            extra_inputs["document_lengths"] = torch.tensor([len(document), 0])
        with mixed_precision(base):
            logits.append(peft_model(input_ids=ids, use_cache=False, **extra_inputs).logits[0])
    return torch.cat(logits)


@contextmanager
def _with_noise(
    peft_model: PeftModel, deviation: float = _NOISES[0]
) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Add noise to the active adapter's parameters, which are yielded by name and then restored."""
    active, prefix = set(peft_model.active_adapters), _prefix(peft_model)
    parameters = {
        name: parameter
        for name, parameter in peft_model.named_parameters()
        if prefix in name and active & set(name.split("."))
    }
    was_training = peft_model.training
    peft_model.eval()
    saved_values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    required_grad = {name: parameter.requires_grad for name, parameter in parameters.items()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            noise = torch.randn(parameter.shape, generator=generator) * deviation
            parameter.add_(noise.to(parameter.device, parameter.dtype))
            parameter.requires_grad_(True)
    try:
        yield parameters
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved_values[name])
                parameter.requires_grad_(required_grad[name])
        peft_model.train(was_training)
