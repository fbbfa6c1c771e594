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

Rows = Annotated[int, typer.Option("--rows", min=1, help="Number of rows to show.")]


def build() -> None:
    """Build the embedded data set ml-qa.

    Its rows come from the docstrings of installed libraries.
    """
    from slm_lora.data.sources import ensure_ml_qa

    path = ensure_ml_qa()
    with path.open(encoding="utf-8") as handle:
        count = sum(1 for _ in handle)
    console().print(f"ml-qa: {count} pairs\n{path}", soft_wrap=True)


def show(
    recipe: RecipeFile, overrides: Overrides = None, cell: CellName = "", rows: Rows = 2
) -> None:
    """Show training rows as the model sees them.

    Tokens that count for the loss are highlighted.
    """
    from slm_lora.config.load import load_recipe
    from slm_lora.experiment.resolve_jobs import make_jobs

    _, cells = load_recipe(recipe, overrides or [])
    quiet_libraries()
    job = make_jobs([chosen_cell(cells, cell)], computed="nowhere")[0]
    for note in (*job.rows.notes, *job.data.notes):
        console().print(f"note: {note}", soft_wrap=True)
    _print_rows(job, rows)


def _print_rows(job: Job, rows: int) -> None:
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
        highlighted = Text()
        labels = [
            position > 0 and (response or not on_response)
            for position, response in enumerate(example.response.tolist())
        ]
        pairs = zip(labels, example.ids.tolist(), strict=True)
        for is_label, tokens in itertools.groupby(pairs, key=lambda pair: pair[0]):
            text = printable(str(tokenizer.decode([token for _, token in tokens])))
            # Without a terminal, brackets mark the labels.
            if is_label and not out.is_terminal:
                text = f"[{text}]"
            highlighted.append(text, style="reverse" if is_label else "dim")
        out.print(highlighted, soft_wrap=True)
        out.print()


