"""Replies to the same prompts, as sections of a report."""

from __future__ import annotations

from collections.abc import Sequence

from slm_lora.report.blocks import Column, Section, plain
from slm_lora.runs.outputs import Answer, Compared


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
            folded=level > 2,
        )
        for number, each in enumerate(compared, 1)
    ]


def _title(answer: Answer) -> str:
    if answer.loss is None:
        return answer.variant
    return f"{answer.variant}: loss of the reference {answer.loss:.3f}"
