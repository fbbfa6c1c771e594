"""Single rows and single answers in a report: chosen by rule, never by taste."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_lora.data.prompts import Prompt
from slm_lora.data.splits import seeded_order
from slm_lora.errors import IntegrityError, UsageError
from slm_lora.records import PIECE, Row, RowScore
from slm_lora.report.blocks import Column, Section, markdown_table, plain
from slm_lora.report.names import SettingNames
from slm_lora.report.outputs import sections
from slm_lora.runs import outputs
from slm_lora.runs.folder import Run
from slm_lora.stats.comparisons import Comparison
from slm_lora.stats.settings import Setting

OUTPUTS_FILE = "outputs.json"
"""Beside the run folders: what `compare-outputs` wrote, if anybody asked."""


def replies(results: Path) -> list[Section]:
    """Answers to prompts, side by side, where the experiment's folder has them.

    Raises:
        IntegrityError: the file is broken.
    """
    path = results / OUTPUTS_FILE
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        compared = outputs.read(found)
        how = _how(found)
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{path}: broken ({error}); move it away, or make it again: slm-lora compare-outputs"
        ) from error
    return [
        Section(
            "Replies side by side",
            how,
            anchor="replies",
            folded=True,
            children=tuple(sections(compared, level=3)),
        )
    ]


def _how(outputs: dict[str, Any]) -> str:
    sampled = outputs["sampled"]
    drawn = (
        f" and sampled (temperature {sampled['temperature']:g}, top p {sampled['top_p']:g}, seed "
        f"{sampled['seed']} and on)"
        if sampled
        else ""
    )
    asked = [plain(answer["variant"]) for answer in outputs["prompts"][0]["answers"]]
    return (
        f"{len(outputs['prompts'])} prompts of a fixed list, each to {' and '.join(asked)} in the "
        f"template that the adapters were trained with, greedy{drawn}, "
        f"{outputs['max_new_tokens']} tokens at most. Losses are those of the list's own answer, "
        "nats a token."
    )


@dataclass(frozen=True, slots=True)
class Quoted:
    """What a report for oneself shows of the rows that it names.

    Attributes:
        rows: the data set, by id.
        answer: lets the base and the adapter of a run answer prompts; None: no replies.
    """

    rows: Mapping[str, Row]
    answer: Callable[[Run, Sequence[Prompt]], Sequence[outputs.Compared]] | None = None


def rows(
    comparisons: Sequence[Comparison], quoted: Quoted | None, names: SettingNames
) -> list[Section]:
    """Rows of the test set by how the largest fall in loss treats them.

    Args:
        comparisons: of the report.
        quoted: shows the rows with their text; None: by their ids only.
        names: of the settings.

    Raises:
        UsageError: a chosen row is not among them.
    """
    to_base = [pair for pair in comparisons if pair.key == "base"]
    if not to_base:
        return []
    best = min(to_base, key=lambda pair: pair.metric.cost(pair.difference.value))
    chosen = _chosen(best)
    first, second = names.of(best.first), names.of(best.second)
    table = markdown_table(
        ["Chosen as", "Row", "Category", "Tokens", first, second, "Difference"],
        [
            [
                rule, f"`{score.row_id[:12]}`", plain(score.category) or "–",
                f"{best.metric.parts(score)[1]:g}", f"{before:.4f}", f"{after:.4f}",
                f"{after - before:+.4f}",
            ]
            for rule, score, before, after in chosen
        ],
        left=(0, 1, 2),
    )  # fmt: skip
    shown_as = "each with its text below" if quoted else "shown by the start of their id"
    text = (
        f"Loss of single test rows under {first} and {second}, nats per token; chosen by rule, "
        f"{shown_as}.\n\n{table}"
    )
    if quoted is None:
        return [Section("Rows", text, anchor="rows", folded=True)]
    shown = [_row(score, quoted.rows) for _, score, *_ in chosen]
    run = best.second.first_run.run
    answers = _answers(run, shown, quoted)
    if answers:
        text += "\n\nReplies are greedy, by the base and by the first seed's adapter."
    texts = [
        _text(rule, row, answers.get(row.row_id, ()), _context_seen(run))
        for (rule, *_), row in zip(chosen, shown, strict=True)
    ]
    return [Section("Rows", text, anchor="rows", folded=True, children=tuple(texts))]


def _row(score: RowScore, rows: Mapping[str, Row]) -> Row:
    # Of a long text one piece was scored: shown is the text.
    row_id = score.row_id.partition(PIECE)[0]
    if row_id not in rows:
        raise UsageError(
            f"row {score.row_id[:12]} was scored, but is not among the recipe's rows; "
            "give the recipe and the data that the experiment ran on"
        )
    return rows[row_id]


def _context_seen(run: Run) -> bool:
    """Whether contexts were part of the text that a run was scored on."""
    template = run.record.data.template
    # The template plain has no place for one.
    return template.include_context and template.kind != "plain"


def _answers(
    run: Run, shown: Sequence[Row], quoted: Quoted
) -> dict[str, tuple[outputs.Answer, ...]]:
    """Of those rows that ask something, by their ids."""
    if quoted.answer is None:
        return {}
    asking = [row for row in shown if len(row.turns) > 1]
    prompts = [Prompt(row.turns[:-1], row.context, row.turns[-1].content) for row in asking]
    given = quoted.answer(run, prompts)
    return {row.row_id: each.answers for row, each in zip(asking, given, strict=True)}


def _text(rule: str, row: Row, answers: Sequence[outputs.Answer], context_seen: bool) -> Section:
    said = [Column(turn.role, turn.content) for turn in row.turns]
    # Only what the model saw.
    context = [Column("context", row.context)] if row.context and context_seen else []
    unseen = "The context was not part of the text." if row.context and not context_seen else ""
    given = [Column(f"answer of {answer.variant}", answer.greedy) for answer in answers]
    title = f"{rule[0].upper()}{rule[1:]}: {row.row_id[:12]}"
    return Section(title, unseen, columns=(*context, *said, *given), level=3, folded=True)


def _chosen(best: Comparison) -> list[tuple[str, RowScore, float, float]]:
    before, after = _values(best.first), _values(best.second)
    of_row = {
        score.row_id: score for score in best.first.first_run.scores if score.row_id in before
    }
    order = sorted(of_row, key=lambda row: (after[row] - before[row], row))
    if len(order) < 3:
        return []
    middle = len(order) // 2
    picked = [
        *(("largest fall", row) for row in order[:2]),
        ("median change", order[middle]),
        *(("largest rise or smallest fall", row) for row in order[-2:]),
    ]
    taken = {row for _, row in picked}
    left = [row for row in seeded_order(order, "report", 0) if row not in taken]
    picked += [("at random", row) for row in left[:3]]
    return [(rule, of_row[row], before[row], after[row]) for rule, row in _once(picked)]


def _once(picked: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Every row once, under the first rule that chose it."""
    first: dict[str, str] = {}
    for rule, row in picked:
        first.setdefault(row, rule)
    return [(rule, row) for row, rule in first.items()]


def _values(setting: Setting) -> dict[str, float]:
    """The metric of every row that has it, mean over seeds."""
    sums: dict[str, float] = {}
    for run in setting.runs:
        for score in run.scores:
            numerator, denominator = setting.metric.parts(score)
            if denominator:
                share = numerator / denominator / len(setting.runs)
                sums[score.row_id] = sums.get(score.row_id, 0.0) + share
    return sums
