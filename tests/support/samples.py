"""Paired differences with a planted effect."""

from __future__ import annotations

import numpy as np

from slm_lora.stats.estimates import Paired


def sample(
    seed: int, *, groups: int = 200, seeds: int = 1, effect: float = 0.0, seed_spread: float = 0.0
) -> Paired:
    """Skewed differences over groups of unequal size, with an effect in nats per token."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 200, groups).astype(float)
    shift = effect + seed_spread * rng.standard_normal((seeds, 1))
    nats = tokens * (shift + 0.1 * (rng.exponential(size=(1, groups)) - 1))
    return Paired(nats + 0.2 * rng.standard_normal((seeds, groups)), tokens)
