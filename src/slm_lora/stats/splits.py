"""A difference between settings in two parts: due to the tuned key, and to the setting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slm_lora.stats.comparisons import Comparison
from slm_lora.stats.inference import Difference, difference
from slm_lora.stats.settings import Setting, equivalence_margin, pair_runs, sample_of
from slm_lora.stats.tuned_arms import TunedArm, arm_of


@dataclass(frozen=True)
class Split:
    """One comparison of settings, on the validation set with the tuning seeds.

    Attributes:
        comparison: of the final runs.
        at_common: difference with both settings at the same values of the tuned keys.
        at_own: difference with each at its chosen values.
    """

    comparison: Comparison
    at_common: Difference
    at_own: Difference

    @property
    def share(self) -> float | None:
        """Part of the difference at the same values that is gone at each one's own; None where
        that difference is not clear."""
        if not self.at_common.excludes_zero:
            return None
        return 1 - self.at_own.value / self.at_common.value

    def record(self) -> dict[str, Any]:
        """For metrics.json."""

        def numbers(part: Difference) -> dict[str, float | None]:
            known = math.isfinite(part.low + part.high)
            low, high = (part.low, part.high) if known else (None, None)
            return {"value": part.value, "low": low, "high": high}

        return {
            "key": self.comparison.key,
            "from": self.comparison.first.name,
            "to": self.comparison.second.name,
            "at_common": numbers(self.at_common),
            "at_own": numbers(self.at_own),
            "test": numbers(self.comparison.difference),
            "share": self.share,
        }


def splits(
    comparisons: Sequence[Comparison], arms: Sequence[TunedArm], values: Mapping[str, float]
) -> list[Split]:
    """Comparisons between settings, at common values and at each one's own."""
    parts = []
    for comparison in comparisons:
        first, second = (arm_of(arm, arms) for arm in (comparison.first, comparison.second))
        if comparison.key == "base" or first is None or second is None:
            continue
        pair = first.at(values), second.at(values)
        if pair[0] is not None and pair[1] is not None:
            parts.append(
                Split(
                    comparison,
                    _difference(pair[0], pair[1]),
                    _difference(first.chosen, second.chosen),
                )
            )
    return parts


def _difference(first: Setting, second: Setting) -> Difference:
    sample = sample_of(pair_runs(first, second), first.metric)
    return difference(sample, equivalence_margin(first.first_run))
