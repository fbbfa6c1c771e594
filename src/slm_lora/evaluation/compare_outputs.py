"""Replies of a base and its adapters to the same prompts, greedy and sampled."""

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
    """Ask every variant every prompt.

    All are asked in one template, that of the first adapter: the base, too, sees what the
    adapters were trained to see.

    Args:
        variants: the base and its adapters.
        prompts: what is asked.
        greedy: sampling of temperature 0.
        sampled: another, or None.
        on_answer: told of the tokens of every finished answer.
    """
    asked_as = next((name for name in variants.names if name != BASE), BASE)
    ids = [prompt_ids(variants, asked_as, prompt) for prompt in prompts]

    def text(variant: str, given: list[int], how: Sampling) -> str:
        reply = Generation(variants, variant, given, how)
        said = "".join(reply.pieces())
        on_answer(len(reply.ids))
        return said.strip()

    return [
        Compared(
            prompt="\n".join(turn.content for turn in prompt.turns),
            reference=prompt.reference,
            answers=tuple(
                Answer(
                    variant=variant,
                    greedy=text(variant, given, greedy),
                    # Another seed for each prompt, the same for all who answer it.
                    sampled=text(variant, given, replace(sampled, seed=sampled.seed + number))
                    if sampled
                    else "",
                    loss=reference_loss(variants, variant, asked_as, prompt),
                )
                for variant in variants.names
            ),
        )
        for number, (prompt, given) in enumerate(zip(prompts, ids, strict=True))
    ]


def record(compared: Sequence[Compared], variants: AdapterSet, about: dict[str, Any]) -> Any:
    """For a JSON file; ``about`` says how the answers were made."""
    return {
        "base": variants.base.source.name,
        "precision": variants.base.precision,
        **about,
        "prompts": [asdict(each) for each in compared],
    }
