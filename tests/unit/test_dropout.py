"""Hash-based dropout: its rate, and a mask that depends only on keys and columns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_lora.data.collate import collate
from slm_lora.ops.dropout import TokenDropout, token_keys
from slm_lora.records import Example


def examples(lengths: list[int]) -> list[Example]:
    return [
        Example(f"row {i}", "", "", np.full(n, i, np.int32), np.ones(n, bool), n, n)
        for i, n in enumerate(lengths)
    ]


def mask(p: float, name: str, keys: torch.Tensor, width: int) -> torch.Tensor:
    """Mask of the kept values, bool [tokens, width]."""
    dropout = TokenDropout(p, name, width)
    dropout.keys = keys.unsqueeze(0)
    return dropout(torch.ones(1, len(keys), width))[0] != 0


def keys(seed: str = "s", tokens: int = 2000) -> torch.Tensor:
    return token_keys(collate(examples([tokens // 2, tokens // 2]), "all"), seed)


def assert_share(kept: torch.Tensor, share: float) -> None:
    """The share of True is within five standard deviations of a binomial draw."""
    spread = math.sqrt(share * (1 - share) / kept.numel())
    assert abs(kept.double().mean().item() - share) < 5 * spread


@pytest.mark.parametrize("p", [0.01, 0.05, 0.1, 0.5, 0.9])
def test_dropout_rate_holds_overall_by_token_and_by_column(p: float) -> None:
    kept = mask(p, "layers.3.q_proj", keys(), 512)
    assert_share(kept, 1 - p)
    for part in (kept.double().mean(0), kept.double().mean(1)):
        # The variance of shares between columns or tokens is that of independent draws.
        draws = kept.numel() / len(part)
        ratio = part.var().item() / (p * (1 - p) / draws)
        assert abs(ratio - 1) < 6 * math.sqrt(2 / len(part))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (mask(0.5, "a", keys(), 64), mask(0.5, "b", keys(), 64)),
        (mask(0.5, "a", keys("step 1"), 64), mask(0.5, "a", keys("step 2"), 64)),
        (mask(0.5, "a", keys(), 64)[:-1], mask(0.5, "a", keys(), 64)[1:]),
        (mask(0.5, "a", keys(), 64)[:, :-1], mask(0.5, "a", keys(), 64)[:, 1:]),
        (mask(0.5, "a", keys(), 64)[:1000], mask(0.5, "a", keys(), 64)[1000:]),
    ],
    ids=["modules", "steps", "tokens", "columns", "rows"],
)
def test_dropout_masks_are_independent(first: torch.Tensor, second: torch.Tensor) -> None:
    assert_share(first == second, 0.5)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), seed=st.text(max_size=5))
def test_token_keys_do_not_depend_on_neighbouring_documents(lengths: list[int], seed: str) -> None:
    rows = examples(lengths)
    alone = [token_keys(collate([row], "all"), seed) for row in rows]
    assert torch.equal(token_keys(collate(rows, "all"), seed), torch.cat(alone))


def test_dropout_scales_kept_values_and_masks_the_gradient_alike() -> None:
    dropout = TokenDropout(0.25, "a", 32)
    dropout.keys = keys(tokens=10).unsqueeze(0)
    x = torch.full((1, 10, 32), 3.0, requires_grad=True)
    out = dropout(x)
    assert set(out.flatten().tolist()) == {0.0, 4.0}
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient, out / 3)


def test_dropout_in_training_needs_keys_and_eval_drops_nothing() -> None:
    dropout = TokenDropout(0.5, "a", 4)
    x = torch.ones(1, 3, 4)
    with pytest.raises(RuntimeError, match="no keys"):
        dropout(x)
    assert dropout.eval()(x) is x
