"""The end of `slm-lora tune`: which setting to use, what it gains, and what is not known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from slm_lora.config.axes import LEARNING_RATE
from slm_lora.report.analysis import Analysis
from slm_lora.report.card import Gap
from slm_lora.report.names import rate_name
from slm_lora.runs.tuning import ArmRecord, CandidateRecord, TuningRecord
from slm_lora.stats.comparisons import Comparison
from slm_lora.stats.estimates import perplexity
from slm_lora.stats.power import needed
from slm_lora.stats.settings import Setting, pair_runs, sample_of
from slm_lora.stats.tuned_arms import arm_of


@dataclass(frozen=True)
class Outcome:
    """The result of an experiment that tuned the learning rate of each setting.

    Attributes:
        analysis: of the experiment.
        recommended: the setting to use.
        base: the base model against it.
        to_base: the comparison of the recommended setting with its base.
        arm: the search for the recommended setting's learning rate.
    """

    analysis: Analysis
    recommended: Setting
    base: Gap
    to_base: Comparison
    arm: ArmRecord

    @property
    def is_better(self) -> bool:
        """Whether the recommended setting is shown to be better than the base."""
        difference = self.to_base.difference
        return self.to_base.verdict == "different" and difference.value < 0

    @property
    def margin(self) -> float:
        """Of equivalence, nats per token."""
        return self.analysis.card.margin

    @property
    def rate(self) -> float:
        """Learning rate of the recommended setting."""
        return float(self.recommended.setting(LEARNING_RATE))

    @property
    def tuning(self) -> TuningRecord:
        """The choices of all learning rates."""
        assert self.analysis.tuned is not None
        return self.analysis.tuned.record

    @property
    def usual(self) -> CandidateRecord | None:
        """The candidate at the common learning rate."""
        common = self.tuning.section.get("common_value")
        return next((c for c in self.arm.candidates if c.values[LEARNING_RATE] == common), None)

    @property
    def between(self) -> list[Comparison]:
        """Comparisons of settings with each other."""
        return [pair for pair in self.analysis.comparisons if pair.key != "base"]


def outcome_of(analysis: Analysis) -> Outcome | None:
    """The outcome of an experiment; None without a tuned learning rate, a recommended
    setting and its base."""
    recommended, base = analysis.card.recommended, analysis.card.base
    if analysis.tuned is None or LEARNING_RATE not in analysis.tuned.record.keys:
        return None
    if recommended is None or base is None:
        return None
    for pair in analysis.comparisons:
        if pair.key == "base" and pair.second.first_run is recommended.first_run:
            arm = analysis.tuned.arm_of(recommended)
            return Outcome(analysis, recommended, base, pair, arm)
    return None


def sentences(outcome: Outcome) -> list[str]:
    """The result, one statement each, in their order."""
    return [_headline(outcome), _gain(outcome), *_settings(outcome), *_rates(outcome)]


def _headline(outcome: Outcome) -> str:
    name = outcome.analysis.names.of(outcome.recommended)
    at = f"{name} at learning rate {rate_name(outcome.rate)}"
    if not outcome.is_better:
        return f"No adapter is shown to be better than the base; the best tried is {at}."
    lowest = outcome.analysis.card.lowest
    if lowest is None or lowest is outcome.recommended:
        return f"Use {at}: the lowest loss of {len(outcome.analysis.settings)} settings."
    other = outcome.analysis.names.of(lowest)
    return f"Use {at}: as good as {other} within {outcome.margin:g} nats, and cheaper."


def _gain(outcome: Outcome) -> str:
    base, after = outcome.base, outcome.recommended.estimate().value
    seeds, rows = len(outcome.recommended.runs), len(outcome.recommended.first_run.scores)
    shown = f"loss {after:.4f}, base {base.setting.estimate().value:.4f}"
    scored = f"{rows} test rows, {seeds} seed{'s' * (seeds > 1)}"
    change = _change(-base.value, -base.high, -base.low)
    return f"Perplexity {perplexity(after):.2f}: {change} the base; {shown}; {scored}."


def _change(nats: float, low: float, high: float) -> str:
    """A difference of losses as change of perplexity: ``31.2 % below (30.1 to 32.4 %)``."""
    value, ends = 100 * math.expm1(nats), sorted((100 * math.expm1(low), 100 * math.expm1(high)))
    if not all(map(math.isfinite, ends)):
        return f"{abs(value):.1f} % {'below' if value < 0 else 'above'}"
    if ends[1] < 0:
        return f"{-value:.1f} % ({-ends[1]:.1f} to {-ends[0]:.1f} %) below"
    if ends[0] > 0:
        return f"{value:.1f} % ({ends[0]:.1f} to {ends[1]:.1f} %) above"
    return f"{value:+.1f} % ({ends[0]:+.1f} to {ends[1]:+.1f} %) against"


def _settings(outcome: Outcome) -> Iterator[str]:
    """Whether smaller settings are equivalent to larger ones."""
    names = outcome.analysis.names
    for pair in outcome.between:
        small, large = names.of(pair.first), names.of(pair.second)
        d = pair.difference
        interval = f"{d.value:+.4f} nats"
        if math.isfinite(d.low + d.high):
            interval += f", {d.low:+.4f} to {d.high:+.4f}"
        if pair.negligible:
            yield f"{small} and {large} are equivalent within {d.margin:g} nats ({interval})."
        elif pair.verdict == "different":
            better, worse = (large, small) if d.value < 0 else (small, large)
            yield f"{better} is better than {worse} ({interval})."
        else:
            yield f"Not decided: {large} against {small} ({interval}){_would_decide(pair)}."


def _would_decide(pair: Comparison) -> str:
    enough = pair.needed()
    if enough is None:
        return ""
    seeds = f" and {enough.seeds} seeds" if enough.seeds else ""
    return f"; about {enough.rows:,} test rows{seeds} would decide"


def _rates(outcome: Outcome) -> Iterator[str]:
    candidates = [c for arm in outcome.tuning.arms for c in arm.candidates]
    stopped = sum(bool(c.stopped) for c in candidates)
    kept = sorted(c.values[LEARNING_RATE] for c in outcome.arm.kept)
    name = outcome.analysis.names.of(outcome.recommended)
    best = f"of {name}'s, {rate_name(kept[0])} to {rate_name(kept[-1])} may be the best"
    if len(kept) == 1:
        best = f"no other of {name}'s is as good"
    yield f"Learning rates: {len(candidates)} tried, {stopped} stopped early; {best}."
    usual = outcome.usual
    if usual is None:
        return
    rate = rate_name(usual.values[LEARNING_RATE])
    if usual.values == outcome.arm.chosen:
        yield f"It is the usual one: none of the others tried was better than {rate}."
    elif usual.loss is None:
        yield f"At the usual {rate} training was stopped: {usual.stopped}."
    else:
        value, low, high = usual.above_lowest or (math.nan,) * 3
        if not math.isfinite(value):  # one group of rows: no interval was recorded
            value = usual.loss - _loss_of_chosen(outcome.arm)
        interval = f" ({low:.3f} to {high:.3f})" if math.isfinite(low + high) else ""
        rows = outcome.tuning.validation_rows
        yield (
            f"At the usual {rate} the loss would be {value:.3f} nats higher{interval}, by "
            f"{rows} validation rows."
        )


def _loss_of_chosen(arm: ArmRecord) -> float:
    losses = [c.loss for c in arm.candidates if c.values == arm.chosen and c.loss is not None]
    return losses[0]


def not_known(outcome: Outcome) -> list[str]:
    """What the result does not cover, one phrase each."""
    run = outcome.recommended.first_run
    phrases = [f"rows unlike these {len(run.scores)}"]
    if not outcome.is_better and (decides := _would_decide(outcome.to_base)):
        phrases.append(f"a gain too small for these rows{decides}")
    if len(outcome.recommended.runs) == 1:
        phrases.append("other seeds (one was trained)")
    for end in outcome.arm.edges.values():
        word, most = ("larger", "largest") if end == "high" else ("smaller", "smallest")
        phrases.append(f"{word} learning rates ({rate_name(outcome.rate)} is the {most} tried)")
    if wanted := _validation_rows(outcome):
        rows = outcome.tuning.validation_rows
        enough = f"about {wanted:,}" if wanted <= MOST_TIMES * rows else "many more"
        phrases.append(f"which rate is best ({enough} validation rows would tell, here {rows})")
    facts = {fact.label: fact.text for fact in outcome.analysis.card.facts}
    if "Training length" in facts:
        phrases.append(f"longer training ({facts['Training length'].partition(':')[0]})")
    return phrases


MOST_TIMES = 50
"""A number of rows so many times the present one is no plan."""


def _validation_rows(outcome: Outcome) -> int:
    """Validation rows that tell the chosen rate from the others that may be the best, if the
    difference is the margin; 0 where there are none, or enough rows."""
    assert outcome.analysis.tuned is not None
    searched = arm_of(outcome.recommended, outcome.analysis.tuned.arms)
    assert searched is not None
    rows, chosen = outcome.tuning.validation_rows, searched.at(outcome.arm.chosen)
    rivals = [
        setting
        for index, setting in searched.settings.items()
        if outcome.arm.candidates[index].kept and setting is not chosen
    ]
    if chosen is None:
        return 0
    samples = [sample_of(pair_runs(chosen, rival), chosen.metric) for rival in rivals]
    plans = [needed(sample, rows, outcome.margin) for sample in samples]
    most = max((plan.rows for plan in plans if plan is not None), default=0)
    return most if most > rows else 0


def record(outcome: Outcome) -> dict[str, Any]:
    """For ``--json``; what is not known is null."""
    names, analysis = outcome.analysis.names, outcome.analysis
    d, base, usual = outcome.to_base.difference, outcome.base, outcome.usual
    after = outcome.recommended.estimate().value
    before = base.setting.estimate().value
    document = {
        "better_than_base": outcome.is_better,
        "recommended": {
            "setting": names.of(outcome.recommended),
            "adapter.r": outcome.recommended.setting("adapter.r"),
            LEARNING_RATE: outcome.rate,
            "loss": after,
            "perplexity": perplexity(after),
            "seeds": len(outcome.recommended.runs),
        },
        "base": {"loss": before, "perplexity": perplexity(before)},
        "gain": {
            "nats": base.value,
            "low": base.low,
            "high": base.high,
            "verdict": outcome.to_base.verdict,
            "p_corrected": outcome.to_base.p_corrected,
            "covers": d.covers,
        },
        "settings": [
            {
                "first": names.of(pair.first),
                "second": names.of(pair.second),
                "difference": pair.difference.value,
                "low": pair.difference.low,
                "high": pair.difference.high,
                "verdict": pair.verdict,
                "equivalent": pair.negligible,
            }
            for pair in outcome.between
        ],
        "usual": None
        if usual is None
        else {
            LEARNING_RATE: usual.values[LEARNING_RATE],
            "validation_loss": usual.loss,
            "lost": usual.above_lowest and list(usual.above_lowest),
            "chosen": usual.values == outcome.arm.chosen,
        },
        "summary": sentences(outcome),
        "not_known": not_known(outcome),
        "card": analysis.card.record(names),
        "tuning": [arm.model_dump(mode="json") for arm in outcome.tuning.arms],
    }
    return {key: _finite(value) for key, value in document.items()}


def _finite(value: Any) -> Any:
    """The value with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
