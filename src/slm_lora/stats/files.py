"""Comparisons of score files: paired by id, clustered by group, corrected together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from slm_lora.errors import UsageError
from slm_lora.runs.score_files import Scored
from slm_lora.stats.clustered import Floats
from slm_lora.stats.comparisons import ALPHA
from slm_lora.stats.estimates import Estimate, Paired, estimate_of_sums
from slm_lora.stats.inference import Difference, difference, holm


@dataclass(frozen=True)
class FileComparison:
    """A score file against the first one.

    Attributes:
        name: of the file.
        estimate: of its metric.
        difference: the file minus the first, with interval and tests.
        p_corrected: of no difference, by Holm over all files.
        p_equivalence_corrected: of a difference of the margin or more, likewise.
    """

    name: str
    estimate: Estimate
    difference: Difference
    p_corrected: float
    p_equivalence_corrected: float

    @property
    def verdict(self) -> str:
        """From the corrected p-values."""
        if self.p_corrected < ALPHA:
            return "different"
        return "equivalent" if self.p_equivalence_corrected < ALPHA else "inconclusive"

    def record(self) -> dict[str, Any]:
        """For JSON."""
        d = self.difference
        known = d.groups > 1
        return {
            "name": self.name,
            **self.estimate.record(),
            "difference": d.value,
            "difference_low": d.low if known else None,
            "difference_high": d.high if known else None,
            "p": d.p,
            "p_corrected": self.p_corrected,
            "p_equivalence_corrected": self.p_equivalence_corrected,
            "margin": d.margin,
            "verdict": self.verdict,
        }


def compare_files(
    files: Mapping[str, Mapping[str, Scored]], margin: float
) -> tuple[Estimate, list[FileComparison]]:
    """The first file's metric, and each other file against it.

    Args:
        files: rows by id, by the file's name.
        margin: of equivalence, in the value's unit; 0: equivalence is not tested.

    Raises:
        UsageError: the files hold other rows, or a row has another weight or group.
    """
    (first_name, first), *others = files.items()
    for name, rows in others:
        _check_same_rows(first_name, first, name, rows)
    sums = {name: _sums(first, rows) for name, rows in files.items()}
    reference, weights = sums[first_name]
    results = [
        difference(Paired((sums[name][0] - reference)[None], weights), margin) for name, _ in others
    ]
    corrected = holm([result.p for result in results])
    equivalence = holm([_p_equivalence(result) for result in results])
    return estimate_of_sums(reference, weights), [
        FileComparison(name, estimate_of_sums(*sums[name]), result, p, p_equivalent)
        for (name, _), result, p, p_equivalent in zip(
            others, results, corrected, equivalence, strict=True
        )
    ]


def _p_equivalence(result: Difference) -> float:
    """Of values between 0 and 1: identical rows do not exclude a rare difference, as many rows
    that agree leave a share of unlike ones of the margin with chance (1 - margin)^rows."""
    if result.low < result.high:
        return result.p_equivalence
    return max(result.p_equivalence, (1 - min(result.margin, 1)) ** result.groups)


def _check_same_rows(
    first_name: str, first: Mapping[str, Scored], name: str, rows: Mapping[str, Scored]
) -> None:
    if missing := first.keys() ^ rows.keys():
        example = sorted(missing)[0]
        lacking = name if example in first else first_name
        raise UsageError(
            f"{first_name} and {name} differ in {len(missing)} rows: {lacking} has no {example}; "
            "--common compares the others"
        )
    for row_id, row in rows.items():
        if (row.weight, row.group) != (first[row_id].weight, first[row_id].group):
            raise UsageError(
                f"row {row_id} has another weight or group in {name} than in {first_name}"
            )


def common_rows(files: Mapping[str, Mapping[str, Scored]]) -> dict[str, dict[str, Scored]]:
    """The rows that all files have."""
    shared = set.intersection(*(set(rows) for rows in files.values()))
    return {
        name: {row_id: row for row_id, row in rows.items() if row_id in shared}
        for name, rows in files.items()
    }


def _sums(
    order: Sequence[str] | Mapping[str, Scored], rows: Mapping[str, Scored]
) -> tuple[Floats, Floats]:
    """Sums of values and weights by group, in the order of the first file's groups."""
    values: dict[str, float] = {}
    weights: dict[str, float] = {}
    for row_id in order:
        row = rows[row_id]
        values[row.group] = values.get(row.group, 0.0) + row.value
        weights[row.group] = weights.get(row.group, 0.0) + row.weight
    return np.array(list(values.values())), np.array(list(weights.values()))
