"""Clustered standard errors against explicit matrices, scipy, and planted truths."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from slm_lora.stats.clustered import clustered, effective_groups

SIZES = st.lists(st.integers(1, 500), min_size=2, max_size=30)


@settings(deadline=None)
@given(SIZES, st.integers(0, 1000))
def test_cr2_error_and_freedom_equal_the_explicit_matrices(sizes: list[int], seed: int) -> None:
    """Bell and McCaffrey 2002, written out: unbiased under the working model, and Satterthwaite's
    degrees of freedom from the trace of the quadratic form."""
    denominators = np.array(sizes, dtype=float)
    numerators = denominators * np.random.default_rng(seed).normal(2.0, 0.3, len(sizes))
    result = clustered(numerators, denominators)
    weights = denominators / denominators.sum()
    residual_maker = np.eye(len(sizes)) - np.outer(np.ones(len(sizes)), weights)
    working = np.diag(1 / np.sqrt(denominators))
    of_residuals = residual_maker @ working @ residual_maker.T
    factors = weights**2 * np.diag(working) / np.diag(of_residuals)
    residuals = residual_maker @ (numerators / denominators)
    assert result.value == pytest.approx(numerators.sum() / denominators.sum())
    assert result.standard_error == pytest.approx(np.sqrt(factors @ residuals**2))
    # Unbiased: the expectation of the estimate is the variance of the ratio.
    assert factors @ np.diag(of_residuals) == pytest.approx(weights @ working @ weights)
    form = np.diag(np.sqrt(factors)) @ of_residuals @ np.diag(np.sqrt(factors))
    freedom = np.trace(form) ** 2 / np.trace(form @ form)
    assert result.freedom == pytest.approx(freedom)


def test_equal_groups_have_the_standard_error_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(size=12)
    result = clustered(7 * values, np.full(12, 7.0))
    assert result.standard_error == pytest.approx(stats.sem(values))
    assert result.freedom == pytest.approx(11)
    assert effective_groups(np.full(12, 7.0)) == pytest.approx(12)


def test_one_large_group_leaves_few_degrees_of_freedom() -> None:
    sizes = np.array([1000.0, *[10.0] * 20])
    assert effective_groups(sizes) < 1.5
    assert clustered(sizes * np.arange(21), sizes).freedom < 2


def test_one_group_has_an_infinite_standard_error() -> None:
    result = clustered(np.array([3.0]), np.array([2.0]))
    assert (result.value, result.standard_error, result.freedom) == (1.5, np.inf, 0)


@pytest.mark.parametrize("groups", [10, 20, 50])
def test_intervals_of_few_unequal_groups_cover_the_truth(groups: int) -> None:
    """Groups of log-normal sizes whose ratios err partly together: Student's over plain clustered
    errors with groups - 1 degrees of freedom covers less than 93 % here."""
    rng = np.random.default_rng(groups)
    cases, covered, plain = 3000, 0, 0
    for _ in range(cases):
        sizes = np.ceil(np.exp(rng.normal(5, 1, groups)))
        ratios = rng.normal(size=groups) * np.sqrt(0.02 + 10 / sizes)
        result = clustered(sizes * ratios, sizes)
        covered += abs(result.value) < stats.t.isf(0.025, result.freedom) * result.standard_error
        residuals = sizes * (ratios - result.value) / sizes.sum()
        error = np.sqrt((residuals**2).sum() * groups / (groups - 1))
        plain += abs(result.value) < stats.t.isf(0.025, groups - 1) * error
    assert 0.93 <= covered / cases <= 0.98
    assert plain / cases < 0.935


@pytest.mark.parametrize("sizes", [[1e6, 1.0], [1e12, 1.0], [1e9, 1.0, 1.0], [1.0, 1e6, 5.0]])
def test_dominant_group_leaves_a_finite_error_and_valid_freedom(sizes: list[float]) -> None:
    denominators = np.array(sizes)
    result = clustered(denominators * np.arange(len(sizes)), denominators)
    assert np.isfinite(result.standard_error)
    assert 1 <= result.freedom <= len(sizes) - 1
