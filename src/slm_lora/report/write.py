"""Write what came out of an experiment: table, metrics, report. Reads run folders only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from slm_lora.errors import UsageError
from slm_lora.records import LossOn
from slm_lora.report import analysis, examples, figures
from slm_lora.report.figures import Picture
from slm_lora.report.html import Section, as_html, as_markdown, plain
from slm_lora.report.tables import MEASURED, cells, header, losses_table, markdown_table
from slm_lora.runs.folder import METRICS_FILE, Run, named, run_folders, to_json
from slm_lora.runs.scored_run import ScoredRun, read_scored_runs
from slm_lora.runtime.storage import atomic_write_text
from slm_lora.stats import learning_curve
from slm_lora.stats.comparisons import (
    Comparison,
    Setting,
    all_comparisons,
    arms,
    by_category,
    series_along,
)
from slm_lora.stats.estimates import loss_estimate, mean_over_rows, perplexity
from slm_lora.stats.inference import LEAST_GROUPS

TABLE_FILE, REPORT_FILE, PAGE_FILE = "experiment_table.md", "report.md", "report.html"
WITH_ROWS_FILE = "report-with-rows.html"


def write_report(
    runs: Sequence[Run],
    results: Path,
    headline: LossOn | None = None,
    quoted: examples.Quoted | None = None,
) -> list[ScoredRun]:
    """Write the files of an experiment and return the table's lines.

    Args:
        runs: of one experiment.
        results: its folder.
        headline: tokens behind the table; unset, those of the first run.
        quoted: its data set: a second page, `WITH_ROWS_FILE`, shows some rows with their text. It
            is for those who may read the data; the other files never quote it.

    Raises:
        UsageError: there are no runs, or they were scored on other rows.
        IntegrityError: a run's scores are broken, or runs were scored on different rows.
    """
    if not runs:
        raise UsageError(f"{results}: no finished run in it")
    lines = read_scored_runs(runs, headline)
    found = all_comparisons(lines)
    curves = _curves(lines)
    title = lines[0].run.record["experiment"]
    # Numbers first, words and pictures after them.
    others = not_shown(runs, results)
    table = _table(lines) + (f"\n\n{plain(others)}" if others else "")
    atomic_write_text(results / TABLE_FILE, f"# {title}\n\n{table}\n")
    atomic_write_text(results / METRICS_FILE, to_json(_metrics(lines, found, curves)))
    sections = _sections(lines, found, curves, results)
    atomic_write_text(results / REPORT_FILE, as_markdown(title, sections))
    atomic_write_text(results / PAGE_FILE, as_html(title, sections))
    if quoted is not None:
        sections = _sections(lines, found, curves, results, quoted)
        atomic_write_text(results / WITH_ROWS_FILE, as_html(title, sections))
    return lines


def not_shown(runs: Sequence[Run], results: Path) -> str:
    """One line on finished runs that lie in an experiment's folder besides these; else empty."""
    shown = {run.folder.name for run in runs}
    others = [path.name for path in run_folders(results / "runs") if path.name not in shown]
    if not others:
        return ""
    return (
        f"{len(others)} other finished run{'s' * (len(others) > 1)} in {results.name}/runs, not "
        f"in this table: {named(others)}. The recipe that made them makes their table again, "
        "without training; slm-lora compare compares any two."
    )


