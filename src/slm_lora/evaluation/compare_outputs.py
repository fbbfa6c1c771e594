"""Outputs of a base and its adapters for the same prompts, greedy and sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from slm_lora.adapters.multi import BASE, AdapterSet
from slm_lora.data.prompts import Prompt
from slm_lora.evaluation.batched_generation import generate_replies
from slm_lora.evaluation.generation import Sampling, prompt_ids, reference_loss
from slm_lora.runs.outputs import Answer, Compared


def compare_outputs(
    variants: AdapterSet,
    prompts: Sequence[Prompt],
    greedy: Sampling,
    sampled: Sampling | None,
    on_answer: Callable[[int], None] = lambda tokens: None,
) -> list[Compared]:
    """Generate an answer of every variant to every prompt.

    All use the template of the first adapter, so that the base gets the same input.

    Args:
        variants: the base and its adapters.
        prompts: prompts, with reference answers if any.
        greedy: settings with temperature 0.
        sampled: settings of a second, sampled answer, or None.
        on_answer: called with the number of tokens of every finished answer.

    Returns:
        One comparison per prompt.

    Raises:
        UsageError: a prompt is too long.
    """
    template_variant = next((name for name in variants.names if name != BASE), BASE)
    ids_by_prompt = [prompt_ids(variants, template_variant, prompt) for prompt in prompts]

    replies: dict[tuple[str, str], list[str]] = {}
    for variant in variants.names:
        for kind, sampling in (("greedy", greedy), ("sampled", sampled)):
            if sampling is not None:
                # The seed differs between prompts, not between variants.
                texts = generate_replies(
                    variants, variant, ids_by_prompt, sampling, lambda r: on_answer(len(r.ids))
                )
                replies[variant, kind] = [reply.text.strip() for reply in texts]
    return [
        Compared(
            prompt="\n".join(turn.content for turn in prompt.turns),
            reference=prompt.reference,
            answers=tuple(
                Answer(
                    variant=variant,
                    greedy=replies[variant, "greedy"][index],
                    sampled=replies[variant, "sampled"][index] if sampled else "",
                    loss=reference_loss(variants, variant, template_variant, prompt),
                )
                for variant in variants.names
            ),
        )
        for index, prompt in enumerate(prompts)
    ]


def record(compared: Sequence[Compared], variants: AdapterSet, settings: dict[str, Any]) -> Any:
    """The content of a JSON file; ``settings`` are the generation settings."""
    return {
        "base": variants.base.source.name,
        "precision": variants.base.precision,
        **settings,
        "prompts": [asdict(comparison) for comparison in compared],
    }
