"""The C++ kernels against fp64: outputs and gradients, by shape and number of threads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_lora.ops import attention, attention_cpu, cross_entropy, linear
from slm_lora.ops.kernels import build

from ..support.tensors import relative_error

Tensors = tuple[torch.Tensor, ...]

pytestmark = pytest.mark.skipif(
    not attention_cpu.usable(torch.zeros(1, 1, 64, dtype=torch.bfloat16)),
    reason="no CPU with AVX512-BF16, or no C++ compiler, here",
)


def tensors(lengths: list[int], heads: int, kv_heads: int, width: int) -> Tensors:
    """Queries, keys, values, and the gradient of the output, in bf16."""
    generator = torch.Generator().manual_seed(sum(lengths) + width)
    return tuple(
        torch.randn(sum(lengths), many, width, generator=generator).to(torch.bfloat16)
        for many in (heads, kv_heads, kv_heads, heads)
    )


def computed(given: Tensors, lengths: list[int], scale: float) -> Tensors:
    """Output, log-sum-exp, and gradients of queries, keys and values."""
    q, k, v, upstream = given
    at = torch.tensor(lengths)
    out, logsumexp = attention.packed_attention(q, k, v, at, scale)
    gradients = attention.packed_attention_backward(upstream, q, k, v, out, logsumexp, at, scale)
    return out, logsumexp, *gradients


def distances(actual: Tensors, expected: Tensors) -> list[float]:
    return [
        ((tensor.double() - exact).norm() / exact.norm().clamp(min=1e-3)).item()
        for tensor, exact in zip(actual, expected, strict=True)
    ]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=6),
    heads=st.sampled_from([(1, 1), (4, 4), (9, 3), (8, 1)]),
    width=st.sampled_from([16, 64, 80, 128]),
)
def test_attention_kernel_equals_fp64_to_rounding(
    lengths: list[int], heads: tuple[int, int], width: int
) -> None:
    given_ = tensors(lengths, *heads, width)
    wanted = computed(tuple(x.double() for x in given_), lengths, width**-0.5)
    for distance in distances(computed(given_, lengths, width**-0.5), wanted):
        assert distance < 1e-2


def test_attention_kernel_is_as_close_to_fp64_as_eager_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths = [130, 97, 48, 47, 16, 1]
    given_ = tensors(lengths, 9, 3, 64)
    wanted = computed(tuple(x.double() for x in given_), lengths, 0.125)
    ours = distances(computed(given_, lengths, 0.125), wanted)
    monkeypatch.setattr(attention_cpu, "usable", lambda q: False)
    plain = distances(computed(given_, lengths, 0.125), wanted)
    for one, other in zip(ours, plain, strict=True):
        assert one < 1.1 * other + 1e-6


def test_attention_kernel_bits_do_not_depend_on_threads() -> None:
    lengths = [200, 77, 60, 5]
    given_ = tensors(lengths, 9, 3, 64)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(computed(given_, lengths, 0.125))
    torch.set_num_threads(1)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_attention_kernel_stays_finite_with_extreme_scores() -> None:
    given_ = tensors([40, 7], 2, 1, 32)
    large = (given_[0] * 300, given_[1] * 300, *given_[2:])
    wanted = computed(tuple(x.double() for x in large), [40, 7], 1.0)
    found = computed(large, [40, 7], 1.0)
    assert all(torch.isfinite(x).all() for x in found)
    assert distances(found, wanted)[0] < 1e-2


tiled = pytest.mark.skipif(not build.has_amx(), reason="no CPU with AMX here")


def matrix(rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(torch.bfloat16)


@tiled
@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 200),
    n=st.sampled_from([1, 8, 32, 50, 192, 576, 1536]),
    k=st.sampled_from([1, 8, 31, 64, 576, 1536, 1600, 3200]),
    transpose_a=st.booleans(),
    transpose_b=st.booleans(),
)
def test_amx_product_is_rounded_once(
    m: int, n: int, k: int, transpose_a: bool, transpose_b: bool
) -> None:
    a, b = matrix(m, k, m + k), matrix(k, n, n)
    wanted = a.double() @ b.double()
    found = linear.product(
        a.t().contiguous() if transpose_a else a,
        b.t().contiguous() if transpose_b else b,
        transpose_a,
        transpose_b,
    )
    # Half a unit in the last place of bf16 (8 bits), and the error of the fp32 sum.
    bound = 2**-8 * wanted.abs() + 1e-5 * (a.double().abs() @ b.double().abs())
    assert ((found.double() - wanted).abs() <= bound).all()


@tiled
def test_amx_product_of_a_matrix_view_equals_that_of_a_copy() -> None:
    whole, b = matrix(70, 200, 1), matrix(64, 64, 2)
    part = whole[3:60, 64:128]
    found = linear.product(part, b, False, False)
    assert torch.equal(found, linear.product(part.contiguous(), b, False, False))
    room = torch.full((80, 96), 7.0, dtype=torch.bfloat16)
    linear.multiply(part, b, False, False, room[10:67, 16:80])
    assert torch.equal(room[10:67, 16:80], found)
    room[10:67, 16:80] = 7
    assert (room == 7).all()


@tiled
def test_amx_product_bits_do_not_depend_on_threads() -> None:
    a, b = matrix(333, 3200, 1), matrix(3200, 224, 2)
    found = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        found.append(linear.product(a, b, False, False))
    torch.set_num_threads(1)
    assert all(torch.equal(found[0], other) for other in found[1:])


@tiled
@pytest.mark.parametrize("bias", [False, True])
def test_amx_linear_has_outputs_and_gradients_of_fp64_linear(bias: bool) -> None:
    plain = torch.nn.Linear(96, 64, bias=bias).to(torch.bfloat16)
    reference = torch.nn.Linear(96, 64, bias=bias).double()
    reference.load_state_dict(plain.state_dict())
    layer = torch.nn.Sequential(plain)
    linear.patch_linears(layer, torch.device("cpu"))
    assert type(layer[0]) is linear.AmxLinear
    x = matrix(100, 96, 3)
    ours, wanted = x.clone().requires_grad_(), x.double().requires_grad_()
    upstream = matrix(100, 64, 4)
    layer(ours.view(2, 50, 96)).view(100, 64).backward(upstream)
    reference(wanted).backward(upstream.double())
    pairs = [(ours.grad, wanted.grad)]
    pairs += [
        (p.grad, q.grad) for p, q in zip(plain.parameters(), reference.parameters(), strict=True)
    ]
    for one, other in pairs:
        assert one is not None and other is not None
        assert relative_error(one, other) < 4e-3


@tiled
def test_frozen_amx_linear_saves_no_input_for_backward() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(96, 64, bias=False).to(torch.bfloat16))
    layer.requires_grad_(False)
    linear.patch_linears(layer, torch.device("cpu"))
    x = matrix(100, 96, 3).requires_grad_()
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert [tuple(tensor.shape) for tensor in kept] == [(64, 96)]


@settings(max_examples=30, deadline=None)
@given(positions=st.integers(1, 20), vocabulary=st.sampled_from([2, 15, 16, 17, 1000]))
def test_cross_entropy_kernel_equals_fp64(positions: int, vocabulary: int) -> None:
    logits = matrix(positions, vocabulary, positions) * 4
    labels = torch.arange(positions) * 7 % vocabulary
    reference = logits.double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(reference, labels, reduction="none")
    wanted.sum().backward()
    assert reference.grad is not None
    for_loss, for_gradient = logits.clone(), logits.clone()
    nll = cross_entropy.label_nll(for_loss, labels)
    also, gradient = cross_entropy.nll_and_gradient(for_gradient, labels)
    assert torch.equal(for_loss, logits), "without gradient the logits are unchanged"
    assert torch.equal(nll, also)
    assert (nll.double() - wanted).abs().max() < 1e-5
    assert ((gradient.double() - reference.grad).abs() <= 2**-8 * reference.grad.abs() + 1e-6).all()


def test_cross_entropy_kernel_stays_finite_with_distant_logits() -> None:
    logits = torch.tensor([[300.0, -300.0, 0.0] * 10]).to(torch.bfloat16)
    nll, gradient = cross_entropy.nll_and_gradient(logits.clone(), torch.tensor([1]))
    assert nll.item() == pytest.approx(600 + math.log(10), abs=1e-3)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("at", [0, 17, 29])
def test_kernels_propagate_nan(at: int) -> None:
    logits = matrix(2, 30, 1)
    logits[1, at] = math.nan
    nll, gradient = cross_entropy.nll_and_gradient(logits, torch.tensor([3, 4]))
    assert torch.isfinite(nll).tolist() == [True, False]
    assert torch.isfinite(gradient[0]).all()
    q, k, v, upstream = tensors([40], 2, 1, 32)
    k[20, 0, at] = math.nan
    out, *_, dq, _dk, _dv = computed((q, k, v, upstream), [40], 1.0)
    assert torch.isfinite(out[:20]).all() and not torch.isfinite(out[20:]).any()
    assert not torch.isfinite(dq[20:]).any()


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("SLM_LORA_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_failure", "")
    build.load_library.cache_clear()
    yield
    build.load_library.cache_clear()


@pytest.mark.usefixtures("nothing_compiled")
def test_failing_compiler_is_named_and_eager_code_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho no such target >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    given_ = tensors([5], 2, 1, 32)
    assert not attention_cpu.usable(given_[0])
    assert torch.isfinite(computed(given_, [5], 1.0)[0]).all()
    assert build.failure() == f"{compiler}: no such target"
    assert not list(tmp_path.rglob("*.so"))
