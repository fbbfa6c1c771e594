"""Limits of an experiment, one line each: seeds, learning rate, edges, length, test set."""

from __future__ import annotations

from collections.abc import Sequence

from slm_lora.config.axes import LEARNING_RATE
from slm_lora.report import tuning
from slm_lora.report.blocks import Fact
from slm_lora.report.names import SettingNames, key_name, rate_name
from slm_lora.report.tuning import Tuned
from slm_lora.stats.comparisons import Comparison
from slm_lora.stats.power import failure_bound
from slm_lora.stats.settings import (
    Setting,
    alike_settings,
    amount,
    draw_of,
    series_along,
    varied,
)

FEW_STEPS = 100
"""Fewer optimizer steps are pointed out."""


STILL_FALLING = 0.02
"""Relative fall of the training loss from the fourth to the last fifth of the steps that is
pointed out."""


def limits(
    recommended: Setting,
    settings: Sequence[Setting],
    comparisons: Sequence[Comparison],
    names: SettingNames,
    phase: Tuned | None = None,
) -> list[Fact]:
    """Lines on seeds, learning rate, edges of the grid, training length and test set."""
    facts = tuning.facts(phase, settings, names) if phase else []
    facts += [_seed_fact(recommended, settings, comparisons), *_look_fact(comparisons)]
    if phase is None or LEARNING_RATE not in phase.record.keys:
        facts.append(_rate_fact(recommended, settings, comparisons))
    facts += _edge_fact(recommended, settings)
    facts += _training_fact(settings, names)
    facts.append(_test_set_fact(recommended))
    return facts


def _seed_fact(
    recommended: Setting, settings: Sequence[Setting], comparisons: Sequence[Comparison]
) -> Fact:
    draws = [draw_of(run) for run in recommended.runs]
    if max(len(setting.runs) for setting in settings) == 1:
        text = (
            "one: differences are between these trainings and may not repeat with other seeds "
            "(to test: `seeds: [0, 1, 2]` in the recipe)."
        )
        return Fact("Seeds", text, "method")
    seeds, data_seeds = ({draw[side] for draw in draws} for side in (0, 1))
    text = f"{len(seeds)}" if len(seeds) > 1 else "one"
    if len(data_seeds) > 1 and len(data_seeds) * len(seeds) == len(draws):
        text += f", on each of {len(data_seeds)} draws of training rows"
    to_base = [
        pair.difference
        for pair in comparisons
        if pair.key == "base" and pair.second.first_run is recommended.first_run
    ]
    if to_base and to_base[0].units > 1:
        units, against = to_base[0].units, to_base[0].units - to_base[0].agreeing
        bound = 100 * failure_bound(units, against)
        text += (
            f"; {units - against} of {units} {to_base[0].unit}s agree in the sign of the "
            f"difference to the base, up to {bound:.0f} % of all may not (95 % confidence)"
        )
    return Fact("Seeds", f"{text}.", "method")


def _look_fact(comparisons: Sequence[Comparison]) -> list[Fact]:
    added = [comparison for comparison in comparisons if comparison.added]
    if not added:
        return []
    text = (
        f"in {len(added)} of {len(comparisons)} comparisons seeds were added after the first "
        "report: false differences are more likely than 5 %."
    )
    return [Fact("Added seeds", text, "comparisons")]


SPEED_KEYS = ("adapter.r", "adapter.kind", "adapter.target_modules", "adapter.lora_alpha")
"""Keys whose values learn at different speeds at one learning rate."""


def _rate_fact(
    recommended: Setting, settings: Sequence[Setting], comparisons: Sequence[Comparison]
) -> Fact:
    rates = sorted({float(setting.setting(LEARNING_RATE)) for setting in settings})
    tried = ", ".join(map(rate_name, rates))
    full = [setting for setting in settings if setting.is_full]
    if len(settings) == 1:
        text = f"{tried}, not tuned."
    elif len(rates) == 1 and any(pair.key in SPEED_KEYS for pair in comparisons):
        text = (
            f"{tried} for all settings: this compares how fast they learn, not how well each does "
            "at its best rate (to compare that: `tuning:` in the recipe)."
        )
    elif len(rates) == 1:
        text = (
            f"{tried} for all settings, not tuned: at other rates the order of the settings may "
            "change."
        )
    elif not (series_along(LEARNING_RATE, settings) or alike_settings(full, (LEARNING_RATE,))):
        text = f"one per setting ({tried}), not tuned: the order may change at other rates."
    else:
        text = (
            f"{rate_name(float(recommended.setting(LEARNING_RATE)))}, selected from {tried} on the "
            "test rows, so its loss is optimistic."
        )
    return Fact("Learning rate", text, "method")


def _edge_fact(recommended: Setting, settings: Sequence[Setting]) -> list[Fact]:
    """Numbers of the recommended setting that are the largest or smallest tried."""
    adapters = [setting for setting in settings if not setting.is_full]
    if recommended.is_full or len(adapters) < 2:
        return []
    edges = []
    for key in varied(adapters):
        amounts = [amount(setting, key) for setting in adapters]
        own = amount(recommended, key)
        if own is None or None in amounts or key == "adapter.target_modules":
            continue
        for extreme, word in ((max, "largest"), (min, "smallest")):
            if own == extreme(number for number in amounts if number is not None):
                value = rate_name(own) if key == LEARNING_RATE else f"{own:g}"
                shown = f"{recommended.setting(key) or 'all'} rows" if key == "data.size" else value
                edges.append(f"{shown} is the {word} {key_name(key)} tried")
    if not edges:
        return []
    return [
        Fact("Edge of the grid", f"{'; '.join(edges)}: values beyond may be better.", "settings")
    ]


def _training_fact(settings: Sequence[Setting], names: SettingNames) -> list[Fact]:
    steps = {names.of(setting): setting.first_run.run.record.trained.steps for setting in settings}
    few = [name for name, count in steps.items() if count < FEW_STEPS]
    falling = [names.of(setting) for setting in settings if _still_falling(setting)]
    parts = []
    if few:
        counts = sorted({steps[name] for name in few})
        span = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        parts.append(f"only {span} optimizer steps in {_listed(few, len(settings))}")
    if falling:
        parts.append(f"training loss still falling at the end in {_listed(falling, len(settings))}")
    if not parts:
        return []
    return [Fact("Training length", f"{'; '.join(parts)}: longer training may help.", "training")]


def _listed(names: Sequence[str], total: int) -> str:
    if len(names) == total:
        return "all settings" if total > 1 else "this setting"
    if len(names) > 2:
        return f"{len(names)} of {total} settings"
    alone = len(names) == 1 or not any("," in name for name in names)
    return " and ".join(name if alone else f"({name})" for name in names)


def _still_falling(setting: Setting) -> bool:
    losses = [step["loss"] for step in setting.first_run.run.steps()]
    fifth = len(losses) // 5
    if fifth < 4:
        return False
    before, last = losses[-2 * fifth : -fifth], losses[-fifth:]
    return bool(sum(last) < (1 - STILL_FALLING) * sum(before))


def _test_set_fact(recommended: Setting) -> Fact:
    run = recommended.first_run
    groups = recommended.estimate().groups
    few = (
        "; with fewer than 300 rows small differences are often inconclusive"
        if len(run.scores) < 300
        else ""
    )
    return Fact("Test set", f"{len(run.scores)} rows in {groups} groups{few}.", "setup")
