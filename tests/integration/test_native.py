"""Attention in C++ against the same in fp64: outputs, gradients, every shape, any threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_lora.model import attention, native

Tensors = tuple[torch.Tensor, ...]

pytestmark = pytest.mark.skipif(
    not native.usable(torch.zeros(1, 1, 64, dtype=torch.bfloat16)),
    reason="no CPU with AVX512-BF16, or no C++ compiler, here",
)


def tensors(lengths: list[int], heads: int, kv_heads: int, width: int) -> Tensors:
    """Queries, keys, values and a gradient of the output, in bf16."""
    generator = torch.Generator().manual_seed(sum(lengths) + width)
    return tuple(
        torch.randn(sum(lengths), many, width, generator=generator).to(torch.bfloat16)
        for many in (heads, kv_heads, kv_heads, heads)
    )


def computed(given: Tensors, lengths: list[int], scale: float) -> Tensors:
    """Output, logarithms of the sums, and gradients of queries, keys and values."""
    q, k, v, upstream = given
    at = torch.tensor(lengths)
    out, log_total = attention.packed_attention(q, k, v, at, scale)
    gradients = attention.packed_attention_backward(upstream, q, k, v, out, log_total, at, scale)
    return out, log_total, *gradients


def distances(found: Tensors, wanted: Tensors) -> list[float]:
    return [
        ((one.double() - other).norm() / other.norm().clamp(min=1e-3)).item()
        for one, other in zip(found, wanted, strict=True)
    ]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=6),
    heads=st.sampled_from([(1, 1), (4, 4), (9, 3), (8, 1)]),
    width=st.sampled_from([16, 64, 80, 128]),
)
def test_it_equals_fp64_to_rounding(lengths: list[int], heads: tuple[int, int], width: int) -> None:
    given_ = tensors(lengths, *heads, width)
    wanted = computed(tuple(x.double() for x in given_), lengths, width**-0.5)
    for distance in distances(computed(given_, lengths, width**-0.5), wanted):
        assert distance < 1e-2


def test_it_is_no_further_from_fp64_than_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [130, 97, 48, 47, 16, 1]
    given_ = tensors(lengths, 9, 3, 64)
    wanted = computed(tuple(x.double() for x in given_), lengths, 0.125)
    ours = distances(computed(given_, lengths, 0.125), wanted)
    monkeypatch.setattr(native, "usable", lambda q: False)
    plain = distances(computed(given_, lengths, 0.125), wanted)
    for one, other in zip(ours, plain, strict=True):
        assert one < 1.1 * other + 1e-6


def test_threads_do_not_change_a_bit() -> None:
    lengths = [200, 77, 60, 5]
    given_ = tensors(lengths, 9, 3, 64)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(computed(given_, lengths, 0.125))
    torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_extreme_scores_stay_finite() -> None:
    given_ = tensors([40, 7], 2, 1, 32)
    large = (given_[0] * 300, given_[1] * 300, *given_[2:])
    wanted = computed(tuple(x.double() for x in large), [40, 7], 1.0)
    found = computed(large, [40, 7], 1.0)
    assert all(torch.isfinite(x).all() for x in found)
    assert distances(found, wanted)[0] < 1e-2


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("SLM_LORA_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_failure", "")
    native._library.cache_clear()
    yield
    native._library.cache_clear()


@pytest.mark.usefixtures("nothing_compiled")
def test_a_compiler_that_fails_is_named_and_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho no such target >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    given_ = tensors([5], 2, 1, 32)
    assert not native.usable(given_[0])
    assert torch.isfinite(computed(given_, [5], 1.0)[0]).all()
    assert native.failure() == f"{compiler}: no such target"
    assert not list(tmp_path.rglob("*.so"))
