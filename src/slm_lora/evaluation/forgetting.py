"""What a tuned model lost: its divergence from the base, and its losses on further rows.

Every process scores all rows given here: nothing is gathered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.resources import files
from typing import NamedTuple

import numpy as np
from torch import Tensor

from slm_lora.adapters.multi import BASE, AdapterSet
from slm_lora.data.collate import IGNORE_INDEX, MicroBatch, collate, make_micro_batches
from slm_lora.errors import NumericError
from slm_lora.evaluation.batched_generation import Reply, generate_replies
from slm_lora.evaluation.generation import Sampling
from slm_lora.model.base import Base
from slm_lora.model.forward import score_documents, scored_hidden
from slm_lora.model.head_form import output_head
from slm_lora.ops.kl_divergence import kl_divergence
from slm_lora.ops.output_head import OutputHead
from slm_lora.records import Example, LossOn

OnTokens = Callable[[int], None]


class Variant(NamedTuple):
    """One model of an adapter set: its base, or the base with an adapter."""

    variants: AdapterSet
    name: str

    def activated(self) -> Base:
        """The base with this adapter active, or none."""
        self.variants.activate(self.name)
        return self.variants.base


class TokenLoss(NamedTuple):
    """NLL of a row, nats, and the tokens that it is summed over."""

    nats: float
    tokens: int


def general_prompts(count: int) -> list[str]:
    """The first prompts of this project's own, of all kinds in turn."""
    text = files("slm_lora.evaluation").joinpath("general_prompts.txt").read_text(encoding="utf-8")
    return text.splitlines()[:count]


def sample_from_base(
    variants: AdapterSet,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    on_reply: Callable[[Reply], None],
) -> list[Reply]:
    """Replies of the base at temperature 1, where samples are those of the model's distribution;
    the seed of each is its number."""
    sampling = Sampling(max_new_tokens, temperature=1.0)
    return generate_replies(variants, BASE, prompts, sampling, on_reply)


def reply_example(row: str, prompt: Sequence[int], reply: Sequence[int]) -> Example:
    """A prompt with its reply, which alone is scored."""
    ids = np.array([*prompt, *reply], dtype=np.int32)
    return Example(row, row, "", ids, np.arange(len(ids)) >= len(prompt), 0, 0)


def divergences(
    reference: Variant,
    tuned: Variant,
    examples: Sequence[Example],
    micro_batch_tokens: int,
    on_tokens: OnTokens,
) -> dict[str, float]:
    """KL(reference ‖ tuned) of the next-token distributions, summed over the response tokens of
    every example, in nats, by row id.

    Args:
        reference: the model that wrote the responses.
        tuned: the other model; may be of the same adapter set.
        examples: with at least one response token each.
        micro_batch_tokens: largest micro-batch, in tokens.
        on_tokens: called with the number of tokens scored since the last call.

    Raises:
        NumericError: a divergence is not finite.
    """
    sums = {}
    for micro in make_micro_batches(examples, micro_batch_tokens):
        batch = collate(micro, "response")
        (hidden, head), (tuned_hidden, tuned_head) = (
            _states(variant.activated(), batch) for variant in (reference, tuned)
        )
        values = kl_divergence(hidden, head, tuned_hidden, tuned_head).numpy()
        document = batch.document[batch.labels != IGNORE_INDEX]
        for index, total in enumerate(np.bincount(document, values, len(micro))):
            sums[micro[index].row_id] = _finite(float(total), micro[index], tuned)
        on_tokens(len(batch.ids))
    return sums


def _states(base: Base, batch: MicroBatch) -> tuple[Tensor, OutputHead]:
    """Last hidden states of the scored positions, and the output layer."""
    return scored_hidden(base, batch), output_head(base.model, base.head)


def token_losses(
    variant: Variant,
    examples: Sequence[Example],
    loss_on: LossOn,
    micro_batch_tokens: int,
    on_tokens: OnTokens,
) -> dict[str, TokenLoss]:
    """NLL of every example over its whole text or its response, by row id.

    Raises:
        NumericError: a loss is not finite.
    """
    base = variant.activated()
    losses = {}
    for micro in make_micro_batches(examples, micro_batch_tokens):
        batch = collate(micro, "all")
        scores = score_documents(base, batch)
        of_response = loss_on == "response"
        nats = scores.nll_response if of_response else scores.nll_all
        tokens = scores.tokens_response if of_response else scores.tokens_all
        for index, example in enumerate(micro):
            value = _finite(float(nats[index]), example, variant)
            losses[example.row_id] = TokenLoss(value, int(tokens[index]))
        on_tokens(len(batch.ids))
    return losses


def _finite(value: float, example: Example, variant: Variant) -> float:
    if not math.isfinite(value):
        raise NumericError(
            f"forgetting: row {example.row_id[:8]}: {value} under {variant.name}: the training "
            "diverged, or training.precision is too low"
        )
    return value
