"""Activation checkpointing: only a layer's input is stored, and the layer is recomputed in the
backward pass (Chen et al. 2016, arXiv 1604.06174)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from slm_lora.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def checkpointed_layers(model: PreTrainedModel, on: bool) -> Iterator[None]:
    """Within the context, checkpoint the decoder layers in training mode if ``on``.

    Dropout is a function of the row (`ops.dropout`), so the recomputation uses the same masks.

    Raises:
        UsageError: the model does not support it.
    """
    if not on:
        yield
        return
    # transformers renamed the methods in 5.23.
    names = ("activation_checkpointing", "gradient_checkpointing")
    name = next(name for name in names if hasattr(model, f"{name}_enable"))
    try:
        getattr(model, f"{name}_enable")({"use_reentrant": False})
    except ValueError as error:
        raise UsageError(f"training.activation_checkpointing: {error}") from error
    # Only reentrant checkpoints need inputs that require gradients.
    model.disable_input_require_grads()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        getattr(model, f"{name}_disable")()
