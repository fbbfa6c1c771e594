"""Fields of requests that are known elsewhere and not done here: refused by name where they ask for
something, so that no answer is one to another question. Others, which are not known, are ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_OUTPUT = "only free text is generated"
_SAMPLING = "there is no such sampling here"
_TEMPLATE = "prompts are made as in training, by the template that the adapter came with"
_ALTERNATIVES = "one answer is generated"
_CHANCES = "no probabilities are given out"
_TOOLS = "no tools are called"
_TEXT = "only text is read and written"

_NEUTRAL: tuple[Any, ...] = (None, False, 0, "", [], {})
"""Values that ask for nothing, in nearly every field."""

_UNSUPPORTED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "response_format": (_OUTPUT, ({"type": "text"},)),
    "tools": (_TOOLS, ()),
    "tool_choice": (_TOOLS, ("none",)),
    "functions": (_TOOLS, ()),
    "function_call": (_TOOLS, ("none",)),
    "web_search_options": (_TOOLS, ()),
    "n": (_ALTERNATIVES, (1,)),
    "best_of": (_ALTERNATIVES, (1,)),
    "use_beam_search": (_ALTERNATIVES, ()),
    "num_beams": (_ALTERNATIVES, (1,)),
    "length_penalty": (_ALTERNATIVES, (1,)),
    "logprobs": (_CHANCES, (False,)),
    "top_logprobs": (_CHANCES, ()),
    "prompt_logprobs": (_CHANCES, ()),
    "audio": (_TEXT, ()),
    "modalities": (_TEXT, (["text"],)),
    "prompt_embeds": (_TEXT, ()),
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
    "repeat_penalty": ("it is called repetition_penalty", (1,)),
    "do_sample": ("temperature 0 is greedy, any other samples", ()),
    "max_new_tokens": ("it is called max_tokens", ()),
    "max_output_tokens": ("it is called max_tokens", ()),
    "n_predict": ("it is called max_tokens", (-1,)),
    "num_predict": ("it is called max_tokens", (-1,)),
    "stop_sequences": ("it is called stop", ()),
    "guided_json": (_OUTPUT, ()),
    "guided_regex": (_OUTPUT, ()),
    "guided_choice": (_OUTPUT, ()),
    "guided_grammar": (_OUTPUT, ()),
    "structured_outputs": (_OUTPUT, ()),
    "structural_tag": (_OUTPUT, ()),
    "json_schema": (_OUTPUT, ()),
    "grammar": (_OUTPUT, ()),
    "regex": (_OUTPUT, ()),
    "ebnf": (_OUTPUT, ()),
    "reasoning": (_OUTPUT, ()),
    "reasoning_effort": (_OUTPUT, ("none",)),
    "thinking": (_OUTPUT, ({"type": "disabled"},)),
    "enable_thinking": (_TEMPLATE, ()),
    "thinking_budget": (_OUTPUT, ()),
    "verbosity": (_OUTPUT, ("medium",)),
    "prediction": ("nothing is predicted from outside", ()),
    "suffix": ("nothing is filled in before a suffix", ()),
    "echo": ("the prompt is not repeated", ()),
    "system": ("a system text is a message of role system", ()),
    "chat_template": (_TEMPLATE, ()),
    "chat_template_kwargs": (_TEMPLATE, ()),
    "documents": (_TEMPLATE, ()),
    "add_generation_prompt": (_TEMPLATE, (True,)),
    "continue_final_message": (_TEMPLATE, ()),
    "add_special_tokens": (_TEMPLATE, (True,)),
    "truncate_prompt_tokens": ("prompts are not cut", ()),
    "include_stop_str_in_output": ("a stop text is no part of the answer", ()),
    "skip_special_tokens": ("special tokens are no part of the answer", (True,)),
    "return_token_ids": ("only text is given out", ()),
    "return_tokens_as_token_ids": (_CHANCES, ()),
}
"""Why not, and which values besides `_NEUTRAL` ask for nothing."""

_FALSE_ASKS = {
    "n", "best_of", "logprobs", "do_sample",
    "add_generation_prompt", "skip_special_tokens", "enable_thinking", "max_new_tokens",
    "max_output_tokens", "truncate_prompt_tokens", "repeat_penalty",
}  # fmt: skip
"""Fields of which also false or 0 asks for something."""

MESSAGE = {
    "tool_calls": _TOOLS,
    "function_call": _TOOLS,
    "tool_call_id": _TOOLS,
    "audio": _TEXT,
    "reasoning_content": "reasoning is no part of the prompts that adapters are trained on",
    "reasoning": "reasoning is no part of the prompts that adapters are trained on",
    "prefix": "an answer is not begun by the client",
}
"""Of a message: what it holds besides role and content."""


def unsupported(asked: Mapping[str, Any]) -> tuple[str, str] | None:
    """The first field of a request that asks for what is not done here, and why; None: there is
    none."""
    for name, value in asked.items():
        if name in _UNSUPPORTED:
            why, neutral = _UNSUPPORTED[name]
            if value is not None and not _is_one_of(value, neutral, name in _FALSE_ASKS):
                return name, why
    return None


def unsupported_in_message(message: Mapping[str, Any]) -> tuple[str, str] | None:
    """As `unsupported`, of one message."""
    for name, why in MESSAGE.items():
        if message.get(name) not in _NEUTRAL:
            return name, why
    return None


def _is_one_of(value: Any, neutral: tuple[Any, ...], false_asks: bool) -> bool:
    # As JSON has it, 1 is not true.
    def same(one: Any, other: Any) -> bool:
        return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)

    if any(same(value, each) for each in neutral):
        return True
    return not false_asks and any(same(value, each) for each in _NEUTRAL)
