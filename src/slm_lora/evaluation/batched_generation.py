"""Replies to many prompts, computed together.

Matrix products of several rows round differently from those of one. Where rounding may decide
between the two most likely tokens of a greedy step in fp32, the whole reply is computed again
alone, so greedy replies do not depend on the batch. In bf16 and fp16 the rounding of the logits
themselves makes such ties frequent; there a reply may differ from the one computed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from slm_lora.adapters.multi import AdapterSet
from slm_lora.evaluation.generation import Finish, Generation, Sampling
from slm_lora.model.cache import batch_logits, left_padded, new_cache

if TYPE_CHECKING:
    from slm_lora.model.base import Base

MAX_BATCH = 32
"""Prompts in a batch; limits the memory of logits and the delay of the first reply."""
CACHE_BYTES = 512 << 20
"""Limit of the keys and values of a batch."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A finished reply.

    Attributes:
        text: without end token and stop text.
        ids: token ids, an end token included.
        finished: reason of the end: ``stop`` or ``length``.
        alone: whether it was computed alone, because of a tie.
    """

    text: str
    ids: tuple[int, ...]
    finished: Finish
    alone: bool = False


def generate_replies(
    variants: AdapterSet,
    variant: str,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    on_reply: Callable[[Reply], None] = lambda reply: None,
) -> list[Reply]:
    """Reply to every prompt, in the order of the prompts.

    Prompt number i is sampled with the seed ``sampling.seed + i``, whatever the batch.

    Args:
        variants: the base and its adapters.
        variant: name of the adapter, or of the base.
        prompts: token ids of each.
        sampling: sampling parameters.
        on_reply: called with every finished reply.

    Raises:
        UsageError: a prompt is too long; before any reply is computed.
    """
    # All prompts are checked first.
    generations = [
        Generation(variants, variant, prompt, replace(sampling, seed=sampling.seed + index))
        for index, prompt in enumerate(prompts)
    ]
    variants.activate(variant)
    batched = len(prompts) > 1 and variants.batches_exactly
    replies: dict[int, Reply] = {}
    for batch in _batches(variants, generations) if batched else []:
        texts = _run([generations[index] for index in batch], variants)
        for text, index in zip(texts, batch, strict=True):
            done = generations[index]
            if not _is_uncertain(done, variants.base):
                replies[index] = Reply(text, tuple(done.ids), done.finished)
                on_reply(replies[index])
    for index, prompt in enumerate(prompts):
        if index not in replies:
            own = replace(sampling, seed=sampling.seed + index)
            again = Generation(variants, variant, prompt, own)
            text = "".join(again.pieces())
            replies[index] = Reply(text, tuple(again.ids), again.finished, alone=True)
            on_reply(replies[index])
    return [replies[index] for index in range(len(prompts))]


def _batches(variants: AdapterSet, generations: Sequence[Generation]) -> Iterator[list[int]]:
    """Numbers of generations by batch; those of similar length together, the longest first."""
    limit = CACHE_BYTES // _cache_bytes_per_token(variants)
    batch: list[int] = []
    longest = 0
    for index in sorted(range(len(generations)), key=lambda i: -len(generations[i].prompt)):
        own = generations[index]
        longest = max(longest, len(own.prompt) + own.max_tokens)
        if batch and (len(batch) == MAX_BATCH or longest * (len(batch) + 1) > limit):
            yield batch
            batch, longest = [], len(own.prompt) + own.max_tokens
        batch.append(index)
    if batch:
        yield batch


def _cache_bytes_per_token(variants: AdapterSet) -> int:
    """Bytes of keys and values of one token, if all heads of all layers are kept."""
    config = variants.base.model.config.get_text_config()
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    bytes_per_value = 2 if variants.base.low_precision else 4
    return 2 * int(config.num_hidden_layers) * kv_heads * width * bytes_per_value


@torch.inference_mode()
def _run(generations: Sequence[Generation], variants: AdapterSet) -> list[str]:
    """Run generations to their ends, or to a tie in fp32; their texts."""
    base = variants.base
    texts = ["" for _ in generations]
    active = list(range(len(generations)))
    cache = new_cache(base)
    ids, mask, positions = left_padded([own.prompt for own in generations], base.device)
    while active:
        logits = batch_logits(base, ids, mask, positions, cache).to("cpu", torch.float32)
        for row, place in enumerate(active):
            texts[place] += generations[place].add(logits[row : row + 1])
        kept = [row for row, place in enumerate(active) if not _ends(generations[place], base)]
        if len(kept) < len(active):
            active = [active[row] for row in kept]
            rows = torch.tensor(kept, dtype=torch.long, device=base.device)
            cache.batch_select_indices(rows)
            mask, positions = mask[rows], positions[rows]
        if active:
            ids = torch.tensor([[generations[i].ids[-1]] for i in active], device=base.device)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            positions = positions[:, -1:] + 1
    return texts


def _ends(generation: Generation, base: Base) -> bool:
    return bool(generation.finished) or _is_uncertain(generation, base)


def _is_uncertain(generation: Generation, base: Base) -> bool:
    """Whether rounding may have decided a token."""
    return generation.tied and not base.low_precision
