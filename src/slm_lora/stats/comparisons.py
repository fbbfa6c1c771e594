"""Comparisons of an experiment: which settings, how they are paired, and the verdict on each.

A setting is a cell over its seeds. Every adapter is compared with its base, and settings that
differ in one key with their neighbour along it. This family follows from the recipe, before any
result is seen, and its p-values are corrected together (Holm).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from slm_lora.config.schema import EvaluationSection
from slm_lora.config.types import METHOD_LABELS
from slm_lora.runs.folder import Run
from slm_lora.runs.metrics import Metric
from slm_lora.runs.scored_run import ScoredRun, read_scored_run
from slm_lora.stats.estimates import Estimate, Paired, estimate, paired
from slm_lora.stats.inference import LEAST_GROUPS, Difference, difference, holm
from slm_lora.stats.power import Needed, needed_for_difference, needed_for_equivalence

Verdict = Literal["different", "equivalent", "inconclusive"]


@dataclass(frozen=True)
class Setting:
    """One setting of the grid over its seeds; the base model is a setting of one run."""

    runs: tuple[ScoredRun, ...]

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
        name, settings = self.first_run.run.cell, self.first_run.run.record.settings
        if len(self.runs) == 1:
            return name
        seeds = {f"seed{settings.get('seed')}", f"data{settings.get('data_seed')}"}
        parts = [part for part in name.split("-") if part not in seeds]
        return "-".join(parts) or f"r{self.setting('adapter.r')}"

    def setting(self, key: str) -> Any:
        """A dotted key of the resolved recipe."""
        return self.first_run.setting(key)

    @property
    def metric(self) -> Metric:
        """The headline of its runs."""
        return self.first_run.metric

    def estimate(self, metric: Metric | None = None) -> Estimate:
        """A metric (the headline), mean over seeds; its interval covers the choice of test rows."""
        return estimate([run.scores for run in self.runs], metric or self.metric)

    def within(self, category: str) -> Estimate:
        """As `estimate`, among the rows of a category."""
        runs = [[s for s in run.scores if s.category == category] for run in self.runs]
        return estimate(runs, self.metric)

    @property
    def training_rows(self) -> int:
        """Rows that it was trained on."""
        return self.first_run.run.record.data.sets.train.rows


@dataclass(frozen=True)
class Comparison:
    """Two settings that differ in one key.

    Attributes:
        key: that they differ in: ``base``, or a dotted key of the recipe.
        tied: other keys, whose values go one to one with those of ``key`` in all settings.
        first: the reference.
        second: the other; differences are second minus first.
        pairs: of runs, one per seed.
        sample: differences by seed and group.
        difference: with interval, p and equivalence.
        p_corrected: by Holm over all comparisons of the experiment.
        family: how many these are.
    """

    key: str
    tied: tuple[str, ...]
    first: Setting
    second: Setting
    pairs: tuple[tuple[ScoredRun, ScoredRun], ...]
    sample: Paired
    difference: Difference
    p_corrected: float
    family: int = 1

    @property
    def verdict(self) -> Verdict:
        """What interval, corrected p and equivalence test say together."""
        if self.difference.excludes_zero and self.p_corrected < 0.05:
            return "different"
        return "equivalent" if self.difference.equivalent else "inconclusive"

    @property
    def metric(self) -> Metric:
        """What is compared."""
        return self.first.metric

    @property
    def covers_seeds(self) -> bool:
        """Whether it may be said of the settings, not only of these very trainings."""
        return self.difference.seeds > 1

    @property
    def p_is_least(self) -> bool:
        """Whether more sign flips might have shown a smaller p."""
        return 0 < self.difference.p <= self.difference.p_least

    def needed(self) -> Needed | None:
        """Rows and seeds for 80 % power: to show the observed difference or, where even its
        interval is not far from zero, equivalence."""
        rows = len(self.first.first_run.scores)
        if abs(self.difference.value) < self.difference.margin:
            return needed_for_equivalence(self.sample, rows, self.difference.margin)
        return needed_for_difference(self.sample, rows, self.family)

    def record(self) -> dict[str, Any]:
        """For metrics.json, which has no infinity: what is not known is null."""
        d = self.difference
        known = self.sample.groups > 1
        return {
            "key": self.key,
            "tied": list(self.tied),
            "pairs": [[a.run.folder.name, b.run.folder.name] for a, b in self.pairs],
            "tokens": self.first.first_run.headline,
            "value": d.value,
            "low": d.low if known else None,
            "high": d.high if known else None,
            "covers": d.covers,
            "p": d.p,
            "p_least": d.p_least,
            "p_corrected": self.p_corrected,
            "equivalent": d.equivalent,
            "margin": d.margin,
            "seeds": d.seeds,
            "groups": d.groups,
            "verdict": self.verdict,
        }


def group_settings(runs: Sequence[ScoredRun]) -> list[Setting]:
    """Adapters' runs grouped by everything but the seeds, in the order of the runs."""
    groups: dict[str, list[ScoredRun]] = {}
    for run in runs:
        if not run.is_base:
            groups.setdefault(repr((_base_key(run), _settings(run))), []).append(run)
    return [Setting(tuple(group)) for group in groups.values()]


