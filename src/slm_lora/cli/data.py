"""Commands that build, show and check data sets."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from slm_lora.cli.options import (
    CellName,
    Overrides,
    RecipeFile,
    chosen_cell,
    console,
    quiet_libraries,
)
from slm_lora.terminal import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slm_lora.data.sources import BadRow
    from slm_lora.experiment.jobs import Job

Rows = Annotated[int, typer.Option("--rows", min=1, help="How many rows to show.")]


def build() -> None:
    """Build the embedded data set ml-qa from the installed libraries' docstrings."""
    from slm_lora.data.sources import ensure_ml_qa

    path = ensure_ml_qa()
    with path.open(encoding="utf-8") as handle:
        count = sum(1 for _ in handle)
    console().print(f"ml-qa: {count} pairs\n{path}", soft_wrap=True)


def show(
    recipe: RecipeFile, overrides: Overrides = None, cell: CellName = "", rows: Rows = 2
) -> None:
    """Show training rows as the model sees them: loss is taken on what is marked."""
    from slm_lora.experiment.jobs import make_jobs
    from slm_lora.recipe.reading import load_recipe

    _, cells = load_recipe(recipe, overrides or [])
    quiet_libraries()
    job = make_jobs([chosen_cell(cells, cell)], computed="nowhere")[0]
    for note in (*job.rows.notes, *job.prepared.notes):
        console().print(f"note: {note}", soft_wrap=True)
    _show_rows(job, rows)


def _show_rows(job: Job, rows: int) -> None:
    from rich.text import Text

    from slm_lora.model.load import load_tokenizer

    tokenizer = load_tokenizer(job.source)
    on_response = job.cell.recipe.training.loss_on == "response"
    out = console()
    for example in job.prepared.train[:rows]:
        out.print(
            f"row {example.row_id[:8]}  {printable(example.category)}  {example.length} tokens, "
            f"{int(example.response.sum())} of the response"
        )
        shown = Text()
        labels = [
            position > 0 and (response or not on_response)
            for position, response in enumerate(example.response.tolist())
        ]
        pairs = zip(labels, example.ids.tolist(), strict=True)
        for marked, run in itertools.groupby(pairs, key=lambda pair: pair[0]):
            text = printable(str(tokenizer.decode([token for _, token in run])))
            # Off a terminal there is no colour: brackets mark the labels instead.
            if marked and not out.is_terminal:
                text = f"[{text}]"
            shown.append(text, style="reverse" if marked else "dim")
        out.print(shown, soft_wrap=True)
        out.print()


def check(recipe: RecipeFile, overrides: Overrides = None, rows: Rows = 2) -> None:
    """Read, split and tokenise a recipe's rows, and say what was found.

    Names bad rows, a few of every kind; counts duplicates and what a random split would leak,
    conflicting answers, categories, lengths and what a limit on them costs; shows a few rows.
    """
    from slm_lora.data.sources import MalformedRowsError
    from slm_lora.experiment.jobs import data_record, make_jobs
    from slm_lora.recipe.reading import load_recipe

    _, cells = load_recipe(recipe, overrides or [])
    quiet_libraries()
    out = console()
    try:
        jobs = make_jobs(cells, computed="nowhere")
    except MalformedRowsError as error:
        # The error names a few rows; whoever checks wants to see some of every kind.
        kinds = {bad.reason for bad in error.bad_rows}
        if len(kinds) > 1 or len(error.bad_rows) <= _MOST_SHOWN:
            _print_bad_rows(error.bad_rows, "")
        raise
    _print_bad_rows(jobs[0].rows.bad_rows, "skipped ")
    for note in (*jobs[0].rows.notes, *jobs[0].prepared.notes):
        out.print(f"note: {note}", soft_wrap=True)
    for job in jobs:
        record = data_record(job)
        out.print(f"{job.cell.name}: {record['origin']}", soft_wrap=True)
        out.print(
            f"  format {record['format']}, template {record['template']['kind']}; "
            f"{record['rows_available']} rows in {record['groups']} groups, "
            f"{record['duplicates_dropped']} exact duplicates dropped, "
            f"{record['bad_rows_skipped']} malformed rows skipped",
            soft_wrap=True,
        )
        for name, found in record["sets"].items():
            long = record["long_rows"].get(name, record["long_rows"].get("all"))
            out.print(
                f"  {name:10} {found['rows']:6} rows {found['tokens']:9} tokens; "
                f"{long['rows']} over {job.cell.recipe.data.max_length} tokens ({long['policy']})",
                soft_wrap=True,
            )
    _say_facts(jobs[0])
    out.print()
    _show_rows(jobs[0], rows)


