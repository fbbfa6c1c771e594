"""Outputs of a base and its adapters for the same prompts, greedy and sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from slm_lora.adapters.multi import BASE, AdapterSet
from slm_lora.data.prompts import Prompt
from slm_lora.evaluation.generation import Generation, Sampling, prompt_ids, reference_loss
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

    def generate(variant: str, ids: list[int], sampling: Sampling) -> str:
        generation = Generation(variants, variant, ids, sampling)
        text = "".join(generation.pieces())
        on_answer(len(generation.ids))
        return text.strip()

    return [
        Compared(
            prompt="\n".join(turn.content for turn in prompt.turns),
            reference=prompt.reference,
            answers=tuple(
                Answer(
                    variant=variant,
                    greedy=generate(variant, ids, greedy),
                    # The seed differs between prompts, not between variants.
                    sampled=generate(variant, ids, replace(sampled, seed=sampled.seed + index))
                    if sampled
                    else "",
                    loss=reference_loss(variants, variant, template_variant, prompt),
                )
                for variant in variants.names
            ),
        )
        for index, (prompt, ids) in enumerate(zip(prompts, ids_by_prompt, strict=True))
    ]


def record(compared: Sequence[Compared], variants: AdapterSet, settings: dict[str, Any]) -> Any:
    """The content of a JSON file; ``settings`` are the generation settings."""
    return {
        "base": variants.base.source.name,
        "precision": variants.base.precision,
        **settings,
        "prompts": [asdict(comparison) for comparison in compared],
    }
