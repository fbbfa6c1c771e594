"""Contrasts over a grid: ends of an axis, main effects, interactions.

All are linear in the settings' losses, on the same rows and trainings, and a family of their own:
their p-values are corrected together (Holm), apart from the comparisons of neighbours.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from slm_lora.stats.comparisons import ALPHA
from slm_lora.stats.estimates import group_sums, paired_of_sums
from slm_lora.stats.inference import Difference, difference, holm
from slm_lora.stats.settings import (
    Setting,
    alike_settings,
    amount,
    base_key,
    draw_of,
    equivalence_margin,
    usual_order,
    varied,
)

KindName = Literal["ends", "main effect", "interaction"]


@dataclass(frozen=True)
class Contrast:
    """A sum of settings with coefficients.

    Attributes:
        kind: of contrast.
        key: whose effect it is about.
        low: a setting with the reference value of ``key``.
        high: a setting with the other value.
        over: of a main effect, the settings with the reference value that it averages over.
        by: of an interaction, the key that the effect is compared along.
        by_low: of an interaction, a setting with the reference value of ``by``.
        by_high: of an interaction, a setting with the other value of ``by``.
        difference: the contrast, with interval and p.
        p_corrected: by Holm over all contrasts of the experiment.
    """

    kind: KindName
    key: str
    low: Setting
    high: Setting
    over: tuple[Setting, ...]
    by: str
    by_low: Setting | None
    by_high: Setting | None
    difference: Difference
    p_corrected: float

    @property
    def significant(self) -> bool:
        """After correction."""
        return self.p_corrected < ALPHA

    def record(self) -> dict[str, Any]:
        """For metrics.json."""
        d = self.difference
        known = d.groups > 1
        return {
            "kind": self.kind,
            "key": self.key,
            "from": self.low.name,
            "to": self.high.name,
            "over": [setting.name for setting in self.over],
            "by": self.by or None,
            "by_from": self.by_low.name if self.by_low else None,
            "by_to": self.by_high.name if self.by_high else None,
            "value": d.value,
            "low": d.low if known else None,
            "high": d.high if known else None,
            "p": d.p,
            "p_corrected": self.p_corrected,
            "seeds": d.units,
        }


class _Terms(NamedTuple):
    """A contrast before any statistics."""

    kind: KindName
    key: str
    low: Setting
    high: Setting
    over: tuple[Setting, ...]
    by: str
    by_low: Setting | None
    by_high: Setting | None
    terms: tuple[tuple[float, Setting], ...]


def contrasts(settings: Sequence[Setting]) -> list[Contrast]:
    """All contrasts of the adapters of a grid, among those of one base model each."""
    by_base: dict[object, list[Setting]] = {}
    for setting in settings:
        if not setting.is_full:
            by_base.setdefault(base_key(setting.first_run), []).append(setting)
    planned = [terms for adapters in by_base.values() for terms in _planned(adapters)]
    margin = equivalence_margin(settings[0].first_run) if settings else 0.0
    computed = [
        (plan, result)
        for plan in planned
        if (result := _difference(plan.terms, margin)) is not None
    ]
    corrected = holm([result.p for _, result in computed])
    return [
        Contrast(*plan[:-1], result, p)
        for (plan, result), p in zip(computed, corrected, strict=True)
    ]


def _planned(adapters: Sequence[Setting]) -> list[_Terms]:
    keys = varied(adapters)
    return [
        *(term for key, tied in keys.items() for term in _ends(adapters, (key, *tied))),
        *(term for key, tied in keys.items() for term in _main_effects(adapters, (key, *tied))),
        *(
            term
            for (key, tied), (by, by_tied) in itertools.combinations(keys.items(), 2)
            for term in _interactions(adapters, (key, *tied), (by, *by_tied))
        ),
    ]


def _difference(terms: Sequence[tuple[float, Setting]], margin: float) -> Difference | None:
    """The sum over the trainings that all settings have; None without any."""
    by_draw = [{draw_of(run): run for run in setting.runs} for _, setting in terms]
    draws = [draw for draw in by_draw[0] if all(draw in runs for runs in by_draw)]
    # One common training of settings with several would cover the rows alone.
    if len(draws) < 2 <= max(map(len, by_draw)) or not draws:
        return None
    scores = [runs[draw].scores for runs in by_draw for draw in draws]
    sums, denominators = group_sums(scores, terms[0][1].metric)
    coefficients = np.array([coefficient for coefficient, _ in terms])
    shaped = sums.reshape(len(terms), len(draws), -1)
    total = np.tensordot(coefficients, shaped, axes=1)
    return difference(paired_of_sums(total, denominators, draws), margin)


def _levels(series: Sequence[Setting], key: str) -> list[Setting]:
    """Settings that differ in one key, in its order; what has none, the usual value first."""
    if all(amount(setting, key) is not None for setting in series):
        return sorted(series, key=lambda setting: amount(setting, key) or 0)
    return sorted(series, key=lambda setting: usual_order(setting.setting(key)))


def _steps(levels: Sequence[Setting], key: str) -> list[tuple[Setting, Setting]]:
    """What has an order, its ends; anything else, each value with the first; none of one value."""
    if len(levels) < 2:
        return []
    if all(amount(setting, key) is not None for setting in levels):
        return [(levels[0], levels[-1])]
    return [(levels[0], other) for other in levels[1:]]


def _ends(adapters: Sequence[Setting], keys: tuple[str, ...]) -> list[_Terms]:
    """The ends of every axis of three values or more, which no comparison of neighbours has."""
    planned = []
    for series in alike_settings(adapters, keys):
        levels = _levels(series, keys[0])
        if len(levels) > 2 and amount(levels[0], keys[0]) is not None:
            low, high = levels[0], levels[-1]
            terms = ((1.0, high), (-1.0, low))
            planned.append(_Terms("ends", keys[0], low, high, (), "", None, None, terms))
    return planned


def _value(setting: Setting, keys: Sequence[str]) -> str:
    return repr([setting.setting(key) for key in keys])


def _main_effects(adapters: Sequence[Setting], keys: tuple[str, ...]) -> list[_Terms]:
    """The effect of a key, averaged over all series along it that have both values."""
    pairs: dict[tuple[str, str], list[tuple[Setting, Setting]]] = {}
    for series in alike_settings(adapters, keys):
        for low, high in _steps(_levels(series, keys[0]), keys[0]):
            pairs.setdefault((_value(low, keys), _value(high, keys)), []).append((low, high))
    planned = []
    for several in pairs.values():
        if len(several) > 1:
            weight = 1 / len(several)
            terms = tuple(
                term for low, high in several for term in ((weight, high), (-weight, low))
            )
            over = tuple(low for low, _ in several)
            low, high = several[0]
            planned.append(_Terms("main effect", keys[0], low, high, over, "", None, None, terms))
    return planned


def _interactions(
    adapters: Sequence[Setting], keys: tuple[str, ...], by: tuple[str, ...]
) -> list[_Terms]:
    """How the effect of one key changes along another, at the ends of both."""
    planned = []
    for plane in alike_settings(adapters, (*keys, *by)):
        at = {(_value(setting, keys), _value(setting, by)): setting for setting in plane}
        for low, high in _steps(_levels(_distinct(plane, keys), keys[0]), keys[0]):
            for by_low, by_high in _steps(_levels(_distinct(plane, by), by[0]), by[0]):
                corners = [
                    at.get((_value(level, keys), _value(other, by)))
                    for other in (by_high, by_low)
                    for level in (high, low)
                ]
                complete = [corner for corner in corners if corner is not None]
                if len(complete) == 4:
                    terms = tuple(zip((1.0, -1.0, -1.0, 1.0), complete, strict=True))
                    _, other, high_corner, low_corner = complete
                    ends = (keys[0], low_corner, high_corner, (), by[0], low_corner, other)
                    planned.append(_Terms("interaction", *ends, terms))
    return planned


def _distinct(settings: Sequence[Setting], keys: Sequence[str]) -> list[Setting]:
    """One setting for each value of the keys."""
    return list({_value(setting, keys): setting for setting in settings}.values())