_MOST_SHOWN = 5


def _print_bad_rows(bad_rows: Sequence[BadRow], before: str) -> None:
    """The first rows of every reason, and how many more there are."""
    out = console()
    shown: Counter[str] = Counter()
    for bad in bad_rows:
        shown[bad.reason] += 1
        if shown[bad.reason] <= _MOST_SHOWN:
            out.print(f"{before}{bad.source}: {bad.reason}", soft_wrap=True)
    for reason, many in shown.items():
        if many > _MOST_SHOWN:
            out.print(f"{before}{many - _MOST_SHOWN} more rows: {reason}", soft_wrap=True)


_RELATIONS = {
    "instruction": "same instruction (case, punctuation and spacing aside)",
    "context": "same context",
    "hint": "same named group",
    "near": "nearly the same prompt (4 of 5 words shared)",
    None: "related in any of these ways",
}


def _say_facts(job: Job) -> None:
    from slm_lora.data.batches import label_count
    from slm_lora.data.checks import facts, plain_marks
    from slm_lora.data.tokens import RowTokenizer
    from slm_lora.model.load import load_tokenizer

    rows = job.rows.rows
    tokenize = RowTokenizer(load_tokenizer(job.source), job.prepared.template)
    whole, _ = tokenize.encode(rows, {row.row_id: row.row_id for row in rows})
    found = facts(rows, [example.length for example in whole])
    out = console()

    def say(line: str) -> None:
        out.print(line, soft_wrap=True)

    if found.related:
        say("\nrelated rows; a 90/10 split drawn row by row would leak so many of its test rows")
        for each in found.related:
            say(
                f"  {_RELATIONS[each.relation]:55} {each.rows:6} rows in {each.groups:5} groups  "
                f"{each.leak:6.1%}"
            )
    prompts, answered = found.conflicts
    say(f"\nprompts with different answers: {prompts} ({answered} rows)")
    for mark in plain_marks(tokenize, rows):
        spelt = (
            f"{mark.rows} rows spell it, first {mark.first}" if mark.rows else "no row spells it"
        )
        say(f"role mark {mark.text!r} is plain text to the tokenizer: {spelt}")
    if found.categories:
        held = Counter(example.category for example in job.prepared.test)
        say("\ncategory: rows, test rows")
        for name, many in found.categories:
            say(f"  {printable(name):30} {many:6} {held[name]:6}")
    labels = sorted(label_count(e, job.cell.recipe.training.loss_on) for e in job.prepared.train)
    say(
        f"\nlabels a training row ({job.cell.recipe.training.loss_on}): "
        f"{labels[0]} to {labels[-1]}, median {labels[len(labels) // 2]}, "
        f"{sum(not many for many in labels)} rows without"
    )
    say("\nlength in tokens, uncut: rows")
    largest = max(many for _, many in found.lengths)
    for end, many in found.lengths:
        say(f"  up to {end:6} {many:6} {'█' * round(40 * many / largest)}")
    for cost in found.costs:
        say(
            f"  max_length {cost.limit:5} cuts {cost.rows:6.2%} of rows, "
            f"{cost.tokens:6.2%} of tokens"
        )
