"""The learning curve: a planted one is found again, and nothing is fitted to too little."""

from __future__ import annotations

import math

import numpy as np
import pytest

from slm_lora.experiment.curve import LearningCurve, fit
from slm_lora.records import RowScore

Arms = list[tuple[int, list[list[RowScore]]]]


def arms(sizes: list[int], floor: float, factor: float, exponent: float, noise: float) -> Arms:
    """Scores whose total loss follows the curve; rows differ as rows do, groups wobble by size."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(20, 200, 300)
    hard = rng.normal(0, 0.3, 300)
    hard -= (hard * tokens).sum() / tokens.sum()
    found: Arms = []
    for size in sizes:
        loss = floor + factor * size**-exponent + hard + noise * rng.standard_normal(300)
        scores = [
            RowScore(f"{i:03d}", f"{i:03d}", "", "test", float(n * t), int(t), 1, 0.0, 0, 0)
            for i, (n, t) in enumerate(zip(loss, tokens, strict=True))
        ]
        found.append((size, [scores]))
    return found


def fitted(given: Arms) -> LearningCurve:
    found = fit("LoRA", given, "all")
    assert found is not None
    return found


def test_a_planted_curve_is_found_again() -> None:
    found = fitted(arms([100, 200, 400, 800, 1600], 2.0, 5.0, 0.5, noise=0.0))
    assert found.floor[0] == pytest.approx(2.0, abs=0.01)
    assert found.exponent[0] == pytest.approx(0.5, abs=0.02)
    assert found.middle[-1] == pytest.approx(2.0 + 5.0 * 3200**-0.5, abs=1e-3)
    assert found.rows[-1] == pytest.approx(3200), "twice the largest, and no further"


def test_intervals_hold_the_truth_and_bands_hold_the_curve() -> None:
    found = fitted(arms([200, 400, 800, 1600], 2.0, 5.0, 0.5, noise=0.05))
    assert found.floor[1] < 2.0 < found.floor[2]
    assert found.exponent[1] < 0.5 < found.exponent[2]
    assert np.all(found.low <= found.middle) and np.all(found.middle <= found.high)
    truth = 2.0 + 5.0 * 800**-0.5
    at = int(np.argmin(np.abs(found.rows - 800)))
    assert found.low[at] < truth < found.high[at]


def test_a_flat_line_has_no_gain() -> None:
    found = fitted(arms([100, 200, 400, 800], 2.0, 0.0, 0.5, noise=0.0))
    assert found.middle == pytest.approx(2.0)


def test_three_sizes_are_too_few() -> None:
    given = arms([100, 200, 400], 2.0, 5.0, 0.5, noise=0.0)
    assert fit("LoRA", given, "all") is None
    assert fit("LoRA", [*given, given[0]], "all") is None, "the same size twice is no fourth"


def test_its_record_is_json() -> None:
    record = fitted(arms([100, 200, 400, 800], 2.0, 5.0, 0.5, noise=0.1)).record()
    assert all(math.isfinite(value) for value in (*record["floor"], *record["exponent"]))
