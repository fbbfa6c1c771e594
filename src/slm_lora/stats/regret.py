"""The regret of a chosen value: how much lower the best of the tried values may be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from slm_lora.stats.clustered import Floats

CONFIDENCE = 0.95


@dataclass(frozen=True, eq=False)
class Contrasts:
    """Loss of the chosen value minus the loss of each of some others, with errors.

    Attributes:
        values: nats per token, [others].
        errors: standard errors, [others].
        freedom: degrees of freedom, [others].
    """

    values: Floats
    errors: Floats
    freedom: Floats

    def upper(self, error: float) -> float:
        """Upper bound of the largest, each at a one-sided error; at least 0."""
        known = np.where(np.isfinite(self.errors), self.errors, 0.0)
        ends = self.values - stdtrit(self.freedom, error) * known
        return float(np.max(np.where(np.isfinite(self.errors), ends, math.inf), initial=0.0))


@dataclass(frozen=True, eq=False)
class Regret:
    """Expected loss of the chosen value minus the lowest of those tried.

    Attributes:
        observed: from the losses of the values.
        fitted: from a parabola through them; None where there are too few, or several keys.
        higher_is_better: direction of the metric; regrets are costs, at least zero, either way.
    """

    observed: Contrasts
    fitted: Contrasts | None = None
    higher_is_better: bool = False

    def upper(self, error: float) -> float:
        """Upper bound at a one-sided error: the smaller of that from the losses and that from the
        parabola, which is the tighter where it fits."""
        bound = self.observed.upper(error)
        return bound if self.fitted is None else min(bound, self.fitted.upper(error))

    @property
    def estimate(self) -> float:
        """Of the parabola if there is one; from losses alone it is 0 for the lowest of them."""
        return float(np.max((self.fitted or self.observed).values, initial=0.0))

    @property
    def bound(self) -> float:
        """Upper bound in a 95 % interval."""
        return self.upper((1 - CONFIDENCE) / 2)


NO_REGRET = Regret(Contrasts(np.zeros(0), np.zeros(0), np.zeros(0)))
"""Of a setting without tuned values, such as the base model."""
