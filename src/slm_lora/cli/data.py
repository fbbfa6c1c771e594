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
from slm_lora.runtime.terminal import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from slm_lora.data.checks import SpecialTokensInRows
    from slm_lora.data.sources import BadRow
    from slm_lora.experiment.job import Job

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
    from slm_lora.config.load import load_recipe
    from slm_lora.experiment.resolve_jobs import make_jobs

    _, cells = load_recipe(recipe, overrides or [])
    quiet_libraries()
    job = make_jobs([chosen_cell(cells, cell)], computed="nowhere")[0]
    for note in (*job.rows.notes, *job.data.notes):
        console().print(f"note: {note}", soft_wrap=True)
    _show_rows(job, rows)


def _show_rows(job: Job, rows: int) -> None:
    from rich.text import Text

    from slm_lora.model.loading import load_tokenizer

    tokenizer = load_tokenizer(job.source)
    on_response = job.config.training.loss_on == "response"
    out = console()
    for example in job.data.train[:rows]:
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
    conflicting answers, categories, lengths and what a limit on them costs; warns of too few test
    rows, rows without labels, text that is cut, placeholders, special tokens; shows a few rows.
    """
    from slm_lora.config.load import load_recipe
    from slm_lora.data.sources import MalformedRowsError
    from slm_lora.experiment.provenance import data_record
    from slm_lora.experiment.resolve_jobs import make_jobs

    _, cells = load_recipe(recipe, overrides or [])
    quiet_libraries()
    out = console()
    try:
        jobs = make_jobs(cells, computed="nowhere")
    except MalformedRowsError as error:
        # The error names a few rows; `data check` shows some of every kind.
        kinds = {bad.reason for bad in error.bad_rows}
        if len(kinds) > 1 or len(error.bad_rows) <= _MOST_SHOWN:
            _print_bad_rows(error.bad_rows, "")
        raise
    _print_bad_rows(jobs[0].rows.bad_rows, "skipped ")
    for note in (*jobs[0].rows.notes, *jobs[0].data.notes):
        out.print(f"note: {note}", soft_wrap=True)
    for job in jobs:
        record = data_record(job)
        out.print(f"{job.name}: {record['origin']}", soft_wrap=True)
        out.print(
            f"  format {record['format']}, template {record['template']['kind']}; "
            f"{record['rows_available']} rows in {record['groups']} groups, "
            f"{record['duplicates_dropped']} exact duplicates dropped, "
            f"{record['bad_rows_skipped']} malformed rows skipped",
            soft_wrap=True,
        )
        # Once some rows are pieces, it is pieces that are counted.
        unit = "pieces" if job.config.data.on_long_row == "split" else "rows"
        for name, found in record["sets"].items():
            long = record["long_rows"].get(name, record["long_rows"].get("all"))
            out.print(
                f"  {name:10} {found['rows']:6} {unit} {found['tokens']:9} tokens; "
                f"{long['rows']} rows over {job.config.data.max_length} tokens "
                f"({long['policy']})",
                soft_wrap=True,
            )
    _say_facts(jobs[0])
    _say_warnings(jobs)
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
    "group": "same named group",
    "prompt": "same prompt (case, punctuation and spacing aside)",
    "instruction": "same instruction, whatever the context",
    "context": "same context",
    "near": "nearly the same prompt",
    None: "related as data.group_by says: never parted here",
}


def _say_facts(job: Job) -> None:
    from slm_lora.data.checks import dataset_statistics, text_role_marks
    from slm_lora.data.collate import label_count
    from slm_lora.data.tokenization import RowTokenizer
    from slm_lora.model.loading import load_tokenizer

    rows = job.rows.rows
    tokenize = RowTokenizer(load_tokenizer(job.source), job.data.template)
    whole, _ = tokenize.encode(rows, {row.row_id: row.row_id for row in rows})
    found = dataset_statistics(rows, [example.length for example in whole], job.data.rule)
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
    if found.cross_group_prompts:
        say(
            f"  rows that ask exactly what a row of another group asks: {found.cross_group_prompts}"
        )
    prompts, answered = found.conflicts
    say(f"\nprompts with different answers: {prompts} ({answered} rows)")
    for mark in text_role_marks(tokenize, rows):
        spelt = (
            f"{mark.rows} rows spell it, first {mark.first}" if mark.rows else "no row spells it"
        )
        say(f"role mark {mark.text!r} is plain text to the tokenizer: {spelt}")
    if found.categories:
        held = Counter(example.category for example in job.data.test)
        say("\ncategory: rows, test rows")
        for name, many in found.categories:
            say(f"  {printable(name):30} {many:6} {held[name]:6}")
    labels = sorted(label_count(e, job.config.training.loss_on) for e in job.data.train)
    say(
        f"\nlabels a training row ({job.config.training.loss_on}): "
        f"{labels[0]} to {labels[-1]}, median {labels[len(labels) // 2]}"
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


def _say_warnings(jobs: Sequence[Job]) -> None:
    """One line for each thing that may not be meant so."""
    from slm_lora.data.checks import few_test_rows

    job = jobs[0]
    lines = [
        few_test_rows(job.data.test),
        *_without_labels(jobs),
        *_cut(job),
        *_odd_text(job),
    ]
    out = console()
    out.print()
    for line in filter(None, lines):
        out.print(f"warning: {line}", soft_wrap=True)


def _without_labels(jobs: Sequence[Job]) -> list[str]:
    from slm_lora.data.collate import label_count

    lines = []
    for job in jobs:
        recipe, prepared = job.config, job.data
        for name, examples, loss_on, then in (
            ("training", prepared.train, recipe.training.loss_on, "they are not trained on"),
            ("test", prepared.test, recipe.evaluation.headline, "they are not scored"),
        ):
            if many := sum(not label_count(each, loss_on) for each in examples):
                lines.append(
                    f"{many} of {len(examples)} {name} rows have no label token (loss on "
                    f"{loss_on}): {then}; their prompts fill data.max_length = "
                    f"{recipe.data.max_length}, or the template writes no response"
                )
    return list(dict.fromkeys(lines))


def _cut(job: Job) -> list[str]:
    data, long = job.config.data, job.data.long
    rows = sum(each.rows for each in long.values())
    if not rows or data.on_long_row not in ("truncate", "drop"):
        return []
    tokens = sum(each.tokens_cut for each in long.values())
    done = "are cut off there" if data.on_long_row == "truncate" else "are left out"
    line = f"{rows} rows are longer than data.max_length = {data.max_length} and {done}"
    if data.on_long_row == "truncate":
        line += f" ({tokens} tokens)"
    if job.data.template.kind == "plain" and job.rows.format == "text":
        return [f"{line}; data.on_long_row=split trains on and scores all of it, in pieces"]
    return [f"{line}; raise data.max_length to keep them whole"]


def _odd_text(job: Job) -> list[str]:
    from slm_lora.data.chat_templates import default_template
    from slm_lora.data.checks import special_tokens_in_rows, undefined_names
    from slm_lora.data.placeholders import find_placeholders
    from slm_lora.data.tokenization import RowTokenizer
    from slm_lora.model.loading import load_tokenizer

    rows, template = job.rows.rows, job.data.template
    tokenizer = load_tokenizer(job.source)
    tokenize = RowTokenizer(tokenizer, template)
    lines = []
    if found := find_placeholders(rows):
        spelt = ", ".join(found.placeholders[:5]) + (", …" if len(found.placeholders) > 5 else "")
        lines.append(
            f"{found.rows} rows hold what looks like a placeholder that was never filled in "
            f"({spelt}), first {found.first}"
        )
    joined = [row for row, so in zip(rows, tokenize.differs_from_prompt(rows), strict=True) if so]
    if joined:
        lines.append(
            f"{len(joined)} of {len(rows)} rows are prompted otherwise than trained: the end of "
            "the prompt and the beginning of the response become other tokens together than apart "
            f"(a space or line end between them, say), first {joined[0].source}; let prompts end "
            "without white space, and responses begin with it"
        )
    in_responses, in_prompts = special_tokens_in_rows(tokenize, rows)
    if in_responses:
        how = (
            "they are these tokens (data.special_tokens_in_responses = special)"
            if template.special_in_responses
            else "they are cut up as text; data.special_tokens_in_responses=special makes them "
            "the tokens themselves"
        )
        lines.append(f"responses of {_named(in_responses)}: {how}")
    if in_prompts:
        lines.append(f"prompts of {_named(in_prompts)}: they are text there, always")
    source = template.source if template.kind == "jinja" else default_template(tokenizer)
    if template.kind in ("jinja", "chat") and source is not None:
        unset = undefined_names(source, tokenizer.special_tokens_map.keys())
        if unset:
            lines.append(
                f"the chat template uses names that nothing sets: {', '.join(unset)}; each counts "
                "as empty, or as false"
            )
    return lines


def _named(found: SpecialTokensInRows) -> str:
    tokens = ", ".join(f"{token} ({many})" for token, many in found.tokens[:5])
    more = ", …" if len(found.tokens) > 5 else ""
    return f"{found.rows} rows spell special tokens ({tokens}{more}), first {found.first}"
