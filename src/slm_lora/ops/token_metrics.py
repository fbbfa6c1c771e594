"""Values of labels other than their NLL, computed from a chunk's logits while rows are scored.

An entry of `TOKEN_METRICS` reaches `RowScore.values` as ``<name>`` (sum over all labels, number of
labels) and ``<name>_response`` (over the response's), where `runs.metrics` turns it into a metric.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

TokenMetric = Callable[[Tensor, Tensor], Tensor]
"""Logits [positions, vocab_size], not to be changed, and labels, int64 [positions] → values
[positions]."""

TOKEN_METRICS: dict[str, TokenMetric] = {}
"""Computed in every scoring; each costs a pass over the logits."""