def check(recipe: RecipeFile, overrides: Overrides = None, rows: Rows = 2) -> None:
    """Check the data of a recipe.

    Reads, splits and tokenises the rows. Lists malformed rows, some of each kind. Counts
    duplicates, the leak of a random split, conflicting answers, categories, lengths, and the cost
    of length limits. Warns about too few test rows, rows without labels, truncated text,
    placeholders and special tokens.
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
        # The error names some rows; print some of each kind.
        kinds = {bad.reason for bad in error.bad_rows}
        if len(kinds) > 1 or len(error.bad_rows) <= _MAX_SHOWN:
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
        # With on_long_row=split the counts are of pieces.
        unit = "pieces" if job.config.data.on_long_row == "split" else "rows"
        for name, counts in record["sets"].items():
            long = record["long_rows"].get(name, record["long_rows"].get("all"))
            out.print(
                f"  {name:10} {counts['rows']:6} {unit} {counts['tokens']:9} tokens; "
                f"{long['rows']} rows over {job.config.data.max_length} tokens "
                f"({long['policy']})",
                soft_wrap=True,
            )
    _print_facts(jobs[0])
    _print_warnings(jobs)
    out.print()
    _print_rows(jobs[0], rows)


_MAX_SHOWN = 5


def _print_bad_rows(bad_rows: Sequence[BadRow], prefix: str) -> None:
    """Print the first rows of each reason, and the number of further ones."""
    out = console()
    counts: Counter[str] = Counter()
    for bad in bad_rows:
        counts[bad.reason] += 1
        if counts[bad.reason] <= _MAX_SHOWN:
            out.print(f"{prefix}{bad.source}: {bad.reason}", soft_wrap=True)
    for reason, count in counts.items():
        if count > _MAX_SHOWN:
            out.print(f"{prefix}{count - _MAX_SHOWN} more rows: {reason}", soft_wrap=True)


_RELATIONS = {
    "group": "same named group",
    "prompt": "same prompt (ignoring case, punctuation and spacing)",
    "instruction": "same instruction in any context",
    "context": "same context",
    "near": "near-duplicate prompt",
    None: "related by data.group_by: kept together here",
}


def _print_facts(job: Job) -> None:
    from slm_lora.data.checks import dataset_statistics, text_role_marks
    from slm_lora.data.collate import label_count
    from slm_lora.data.tokenization import RowTokenizer
    from slm_lora.model.loading import load_tokenizer

    rows = job.rows.rows
    tokenize = RowTokenizer(load_tokenizer(job.source), job.data.template)
    examples, _ = tokenize.encode(rows, {row.row_id: row.row_id for row in rows})
    summary = dataset_statistics(rows, [example.length for example in examples], job.data.rule)
    out = console()

    def print_line(line: str) -> None:
        out.print(line, soft_wrap=True)

    if summary.related:
        print_line("\nrelated rows; share of test rows that a random 90/10 split by row would leak")
        for related in summary.related:
            print_line(
                f"  {_RELATIONS[related.relation]:55} {related.rows:6} rows in "
                f"{related.groups:5} groups  {related.leak:6.1%}"
            )
    if summary.cross_group_prompts:
        print_line(
            f"  rows with the same prompt as a row of another group: {summary.cross_group_prompts}"
        )
    prompts, answered = summary.conflicts
    print_line(f"\nprompts with conflicting answers: {prompts} ({answered} rows)")
    for mark in text_role_marks(tokenize, rows):
        occurrence = f"in {mark.rows} rows, first {mark.first}" if mark.rows else "in no row"
        print_line(f"role marker {mark.text!r} is ordinary text for the tokenizer: {occurrence}")
    if summary.categories:
        test_counts = Counter(example.category for example in job.data.test)
        print_line("\ncategory: rows, test rows")
        for name, count in summary.categories:
            print_line(f"  {printable(name):30} {count:6} {test_counts[name]:6}")
    labels = sorted(label_count(example, job.config.training.loss_on) for example in job.data.train)
    print_line(
        f"\nlabels per training row ({job.config.training.loss_on}): "
        f"{labels[0]} to {labels[-1]}, median {labels[len(labels) // 2]}"
    )
    print_line("\nlength in tokens before truncation: rows")
    largest = max(count for _, count in summary.lengths)
    for end, count in summary.lengths:
        print_line(f"  up to {end:6} {count:6} {'█' * round(40 * count / largest)}")
    for cost in summary.costs:
        print_line(
            f"  max_length {cost.limit:5} truncates {cost.rows:6.2%} of rows, "
            f"{cost.tokens:6.2%} of tokens"
        )


def _print_warnings(jobs: Sequence[Job]) -> None:
    out = console()
    out.print()
    for line in data_warnings(jobs):
        out.print(f"warning: {line}", soft_wrap=True)


def data_warnings(jobs: Sequence[Job]) -> list[str]:
    """One line for each likely mistake in the data."""
    from slm_lora.data.checks import few_test_rows

    job = jobs[0]
    lines = [
        few_test_rows(job.data.test),
        *_unlabelled_row_warnings(jobs),
        *_long_row_warnings(job),
        *_text_warnings(job),
    ]
    return [line for line in lines if line]


def _unlabelled_row_warnings(jobs: Sequence[Job]) -> list[str]:
    from slm_lora.data.collate import label_count

    lines = []
    for job in jobs:
        recipe, prepared = job.config, job.data
        for name, examples, loss_on, consequence in (
            ("training", prepared.train, recipe.training.loss_on, "training ignores them"),
            ("test", prepared.test, recipe.evaluation.headline, "the evaluation ignores them"),
        ):
            if n_unlabelled := sum(not label_count(example, loss_on) for example in examples):
                lines.append(
                    f"{n_unlabelled} of {len(examples)} {name} rows have no label token (loss on "
                    f"{loss_on}): {consequence}; either their prompts fill data.max_length = "
                    f"{recipe.data.max_length}, or the template renders no response"
                )
    return list(dict.fromkeys(lines))


def _long_row_warnings(job: Job) -> list[str]:
    data, long_rows = job.config.data, job.data.long
    rows = sum(counts.rows for counts in long_rows.values())
    if not rows or data.on_long_row not in ("truncate", "drop"):
        return []
    tokens = sum(counts.tokens_cut for counts in long_rows.values())
    consequence = "are truncated" if data.on_long_row == "truncate" else "are dropped"
    line = f"{rows} rows are longer than data.max_length = {data.max_length} and {consequence}"
    if data.on_long_row == "truncate":
        line += f" ({tokens} tokens)"
    if job.data.template.kind == "plain" and job.rows.format == "text":
        return [f"{line}; data.on_long_row=split uses the whole text, in pieces"]
    return [f"{line}; raise data.max_length to keep them whole"]


def _text_warnings(job: Job) -> list[str]:
    from slm_lora.data.chat_templates import default_template
    from slm_lora.data.checks import special_tokens_in_rows, undefined_names
    from slm_lora.data.placeholders import find_placeholders
    from slm_lora.data.tokenization import RowTokenizer
    from slm_lora.model.loading import load_tokenizer

    rows, template = job.rows.rows, job.data.template
    tokenizer = load_tokenizer(job.source)
    tokenize = RowTokenizer(tokenizer, template)
    lines = []
    if placeholders := find_placeholders(rows):
        more = ", …" if len(placeholders.placeholders) > 5 else ""
        examples = ", ".join(placeholders.placeholders[:5]) + more
        lines.append(
            f"{placeholders.rows} rows contain what looks like an unfilled placeholder "
            f"({examples}), first {placeholders.first}"
        )
    joined = [
        row
        for row, differs in zip(rows, tokenize.differs_from_prompt(rows), strict=True)
        if differs
    ]
    if joined:
        lines.append(
            f"{len(joined)} of {len(rows)} rows are tokenised differently in training and in "
            "generation, because a token spans the end of the prompt and the beginning of the "
            f"response, first {joined[0].source}; let prompts end without white space, and "
            "responses begin with it"
        )
    in_responses, in_prompts = special_tokens_in_rows(tokenize, rows)
    if in_responses:
        treatment = (
            "tokenised as special tokens (data.special_tokens_in_responses = special)"
            if template.special_in_responses
            else "tokenised as text; data.special_tokens_in_responses=special makes them special "
            "tokens"
        )
        lines.append(f"responses: {_describe_specials(in_responses)}; {treatment}")
    if in_prompts:
        lines.append(f"prompts: {_describe_specials(in_prompts)}; always tokenised as text")
    source = template.source if template.kind == "jinja" else default_template(tokenizer)
    if template.kind in ("jinja", "chat") and source is not None:
        unset = undefined_names(source, tokenizer.special_tokens_map.keys())
        if unset:
            lines.append(
                f"the chat template uses undefined names: {', '.join(unset)}; they count as empty "
                "or false"
            )
    return lines


def _describe_specials(specials: SpecialTokensInRows) -> str:
    tokens = ", ".join(f"{token} ({count})" for token, count in specials.tokens[:5])
    more = ", …" if len(specials.tokens) > 5 else ""
    return f"{specials.rows} rows contain special tokens ({tokens}{more}), first {specials.first}"