def terminal_table(lines: Sequence[ScoredRun]) -> Table:
    """The described columns for a terminal, with the interval of the perplexity."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    titles = header(lines)
    shown = len(titles) - len(MEASURED)
    for index, title in enumerate([*titles[:shown], "95 % interval"]):
        side: Literal["left", "right"] = "left" if index == 0 else "right"
        table.add_column(title, justify=side, no_wrap=index > 0, overflow="fold")
    for line in lines:
        loss = loss_estimate([line.scores], line.headline)
        interval = f"{perplexity(loss.low):.2f} – {perplexity(loss.high):.2f}"
        table.add_row(*cells(line, lines)[:shown], interval)
    return table


def _curves(lines: Sequence[ScoredRun]) -> list[learning_curve.LearningCurve]:
    fitted = []
    for series in series_along("data.size", arms(lines)):
        sized = [(arm.training_rows, [line.scores for line in arm.lines]) for arm in series]
        name = figures.name_without("data.size", series[0])
        if found := learning_curve.fit(name, sized, series[0].line.headline):
            fitted.append(found)
    return fitted


def _sections(
    lines: Sequence[ScoredRun],
    found: Sequence[Comparison],
    curves: Sequence[learning_curve.LearningCurve],
    results: Path,
    quoted: examples.Quoted | None = None,
) -> list[Section]:
    tuned = arms(lines)
    base = next((line for line in lines if line.is_base), None)
    others = [each for each in found if each.key != "base"]
    pictures = [
        figures.forest([each for each in found if each.key == "base"], "Against the base"),
        figures.forest(others, "Between trainings"),
        *(
            figures.perplexity_against(key, analysis.name_of(key), series_along(key, tuned))
            for key in ("adapter.r", "data.size")
        ),
    ]
    return [
        Section("Question", analysis.question(lines, tuned, found)),
        Section("Answer", analysis.answer(found), _there(pictures)),
        Section("Table", _table(lines)),
        Section(
            "Diminishing returns",
            analysis.returns(found, curves),
            _there([*map(figures.learning_curve, curves), figures.cost(tuned)]),
        ),
        *_categories(lines, found, tuned, base),
        *examples.rows(found, quoted),
        Section("Training", _trained(tuned), _there([figures.training_curves(tuned)])),
        Section(
            "What the numbers are",
            "\n\n".join([analysis.basis(lines, found), analysis.confounds(found)]),
        ),
        Section("Setup", _setup(lines, results)),
        *examples.replies(results),
    ]


def _trained(tuned: Sequence[Setting]) -> str:
    said = []
    for arm in tuned:
        record = arm.line.run.record["training"]
        said.append(
            f"- {arm.name}: {record['steps']} steps over {record['tokens']:,} tokens, last loss "
            f"{record['last_step_loss']:.3f}"
            + (f", first of {len(arm.lines)} seeds" if len(arm.lines) > 1 else "")
        )
    return "\n".join(said) or "Nothing was trained."


def _there(pictures: Sequence[Picture | None]) -> tuple[Picture, ...]:
    return tuple(each for each in pictures if each is not None)


def _categories(
    lines: Sequence[ScoredRun],
    found: Sequence[Comparison],
    tuned: Sequence[Setting],
    base: ScoredRun | None,
) -> list[Section]:
    text = analysis.category_table(tuned, base)
    if not text:
        return []
    to_base = [each for each in found if each.key == "base"]
    pictures = []
    if to_base:
        best = min(to_base, key=lambda each: each.difference.value)
        pictures.append(figures.categories(by_category(best), best.second.name, best.first.name))
    said = (
        "Held-out loss, nats a token, with 95 % intervals over the choice of test rows where a "
        f"category has {LEAST_GROUPS} groups of them or more."
    )
    return [Section("By category", f"{said}\n\n{text}", _there(pictures))]


def _table(lines: Sequence[ScoredRun]) -> str:
    record = lines[0].run.record
    data, machine = record["data"], record["machine"]
    tokens = "the whole text" if lines[0].headline == "all" else "the response"
    test = data["sets"]["test"]
    notes = [
        f"Eval Loss: total negative log-likelihood over the tokens of {tokens} (end-of-sequence "
        f"token included), in nats a token, on the same {test['rows']} test rows for every line; "
        "Perplexity is exp of that number.",
        f"Base: {record['model']['name']}, {record['model']['precision']}; "
        f"data: {data['origin']}; template: {data['template']['kind']}; seed(s): "
        + ", ".join(map(str, sorted({line.recipe["seed"] for line in lines})))
        + ".",
        f"Run on {machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB"
        + (f", {machine['gpu']}" if "gpu" in machine else "")
        + ". Tokens/s counts real tokens of training, the first two steps left out.",
    ]
    return (
        f"{markdown_table(lines)}\n"
        + "\n".join(f"- {note}" for note in notes)
        + f"\n\n### Whole text, with 95 % intervals\n\n{losses_table(lines, 'all')}"
        + f"\n### Response only, with 95 % intervals\n\n{losses_table(lines, 'response')}\n"
        "Intervals cover the choice of test rows, not the training seed. Mean over rows: of each "
        "row's own loss a token, so that short rows count as much as long ones."
    )


def _setup(lines: Sequence[ScoredRun], results: Path) -> str:
    record = lines[0].run.record
    data, model = record["data"], record["model"]
    sets = {line.run.cell: line.run.record["data"]["sets"] for line in lines if not line.is_base}
    sets = sets or {lines[0].run.cell: data["sets"]}
    trained = sorted({each["train"]["rows"] for each in sets.values()})
    first = data["sets"]
    facts = [
        f"Model: {model['name']}"
        + (f", revision {model['revision']}" if model["revision"] else "")
        + f"; SHA-256 of its weights {model['sha256'][:16]}…; computed in {model['precision']}.",
        f"Data: {plain(data['origin'])}, format {data['format']}, template "
        f"{data['template']['kind']}; "
        f"{data['rows_available']} rows in {data['groups']} groups of related rows "
        f"({_relations(record)}; split version {data['split_version']}).",
        f"Left out: {data['duplicates_dropped']} exact duplicates, {data['bad_rows_skipped']} "
        "malformed rows.",
        f"Sets: {first['test']['rows']} test rows ({first['test']['tokens']} tokens), "
        f"{first['validation']['rows']} validation rows, "
        + " and ".join(map(str, trained))
        + f" training rows; SHA-256 of the held-out tokens {data['held_out_sha256'][:16]}….",
        *_cut_rows(lines),
        "Versions: " + ", ".join(f"{k} {v}" for k, v in record["versions"].items()) + ".",
        f"Runs: {', '.join(f'`{line.run.folder.name}`' for line in lines)}.",
    ]
    again = (
        "The resolved recipe, every hash and every number are in `metrics.json`, the loss of every "
        "test row in `runs/*/scores.parquet`. The same recipe on the same rows and base gives the "
        "same hashes, which end the names of the run folders. This file is made from them by:"
    )
    command = f"slm-lora report results/{results.name}"
    if others := not_shown([line.run for line in lines], results):
        facts.append(plain(others))
    return "\n".join(f"- {each}" for each in facts) + f"\n\n{again}\n\n```\n{command}\n```"


def _relations(record: Mapping[str, Any]) -> str:
    """What tied the rows: the recipe's relations, or what there was before a recipe named them."""
    named = {
        "group": "same named group",
        "prompt": "same prompt",
        "instruction": "same instruction",
        "context": "same context",
        "near": "nearly the same prompt",
    }
    chosen = record["recipe"]["data"].get("group_by")
    if chosen is not None:
        return ", ".join(named[each] for each in chosen) or "none: every row by itself"
    near = ", or nearly the same prompt" if record["data"]["split_version"] > 1 else ""
    return f"same instruction, context or named group{near}"


