"""A loaded base model: what training and scoring are handed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from slm_lora.model.resolve import ModelSource
from slm_lora.ops.output_head import PLAIN_HEAD, HeadForm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PrecisionName = Literal["fp32", "bf16", "fp16"]

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers that every token goes through, as transformers knows them."""
    kinds = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in kinds]


def trunk(model: PreTrainedModel) -> torch.nn.Module:
    """The model without its output layer: from token ids to last hidden states."""
    # (Some name as their base model what they do not have, and are then their own.)
    inner: torch.nn.Module = model.base_model
    return inner if inner is not model else model.get_submodule("model")


def text_decoder(model: PreTrainedModel) -> torch.nn.Module:
    """The part of the trunk that text goes through: not a vision tower, say."""
    whole, decoder = trunk(model), model.get_decoder()  # type: ignore[no-untyped-call]
    # (Some call their output layer a decoder.)
    return decoder if any(module is decoder for module in whole.modules()) else whole


@dataclass(frozen=True)
class Base:
    """A causal language model, ready to compute; frozen, unless all of it is trained.

    Attributes:
        source: where it came from.
        model: the transformers model; an adapter's layers are put into it in place.
        device: where it computes.
        precision: of its weights, or of its products where all of it is trained.
        packed: whether documents are packed (else: padded batches, the plain way).
        fallback_reason: one line for the user where ``packed`` is False.
        quantization: ``nf4`` where its matrices are held in 4 bits.
        head: what its output layer does beside multiplying with the output embedding.
        sharded: whether its layers are shared out over the processes, which then must compute
            equally many micro-batches.
    """

    source: ModelSource
    model: PreTrainedModel
    device: torch.device
    precision: PrecisionName
    packed: bool
    fallback_reason: str = ""
    quantization: str | None = None
    sharded: bool = False
    head: HeadForm = PLAIN_HEAD

    @property
    def dtype(self) -> torch.dtype:
        """The precision as torch names it."""
        return DTYPES[self.precision]

    @property
    def low_precision(self) -> bool:
        """Whether it computes in half precision."""
        return self.precision in ("bf16", "fp16")
