"""The learning curve: a planted one is found again, and nothing is fitted to too little."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from slm_lora.records import RowScore
from slm_lora.report import sentences
from slm_lora.runs.metrics import METRICS
from slm_lora.stats.learning_curve import LearningCurve, fit, resampled_losses

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
    found = fit("LoRA", given, METRICS["all"])
    assert found is not None
    return found


def test_fit_recovers_a_planted_curve() -> None:
    found = fitted(arms([100, 200, 400, 800, 1600], 2.0, 5.0, 0.5, noise=0.0))
    assert found.floor[0] == pytest.approx(2.0, abs=0.01)
    assert found.exponent[0] == pytest.approx(0.5, abs=0.02)
    assert found.middle[-1] == pytest.approx(2.0 + 5.0 * 3200**-0.5, abs=1e-3)
    assert found.rows[-1] == pytest.approx(3200), "twice the largest, and no further"


def test_fitted_intervals_and_bands_cover_a_planted_curve() -> None:
    found = fitted(arms([200, 400, 800, 1600], 2.0, 5.0, 0.5, noise=0.05))
    assert found.floor[1] < 2.0 < found.floor[2]
    assert found.exponent[1] < 0.5 < found.exponent[2]
    assert np.all(found.low <= found.middle) and np.all(found.middle <= found.high)
    truth = 2.0 + 5.0 * 800**-0.5
    at = int(np.argmin(np.abs(found.rows - 800)))
    assert found.low[at] < truth < found.high[at]


def test_fit_of_equal_losses_is_flat() -> None:
    found = fitted(arms([100, 200, 400, 800], 2.0, 0.0, 0.5, noise=0.0))
    assert found.middle == pytest.approx(2.0)


def test_fit_is_repeatable_although_it_resamples() -> None:
    scores = arms([100, 200, 400, 800], 2.0, 5.0, 0.5, noise=0.05)
    assert fitted(scores).record() == fitted(scores).record()


def test_three_sizes_are_too_few_for_a_fit() -> None:
    given = arms([100, 200, 400], 2.0, 5.0, 0.5, noise=0.0)
    assert fit("LoRA", given, METRICS["all"]) is None
    assert fit("LoRA", [*given, given[0]], METRICS["all"]) is None, (
        "the same size twice is no fourth"
    )


def test_record_of_a_fit_is_finite() -> None:
    record = fitted(arms([100, 200, 400, 800], 2.0, 5.0, 0.5, noise=0.1)).record()
    assert all(math.isfinite(value) for value in (*record["floor"], *record["exponent"]))


def test_fit_is_rejected_when_losses_fall_ever_faster() -> None:
    """E + A·N^(−β) falls ever slower."""
    given = arms([100, 200, 400, 800], 2.0, 5.0, 0.5, noise=0.01)
    assert fitted(given).fits
    shifts = {100: 0.0, 200: 0.3, 400: 0.4, 800: 0.2}
    bent: Arms = [
        (size, [[replace(s, nll_all=s.nll_all + shifts[size] * s.tokens_all) for s in run]])
        for size, ((run,),) in ((size, (runs,)) for size, runs in given)
    ]
    found = fitted(bent)
    assert not found.fits
    assert abs(sum(found.residuals)) < 0.01, "least squares with E leaves no mean"
    assert "No extrapolation." in sentences.curve_text(found)
    assert "E =" not in sentences.curve_text(found)


def test_intervals_of_three_seeds_cover_the_truth() -> None:
    """Three seeds, rows that all chance alike: 95 % intervals are to hold the truth as often."""
    sizes = np.array([100.0, 200, 400, 800])
    truth = 2 + 5 * sizes**-0.5
    rng = np.random.default_rng(3)
    held = []
    for _ in range(200):
        losses = truth[:, None] + 0.005 * rng.standard_normal((4, 3))
        sums = [(np.outer(each, np.full(12, 50.0)), np.full(12, 50.0)) for each in losses]
        low, high = np.percentile(resampled_losses(sums)[:, -1], [2.5, 97.5])
        held.append(low < truth[-1] < high)
    assert 0.9 < np.mean(held) < 0.99
