"""torch.compile: same results as in eager mode, one compilation for all shapes, fallback."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from slm_lora.adapters import attach
from slm_lora.config.schema import AdapterSection, TrainingSection
from slm_lora.data.collate import collate
from slm_lora.errors import DataError
from slm_lora.model.base import DTYPES, Base
from slm_lora.model.forward import batch_nll, score_documents
from slm_lora.ops import compilation
from slm_lora.ops.cross_entropy import EAGER_BLOCK, label_nll, nll_and_gradient
from slm_lora.ops.dropout import TokenDropout
from slm_lora.ops.kernels import build
from slm_lora.training.loop import train

from ..support.examples import LENGTHS, gradients, make_examples
from ..support.tensors import relative_error

LoadTiny = Callable[..., Base]

pytestmark = pytest.mark.skipif(
    not compilation.should_compile("auto", 10**9, torch.device("cpu"), low_precision=False),
    reason="no C++ compiler here",
)


@pytest.fixture(autouse=True)
def fresh_compilation_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(compilation, "_failure", "")
    counters.clear()
    yield
    assert not counters["graph_break"]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiled_gradients_equal_fp64(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch, dropout: float
) -> None:
    examples = make_examples(LENGTHS)
    monkeypatch.setitem(DTYPES, "fp64", torch.float64)
    reference = gradients(load_tiny("fp64", plain=True), examples, double=True, dropout=dropout)

    def error(precision: str, plain: bool, on: bool) -> float:
        with compilation.enabled(on):
            actual = gradients(load_tiny(precision, plain=plain), examples, dropout=dropout)
        return relative_error(actual, reference)

    assert error("fp32", plain=False, on=True) < 1e-5
    assert error("bf16", plain=False, on=True) < 1.1 * error("bf16", plain=True, on=False)


def test_compiled_scores_equal_eager_scores(load_tiny: LoadTiny) -> None:
    base, batch = load_tiny(), collate(make_examples(LENGTHS), "all")
    eager = score_documents(base, batch).nll_all
    torch._dynamo.reset()
    with compilation.enabled(True):
        compiled = score_documents(base, batch).nll_all
    assert counters["stats"]["unique_graphs"] > 0
    assert compiled == pytest.approx(eager, rel=1e-6)


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_loss_and_logit_gradient_equal_fp64_cross_entropy(
    dtype: torch.dtype, rounding: float, on: bool
) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(2 * EAGER_BLOCK + 3, 5_000) * 8 + 50).to(dtype)
    labels = torch.randint(0, 5_000, (len(logits),))
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    expected_gradient = torch.autograd.grad(expected.sum(), exact)[0]
    with compilation.enabled(on):
        scored = label_nll(logits.clone(), labels)
        nll, logit_gradient = nll_and_gradient(logits.clone(), labels)
    assert logit_gradient.dtype == dtype and nll.dtype == torch.float32
    assert torch.equal(scored, nll)
    torch.testing.assert_close(nll.double(), expected, rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(
        logit_gradient.double(), expected_gradient, rtol=4 * rounding, atol=1e-7
    )


@pytest.mark.parametrize("p", [0.05, 0.3, 0.6])
def test_compiled_dropout_has_the_mask_of_eager_mode(p: float) -> None:
    # The same shape for every p, to detect reuse of cached code with another p's threshold.
    dropout = TokenDropout(p, "a", 96)
    dropout.keys = torch.randint(-(2**31), 2**31, (1, 37), dtype=torch.int64).to(torch.int32)
    weight = torch.ones(3, 96)

    def product(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return torch.nn.functional.linear(dropout(x.float()), weight)

    x = torch.ones(1, 37, 96, dtype=torch.bfloat16, requires_grad=True)
    eager, compiled = product(x), torch.compile(product, dynamic=True)(x)
    assert torch.equal(eager, compiled)
    assert len(eager.unique()) > 1, "nothing was dropped"
    for eager_gradient, compiled_gradient in zip(
        torch.autograd.grad(eager.sum(), x), torch.autograd.grad(compiled.sum(), x), strict=True
    ):
        assert torch.equal(eager_gradient, compiled_gradient)


# Code is compiled for the first shapes, so seeds vary these.
@pytest.mark.parametrize(("precision", "seed"), [("fp32", 0), ("fp32", 1), ("bf16", 2)])
def test_new_shapes_compile_no_further_graph(
    load_tiny: LoadTiny, precision: str, seed: int
) -> None:
    base = load_tiny(precision)
    peft_model = attach.attach(
        base, AdapterSection(r=4, lora_dropout=0.1, target_modules=("q_proj", "v_proj")), seed=0
    )
    peft_model.train()
    generator = torch.Generator().manual_seed(seed)

    def step(number: int) -> None:
        rows = int(torch.randint(1, 12, (1,), generator=generator))
        lengths = torch.randint(2, 400, (rows,), generator=generator).tolist()
        batch_nll(base, collate(make_examples(lengths, seed=number), "all")).backward()

    torch._dynamo.reset()
    with compilation.enabled(True):
        for number in range(20):
            step(number)
    # One graph for all layers, two for the softmax of `attention_bmm` and its gradient (the C++
    # does not support a head dimension of 8), and one for the loss unless a kernel computes it.
    in_cpp = precision == "bf16" and build.available()
    assert counters["stats"]["unique_graphs"] == (3 if in_cpp else 4)


def test_every_rank_of_a_grid_is_compiled(load_tiny: LoadTiny) -> None:
    base, batch = load_tiny(), collate(make_examples(LENGTHS), "all")
    torch._dynamo.reset()
    compiled = 0
    for r in (1, 2, 3, 4, 5):
        peft_model = attach.attach(
            base, AdapterSection(r=r, target_modules=("q_proj", "v_proj")), seed=0
        )
        with compilation.enabled(True):
            batch_nll(base, batch).backward()
            peft_model.eval()
            score_documents(base, batch)
        attach.detach(peft_model)
        assert counters["stats"]["unique_graphs"] >= compiled + 2
        compiled = counters["stats"]["unique_graphs"]


def test_compiled_training_has_the_losses_of_eager_training(load_tiny: LoadTiny) -> None:
    examples = make_examples(LENGTHS)

    def losses(setting: bool, recompute: bool = False) -> list[float]:
        base = load_tiny()
        peft_model = attach.attach(
            base, AdapterSection(r=4, lora_dropout=0.1, target_modules=("q_proj", "v_proj")), seed=0
        )
        section = TrainingSection(
            num_train_epochs=2, effective_batch_size=4, compile=setting, learning_rate=1e-3,
            activation_checkpointing=recompute,
        )  # fmt: skip
        result = train(base, peft_model, examples, section, 0)
        assert result.compiled == setting
        return [step.loss for step in result.history]

    plain = losses(False)
    assert counters["stats"]["unique_graphs"] == 0
    torch._dynamo.reset()
    compiled = losses(True)
    assert counters["stats"]["unique_graphs"] > 0
    assert compiled == pytest.approx(plain, rel=1e-5)
    torch._dynamo.reset()
    assert losses(True, recompute=True) == pytest.approx(plain, rel=1e-5)


def test_failed_compilation_falls_back_to_eager_once_and_for_all() -> None:
    tried = []

    def work() -> str:
        tried.append(compilation.is_enabled())
        if compilation.is_enabled():
            raise RuntimeError("no such instruction\nand much more")
        return "done"

    assert compilation.run_with_compile_fallback(True, work) == "done"
    assert compilation.failure() == "no such instruction"
    # Compilation is not attempted again.
    assert compilation.run_with_compile_fallback(True, work) == "done"
    assert tried == [True, False, False]


def test_exceeding_the_recompile_limit_is_reported() -> None:
    @compilation.compilable
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def work(dtype: torch.dtype) -> torch.Tensor:
        return compilation.run_with_compile_fallback(
            True, lambda: doubled(torch.ones(3, dtype=dtype))
        )

    work(torch.float16)  # configures torch.compile
    with torch._dynamo.config.patch(recompile_limit=2):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            assert work(dtype).tolist() == [2, 2, 2]
    assert "recompile_limit" in compilation.failure()


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError(), DataError("x"), ValueError("in the work")]
)
def test_errors_of_the_work_itself_are_not_compile_failures(error: Exception) -> None:
    def work() -> None:
        raise error

    with pytest.raises(type(error)):
        compilation.run_with_compile_fallback(True, work)
    assert not compilation.failure()


def test_should_compile_needs_enough_tokens_and_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for low_precision, minimum in zip((True, False), compilation.MIN_TOKENS["cpu"], strict=True):
        assert not compilation.should_compile("auto", minimum - 1, cpu, low_precision)
        assert compilation.should_compile("auto", minimum, cpu, low_precision)
    assert compilation.should_compile(True, 1, cpu, low_precision=True)
    assert not compilation.should_compile(False, 10**9, cpu, low_precision=True)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not compilation.should_compile("auto", 10**9, cpu, low_precision=True)
