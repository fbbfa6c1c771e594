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
    actual, reference = torch.cat(cached_logits).float(), torch.cat(full_logits).float()
    spread = (reference - reference.mean(1, keepdim=True)).norm(dim=1)
    error = (actual - reference).norm(dim=1) / spread
    # In this form a NaN fails.
    return bool((error <= (0.2 if base.low_precision else 3e-5)).all())
