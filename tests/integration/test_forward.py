"""Loss and gradient of packed documents against padded batches, single documents and fp64."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slm_lora.data.collate import IGNORE_INDEX, collate
from slm_lora.errors import UsageError
from slm_lora.evaluation.scoring import score
from slm_lora.model.base import DTYPES, Base, PrecisionName
from slm_lora.model.forward import batch_nll, score_documents
from slm_lora.ops import attention, attention_bmm, attention_cpu, attention_flash
from slm_lora.ops.cross_entropy import CHUNK, summed_nll, token_nll
from slm_lora.ops.output_head import HeadForm, OutputHead
from slm_lora.ops.token_metrics import TOKEN_METRICS

from ..support.examples import LENGTHS, gradients, load, make_examples, save_model
from ..support.tensors import relative_error

LoadTiny = Callable[..., Base]


def test_packed_forward_is_used_unless_padded_is_requested(load_tiny: LoadTiny) -> None:
    for precision in ("fp32", "bf16"):
        base = load_tiny(precision)
        assert base.packed
        assert base.model.config._attn_implementation == attention.PACKED
    assert not load_tiny(plain=True).packed


def test_packed_scores_equal_each_document_alone(load_tiny: LoadTiny) -> None:
    packed, plain = load_tiny(), load_tiny(plain=True)
    examples = make_examples(LENGTHS)
    together = score_documents(packed, collate(examples, "all"))
    for index, example in enumerate(examples):
        alone = score_documents(plain, collate([example], "all"))
        assert together.nll_all[index] == pytest.approx(alone.nll_all[0], rel=1e-5)
        assert together.nll_response[index] == pytest.approx(alone.nll_response[0], rel=1e-5)
        assert together.tokens_all[index] == example.length - 1


def test_nll_of_a_document_does_not_depend_on_its_neighbours(load_tiny: LoadTiny) -> None:
    base = load_tiny()
    first, *rest = make_examples(LENGTHS)
    others = make_examples(LENGTHS, seed=9)[1:]
    nll = score_documents(base, collate([first, *rest], "all")).nll_all[0]
    with_others = score_documents(base, collate([first, *others], "all")).nll_all[0]
    moved = score_documents(base, collate([*others, first], "all")).nll_all[-1]
    assert nll == pytest.approx(with_others, rel=1e-6)
    assert nll == pytest.approx(moved, rel=1e-6)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(2, 60), min_size=1, max_size=9))
def test_packed_attention_equals_softmax_attention_with_gradients(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(sum(lengths))
    total = sum(lengths)
    q = torch.randn(total, 6, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    k, v = (
        torch.randn(total, 2, 8, dtype=torch.float64, generator=generator, requires_grad=True)
        for _ in range(2)
    )
    up = torch.randn(total, 6, 8, dtype=torch.float64, generator=generator)
    out, _ = attention.packed_attention(q, k, v, torch.tensor(lengths), 0.3)
    actual_gradients = torch.autograd.grad((out * up).sum(), (q, k, v))
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (document[:, None] == document[None, :]).tril()
    scores = torch.einsum("thd,shd->hts", q, k.repeat_interleave(3, 1)) * 0.3
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
    reference = torch.einsum("hts,shd->thd", weights, v.repeat_interleave(3, 1))
    expected_gradients = torch.autograd.grad((reference * up).sum(), (q, k, v))
    torch.testing.assert_close(out, reference, rtol=1e-10, atol=1e-10)
    for gradient, expected in zip(actual_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_attention_passes_opcheck(dtype: torch.dtype) -> None:
    """It neither mutates nor returns its inputs, and its fake kernel gives the right shapes."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, upstream = (
        torch.randn(12, heads, 16, generator=generator).to(dtype).requires_grad_()
        for heads in (6, 2, 2, 6)
    )
    lengths = torch.tensor([7, 5])
    torch.library.opcheck(attention.packed_attention, (q, k, v, lengths, 0.3))
    with torch.no_grad():
        saved = (q, k, v, *attention.packed_attention(q, k, v, lengths, 0.3), lengths, 0.3)
        torch.library.opcheck(attention.packed_attention_backward, (upstream, *saved))


@pytest.fixture
def error_to_fp64(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, bool], float]:
    """Relative error of gradients, by precision and packed or padded; reference: padded fp64."""
    examples = make_examples(LENGTHS)
    monkeypatch.setitem(DTYPES, "fp64", torch.float64)
    reference = gradients(load_tiny("fp64", plain=True), examples, double=True)

    def error(precision: str, plain: bool) -> float:
        actual = gradients(load_tiny(precision, plain=plain), examples)
        return relative_error(actual, reference)

    return error