class _Pair(NamedTuple):
    """Two settings to compare, before any statistics."""

    key: str
    tied: tuple[str, ...]
    first: Setting
    second: Setting
    runs: tuple[tuple[ScoredRun, ScoredRun], ...]


def all_comparisons(runs: Sequence[ScoredRun]) -> list[Comparison]:
    """Every setting against its base, then neighbours along every key that varies."""
    settings = group_settings(runs)
    pairs = [*_with_bases(runs, settings), *_between(settings)]
    samples = [
        paired([(a.scores, b.scores) for a, b in pair.runs], pair.first.metric) for pair in pairs
    ]
    differences = [
        difference(sample, equivalence_margin(pair.first.first_run))
        for pair, sample in zip(pairs, samples, strict=True)
    ]
    corrected = holm([result.p for result in differences])
    return [
        Comparison(*pair, sample, result, p, len(pairs))
        for pair, sample, result, p in zip(pairs, samples, differences, corrected, strict=True)
    ]


def _with_bases(runs: Sequence[ScoredRun], settings: Sequence[Setting]) -> list[_Pair]:
    bases = {_base_key(run): run for run in runs if run.is_base}
    return [
        _Pair("base", (), Setting((base,)), setting, tuple((base, run) for run in setting.runs))
        for setting in settings
        if (base := bases.get(_base_key(setting.first_run)))
    ]


def _between(settings: Sequence[Setting]) -> list[_Pair]:
    adapters = [setting for setting in settings if not setting.is_full]
    full = [setting for setting in settings if setting.is_full]
    differing = [
        (key, tied, first, second)
        for kind in (adapters, full)
        for key, tied in varied(kind).items()
        for alike in _alike(kind, (key, *tied))
        for first, second in _neighbours(alike, key)
    ]
    pairs = []
    for key, tied, first, second in [*differing, *_against_full(adapters, full)]:
        if by_seed := _by_seed(first, second):  # the seeds that both have
            one, other = (Setting(tuple(pair[side] for pair in by_seed)) for side in (0, 1))
            pairs.append(_Pair(key, tied, one, other, by_seed))
    return pairs


def compare(first: Run, second: Run) -> Comparison:
    """Two runs, whatever they differ in, by the first's headline.

    Raises:
        IntegrityError: they were not scored on the same tokens of the same rows.
    """
    a, b = read_scored_run(first), read_scored_run(second)
    sample = paired([(a.scores, b.scores)], a.metric)
    result = difference(sample, equivalence_margin(a))
    return Comparison(
        "compare", (), Setting((a,)), Setting((b,)), ((a, b),), sample, result, result.p
    )


def by_category(comparison: Comparison) -> list[tuple[str, int, Difference]]:
    """The difference among the rows of every category: its name, its rows, the difference.

    Categories of fewer than `LEAST_GROUPS` groups are left out, as these are too few to resample;
    so are all beyond the twenty largest.
    """
    results = []
    scores = comparison.pairs[0][0].scores
    counts = Counter(score.category for score in scores if score.category).most_common(20)
    for category in sorted(name for name, rows in counts if rows >= LEAST_GROUPS):
        pairs = [
            tuple([score for score in run.scores if score.category == category] for run in pair)
            for pair in comparison.pairs
        ]
        sample = paired([(first, second) for first, second in pairs], comparison.metric)
        if sample.groups >= LEAST_GROUPS:
            result = difference(sample, comparison.difference.margin)
            results.append((category, len(pairs[0][0]), result))
    return results


def series_along(key: str, settings: Sequence[Setting]) -> list[list[Setting]]:
    """Settings that differ in ``key`` alone, a number, in its order; at least two of them each."""
    return [
        sorted(alike, key=lambda setting: amount(setting, key) or 0)
        for alike in _alike([setting for setting in settings if not setting.is_full], (key,))
    ]


