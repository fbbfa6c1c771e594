"""The sections of a report, in their order: the answer first, its evidence folded below."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slm_lora.report import examples, figures, method, sentences, tuning
from slm_lora.report.analysis import Analysis, same_tokens
from slm_lora.report.bases import base_section
from slm_lora.report.blocks import Picture, Section, markdown_table, plain
from slm_lora.report.forgetting import forgetting_section
from slm_lora.report.judge import judge_section
from slm_lora.report.names import SettingNames, key_name
from slm_lora.report.setup import not_shown, setup
from slm_lora.report.summary import (
    MOST_INTERVALS,
    category_table,
    comparisons_table,
    contrasts_table,
    doubling_tables,
    metrics_table,
    settings_table,
)
from slm_lora.report.tables import runs_text
from slm_lora.runs.folder import METRICS_FILE, named
from slm_lora.runs.metrics import BY_JUDGE, METRICS, OF_REPLIES
from slm_lora.runs.scored_run import ScoredRun, has_metric
from slm_lora.stats.categories import by_category, p_alike
from slm_lora.stats.comparisons import ALPHA
from slm_lora.stats.inference import LEAST_GROUPS, holm
from slm_lora.stats.selection import pareto_set
from slm_lora.stats.settings import (
    Setting,
    series_along,
)


def sections(
    analysis: Analysis, results: Path, quoted: examples.Quoted | None = None
) -> list[Section]:
    """Everything below the card."""
    names, settings, comparisons = analysis.names, analysis.settings, analysis.comparisons
    between = [pair for pair in comparisons if pair.key != "base"]
    note = method.untuned(comparisons)
    phase = analysis.tuned
    forests = [
        figures.forest(
            "against-base",
            [pair for pair in comparisons if pair.key == "base"],
            "Against the base",
            names,
        ),
        figures.forest("between-settings", between, "Between settings", names),
    ]
    effects = [
        *map(figures.learning_curve, analysis.curves),
        *(
            figures.perplexity_along(key, key_name(key), series_along(key, settings), names)
            for key in ("adapter.r", "data.size")
        ),
    ]
    return [
        Section(
            "Settings",
            settings_table(analysis.card, settings, analysis.bases, names, phase, analysis.between)
            + "\nLoss in nats per token (lower is better), mean over seeds. Time: mean per "
            "training. Memory: largest peak over seeds. Against the recommended: setting minus "
            "recommended; intervals are for one setting at a time, that of the base allows for the "
            "selection of the recommended setting." + _pareto(settings, names),
            anchor="settings",
        ),
        *([base_section(analysis.between, names)] if analysis.between else []),
        *([tuning.section(phase, settings, names)] if phase else []),
        *forgetting_section(settings, analysis.bases, names),
        Section(
            "All comparisons",
            "\n\n".join(filter(None, [note, _LEGEND, comparisons_table(comparisons, names)])),
            _present(forests),
            anchor="comparisons",
            folded=True,
        ),
        *_contrasts(analysis),
        *_scaling(analysis, _present(effects)),
        *_metrics(analysis),
        Section("Every run", runs_text(analysis.runs), anchor="runs", folded=True),
        *_categories(analysis),
        *examples.rows(comparisons, quoted, names),
        Section(
            "Training",
            _training(settings, names),
            _present(
                [figures.training_curves(settings, names), figures.time_and_loss(settings, names)]
            ),
            anchor="training",
            folded=True,
        ),
        Section(
            "Method",
            "\n\n".join(
                [method.description(analysis.runs, comparisons), method.confounds(comparisons)]
            ),
            anchor="method",
            folded=True,
        ),
        Section("Setup", setup(analysis.runs, results), anchor="setup", folded=True),
        *judge_section(analysis.runs, settings, names, results),
        *examples.replies(results),
    ]


_LEGEND = (
    "Lower, higher, equivalent: significant at 5 % after correction for all comparisons. By seed: "
    "smallest to largest difference. Next seed: 95 % prediction interval for one more seed on the "
    "same test rows."
)


def question(analysis: Analysis) -> str:
    """The question of the experiment."""
    return method.question(analysis.runs, analysis.settings, analysis.comparisons)


def answer_picture(analysis: Analysis) -> Picture | None:
    """The one figure that carries the answer."""
    return figures.gaps(analysis.card, analysis.names)


def _present(pictures: Sequence[Picture | None]) -> tuple[Picture, ...]:
    return tuple(picture for picture in pictures if picture is not None)


def _training(settings: Sequence[Setting], names: SettingNames) -> str:
    if not settings:
        return "Nothing was trained."
    rows = []
    for setting in settings:
        record = setting.first_run.run.record.trained
        numbers = [f"{record.steps}", f"{record.tokens:,}", f"{record.last_step_loss:.3f}"]
        rows.append([plain(names.of(setting)), *numbers])
    table = markdown_table(["Setting", "Steps", "Tokens", "Last training loss"], rows)
    several = any(len(setting.runs) > 1 for setting in settings)
    return table + ("\nFirst seed of each setting." if several else "")


def _pareto(settings: Sequence[Setting], names: SettingNames) -> str:
    if len(settings) < 2:
        return ""
    comparable = [
        setting for setting in settings if same_tokens(setting.first_run, settings[0].first_run)
    ]
    best = pareto_set(comparable)
    listed = _most([*map(names.of, best)], [*map(names.of, settings)], "settings")
    return f" Pareto-optimal in loss, training tokens and trained weights: {listed}."


def _most(chosen: Sequence[str], everything: Sequence[str], noun: str) -> str:
    """Some of many names; where they are most of them, the others."""
    others = [name for name in everything if name not in chosen]
    if not others:
        return f"all {noun}"
    if len(others) < len(chosen):
        return plain(f"all {noun} but {'; '.join(others)}")
    return plain("; ".join(chosen))


def _contrasts(analysis: Analysis) -> list[Section]:
    if not analysis.contrasts:
        return []
    text = (
        f"{contrasts_table(analysis.contrasts, analysis.names)}\nAn interaction is the effect at "
        "one value minus the effect at another. p-values are corrected for these "
        f"{len(analysis.contrasts)} contrasts (Holm), separately from the comparisons above."
    )
    return [Section("Main effects and interactions", text, anchor="contrasts", folded=True)]


def _scaling(analysis: Analysis, pictures: tuple[Picture, ...]) -> list[Section]:
    items = "\n".join(f"- {sentences.curve_text(curve)}" for curve in analysis.curves)
    tables = doubling_tables(analysis.comparisons, analysis.names)
    text = "\n".join(filter(None, [tables, items]))
    if not text and not pictures:
        return []
    return [
        Section("Effect of doubling rank or data", text, pictures, anchor="scaling", folded=True)
    ]


def _metrics(analysis: Analysis) -> list[Section]:
    table = metrics_table(analysis.card, analysis.settings, analysis.bases, analysis.names)
    if not table:
        return []
    note = (
        "Means over seeds. Last row: paired difference, 95 % interval, not corrected for the "
        "number of metrics. *Mean over rows* averages the loss of each row, so short rows count as "
        "much as long ones."
    )
    note += " Intervals below do not include the choice of tuned values." * bool(analysis.tuned)
    parts = [f"{table}\n{note}", *_unscored(analysis.runs)]
    for pairs in analysis.other_metrics:
        if pairs:
            metric = pairs[0].metric
            better = "higher" if metric.higher_is_better else "lower"
            parts.append(
                f"### {metric.title}\n\nOver {metric.scope}; {better} is better. p-values are "
                f"corrected for the {len(pairs)} comparisons in this metric.\n\n"
                f"{comparisons_table(pairs, analysis.names, level=4)}"
            )
    return [Section("All metrics", "\n\n".join(parts), anchor="metrics", folded=True)]


def _unscored(runs: Sequence[ScoredRun]) -> list[str]:
    """A line for each metric that some runs have and others, scored before it existed, lack."""
    lines = []
    for metric in METRICS.values():
        lacking = [run.run.folder.name for run in runs if not has_metric(run, metric)]
        if lacking and len(lacking) < len(runs):
            remedy = "scored before it was computed: remove these runs and run the experiment again"
            if metric.scope == BY_JUDGE:
                remedy = "whose replies were not compared: run `slm-lora judge` again"
            if metric.task or metric.own_rows or metric.scope == OF_REPLIES:
                section = "tasks" if metric.task else "forgetting" if metric.own_rows else "replies"
                remedy = f"which have none: run the experiment with its section `{section}` again"
            lines.append(f"{metric.title} is not in {plain(named(lacking))}, {remedy} to have it.")
    return lines


def _categories(analysis: Analysis) -> list[Section]:
    table = category_table(analysis.settings, analysis.bases, analysis.names)
    if not table:
        return []
    pictures = []
    to_base = [
        pair
        for pair in analysis.comparisons
        if pair.key == "base"
        and analysis.card.recommended is not None
        and pair.second.first_run is analysis.card.recommended.first_run
    ]
    for pair in to_base[:1]:
        second, first = analysis.names.of(pair.second), analysis.names.of(pair.first)
        pictures.append(figures.categories(by_category(pair), second, first))
    columns = len(analysis.settings) + len(analysis.bases)
    intervals = (
        " Unpaired 95 % intervals cover the choice of test rows; categories with fewer than "
        f"{LEAST_GROUPS} groups have none."
        if columns <= MOST_INTERVALS
        else f" Intervals are in {METRICS_FILE}."
    )
    text = f"Held-out loss in nats per token.{intervals}{_alike(analysis)}"
    return [
        Section(
            "By category",
            f"{text}\n\n{table}",
            _present(pictures),
            anchor="categories",
            folded=True,
        )
    ]


def _alike(analysis: Analysis) -> str:
    """Comparisons whose difference is not the same in all categories."""
    tested = [(pair, p) for pair in analysis.comparisons if (p := p_alike(pair)) is not None]
    if not tested:
        return ""
    corrected = holm([p for _, p in tested])
    pairs = [
        f"{analysis.names.of(pair.second)} vs {analysis.names.of(pair.first)}" for pair, _ in tested
    ]
    unlike = [pair for pair, p in zip(pairs, corrected, strict=True) if p < ALPHA]
    count = len(analysis.comparisons)
    tests = f"{count}" if len(tested) == count else f"{len(tested)} of {count}"
    test = (
        f" Wald test of equal differences in all categories ({tests} comparisons, Holm; these "
        "trainings only; small differences between categories are rarely found):"
    )
    if not unlike:
        return f"{test} no difference varies significantly between categories."
    return f"{test} the difference varies significantly for {_most(unlike, pairs, 'comparisons')}."


def table_text(analysis: Analysis, results: Path) -> str:
    """The table of all runs with its notes, for a file of its own."""
    others = not_shown([run.run for run in analysis.runs], results)
    return runs_text(analysis.runs) + (f"\n\n{plain(others)}" if others else "")
