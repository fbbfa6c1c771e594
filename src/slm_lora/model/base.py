"""A loaded base model, as used by training and scoring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from slm_lora.model.resolve import ModelSource
from slm_lora.ops.output_head import IDENTITY_FORM, HeadForm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PrecisionName = Literal["fp32", "bf16", "fp16"]

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The decoder layers, by the class names that transformers lists as unsplittable."""
    layer_classes = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in layer_classes]


def trunk(model: PreTrainedModel) -> torch.nn.Module:
    """The model without its output layer: token ids to last hidden states."""
    # Some models name a missing attribute as base model; `base_model` is then the model itself.
    inner: torch.nn.Module = model.base_model
    return inner if inner is not model else model.get_submodule("model")


def text_decoder(model: PreTrainedModel) -> torch.nn.Module:
    """The part of the trunk that processes text, without a vision tower."""
    full_trunk, decoder = trunk(model), model.get_decoder()  # type: ignore[no-untyped-call]
    # Some models return their output layer as the decoder.
    return decoder if any(module is decoder for module in full_trunk.modules()) else full_trunk


@dataclass(frozen=True)
class Base:
    """A causal language model on its device; frozen, except in full fine-tuning.

    Attributes:
        source: folder and hash of its weights.
        model: the transformers model; adapter layers are inserted in place.
        device: device of its weights.
        precision: of its weights; in full fine-tuning, of its matrix products.
        packed: whether documents are packed without padding; else batches are padded.
        fallback_reason: one line on why ``packed`` is False; else empty.
        quantization: ``nf4`` if its matrices are stored in 4 bits.
        head: scale and cap of its logits.
        sharded: whether its layers are sharded over the processes (FSDP2), which must then compute
            the same number of micro-batches.
    """

    source: ModelSource
    model: PreTrainedModel
    device: torch.device
    precision: PrecisionName
    packed: bool
    fallback_reason: str = ""
    quantization: str | None = None
    sharded: bool = False
    head: HeadForm = IDENTITY_FORM

    @property
    def dtype(self) -> torch.dtype:
        """The precision as a torch dtype."""
        return DTYPES[self.precision]

    @property
    def low_precision(self) -> bool:
        """Whether it computes in bf16 or fp16."""
        return self.precision in ("bf16", "fp16")
