"""Comparing settings at their own best values, the choice of these values included.

Each setting is trained at the value of a tuned key (a learning rate) that was chosen by validation.
The *regret* of the choice is the loss at the chosen value minus the lowest among the values that
were tried, both expected losses. The difference of two settings at their own best values is that at
the chosen values, minus the regret of the second setting, plus the regret of the first. Regrets are
at least zero, so the ordinary interval ``d ± h`` is widened by their upper bounds. Validation and
tuning seeds are independent of test rows and final seeds, so lengths add as in the method of
variance estimates recovery (Zou and Donner 2008): ``d - √(h² + U_second²)`` to
``d + √(h² + U_first²)``, all at the same one-sided level.

`make calibration` measures the rates of this interval and of other ways to include the choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from slm_lora.stats.clustered import Floats, clustered_covariance
from slm_lora.stats.estimates import Paired, group_sums
from slm_lora.stats.inference import LEAST_GROUPS, Difference, interval, p_below
from slm_lora.stats.regret import CONFIDENCE, Contrasts, Regret
from slm_lora.stats.settings import Setting, common_draws, draw_of
from slm_lora.stats.tuned_arms import TunedArm, arm_of

WINDOW = math.log(5) + 0.1
"""Half width of a fitted curve, in the logarithm of the value: a factor of five either way, with
room for rounded values."""
LEAST_FITTED = 4
"""Values that a curve of three parameters is fitted to, at least."""


def pooled_training_variance(settings: Sequence[Setting]) -> tuple[float | None, float]:
    """Variance of one run's loss between seeds, in the unit of the loss squared, pooled over
    settings, and its degrees of freedom; None from settings of one seed each."""
    squares, freedom = 0.0, 0
    for setting in settings:
        numerators, denominators = group_sums([run.scores for run in setting.runs], setting.metric)
        losses = numerators.sum(1) / denominators.sum()
        squares += float(((losses - losses.mean()) ** 2).sum())
        freedom += len(losses) - 1
    return (squares / freedom, float(freedom)) if freedom else (None, 0.0)


def regret_bound(
    candidates: Sequence[Setting],
    chosen: Setting,
    values: Sequence[float] | None,
    training_variance: float | None,
    freedom: float,
) -> Regret:
    """Regret of a choice among tuned values.

    Args:
        candidates: finished tuning runs by value, scored on the same validation rows; compared by
            the seeds that all have. Without one the bound is infinite.
        chosen: one of them.
        values: of the tuned key, one per candidate; None with several keys: no curve is fitted.
        training_variance: of one run's loss between seeds, `pooled_training_variance` of the final
            runs, because a single tuning seed shows none; None: not counted.
        freedom: degrees of freedom of it.

    Raises:
        IntegrityError: candidates were not scored on the same tokens of the same rows.
        ValueError: ``chosen`` is no candidate.
    """
    place = next((i for i, candidate in enumerate(candidates) if candidate is chosen), None)
    if place is None:
        raise ValueError("the chosen setting is none of the candidates")
    shared, metric = common_draws(candidates), chosen.metric
    if not shared:
        return Regret(_unknown(len(candidates) - 1), None, metric.higher_is_better)
    runs = [
        sorted((run for run in candidate.runs if draw_of(run) in shared), key=draw_of)
        for candidate in candidates
    ]
    numerators, denominators = group_sums([run.scores for own in runs for run in own], metric)
    costs = metric.cost(1.0) * numerators.reshape(len(runs), len(shared), -1)
    regret = regret_of_sums(costs, denominators, place, values, training_variance, freedom)
    return replace(regret, higher_is_better=metric.higher_is_better)


def regret_of_arm(arm: TunedArm, training_variance: float | None, freedom: float) -> Regret:
    """As `regret_bound`, of a search. Values whose runs were stopped are left out."""
    places = sorted(arm.settings)
    keys = list(arm.record.chosen)
    values = [arm.record.candidates[place].values[keys[0]] for place in places]
    return regret_bound(
        [arm.settings[place] for place in places],
        arm.chosen,
        values if len(keys) == 1 else None,
        training_variance,
        freedom,
    )


def with_regrets(settings: Sequence[Setting], arms: Sequence[TunedArm]) -> list[Setting]:
    """Settings with the regret of their chosen values, so that comparisons include the choice."""
    variance, freedom = pooled_training_variance(settings)
    return [
        setting
        if (arm := arm_of(setting, arms)) is None
        else replace(setting, regret=regret_of_arm(arm, variance, freedom))
        for setting in settings
    ]


def _unknown(others: int) -> Contrasts:
    return Contrasts(np.zeros(others), np.full(others, math.inf), np.ones(others))


def regret_of_sums(
    numerators: Floats,
    denominators: Floats,
    chosen: int,
    values: Sequence[float] | None = None,
    training_variance: float | None = None,
    freedom: float = 0.0,
) -> Regret:
    """As `regret_bound`, from sums by group of rows, [candidates, seeds, groups]."""
    count, seeds, groups = numerators.shape
    if groups < 2:
        return Regret(_unknown(count - 1))
    losses, over_rows, freedom_rows = clustered_covariance(numerators.mean(1), denominators)
    variance = 0.0 if training_variance is None else training_variance / seeds

    def contrasts(weights: Floats) -> Contrasts:
        """Of linear combinations of the losses, [others, candidates]."""
        rows = np.maximum(np.einsum("ki,ij,kj->k", weights, over_rows, weights), 0.0)
        training = variance * (weights**2).sum(1)
        both = rows + training
        # Satterthwaite's, of a sum of two variances.
        parts = rows**2 / freedom_rows + (training**2 / freedom if training.any() else 0.0)
        sum_freedom = np.divide(
            both**2, parts, out=np.full(len(both), freedom_rows), where=parts > 0
        )
        return Contrasts(weights @ losses, np.sqrt(both), sum_freedom)

    chosen_weights = np.eye(count)[chosen]
    observed = np.delete(chosen_weights - np.eye(count), chosen, axis=0)
    if values is None:
        return Regret(contrasts(observed))
    distances = np.log(np.asarray(values, dtype=float) / values[chosen])
    near = np.flatnonzero(np.abs(distances) <= WINDOW)
    if len(near) < LEAST_FITTED:
        return Regret(contrasts(observed))
    design = np.vander(distances[near], 3)
    smooth = np.eye(count)
    smooth[np.ix_(near, near)] = design @ np.linalg.pinv(design)
    fitted = np.delete(smooth[chosen] - smooth, chosen, axis=0)
    # A value too far away for the curve is compared as it was measured.
    far = np.delete(np.abs(distances) > WINDOW, chosen)
    fitted[far] = observed[far]
    return Regret(contrasts(observed), contrasts(fitted))


def own_best_interval(
    sample: Paired, confidence: float, first: Regret, second: Regret
) -> tuple[float, float]:
    """Confidence interval of the difference of two settings at their own best values, second minus
    first; contains the ordinary one.

    Args:
        sample: of the final runs at the chosen values.
        confidence: of the interval.
        first: regret of the reference.
        second: regret of the other setting.
    """
    below, above = _sides(first, second)
    low, high = interval(sample, confidence)
    half, error = (high - low) / 2, (1 - confidence) / 2
    return (
        min(low, sample.value - math.hypot(half, below.upper(error))),
        max(high, sample.value + math.hypot(half, above.upper(error))),
    )


def at_own_best(
    difference: Difference, sample: Paired, first: Regret, second: Regret
) -> Difference:
    """A difference at the chosen values, as one of the two settings at their own best values.

    The value stays that of the chosen ones; interval and p-values include the choice. The 95 %
    interval excludes zero exactly if p < 0.05, and p-values of several comparisons can be
    corrected together.

    Args:
        difference: of the final runs.
        sample: that it was computed from.
        first: regret of the reference.
        second: regret of the other setting.
    """
    if not (first.observed.values.size or second.observed.values.size):
        return difference
    below, above = _sides(first, second)
    value, margin = sample.value, difference.margin
    p_zero = _p_within(sample, *((value, below) if value > 0 else (-value, above)))
    p_equivalence = (
        max(_p_within(sample, margin + value, below), _p_within(sample, margin - value, above))
        if sample.groups >= LEAST_GROUPS
        else 1.0
    )
    low, high = own_best_interval(sample, CONFIDENCE, first, second)
    return replace(
        difference, low=low, high=high, p=min(1.0, 2 * p_zero), p_equivalence=p_equivalence
    )


def p_worse(sample: Paired, first: Regret, second: Regret) -> float:
    """One-sided p of the second setting being as good as the first, each at its own best value."""
    below, above = _sides(first, second)
    if first.higher_is_better or second.higher_is_better:
        return _p_within(sample, -sample.value, above)
    return _p_within(sample, sample.value, below)


def _sides(first: Regret, second: Regret) -> tuple[Regret, Regret]:
    """The regrets that lower and raise the difference: at its best value the second setting has a
    lower cost, which is a higher value of some metrics. `NO_REGRET` has no direction."""
    higher = first.higher_is_better or second.higher_is_better
    return (first, second) if higher else (second, first)


def _p_within(sample: Paired, distance: float, regret: Regret) -> float:
    """One-sided p of a true difference that lies ``distance`` or more to the side that a regret
    reaches to: the error at which the end of the interval is that far away."""
    if distance <= 0 or not len(regret.observed.values):
        return p_below(sample, distance)

    def p(error: float) -> float:
        bound = regret.upper(error)
        if bound >= distance:
            return p_below(sample, 0.0)
        return p_below(sample, math.sqrt((distance - bound) * (distance + bound)))

    # p falls with the error from 0.5: the end is reached where p equals it.
    low, high = _LEAST_P, 0.5
    if p(low) <= low:
        return low
    while high / low > 1 + 1e-9:
        middle = math.sqrt(low) * math.sqrt(high)
        low, high = (middle, high) if p(middle) > middle else (low, middle)
    return high


_LEAST_P = 1e-100