def test_fp32_gradients_equal_fp64(error_to_fp64: Callable[[str, bool], float]) -> None:
    assert error_to_fp64("fp32", False) < 1e-5


def test_bf16_gradients_are_as_close_to_fp64_as_transformers(
    error_to_fp64: Callable[[str, bool], float],
) -> None:
    # A tolerance of a tenth, because rounding errors are of equal size but different.
    assert error_to_fp64("bf16", False) < 1.1 * error_to_fp64("bf16", True)


HEADS = {
    "GraniteConfig": {"logits_scaling": 4.0},
    "CohereConfig": {"logit_scale": 0.3},
    "Gemma2Config": {"final_logit_softcapping": 30.0},
    "VaultGemmaConfig": {"final_logit_softcapping": 30.0},
    "NanoChatConfig": {},
    "PhiConfig": {},
    "GPTJConfig": {"rotary_dim": 4},
    "MiniCPM3Config": {
        "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 8, "dim_model_base": 4,
    },
}  # fmt: skip
"""Models with a scale, a cap or a bias in their output layer."""


def save_headed(kind: str, folder: Path, std: float) -> None:
    sizes = {
        "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    if not hasattr(transformers, kind):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    if kind == "MiniCPM3Config":
        del sizes["head_dim"]
    torch.manual_seed(0)
    save_model(getattr(transformers, kind)(**sizes, **HEADS[kind]), folder, std)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("std", [0.1, 0.7])  # with 0.1, a cap of 30 has almost no effect
def test_special_output_heads_have_the_loss_of_transformers(
    kind: str, std: float, tmp_path: Path
) -> None:
    save_headed(kind, tmp_path, std)
    base = load(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    examples = make_examples([30, 12, 5])
    nll = score_documents(base, collate(examples, "all")).nll_all
    batch = collate(examples, "all")
    total = sum(
        plain(input_ids=ids, labels=ids, use_cache=False).loss * (ids.shape[1] - 1)
        for example in examples
        for ids in [torch.from_numpy(example.ids).long().unsqueeze(0)]
    )
    assert nll.sum() == pytest.approx(total.item(), rel=2e-6)
    assert batch_nll(base, batch).item() == pytest.approx(total.item(), rel=2e-6)


@pytest.mark.parametrize("kind", ["Gemma2Config", "CohereConfig", "PhiConfig"])
def test_special_output_heads_have_the_gradient_of_transformers(kind: str, tmp_path: Path) -> None:
    save_headed(kind, tmp_path, 0.7)
    base = load(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    base.model.requires_grad_(True)
    (example,) = make_examples([40])
    batch_nll(base, collate([example], "all")).backward()
    ids = torch.from_numpy(example.ids).long().unsqueeze(0)
    (plain(input_ids=ids, labels=ids, use_cache=False).loss * (example.length - 1)).backward()
    ours = dict(base.model.named_parameters())
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(ours[name].grad, parameter.grad, rtol=1e-3, atol=1e-4)


def test_model_whose_head_needs_more_than_hidden_states_is_refused(tmp_path: Path) -> None:
    config = transformers.ModernBertDecoderConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=0, cls_token_id=0,
        sep_token_id=0,
    )  # fmt: skip
    save_model(config, tmp_path)
    with pytest.raises(UsageError, match="sees more than its last hidden states"):
        load(tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_attention_across_documents_falls_back_to_padding(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch, precision: PrecisionName
) -> None:
    forward = attention_bmm.forward

    def across_documents(
        q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float
    ) -> tuple[Tensor, ...]:
        return forward(q, k, v, lengths.sum().view(1), scale)

    for backend in (attention_bmm, attention_cpu):
        monkeypatch.setattr(backend, "forward", across_documents)
    base = load_tiny(precision)
    assert not base.packed
    assert "logits differ by" in base.fallback_reason


def test_flash_attention_that_fails_is_reported_and_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # PyTorch has no FlashAttention operator on a CPU, so the check fails.
    monkeypatch.setattr(attention_flash, "_failure", "")
    assert not attention_flash.is_verified.__wrapped__(torch.device("cpu"), torch.bfloat16, 64)
    assert "_flash_attention_forward" in attention_flash.failure()


@pytest.mark.parametrize("kind", ["MistralConfig", "Qwen2Config", "Qwen3Config"])
def test_other_model_families_score_as_transformers_does(kind: str, tmp_path: Path) -> None:
    config = getattr(transformers, kind)(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, sliding_window=8,
    )  # fmt: skip
    torch.manual_seed(0)
    save_model(config, tmp_path)
    base = load(tmp_path)
    # Only Mistral enables its sliding window by default; packed attention does not support one.
    assert base.packed == (kind != "MistralConfig"), base.fallback_reason
    examples = make_examples([30, 12, 5])
    nll = score_documents(base, collate(examples, "all")).nll_all
    for index, example in enumerate(examples):
        ids = torch.from_numpy(example.ids).long().unsqueeze(0)
        plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        expected = plain(input_ids=ids, labels=ids).loss.item() * (example.length - 1)
        assert nll[index] == pytest.approx(expected, rel=1e-4)


def test_summed_micro_batch_gradients_equal_the_whole_batch(load_tiny: LoadTiny) -> None:
    examples = make_examples(LENGTHS)
    one_batch = gradients(load_tiny(), examples)
    parts = gradients(load_tiny(), examples, micro_batch=1)
    assert relative_error(parts, one_batch) < 1e-5


def test_dropout_gradients_do_not_depend_on_packing(load_tiny: LoadTiny) -> None:
    examples = make_examples(LENGTHS)
    packed = gradients(load_tiny(), examples, dropout=0.3)
    padded = gradients(load_tiny(plain=True), examples, dropout=0.3)
    alone = gradients(load_tiny(), examples, dropout=0.3, micro_batch=1)
    without = gradients(load_tiny(), examples)
    for gradient in (padded, alone):
        assert relative_error(gradient, packed) < 1e-5
    assert relative_error(without, packed) > 1e-2


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    "form", [HeadForm(), HeadForm(0.125), HeadForm(1.0, 3.0), HeadForm(2.0, 5.0)]
)
@pytest.mark.parametrize("positions", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 3])
def test_chunked_loss_equals_cross_entropy(positions: int, form: HeadForm, with_bias: bool) -> None:
    torch.manual_seed(positions)
    hidden = torch.randn(positions, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 50, (positions,))
    bias = torch.randn(50, dtype=torch.float64, requires_grad=True) if with_bias else None
    nll = summed_nll(hidden, OutputHead(weight, bias, form), labels)
    logits = form.scale * (hidden @ weight.t() + (0 if bias is None else bias))
    if form.cap is not None:
        logits = form.cap * torch.tanh(logits / form.cap)
    reference = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    assert nll.item() == pytest.approx(reference.item(), rel=1e-12)
    trained = (hidden, weight) if bias is None else (hidden, weight, bias)
    ours = torch.autograd.grad(nll / 7, trained)
    theirs = torch.autograd.grad(reference / 7, trained)
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    rows = token_nll(hidden, OutputHead(weight, bias, form), labels)
    assert rows.sum().item() == pytest.approx(reference.item(), rel=1e-6)


def accurate(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (logits.argmax(1) == labels).double()


@pytest.mark.parametrize("plain", [False, True])
def test_token_metrics_equal_those_of_transformers_logits(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch, plain: bool
) -> None:
    """A planted accuracy, over all labels and over the response's, per row."""
    monkeypatch.setitem(TOKEN_METRICS, "accuracy", accurate)
    base, examples = load_tiny("fp32", plain=plain), make_examples(LENGTHS)
    base.model.eval()
    rows = score(base, examples, "test", 64)
    assert len(rows) == len(examples)
    for row in rows:
        (example,) = (e for e in examples if e.row_id == row.row_id)
        (alone,) = [collate([example], "all")]
        with torch.no_grad():
            ids = torch.from_numpy(alone.ids)[None]
            hit = load_tiny("fp32", plain=True).model(ids).logits[0].argmax(1).numpy()
        scored = alone.labels != IGNORE_INDEX
        right = (hit == alone.labels) & scored
        assert row.values["accuracy"] == (right.sum(), scored.sum())
        response = alone.response.astype(bool)
        expected = (right & response).sum(), (scored & response).sum()
        assert row.values["accuracy_response"] == expected
    monkeypatch.delitem(TOKEN_METRICS, "accuracy")
    assert all(row.values == {} for row in score(base, examples, "test", 64))
