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
        torch.randn(sum(lengths), n_heads, width, generator=generator).to(torch.bfloat16)
        for n_heads in (heads, kv_heads, kv_heads, heads)
    )


def attention_results(inputs: Tensors, lengths: list[int], scale: float) -> Tensors:
    """Output, log-sum-exp, and gradients of queries, keys and values."""
    q, k, v, upstream = inputs
    length_tensor = torch.tensor(lengths)
    out, logsumexp = attention.packed_attention(q, k, v, length_tensor, scale)
    gradients = attention.packed_attention_backward(
        upstream, q, k, v, out, logsumexp, length_tensor, scale
    )
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
    inputs = tensors(lengths, *heads, width)
    expected = attention_results(tuple(x.double() for x in inputs), lengths, width**-0.5)
    for distance in distances(attention_results(inputs, lengths, width**-0.5), expected):
        assert distance < 1e-2


def test_attention_kernel_is_as_close_to_fp64_as_eager_attention(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lengths = [130, 97, 48, 47, 16, 1]
    inputs = tensors(lengths, 9, 3, 64)
    expected = attention_results(tuple(x.double() for x in inputs), lengths, 0.125)
    kernel = distances(attention_results(inputs, lengths, 0.125), expected)
    monkeypatch.setattr(attention_cpu, "usable", lambda q: False)
    eager = distances(attention_results(inputs, lengths, 0.125), expected)
    for kernel_error, eager_error in zip(kernel, eager, strict=True):
        assert kernel_error < 1.1 * eager_error + 1e-6


def test_attention_kernel_bits_do_not_depend_on_threads() -> None:
    lengths = [200, 77, 60, 5]
    inputs = tensors(lengths, 9, 3, 64)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(attention_results(inputs, lengths, 0.125))
    torch.set_num_threads(1)
    for result in results[1:]:
        assert all(
            torch.equal(first, second) for first, second in zip(results[0], result, strict=True)
        )


def test_attention_kernel_stays_finite_with_extreme_scores() -> None:
    inputs = tensors([40, 7], 2, 1, 32)
    large = (inputs[0] * 300, inputs[1] * 300, *inputs[2:])
    expected = attention_results(tuple(x.double() for x in large), [40, 7], 1.0)
    actual = attention_results(large, [40, 7], 1.0)
    assert all(torch.isfinite(x).all() for x in actual)
    assert distances(actual, expected)[0] < 1e-2


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
    expected = a.double() @ b.double()
    product = linear.product(
        a.t().contiguous() if transpose_a else a,
        b.t().contiguous() if transpose_b else b,
        transpose_a,
        transpose_b,
    )
    # Half a unit in the last place of bf16 (8 bits), and the error of the fp32 sum.
    bound = 2**-8 * expected.abs() + 1e-5 * (a.double().abs() @ b.double().abs())
    assert ((product.double() - expected).abs() <= bound).all()


@tiled
def test_amx_product_of_a_matrix_view_equals_that_of_a_copy() -> None:
    full, b = matrix(70, 200, 1), matrix(64, 64, 2)
    part = full[3:60, 64:128]
    product = linear.product(part, b, False, False)
    assert torch.equal(product, linear.product(part.contiguous(), b, False, False))
    target = torch.full((80, 96), 7.0, dtype=torch.bfloat16)
    linear.multiply(part, b, False, False, target[10:67, 16:80])
    assert torch.equal(target[10:67, 16:80], product)
    target[10:67, 16:80] = 7
    assert (target == 7).all()


@tiled
def test_amx_product_bits_do_not_depend_on_threads() -> None:
    a, b = matrix(333, 3200, 1), matrix(3200, 224, 2)
    products = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        products.append(linear.product(a, b, False, False))
    torch.set_num_threads(1)
    assert all(torch.equal(products[0], product) for product in products[1:])


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
    for gradient, expected in pairs:
        assert gradient is not None and expected is not None
        assert relative_error(gradient, expected) < 4e-3


@tiled
def test_frozen_amx_linear_saves_no_input_for_backward() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(96, 64, bias=False).to(torch.bfloat16))
    layer.requires_grad_(False)
    linear.patch_linears(layer, torch.device("cpu"))
    x = matrix(100, 96, 3).requires_grad_()
    saved: list[torch.Tensor] = []

    def record(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        layer(x)
    assert [tuple(tensor.shape) for tensor in saved] == [(64, 96)]


@settings(max_examples=30, deadline=None)
@given(positions=st.integers(1, 20), vocabulary=st.sampled_from([2, 15, 16, 17, 1000]))
def test_cross_entropy_kernel_equals_fp64(positions: int, vocabulary: int) -> None:
    logits = matrix(positions, vocabulary, positions) * 4
    labels = torch.arange(positions) * 7 % vocabulary
    reference = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(reference, labels, reduction="none")
    expected.sum().backward()
    assert reference.grad is not None
    for_loss, for_gradient = logits.clone(), logits.clone()
    nll = cross_entropy.label_nll(for_loss, labels)
    nll_with_gradient, gradient = cross_entropy.nll_and_gradient(for_gradient, labels)
    assert torch.equal(for_loss, logits), "without gradient the logits are unchanged"
    assert torch.equal(nll, nll_with_gradient)
    assert (nll.double() - expected).abs().max() < 1e-5
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
    out, *_, dq, _dk, _dv = attention_results((q, k, v, upstream), [40], 1.0)
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
    inputs = tensors([5], 2, 1, 32)
    assert not attention_cpu.usable(inputs[0])
    assert torch.isfinite(attention_results(inputs, [5], 1.0)[0]).all()
    assert build.failure() == f"{compiler}: no such target"
    assert not list(tmp_path.rglob("*.so"))
