"""Logits of the next token, with a key-value cache where the model proves to use it.

Models with a state of their own (Mamba, RWKV, xLSTM) take a cache of another kind, and ignore this
one silently: they would continue each token as if it were the first.
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
"""Tokens of the trial: at once, and one by one after them."""


def new_cache(base: Base) -> DynamicCache:
    """An empty cache of keys and values."""
    from transformers import DynamicCache

    return DynamicCache(config=base.model.config)


def next_logits(base: Base, ids: Sequence[int], cache: DynamicCache | None, known: int) -> Tensor:
    """Logits of the token that follows ``ids``, [1, vocabulary], in the precision of the base.

    Args:
        base: not packed: transformers' own attention knows the cache.
        ids: the text so far.
        cache: of its first ``known`` tokens; None: all is computed.
        known: tokens in the cache.
    """
    given = torch.tensor([list(ids if cache is None else ids[known:])], device=base.device)
    more: dict[str, Any] = {"use_cache": False}
    if cache is not None:
        more = {"use_cache": True, "past_key_values": cache}
    with mixed_precision(base):
        hidden = trunk(base.model)(input_ids=given, **more).last_hidden_state[:, -1]
        return output_head(base.model, base.head).logits(hidden)


def cache_is_exact(base: Base) -> bool:
    """Whether token by token with a cache gives the logits of the whole text, to rounding."""
    generator = torch.Generator().manual_seed(2)
    words = int(base.model.config.get_text_config().vocab_size)
    ids = torch.randint(0, words, (_PROMPT + _STEPS,), generator=generator).tolist()
    try:
        with torch.no_grad():
            cache, found, wanted = new_cache(base), [], []
            for end in range(_PROMPT, len(ids) + 1):
                known = end - 1 if end > _PROMPT else 0
                found.append(next_logits(base, ids[:end], cache, known))
                wanted.append(next_logits(base, ids[:end], None, 0))
    except Exception:  # the model's code, with a cache that is not its own
        return False
    ours, reference = torch.cat(found).float(), torch.cat(wanted).float()
    spread = (reference - reference.mean(1, keepdim=True)).norm(dim=1)
    error = (ours - reference).norm(dim=1) / spread
    # (Written so that a NaN fails.)
    return bool((error <= (0.2 if base.low_precision else 3e-5)).all())
