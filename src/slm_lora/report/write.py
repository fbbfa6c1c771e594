"""Write the files of an experiment: table, metrics, report, figures. Reads run folders only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from slm_lora.config.conditions import Condition, parse_ship, ship_record
from slm_lora.errors import UsageError
from slm_lora.report import contents, examples
from slm_lora.report.analysis import Analysis, analyse
from slm_lora.report.blocks import Picture, Section
from slm_lora.report.drawing import svg_file
from slm_lora.report.forgetting import forgetting_records
from slm_lora.report.html import as_html
from slm_lora.report.markdown import as_markdown
from slm_lora.report.summary import category_names
from slm_lora.report.tuning import tuned_keys
from slm_lora.runs.folder import METRICS_FILE, Run, read_table, to_json
from slm_lora.runs.metrics import METRICS, mean_over_rows
from slm_lora.runs.scored_run import ScoredRun, has_metric, read_scored_runs
from slm_lora.runs.tuning import read_tuning
from slm_lora.runtime.storage import atomic_write_text
from slm_lora.stats.estimates import estimate

TABLE_FILE, REPORT_FILE, PAGE_FILE = "experiment_table.md", "report.md", "report.html"
WITH_ROWS_FILE = "report-with-rows.html"
FIGURES = "figures"
"""Folder of the figures, SVG."""


def write_report(
    runs: Sequence[Run],
    results: Path,
    headline: str | None = None,
    quoted: examples.Quoted | None = None,
    ship: Mapping[str, str] | None = None,
) -> Analysis:
    """Write the files of an experiment.

    Args:
        runs: of one experiment.
        results: its folder.
        headline: tokens behind the table; None: those of the first run.
        quoted: its data set: a second page, `WITH_ROWS_FILE`, quotes some rows. It is for readers
            who may see the data; the other files never quote it.
        ship: conditions of `slm-lora verdict`; None: those of the report before.

    Returns:
        The statistics that the files show.

    Raises:
        UsageError: there are no runs, or they were scored on other rows.
        IntegrityError: a run's scores are broken, or runs were scored on different rows.
    """
    if not runs:
        raise UsageError(f"{results}: no finished run in it")
    table_before = read_table(results)
    first = table_before.first_report if table_before else ()
    first = first or tuple(run.folder.name for run in runs)
    conditions = parse_ship(ship) if ship is not None else table_before.ship if table_before else ()
    analysis = read_analysis(runs, results, headline, frozenset(first))
    title = analysis.runs[0].run.record.experiment
    question, answer = contents.question(analysis), contents.answer_picture(analysis)
    sections = contents.sections(analysis, results)
    # Numbers first, text and figures after them.
    table = contents.table_text(analysis, results)
    atomic_write_text(results / TABLE_FILE, f"# {title}\n\n{table}\n")
    atomic_write_text(results / METRICS_FILE, to_json(_metrics(analysis, first, conditions)))
    _write_figures(results / FIGURES, _pictures(answer, sections))
    page = (title, question, analysis.card, answer)
    atomic_write_text(results / REPORT_FILE, as_markdown(*page, sections, FIGURES))
    atomic_write_text(results / PAGE_FILE, as_html(*page, sections))
    if quoted is not None:
        sections = contents.sections(analysis, results, quoted)
        atomic_write_text(results / WITH_ROWS_FILE, as_html(*page, sections))
    return analysis


def read_analysis(
    runs: Sequence[Run],
    results: Path,
    headline: str | None = None,
    first: frozenset[str] | None = None,
) -> Analysis:
    """Statistics of the runs, each setting at its own value of tuned keys where these were chosen
    by the experiment's tuning.json.

    Args:
        runs: of one experiment.
        results: its folder.
        headline: metric of the card; None: that of the first run.
        first: run folders of the first report; None: this is the first.

    Raises:
        IntegrityError: scores are broken, or of different rows.
    """
    record = read_tuning(results)
    scored = read_scored_runs(runs, headline)
    keys = tuned_keys(record, scored)
    scored = [replace(run, tuned=keys) for run in scored]
    return analyse(scored, first, (results, record) if record and keys else None)


def _pictures(answer: Picture | None, sections: Sequence[Section]) -> list[Picture]:
    inside = [picture for section in sections for picture in section.pictures]
    return [*([answer] if answer else []), *inside]


def _write_figures(folder: Path, pictures: Sequence[Picture]) -> None:
    """Write the figures; those of an earlier report that are no longer made are removed."""
    for picture in pictures:
        atomic_write_text(folder / f"{picture.name}.svg", svg_file(picture))
    current = {f"{picture.name}.svg" for picture in pictures}
    for path in folder.glob("*.svg") if folder.is_dir() else ():
        if path.name not in current and _is_ours(path):
            path.unlink()


def _is_ours(path: Path) -> bool:
    return "<title>slm-lora: " in path.read_text(encoding="utf-8", errors="replace")[:2000]


def _scored(run: ScoredRun) -> list[str]:
    """Losses that the run recorded, and further metrics of its rows."""
    return [
        name
        for name, metric in METRICS.items()
        if run.run.record.evaluation.loss(name) or (metric.compared and has_metric(run, metric))
    ]


def _metrics(
    analysis: Analysis, first_report: Sequence[str], ship: Sequence[Condition]
) -> dict[str, Any]:
    runs = analysis.runs
    settings = [*analysis.bases, *analysis.settings]
    records = forgetting_records(analysis.settings, analysis.names)
    return {
        "experiment": runs[0].run.record.experiment,
        "card": analysis.card.record(analysis.names),
        "first_report": sorted(first_report),
        **({"ship": ship_record(ship)} if ship else {}),
        "runs": [
            {
                "folder": run.run.folder.name,
                **{key: value for key, value in run.run.raw.items() if key != "folder"},
                "intervals": {
                    name: estimate([run.scores_of(METRICS[name])], METRICS[name]).record()
                    for name in _scored(run)
                },
                "mean_over_rows": {
                    name: estimate(
                        [run.scores_of(METRICS[name])], mean_over_rows(METRICS[name])
                    ).record()
                    for name in _scored(run)
                },
            }
            for run in runs
        ],
        "categories": [
            {"arm": setting.name, "category": name, **setting.within(name).record()}
            for setting in settings
            for name in category_names(setting)
        ],
        "contrasts": [pair.record() for pair in analysis.comparisons],
        "other_metrics": {
            pairs[0].metric.name: [pair.record() for pair in pairs]
            for pairs in analysis.other_metrics
            if pairs
        },
        "grid_contrasts": [contrast.record() for contrast in analysis.contrasts],
        **({"forgetting": records} if records else {}),
        **({"tuning": analysis.tuned.summary()} if analysis.tuned else {}),
        **({"bases": analysis.between.record()} if analysis.between else {}),
        "learning_curves": [curve.record() for curve in analysis.curves],
    }
