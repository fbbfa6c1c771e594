"""The same prompts to a base and its adapters, greedy and sampled, one beside the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from slm_lora.data.prompts import Prompt
from slm_lora.evaluation.generate import Reply, Sampling, prompt_ids, reference_loss
from slm_lora.experiment.page import Column, Section, plain
from slm_lora.model.variants import BASE, Variants


@dataclass(frozen=True, slots=True)
class Answer:
    """What one variant says to one prompt.

    Attributes:
        variant: who.
        greedy: always its most likely token.
        sampled: drawn; empty where none was asked for.
        loss: nats a token of the reference answer, None without one.
    """

    variant: str
    greedy: str
    sampled: str
    loss: float | None


@dataclass(frozen=True, slots=True)
class Compared:
    """One prompt and everybody's answers."""

    prompt: str
    reference: str
    answers: tuple[Answer, ...]


def compare_outputs(
    variants: Variants,
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
        reply = Reply(variants, variant, given, how)
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


def sections(compared: Sequence[Compared], level: int = 2) -> list[Section]:
    """One section a prompt, its answers as columns; ``level`` of their headings."""
    return [
        Section(
            f"{number}. {' '.join(each.prompt.split())[:120]}",
            f"Reference: {plain(each.reference)}" if each.reference else "",
            columns=(
                *(Column(_title(answer), answer.greedy) for answer in each.answers),
                *(
                    Column(f"{answer.variant}, sampled", answer.sampled)
                    for answer in each.answers
                    if answer.sampled
                ),
            ),
            across=len(each.answers),
            level=level,
        )
        for number, each in enumerate(compared, 1)
    ]


def _title(answer: Answer) -> str:
    if answer.loss is None:
        return answer.variant
    return f"{answer.variant}: loss of the reference {answer.loss:.3f}"


def record(compared: Sequence[Compared], variants: Variants, about: dict[str, Any]) -> Any:
    """For a JSON file; ``about`` says how the answers were made."""
    return {
        "base": variants.base.source.name,
        "precision": variants.base.precision,
        **about,
        "prompts": [asdict(each) for each in compared],
    }


def read(found: Any) -> list[Compared]:
    """The prompts and answers of what `record` made.

    Raises:
        KeyError, TypeError: it is something else.
    """
    return [
        Compared(
            each["prompt"],
            each["reference"],
            tuple(Answer(**answer) for answer in each["answers"]),
        )
        for each in found["prompts"]
    ]
