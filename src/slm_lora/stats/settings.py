"""Settings of a grid: runs grouped over their seeds, the keys that vary, and their order."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slm_lora.config.grid import name_without_seeds
from slm_lora.config.schema import EvaluationSection
from slm_lora.config.types import METHOD_LABELS
from slm_lora.errors import UsageError
from slm_lora.runs.metrics import Metric
from slm_lora.runs.scored_run import ScoredRun
from slm_lora.stats.estimates import (
    Draw,
    Estimate,
    Paired,
    estimate,
    group_sums,
    paired,
    paired_of_sums,
)
from slm_lora.stats.regret import NO_REGRET, Regret


@dataclass(frozen=True)
class Setting:
    """One setting of the grid over its seeds; the base model is a setting of one run.

    Attributes:
        runs: one per seed.
        regret: of its tuned values, in the headline; none without tuning.
    """

    runs: tuple[ScoredRun, ...]
    regret: Regret = NO_REGRET

    @property
    def is_full(self) -> bool:
        """Whether all weights were trained: keys of an adapter have no effect then."""
        return bool(self.setting("adapter.kind") == "full")

    @property
    def first_run(self) -> ScoredRun:
        """The first seed's run: settings are those of all."""
        return self.runs[0]

    @property
    def name(self) -> str:
        """Name of the cell, without the seed where there are several."""
        name, draw = self.first_run.run.cell, draw_of(self.first_run)
        if len(self.runs) == 1:
            return name
        return name_without_seeds(name, draw.seed, draw.data_seed, self.setting("adapter.r"))

    def setting(self, key: str) -> Any:
        """A dotted key of the resolved recipe."""
        return self.first_run.setting(key)

    @property
    def metric(self) -> Metric:
        """The headline of its runs."""
        return self.first_run.metric

    def estimate(self, metric: Metric | None = None) -> Estimate:
        """A metric (the headline), mean over seeds; its interval covers the choice of test rows."""
        metric = metric or self.metric
        return estimate([run.scores_of(metric) for run in self.runs], metric)

    def within(self, category: str) -> Estimate:
        """As `estimate`, among the rows of a category."""
        runs = [[s for s in run.scores if s.category == category] for run in self.runs]
        return estimate(runs, self.metric)

    @property
    def trainable_weights(self) -> int:
        """Weights that were trained."""
        return self.first_run.run.record.saved.trainable_parameters

    @property
    def training_rows(self) -> int:
        """Rows that it was trained on."""
        return self.first_run.run.record.data.sets.train.rows


def group_settings(runs: Sequence[ScoredRun]) -> list[Setting]:
    """Adapters' runs grouped by everything but the seeds, in the order of the runs."""
    groups: dict[str, list[ScoredRun]] = {}
    for run in runs:
        if not run.is_base:
            groups.setdefault(repr((base_key(run), flat_settings(run))), []).append(run)
    for group in groups.values():
        twice = [draw for draw, count in Counter(map(draw_of, group)).items() if count > 1]
        if twice:
            same = [run.run.folder.name for run in group if draw_of(run) == twice[0]]
            raise UsageError(
                f"{' and '.join(same)} have the same settings and seeds, but other training rows; "
                "move all but one of them away"
            )
    return [Setting(tuple(group)) for group in groups.values()]


Pairs = tuple[tuple[ScoredRun, ScoredRun], ...]
"""Runs of two settings, one pair per training."""


def draw_of(run: ScoredRun) -> Draw:
    """What a training drew at random."""
    return Draw(run.resolved["seed"], run.resolved["data_seed"])


def pair_runs(first: Setting, second: Setting) -> Pairs:
    """Runs of two settings with the same seeds; the base model goes with every run."""
    if first.first_run.is_base:
        return tuple((first.first_run, run) for run in second.runs)
    if second.first_run.is_base:
        return tuple((run, second.first_run) for run in first.runs)
    others = {draw_of(run): run for run in second.runs}
    return tuple((run, others[draw_of(run)]) for run in first.runs if draw_of(run) in others)


def common_draws(settings: Sequence[Setting]) -> set[Draw]:
    """Seeds that all settings were trained with."""
    return set.intersection(*({draw_of(run) for run in setting.runs} for setting in settings))


def sample_of(pairs: Pairs, metric: Metric) -> Paired:
    """Paired differences, second minus first, by what was drawn independently."""
    draws = [draw_of(first if second.is_base else second) for first, second in pairs]
    scores = [(first.scores_of(metric), second.scores_of(metric)) for first, second in pairs]
    return paired(scores, metric, draws)


def values_of(setting: Setting, metric: Metric) -> Paired:
    """A setting's own values, without another to compare with, by what was drawn independently."""
    sums, denominators = group_sums([run.scores_of(metric) for run in setting.runs], metric)
    return paired_of_sums(sums, denominators, [draw_of(run) for run in setting.runs])


