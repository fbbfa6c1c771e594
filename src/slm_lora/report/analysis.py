"""Statistics of an experiment, computed once for all files of its report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slm_lora.report import tuning
from slm_lora.report.bases import base_facts
from slm_lora.report.card import Card, make_card
from slm_lora.report.names import SettingNames
from slm_lora.runs.metrics import METRICS
from slm_lora.runs.scored_run import ScoredRun, has_metric
from slm_lora.runs.tuning import TuningRecord
from slm_lora.stats import learning_curve
from slm_lora.stats.bases import BaseComparisons, compare_bases
from slm_lora.stats.comparisons import Comparison, all_comparisons
from slm_lora.stats.factorial import Contrast, contrasts
from slm_lora.stats.selection_regret import with_regrets
from slm_lora.stats.settings import (
    Setting,
    draw_of,
    equivalence_margin,
    group_settings,
    series_along,
)
from slm_lora.stats.tuned_arms import read_arms


@dataclass(frozen=True)
class Analysis:
    """Statistics of an experiment, computed once for all of its files.

    Attributes:
        runs: all of them, with their scores.
        settings: trained ones, over their seeds.
        bases: base models, untrained, in the order of the runs.
        comparisons: of the experiment, corrected together.
        other_metrics: comparisons in further metrics, a family each; a metric that not all runs
            have compares those that have it.
        contrasts: ends of axes, main effects, interactions; a family of their own.
        curves: loss against data size.
        names: of the settings.
        card: the result in a few lines.
        tuned: the search for each setting's own values; None without one.
        between: comparisons between bases; None where there is but one.
    """

    runs: tuple[ScoredRun, ...]
    settings: tuple[Setting, ...]
    bases: tuple[Setting, ...]
    comparisons: tuple[Comparison, ...]
    other_metrics: tuple[tuple[Comparison, ...], ...]
    contrasts: tuple[Contrast, ...]
    curves: tuple[learning_curve.LearningCurve, ...]
    names: SettingNames
    card: Card
    tuned: tuning.Tuned | None = None
    between: BaseComparisons | None = None


def analyse(
    runs: Sequence[ScoredRun],
    seen: frozenset[str] | None = None,
    choice: tuple[Path, TuningRecord] | None = None,
) -> Analysis:
    """Statistics of runs on the same test rows.

    Args:
        runs: of one experiment.
        seen: folders of the runs that its first report showed; None: this is the first.
        choice: folder of the experiment and its tuning.json, where the runs are at its values.

    Raises:
        IntegrityError: they were scored on different rows.
    """
    settings = group_settings(runs)
    arms = read_arms(*choice) if choice else []
    settings = with_regrets(settings, arms) if arms else settings
    comparisons = all_comparisons(runs, seen, settings)
    bases = [Setting((run,)) for run in runs if run.is_base]
    names = SettingNames(settings)
    curves = []
    for series in series_along("data.size", settings):
        if any(_crossed(point) for point in series):  # its resampling takes runs for seeds
            continue
        sized = [(point.training_rows, [run.scores for run in point.runs]) for point in series]
        name = names.series("data.size", series[0])
        if curve := learning_curve.fit(name, sized, series[0].metric):
            curves.append(curve)
    between = compare_bases(runs)
    # Losses of models with other tokenizers do not compare: the card is on one base's.
    lead = between.best if between else None
    anchor = lead.first_run if lead else bases[0].first_run if bases else runs[0]
    comparable = [setting for setting in settings if same_tokens(setting.first_run, anchor)]
    phase = tuning.tuned(choice[1], arms, comparisons) if choice else None
    card = make_card(comparable, bases, comparisons, equivalence_margin(runs[0]), names, phase)
    if between:
        recommended, *rest = card.facts or (None,)
        own = base_facts(between, names)
        facts = (*([recommended] if recommended else []), *own, *rest)
        card = replace(card, facts=facts)
    return Analysis(
        tuple(runs),
        tuple(settings),
        tuple(bases),
        tuple(comparisons),
        tuple(_in_other_metrics(runs, seen)),
        tuple(contrasts(settings)),
        tuple(curves),
        names,
        card,
        phase,
        between,
    )


def _in_other_metrics(
    runs: Sequence[ScoredRun], seen: frozenset[str] | None
) -> Iterator[tuple[Comparison, ...]]:
    for metric in METRICS.values():
        scored = [replace(run, headline=metric.name) for run in runs if has_metric(run, metric)]
        if metric.compared and metric.name != runs[0].headline and len(scored) > 1:
            yield tuple(all_comparisons(scored, seen))


def _crossed(setting: Setting) -> bool:
    """Whether several seeds share a draw of training rows, among several draws."""
    data_seeds = {draw_of(run).data_seed for run in setting.runs}
    return 1 < len(data_seeds) < len(setting.runs)


def same_tokens(first: ScoredRun, second: ScoredRun) -> bool:
    """Whether two runs were scored on the same token ids, so that their losses compare."""
    return all(
        run.run.record.data.held_out_sha256 == first.run.record.data.held_out_sha256
        for run in (first, second)
    )
