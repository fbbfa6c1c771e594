"""Comparisons between base models: bits per byte, and metrics that tokens do not enter.

Tokenizers cut the same text into different numbers of tokens, so losses per token of two bases do
not compare. Bits per byte do, on rows of which both scored the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from slm_lora.runs.metrics import BY_JUDGE, METRICS, Metric
from slm_lora.runs.scored_run import ScoredRun, has_metric
from slm_lora.stats.comparisons import Comparison, SettingPair, correct_together
from slm_lora.stats.settings import (
    Pairs,
    Setting,
    flat_settings,
    group_settings,
    pair_runs,
    varied,
)

MODEL = "model.name"
"""Key of comparisons between bases."""


@dataclass(frozen=True)
class BaseComparisons:
    """Each further base against the first, untuned and in every setting that both have.

    Attributes:
        bases: of the grid, untuned, in the order of its runs, with ``metric`` as headline.
        settings: trained ones, likewise.
        metric: ``bits_per_byte``, or that of the response where more rows agree in its bytes.
        rows: test rows of which all bases scored the same bytes.
        left_out: the others, such as rows truncated by one base only.
        comparisons: in ``metric``, a family; other minus first.
        other_metrics: likewise in metrics of replies, a family each.
    """

    bases: tuple[Setting, ...]
    settings: tuple[Setting, ...]
    metric: Metric
    rows: int
    left_out: int
    comparisons: tuple[Comparison, ...]
    other_metrics: tuple[tuple[Comparison, ...], ...]

    @property
    def best(self) -> Setting | None:
        """The trained setting of the lowest bits per byte, or the untuned base; None without
        common rows."""
        return min(
            self.settings or self.bases,
            key=lambda setting: setting.estimate().value,
            default=None,
        )

    def record(self) -> dict[str, Any]:
        """For metrics.json."""
        return {
            "metric": self.metric.name,
            "rows": self.rows,
            "left_out": self.left_out,
            "comparisons": [pair.record() for pair in self.comparisons],
            "other_metrics": {
                pairs[0].metric.name: [pair.record() for pair in pairs]
                for pairs in self.other_metrics
            },
        }


def compare_bases(runs: Sequence[ScoredRun]) -> BaseComparisons | None:
    """Comparisons between the bases of an experiment; None where it has but one.

    Args:
        runs: of one experiment, all on the same test rows.
    """
    if len({base_model(run) for run in runs}) < 2:
        return None
    names = ("bits_per_byte", "response_bits_per_byte")
    if runs[0].headline == "response":
        names = names[::-1]
    rows = {name: _common_rows(runs, METRICS[name]) for name in names}
    name = max(names, key=lambda name: len(rows[name]))
    common = _on_common_rows(runs, METRICS[name])
    others = [
        _on_common_rows([run for run in runs if has_metric(run, metric)], metric)
        for metric in METRICS.values()
        # Changes from a base, and preferences over its replies, do not compare with another's.
        if metric.compared and not metric.own_rows and metric.scope != BY_JUDGE
    ]
    return BaseComparisons(
        tuple(Setting((run,)) for run in common if run.is_base) if rows[name] else (),
        tuple(group_settings(common)) if rows[name] else (),
        METRICS[name],
        len(rows[name]),
        len({score.row_id for run in runs for score in run.scores}) - len(rows[name]),
        tuple(correct_together(_pairs(common))) if rows[name] else (),
        tuple(tuple(pairs) for some in others if (pairs := correct_together(_pairs(some)))),
    )


def base_model(run: ScoredRun) -> tuple[object, object]:
    """SHA-256 of the base's weights, and their quantisation."""
    return run.run.record.model.sha256, run.setting("model.quantization")


def _on_common_rows(runs: Sequence[ScoredRun], metric: Metric) -> list[ScoredRun]:
    """Runs with the metric as headline, on the test rows that compare in it."""
    if metric.task:  # its documents are those of all
        return [replace(run, headline=metric.name) for run in runs]
    rows = _common_rows(runs, metric)
    return [
        replace(
            run,
            headline=metric.name,
            scores=tuple(score for score in run.scores if score.row_id in rows),
        )
        for run in runs
    ]


def _common_rows(runs: Sequence[ScoredRun], metric: Metric) -> set[str]:
    """Ids of the rows that all runs have with one denominator, such as equally many bytes. A long
    prompt may have no room for a reply with one tokenizer only."""
    counts = Counter((score.row_id, metric.parts(score)[1]) for run in runs for score in run.scores)
    return {row for (row, size), count in counts.items() if size and count == len(runs)}


def _pairs(runs: Sequence[ScoredRun]) -> list[SettingPair]:
    """Each further base, then each of its settings, with its counterpart on the first base."""
    if not runs:
        return []
    reference = base_model(runs[0])
    settings = group_settings(runs)
    keys = _keys_of_model(settings)
    tied = tuple(key for key in keys if not key.startswith("model."))
    pairs = []
    untuned = {base_model(run): Setting((run,)) for run in runs if run.is_base}
    for model, base in untuned.items():
        if model != reference and reference in untuned:
            first = untuned[reference]
            both: Pairs = ((first.first_run, base.first_run),)
            pairs.append(SettingPair(MODEL, (), first, base, both))
    counterparts = {
        _rest(setting, keys): setting
        for setting in settings
        if base_model(setting.first_run) == reference
    }
    for setting in settings:
        first_setting = counterparts.get(_rest(setting, keys))
        if first_setting is None or first_setting is setting:
            continue
        if by_seed := pair_runs(first_setting, setting):
            first, second = (
                replace(one, runs=tuple(pair[side] for pair in by_seed))
                for side, one in enumerate((first_setting, setting))
            )
            pairs.append(SettingPair(MODEL, tied, first, second, by_seed))
    return pairs


def _keys_of_model(settings: Sequence[Setting]) -> list[str]:
    """Keys of the model, and those whose values go one to one with them, such as a template."""
    return [
        name
        for key, tied in varied(settings).items()
        if any(own.startswith("model.") for own in (key, *tied))
        for name in (key, *tied)
    ]


def _rest(setting: Setting, without: Sequence[str]) -> str:
    return repr(flat_settings(setting.first_run, without))
