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

SizedRuns = list[tuple[int, list[list[RowScore]]]]


def planted_runs(
    sizes: list[int], floor: float, factor: float, exponent: float, noise: float
) -> SizedRuns:
    """Scores whose total loss follows the curve; rows differ as rows do, groups wobble by size."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(20, 200, 300)
    hard = rng.normal(0, 0.3, 300)
    hard -= (hard * tokens).sum() / tokens.sum()
    sized_runs: SizedRuns = []
    for size in sizes:
        loss = floor + factor * size**-exponent + hard + noise * rng.standard_normal(300)
        scores = [
            RowScore(f"{i:03d}", f"{i:03d}", "", "test", float(n * t), int(t), 1, 0.0, 0, 0)
            for i, (n, t) in enumerate(zip(loss, tokens, strict=True))
        ]
        sized_runs.append((size, [scores]))
    return sized_runs


def fitted(sized_runs: SizedRuns) -> LearningCurve:
    curve = fit("LoRA", sized_runs, METRICS["all"])
    assert curve is not None
    return curve


def test_fit_recovers_a_planted_curve() -> None:
    curve = fitted(planted_runs([100, 200, 400, 800, 1600], 2.0, 5.0, 0.5, noise=0.0))
    assert curve.floor[0] == pytest.approx(2.0, abs=0.01)
    assert curve.exponent[0] == pytest.approx(0.5, abs=0.02)
    assert curve.middle[-1] == pytest.approx(2.0 + 5.0 * 3200**-0.5, abs=1e-3)
    assert curve.rows[-1] == pytest.approx(3200), "twice the largest, and no further"


def test_fitted_intervals_and_bands_cover_a_planted_curve() -> None:
    curve = fitted(planted_runs([200, 400, 800, 1600], 2.0, 5.0, 0.5, noise=0.05))
    assert curve.floor[1] < 2.0 < curve.floor[2]
    assert curve.exponent[1] < 0.5 < curve.exponent[2]
    assert np.all(curve.low <= curve.middle) and np.all(curve.middle <= curve.high)
    truth = 2.0 + 5.0 * 800**-0.5
    index = int(np.argmin(np.abs(curve.rows - 800)))
    assert curve.low[index] < truth < curve.high[index]


def test_fit_of_equal_losses_is_flat() -> None:
    curve = fitted(planted_runs([100, 200, 400, 800], 2.0, 0.0, 0.5, noise=0.0))
    assert curve.middle == pytest.approx(2.0)


def test_fit_is_repeatable_although_it_resamples() -> None:
    scores = planted_runs([100, 200, 400, 800], 2.0, 5.0, 0.5, noise=0.05)
    assert fitted(scores).record() == fitted(scores).record()


def test_three_sizes_are_too_few_for_a_fit() -> None:
    sized_runs = planted_runs([100, 200, 400], 2.0, 5.0, 0.5, noise=0.0)
    assert fit("LoRA", sized_runs, METRICS["all"]) is None
    assert fit("LoRA", [*sized_runs, sized_runs[0]], METRICS["all"]) is None, (
        "the same size twice is no fourth"
    )


def test_record_of_a_fit_is_finite() -> None:
    record = fitted(planted_runs([100, 200, 400, 800], 2.0, 5.0, 0.5, noise=0.1)).record()
    assert all(math.isfinite(value) for value in (*record["floor"], *record["exponent"]))


def test_fit_is_rejected_when_losses_fall_ever_faster() -> None:
    """E + A·N^(−β) falls ever slower."""
    sized_runs = planted_runs([100, 200, 400, 800], 2.0, 5.0, 0.5, noise=0.01)
    assert fitted(sized_runs).fits
    shifts = {100: 0.0, 200: 0.3, 400: 0.4, 800: 0.2}
    bent: SizedRuns = [
        (size, [[replace(s, nll_all=s.nll_all + shifts[size] * s.tokens_all) for s in run]])
        for size, ((run,),) in ((size, (runs,)) for size, runs in sized_runs)
    ]
    curve = fitted(bent)
    assert not curve.fits
    assert abs(sum(curve.residuals)) < 0.01, "least squares with E leaves no mean"
    assert "No extrapolation." in sentences.curve_text(curve)
    assert "E =" not in sentences.curve_text(curve)


def test_intervals_of_three_seeds_cover_the_truth() -> None:
    """Three seeds, rows that all chance alike: 95 % intervals are to hold the truth as often."""
    sizes = np.array([100.0, 200, 400, 800])
    truth = 2 + 5 * sizes**-0.5
    rng = np.random.default_rng(3)
    held = []
    for _ in range(200):
        losses = truth[:, None] + 0.005 * rng.standard_normal((4, 3))
        sums = [
            (np.outer(size_losses, np.full(12, 50.0)), np.full(12, 50.0)) for size_losses in losses
        ]
        low, high = np.percentile(resampled_losses(sums)[:, -1], [2.5, 97.5])
        held.append(low < truth[-1] < high)
    assert 0.9 < np.mean(held) < 0.99