def series_along(key: str, settings: Sequence[Setting]) -> list[list[Setting]]:
    """Settings that differ in ``key`` alone, a number, in its order; at least two of them each."""
    return [
        sorted(alike, key=lambda setting: amount(setting, key) or 0)
        for alike in alike_settings(
            [setting for setting in settings if not setting.is_full], (key,)
        )
    ]


def equivalence_margin(run: ScoredRun) -> float:
    """Margin of equivalence of a run's headline, in its unit."""
    if run.metric.own_rows:
        return run.row_sets[run.headline].margin
    if run.metric.margin is not None:
        return run.metric.margin
    # Runs of before there was the key have the default.
    default = EvaluationSection().equivalence_margin
    return float(run.resolved["evaluation"].get("equivalence_margin", default))


def base_key(run: ScoredRun) -> tuple[object, ...]:
    """Base model, precision, device and test rows: runs compare only if these are equal."""
    record = run.run.record
    return (
        record.model.sha256, record.model.precision, run.setting("model.quantization"),
        record.machine.device, record.data.held_out_sha256,
    )  # fmt: skip


def base_of(setting: Setting, bases: Sequence[Setting]) -> Setting | None:
    """The base model that a setting was trained on, among some."""
    own = base_key(setting.first_run)
    return next((base for base in bases if base_key(base.first_run) == own), None)


def flat_settings(run: ScoredRun, without: Sequence[str] = ()) -> list[tuple[str, str]]:
    """The recipe flat, without seeds, tuned keys and some others (the rank takes alpha/r along)."""
    recipe = {
        section: dict(value) if isinstance(value, dict) else value
        for section, value in run.resolved.items()
        if section not in ("seed", "data_seed", "seeds", "grid", "name", "description")
    }
    recipe["adapter"]["lora_alpha"] /= run.setting("adapter.r")
    flat = {
        f"{section}.{name}": repr(entry)
        for section, value in recipe.items()
        for name, entry in value.items()
    }
    left_out = {*without, *run.tuned}
    return sorted((key, value) for key, value in flat.items() if key not in left_out)


def varied(settings: Sequence[Setting]) -> dict[str, tuple[str, ...]]:
    """Keys that differ between settings, and to each the keys that are tied to it.

    Rank and data size come first, then the rest by name. Keys are tied if every value of one
    goes with one value of the other: a learning rate for each method, for example.
    """
    values: dict[str, list[str]] = {}
    for setting in settings:
        for key, value in flat_settings(setting.first_run):
            values.setdefault(key, []).append(value)
    shared = [key for key, listed in values.items() if len(listed) == len(settings) and "." in key]
    order = {key: place for place, key in enumerate(_FIRST)}
    tied: dict[str, tuple[str, ...]] = {}
    for key in sorted(shared, key=lambda key: (order.get(key, len(order)), key)):
        if len(set(values[key])) < 2:
            continue
        for other in tied:
            pairs = set(zip(values[other], values[key], strict=True))
            if len(pairs) == len(set(values[other])) == len(set(values[key])):
                tied[other] += (key,)
                break
        else:
            tied[key] = ()
    return tied


_FIRST = ("adapter.r", "data.size", "adapter.kind", "adapter.target_modules")


def alike_settings(settings: Sequence[Setting], keys: Sequence[str]) -> list[list[Setting]]:
    """Settings that differ in nothing but the keys."""
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        rest = repr((base_key(setting.first_run), flat_settings(setting.first_run, without=keys)))
        groups.setdefault(rest, []).append(setting)
    return [group for group in groups.values() if len(group) > 1]


def neighbours(alike: Sequence[Setting], key: str) -> list[tuple[Setting, Setting]]:
    """What has an order, each with the next; anything else, each with the first."""
    if all(amount(setting, key) is not None for setting in alike):
        return list(
            itertools.pairwise(sorted(alike, key=lambda setting: amount(setting, key) or 0))
        )
    first, *others = sorted(alike, key=lambda setting: usual_order(setting.setting(key)))
    return [(first, other) for other in others]


def usual_order(value: Any) -> tuple[int, str]:
    """Order of what has no size: LoRA comes before its variations."""
    order = list(METHOD_LABELS)
    return (order.index(value) if value in order else len(order)), str(value)


def amount(setting: Setting, key: str) -> float | None:
    """The setting as a number, where it has an order: data size in training rows (unset, it is
    all of them), target modules in weights that train."""
    if key == "data.size":
        return setting.training_rows
    if key == "adapter.target_modules":
        return setting.first_run.run.record.saved.trainable_parameters
    value = setting.setting(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def shared_rows(run: ScoredRun) -> float:
    """Share of its training rows that a second random draw of as many has in common with the first,
    on average: their number over that of all rows to draw from."""
    data = run.run.record.data
    pool = data.rows_available - data.sets.test.rows - data.sets.validation.rows
    return min(1.0, data.sets.train.rows / pool) if pool > 0 else 1.0