def equivalence_margin(run: ScoredRun) -> float:
    """Margin of equivalence of a run's recipe, nats per token."""
    # Runs of before there was the key have the default.
    default = EvaluationSection().equivalence_margin
    return float(run.resolved["evaluation"].get("equivalence_margin", default))


def _base_key(run: ScoredRun) -> tuple[object, ...]:
    record = run.run.record
    return (
        record.model.sha256, record.model.precision, run.setting("model.quantization"),
        record.machine.device, record.data.held_out_sha256,
    )  # fmt: skip


def _settings(run: ScoredRun, without: Sequence[str] = ()) -> list[tuple[str, str]]:
    """The recipe flat, without seeds, and without some keys (the rank takes alpha/r along)."""
    recipe = {
        section: dict(value) if isinstance(value, dict) else value
        for section, value in run.resolved.items()
        if section not in ("seed", "data_seed", "seeds", "grid", "name", "description")
    }
    recipe["adapter"]["lora_alpha"] /= run.setting("adapter.r")
    flat = {
        f"{section}.{name}": repr(each)
        for section, value in recipe.items()
        for name, each in value.items()
    }
    return sorted((key, value) for key, value in flat.items() if key not in without)


def varied(settings: Sequence[Setting]) -> dict[str, tuple[str, ...]]:
    """Keys that differ between settings, and to each the keys that are tied to it.

    Rank and data size come first, then the rest by name. Keys are tied if every value of one
    goes with one value of the other: a learning rate for each method, say. They differ as one.
    """
    values: dict[str, list[str]] = {}
    for setting in settings:
        for key, value in _settings(setting.first_run):
            values.setdefault(key, []).append(value)
    shared = [key for key, each in values.items() if len(each) == len(settings) and "." in key]
    order = {key: place for place, key in enumerate(_FIRST)}
    found: dict[str, tuple[str, ...]] = {}
    for key in sorted(shared, key=lambda key: (order.get(key, len(order)), key)):
        if len(set(values[key])) < 2:
            continue
        for other in found:
            pairs = set(zip(values[other], values[key], strict=True))
            if len(pairs) == len(set(values[other])) == len(set(values[key])):
                found[other] += (key,)
                break
        else:
            found[key] = ()
    return found


def _against_full(
    adapters: Sequence[Setting], full: Sequence[Setting]
) -> list[tuple[str, tuple[str, ...], Setting, Setting]]:
    """Every adapter with the full training that differs from it in nothing else, but for keys,
    such as a learning rate, that have one value for all adapters and another for all weights."""

    def rest(setting: Setting) -> dict[str, str]:
        return {k: v for k, v in _settings(setting.first_run) if not k.startswith("adapter.")}

    def values(some: Sequence[Setting], key: str) -> set[str | None]:
        return {rest(setting).get(key) for setting in some}

    tied = tuple(
        key
        for key in sorted({key for setting in [*adapters, *full] for key in rest(setting)})
        if len(values(adapters, key)) == len(values(full, key)) == 1
        and values(adapters, key) != values(full, key)
    )

    def same(setting: Setting) -> object:
        return _base_key(setting.first_run), [
            pair for pair in rest(setting).items() if pair[0] not in tied
        ]

    return [
        ("adapter.kind", tied, one, other)
        for one in adapters
        for other in full
        if same(one) == same(other)
    ]


_FIRST = ("adapter.r", "data.size", "adapter.kind", "adapter.target_modules")


def _alike(settings: Sequence[Setting], keys: Sequence[str]) -> list[list[Setting]]:
    """Settings that differ in nothing but the keys."""
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        rest = repr((_base_key(setting.first_run), _settings(setting.first_run, without=keys)))
        groups.setdefault(rest, []).append(setting)
    return [group for group in groups.values() if len(group) > 1]


def _neighbours(alike: Sequence[Setting], key: str) -> list[tuple[Setting, Setting]]:
    """What has an order, each with the next; anything else, each with the first."""
    if all(amount(setting, key) is not None for setting in alike):
        return list(
            itertools.pairwise(sorted(alike, key=lambda setting: amount(setting, key) or 0))
        )
    first, *others = sorted(alike, key=lambda setting: _usual(setting.setting(key)))
    return [(first, other) for other in others]


def _usual(value: Any) -> tuple[int, str]:
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


def _by_seed(one: Setting, other: Setting) -> tuple[tuple[ScoredRun, ScoredRun], ...]:
    def seeds(run: ScoredRun) -> tuple[int, int]:
        return run.resolved["seed"], run.resolved["data_seed"]

    others = {seeds(run): run for run in other.runs}
    return tuple((run, others[seeds(run)]) for run in one.runs if seeds(run) in others)