def _cut_rows(lines: Sequence[ScoredRun]) -> list[str]:
    counted = lines[0].run.record["data"]["long_rows"]
    which, test = ("test rows", counted["test"]) if "test" in counted else ("rows", counted["all"])
    if not test["rows"]:
        return []
    limit = lines[0].setting("data.max_length")
    if test["policy"] == "split":
        return [
            f"{test['rows']} {which} were longer than {limit} tokens, and were split into pieces, "
            f"which count as rows here (the longest row had {test['longest']} tokens)."
        ]
    return [
        f"{test['rows']} {which} were longer than {limit} tokens ({test['policy']}; "
        f"{test['tokens_cut']} tokens cut, the longest row had {test['longest']})."
    ]


def _scored(line: ScoredRun) -> list[LossOn]:
    kinds: tuple[LossOn, ...] = ("all", "response")
    return [tokens for tokens in kinds if tokens in line.run.record["evaluation"]]


def _metrics(
    lines: Sequence[ScoredRun],
    found: Sequence[Comparison],
    curves: Sequence[learning_curve.LearningCurve],
) -> dict[str, Any]:
    return {
        "experiment": lines[0].run.record["experiment"],
        "runs": [
            {
                "folder": line.run.folder.name,
                **line.run.record,
                "intervals": {
                    tokens: loss_estimate([line.scores], tokens).record()
                    for tokens in _scored(line)
                },
                "mean_over_rows": {
                    tokens: mean_over_rows([line.scores], tokens).record()
                    for tokens in _scored(line)
                },
            }
            for line in lines
        ],
        "categories": [
            {"arm": arm.name, "category": name, **arm.within(name).record()}
            for arm in [Setting((line,)) for line in lines if line.is_base] + arms(lines)
            for name in analysis.category_names(arm)
        ],
        "contrasts": [each.record() for each in found],
        "learning_curves": [each.record() for each in curves],
    }  # fmt: skip
