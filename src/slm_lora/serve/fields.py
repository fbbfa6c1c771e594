"""Request fields that other servers support and this one does not.

They are rejected by name unless their value is neutral, since ignoring them would change the
meaning of the reply. Fields unknown to any server are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FREE_TEXT = "only unconstrained text is generated"
_SAMPLING = "this sampling option is not implemented"
_TEMPLATE = "prompts are rendered with the template of the training"
_ONE_COMPLETION = "each request generates one completion"
_PROBABILITIES = "probabilities are not returned"
_TOOLS = "tool calls are not implemented"
_TEXT_ONLY = "only text input and output are supported"

_NEUTRAL: tuple[Any, ...] = (None, False, 0, "", [], {})
"""Values that mean "off" or "unset" in nearly every field."""

_UNSUPPORTED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "response_format": (_FREE_TEXT, ({"type": "text"},)),
    "tools": (_TOOLS, ()),
    "tool_choice": (_TOOLS, ("none",)),
    "functions": (_TOOLS, ()),
    "function_call": (_TOOLS, ("none",)),
    "web_search_options": (_TOOLS, ()),
    "n": (_ONE_COMPLETION, (1,)),
    "best_of": (_ONE_COMPLETION, (1,)),
    "use_beam_search": (_ONE_COMPLETION, ()),
    "num_beams": (_ONE_COMPLETION, (1,)),
    "length_penalty": (_ONE_COMPLETION, (1,)),
    "logprobs": (_PROBABILITIES, (False,)),
    "top_logprobs": (_PROBABILITIES, ()),
    "prompt_logprobs": (_PROBABILITIES, ()),
    "audio": (_TEXT_ONLY, ()),
    "modalities": (_TEXT_ONLY, (["text"],)),
    "prompt_embeds": (_TEXT_ONLY, ()),
    "logit_bias": (_SAMPLING, ()),
    "allowed_token_ids": (_SAMPLING, ()),
    "bad_words": (_SAMPLING, ()),
    "logits_processors": (_SAMPLING, ()),
    "typical_p": (_SAMPLING, (1,)),
    "tfs_z": (_SAMPLING, (1,)),
    "top_a": (_SAMPLING, ()),
    "top_n_sigma": (_SAMPLING, (-1,)),
    "mirostat": (_SAMPLING, ()),
    "mirostat_mode": (_SAMPLING, ()),
    "dry_multiplier": (_SAMPLING, ()),
    "xtc_probability": (_SAMPLING, ()),
    "dynatemp_range": (_SAMPLING, ()),
    "epsilon_cutoff": (_SAMPLING, ()),
    "eta_cutoff": (_SAMPLING, ()),
    "no_repeat_ngram_size": (_SAMPLING, ()),
    "penalty_alpha": (_SAMPLING, ()),
    "repeat_penalty": ("use repetition_penalty instead", (1,)),
    "do_sample": ("use temperature instead (0: greedy)", ()),
    "max_new_tokens": ("use max_tokens instead", ()),
    "max_output_tokens": ("use max_tokens instead", ()),
    "n_predict": ("use max_tokens instead", (-1,)),
    "num_predict": ("use max_tokens instead", (-1,)),
    "stop_sequences": ("use stop instead", ()),
    "guided_json": (_FREE_TEXT, ()),
    "guided_regex": (_FREE_TEXT, ()),
    "guided_choice": (_FREE_TEXT, ()),
    "guided_grammar": (_FREE_TEXT, ()),
    "structured_outputs": (_FREE_TEXT, ()),
    "structural_tag": (_FREE_TEXT, ()),
    "json_schema": (_FREE_TEXT, ()),
    "grammar": (_FREE_TEXT, ()),
    "regex": (_FREE_TEXT, ()),
    "ebnf": (_FREE_TEXT, ()),
    "reasoning": (_FREE_TEXT, ()),
    "reasoning_effort": (_FREE_TEXT, ("none",)),
    "thinking": (_FREE_TEXT, ({"type": "disabled"},)),
    "enable_thinking": (_TEMPLATE, ()),
    "thinking_budget": (_FREE_TEXT, ()),
    "verbosity": (_FREE_TEXT, ("medium",)),
    "prediction": ("predicted outputs are not implemented", ()),
    "suffix": ("fill-in-the-middle is not implemented", ()),
    "echo": ("the prompt is not returned", ()),
    "system": ("send a message of role system instead", ()),
    "chat_template": (_TEMPLATE, ()),
    "chat_template_kwargs": (_TEMPLATE, ()),
    "documents": (_TEMPLATE, ()),
    "add_generation_prompt": (_TEMPLATE, (True,)),
    "continue_final_message": (_TEMPLATE, ()),
    "add_special_tokens": (_TEMPLATE, (True,)),
    "truncate_prompt_tokens": ("prompts are not truncated", ()),
    "include_stop_str_in_output": ("stop texts are never part of the reply", ()),
    "skip_special_tokens": ("special tokens are never part of the reply", (True,)),
    "return_token_ids": ("token ids are not returned", ()),
    "return_tokens_as_token_ids": (_PROBABILITIES, ()),
}
"""Reason, and the neutral values besides `_NEUTRAL`."""

_FALSE_IS_SET = {
    "n", "best_of", "logprobs", "do_sample",
    "add_generation_prompt", "skip_special_tokens", "enable_thinking", "max_new_tokens",
    "max_output_tokens", "truncate_prompt_tokens", "repeat_penalty",
}  # fmt: skip
"""Fields in which false or 0 is not neutral."""

_UNSUPPORTED_IN_MESSAGE = {
    "tool_calls": _TOOLS,
    "function_call": _TOOLS,
    "tool_call_id": _TOOLS,
    "audio": _TEXT_ONLY,
    "reasoning_content": "training prompts hold no reasoning",
    "reasoning": "training prompts hold no reasoning",
    "prefix": "a reply cannot be prefilled",
}
"""Keys of a message besides role and content, and the reason."""


def unsupported(body: Mapping[str, Any]) -> tuple[str, str] | None:
    """Name of the first unsupported field with a non-neutral value, and the reason; else None."""
    for name, value in body.items():
        if name in _UNSUPPORTED:
            reason, neutral = _UNSUPPORTED[name]
            if value is not None and not _is_one_of(value, neutral, name in _FALSE_IS_SET):
                return name, reason
    return None


def unsupported_in_message(message: Mapping[str, Any]) -> tuple[str, str] | None:
    """The same as `unsupported` for one message."""
    for name, reason in _UNSUPPORTED_IN_MESSAGE.items():
        if message.get(name) not in _NEUTRAL:
            return name, reason
    return None


def _is_one_of(value: Any, neutral: tuple[Any, ...], false_is_set: bool) -> bool:
    # In JSON, unlike in Python, 1 is not equal to true.
    def same(left: Any, right: Any) -> bool:
        return bool(left == right) and isinstance(left, bool) == isinstance(right, bool)

    if any(same(value, candidate) for candidate in neutral):
        return True
    return not false_is_set and any(same(value, candidate) for candidate in _NEUTRAL)
