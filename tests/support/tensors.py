"""Comparisons of tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Distance over the norm of the expected tensor, in fp64."""
    distance = actual.double() - expected.double()
    return (distance.norm() / expected.double().norm()).item()


def assert_equal_bits(
    actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    """Two states have the same names, at least one, and equal values."""
    assert expected, "nothing to compare"
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []
