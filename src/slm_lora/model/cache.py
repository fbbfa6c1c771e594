"""Next-token logits, with a key-value cache if the model is shown to use it.

Recurrent models (Mamba, RWKV, xLSTM) need a cache of another type and ignore this one silently:
each token would be processed as if it were the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from slm_lora.model.base import Base, trunk
from slm_lora.model.forward import mixed_precision
from slm_lora.model.head_form import output_head

if TYPE_CHECKING:
    from transformers import DynamicCache

_PROMPT, _STEPS = 9, 6
"""Tokens of the check: processed at once, and one by one after that."""


def new_cache(base: Base) -> DynamicCache:
    """An empty cache of keys and values."""
    from transformers import DynamicCache

    return DynamicCache(config=base.model.config)


def next_logits(
    base: Base, ids: Sequence[int], cache: DynamicCache | None, cached_tokens: int
) -> Tensor:
    """Logits [1, vocab_size] of the token after ``ids``, in the precision of the base.

    Args:
        base: padded: only transformers' own attention uses the cache.
        ids: the text so far.
        cache: of the first ``cached_tokens`` tokens; None: all tokens are computed.
        cached_tokens: number of tokens in the cache.
    """
    input_ids = torch.tensor(
        [list(ids if cache is None else ids[cached_tokens:])], device=base.device
    )
    cache_inputs: dict[str, Any] = {"use_cache": False}
    if cache is not None:
        cache_inputs = {"use_cache": True, "past_key_values": cache}
    with mixed_precision(base):
        hidden = trunk(base.model)(input_ids=input_ids, **cache_inputs).last_hidden_state[:, -1]
        return output_head(base.model, base.head).logits(hidden)


def batch_logits(
    base: Base, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache
) -> Tensor:
    """Logits [batch, vocab_size] of the token after each of several texts; they are then cached.

    Args:
        base: as for `next_logits`.
        ids: tokens that are not cached yet, int64 [batch, length]; texts are padded on the left.
        mask: 0 where a text is padded, int64 [batch, cached and new tokens].
        positions: of ``ids`` in their texts, int64 [batch, length].
        cache: of the tokens before ``ids``.
    """
    with mixed_precision(base):
        hidden = trunk(base.model)(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
        return output_head(base.model, base.head).logits(hidden)


def left_padded(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, ...]:
    """Token ids, mask and positions of texts, for `batch_logits` with an empty cache."""
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + list(text) for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return ids.to(device), mask.to(device), positions.to(device)


def batch_is_exact(base: Base) -> bool:
    """Whether texts of several lengths, computed together with a cache, have the logits that they
    have alone, up to rounding."""
    generator = torch.Generator().manual_seed(3)
    vocab_size = int(base.model.config.get_text_config().vocab_size)
    texts = [
        torch.randint(0, vocab_size, (length + _STEPS,), generator=generator).tolist()
        for length in (_PROMPT, 2, _PROMPT - 3)
    ]
    together, alone = [], []
    try:
        with torch.no_grad():
            cache = new_cache(base)
            ids, mask, positions = left_padded([text[:-_STEPS] for text in texts], base.device)
            for step in range(_STEPS):
                together.append(batch_logits(base, ids, mask, positions, cache))
                ends = [len(text) - _STEPS + step for text in texts]
                alone += [
                    next_logits(base, text[:end], None, 0)
                    for text, end in zip(texts, ends, strict=True)
                ]
                ids = torch.tensor([[text[end]] for text, end in zip(texts, ends, strict=True)])
                ids = ids.to(base.device)
                mask = torch.cat([mask, torch.ones_like(ids)], 1)
                positions = torch.tensor(ends, device=base.device).unsqueeze(1)
            # Generation drops finished texts; a cache that cannot raises.
            cache.batch_select_indices(torch.tensor([0, 2], device=base.device))
    except Exception:  # as in `cache_is_exact`
        return False
    return _agree(base, torch.cat(together), torch.cat(alone))


def cache_is_exact(base: Base) -> bool:
    """Whether decoding with a cache gives the logits of the whole text, up to rounding."""
    generator = torch.Generator().manual_seed(2)
    vocab_size = int(base.model.config.get_text_config().vocab_size)
    ids = torch.randint(0, vocab_size, (_PROMPT + _STEPS,), generator=generator).tolist()
    try:
        with torch.no_grad():
            cache, cached_logits, full_logits = new_cache(base), [], []
            for end in range(_PROMPT, len(ids) + 1):
                cached_tokens = end - 1 if end > _PROMPT else 0
                cached_logits.append(next_logits(base, ids[:end], cache, cached_tokens))
                full_logits.append(next_logits(base, ids[:end], None, 0))
    except Exception:  # any error of the model's code with an unsupported cache
        return False
    return _agree(base, torch.cat(cached_logits), torch.cat(full_logits))


def _agree(base: Base, actual: Tensor, reference: Tensor) -> bool:
    """Whether logits [texts, vocab_size] are equal up to the rounding of the base's precision."""
    actual, reference = actual.float(), reference.float()
    spread = (reference - reference.mean(1, keepdim=True)).norm(dim=1)
    error = (actual - reference).norm(dim=1) / spread
    # In this form a NaN fails.
    return bool((error <= (0.2 if base.low_precision else 3e-5)).all())
