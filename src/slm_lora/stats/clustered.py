"""Standard error of a ratio of sums over groups of related rows, and its degrees of freedom.

The ratio ``sum(numerators) / sum(denominators)`` is the mean of the groups' own ratios, weighted by
their denominators. Its variance is the CR2 (bias-reduced) sandwich estimate of Bell and McCaffrey
(2002, Survey Methodology 28), its degrees of freedom are Satterthwaite's under the same working
model. Few groups, or a few large ones among many, make the degrees of freedom few.

Working model: the variance of a group's ratio falls with the square root of its size, between
independent tokens (size) and tokens that all err alike (constant). `make calibration` measures the
coverage that follows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Clustered:
    """A ratio of sums with its clustered standard error.

    Attributes:
        value: sum of numerators over sum of denominators.
        standard_error: over the choice of groups; infinite for one group.
        freedom: degrees of freedom of the standard error; 0 for one group.
        groups: number of groups.
    """

    value: float
    standard_error: float
    freedom: float
    groups: int


def clustered(numerators: Floats, denominators: Floats) -> Clustered:
    """The ratio with its standard error.

    Args:
        numerators: one sum per group.
        denominators: one sum per group, all above zero.
    """
    value = math.fsum(numerators) / math.fsum(denominators)
    groups = len(denominators)
    if groups < 2:
        return Clustered(value, math.inf, 0.0, groups)
    factors, freedom = _factors(denominators)
    residuals = numerators / denominators - value
    return Clustered(value, math.sqrt(math.fsum(factors * residuals**2)), freedom, groups)


def clustered_covariance(numerators: Floats, denominators: Floats) -> tuple[Floats, Floats, float]:
    """Several ratios on the same groups: values [ratios], covariance [ratios, ratios], and its
    degrees of freedom. Any linear combination has the error that `clustered` computes for it.

    Args:
        numerators: sums, [ratios, groups].
        denominators: one sum per group, of at least two groups.
    """
    values: Floats = numerators.sum(1) / denominators.sum()
    factors, freedom = _factors(denominators)
    residuals = numerators / denominators - values[:, None]
    return values, (factors * residuals) @ residuals.T, freedom


def _factors(denominators: Floats) -> tuple[Floats, float]:
    """Weights of the squared residuals in the variance, and its degrees of freedom."""
    weights = denominators / math.fsum(denominators)
    working = 1 / np.sqrt(weights)
    working = working / working.mean()
    # Covariance of the residuals r - value under the working model, D - u1' - 1u' + c11'.
    u = working * weights
    c = float(weights @ u)
    # own = working·(1 - w)² + the others' parts of c: no cancellation where one group has almost
    # all of the weight.
    parts = weights * u
    before, after = np.cumsum(parts)[:-1], np.cumsum(parts[::-1])[:-1][::-1]
    others = np.concatenate([[0.0], before]) + np.concatenate([after, [0.0]])
    largest = int(weights.argmax())
    remaining = 1 - weights
    remaining[largest] = math.fsum(np.delete(weights, largest))
    own = working * remaining**2 + others
    factors = weights**2 * working / own
    # Satterthwaite: (trace M)² / trace(M²) for M = sqrt(factors) · covariance · sqrt(factors).
    f0, f1, f2 = (float(sum_) for sum_ in (factors.sum(), factors @ u, factors @ u**2))
    off_diagonal = c * c * f0 * f0 + 2 * f2 * f0 + 2 * f1 * f1 - 4 * c * f1 * f0
    squares = float((factors**2) @ (own**2 - (c - 2 * u) ** 2)) + off_diagonal
    # At least one and at most groups - 1, whatever rounding does to a sum that cancels.
    freedom = float(factors @ own) ** 2 / squares if squares > 0 else 1.0
    return factors, min(max(freedom, 1.0), len(denominators) - 1.0)


def effective_groups(denominators: Floats) -> float:
    """Number of equal groups whose mean would be as sure: Kish's (Σd)² / Σd²."""
    return float(denominators.sum() ** 2 / (denominators**2).sum())
