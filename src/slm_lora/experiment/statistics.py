"""What the per-row scores can carry: losses and paired differences with clustered intervals.

Loss is a ratio (nats over tokens), rows of one group are not independent; both are taken into
account by the linearised variance of a ratio over groups (Cochran, Sampling Techniques, 3rd
ed., ch. 6; as recommended for evaluations by Miller 2024, arXiv 2411.00640).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from slm_lora.errors import IntegrityError
from slm_lora.records import LossOn, RowScore

_Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Estimate:
    """A loss or a difference of losses, in nats per token.

    ``low`` and ``high`` bound the 95 % interval over the choice of test rows; it does not cover
    what another training seed would give.
    """

    value: float
    standard_error: float
    groups: int

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.value - _Z95 * self.standard_error

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.value + _Z95 * self.standard_error

    def record(self) -> dict[str, float | int | None]:
        """For JSON, which has no infinity: what is not known from one group is null."""
        known = math.isfinite(self.standard_error)
        return {
            "value": self.value,
            "standard_error": self.standard_error if known else None,
            "low": self.low if known else None,
            "high": self.high if known else None,
            "groups": self.groups,
        }

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def loss_estimate(scores: Sequence[RowScore], tokens: LossOn) -> Estimate:
    """Loss of one model, with its clustered standard error."""
    return _ratio((s.group_id, *_nll(s, tokens)) for s in scores)


def paired_difference(
    first: Sequence[RowScore], second: Sequence[RowScore], tokens: LossOn
) -> Estimate:
    """Loss of ``second`` minus loss of ``first``, row by row: below zero, second is better.

    Raises:
        IntegrityError: the two were not scored on the same tokens of the same rows.
    """
    by_id = {s.row_id: s for s in first}
    if by_id.keys() != {s.row_id for s in second}:
        raise IntegrityError("the two runs were scored on different rows; they do not compare")
    parts = []
    for each in second:
        nll, count = _nll(each, tokens)
        other_nll, other_count = _nll(by_id[each.row_id], tokens)
        if count != other_count:
            raise IntegrityError(
                f"row {each.row_id[:8]} was scored on {other_count} and on {count} tokens; "
                "the two runs do not compare"
            )
        parts.append((each.group_id, nll - other_nll, count))
    return _ratio(parts)


def _nll(score: RowScore, tokens: LossOn) -> tuple[float, int]:
    if tokens == "all":
        return score.nll_all, score.tokens_all
    return score.nll_response, score.tokens_response


def _ratio(parts: Iterable[tuple[str, float, int]]) -> Estimate:
    """Ratio of sums with groups as sampling units; parts are (group, numerator, tokens)."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for group, numerator, tokens in parts:
        sums[group][0] += numerator
        sums[group][1] += tokens
    total = math.fsum(tokens for _, tokens in sums.values())
    value = math.fsum(numerator for numerator, _ in sums.values()) / total
    groups = len(sums)
    if groups < 2:
        return Estimate(value, math.inf, groups)
    residual = math.fsum((n - value * t) ** 2 for n, t in sums.values())
    return Estimate(value, math.sqrt(residual * groups / (groups - 1)) / total, groups)
