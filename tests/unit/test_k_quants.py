"""Types of the tensors of K-quant files, against what llama.cpp prints on published files."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import gguf
import pytest
from gguf import GGMLQuantizationType as Quantization

from slm_lora.export.k_quants import K_QUANTS, tensor_type


def llama(
    layers: int, hidden: int, inner: int, kv: int, vocabulary: int, tied: bool = False
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors of a Llama: name and shape."""
    yield "token_embd.weight", (vocabulary, hidden)
    yield "output_norm.weight", (hidden,)
    if not tied:
        yield "output.weight", (vocabulary, hidden)
    for layer in range(layers):
        for name, shape in (
            ("attn_norm", (hidden,)), ("ffn_norm", (hidden,)),
            ("attn_q", (hidden, hidden)), ("attn_k", (kv, hidden)), ("attn_v", (kv, hidden)),
            ("attn_output", (hidden, hidden)), ("ffn_gate", (inner, hidden)),
            ("ffn_up", (inner, hidden)), ("ffn_down", (hidden, inner)),
        ):  # fmt: skip
            yield f"blk.{layer}.{name}.weight", shape


def size(shape: tuple[int, ...], kind: Quantization) -> int:
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    return math.prod(shape) // block * n_bytes


@pytest.mark.parametrize(
    ("layers", "hidden", "inner", "kv", "counts", "mebibytes"),
    [
        # TinyLlama-1.1B-Chat and Llama-2-7B in Q4_K_M, as llama.cpp lists them when it loads them.
        (22, 2048, 5632, 256, {"F32": 45, "Q4_K": 135, "Q6_K": 21}, 636.18),
        (32, 4096, 11008, 4096, {"F32": 65, "Q4_K": 193, "Q6_K": 33}, 3891.24),
    ],
)
def test_q4_k_m_has_the_tensors_of_published_files(
    layers: int, hidden: int, inner: int, kv: int, counts: dict[str, int], mebibytes: float
) -> None:
    types = [
        (shape, tensor_type(name, shape, K_QUANTS["q4_k_m"][0], layers, False))
        for name, shape in llama(layers, hidden, inner, kv, 32000)
    ]
    assert Counter(kind.name for _, kind in types) == counts
    assert sum(size(*each) for each in types) / 2**20 == pytest.approx(mebibytes, abs=0.01)


@pytest.mark.parametrize(
    ("file_type", "rows", "down", "output"),
    [("q4_k_m", "Q5_0", "Q4_K", "Q8_0"), ("q5_k_m", "Q5_1", "Q5_K", "Q8_0"),
     ("q6_k", "Q8_0", "Q6_K", "Q8_0")],
)  # fmt: skip
def test_rows_that_do_not_divide_into_256_have_blocks_of_32(
    file_type: str, rows: str, down: str, output: str
) -> None:
    """SmolLM2-135M: 576 columns, 1,536 in ffn_down, tied embeddings."""
    kind = K_QUANTS[file_type][0]
    types = {
        name: tensor_type(name, shape, kind, 30, True).name
        for name, shape in llama(30, 576, 1536, 192, 49152, tied=True)
    }
    assert types["blk.4.attn_q.weight"] == rows
    assert types["blk.4.ffn_down.weight"] == down
    assert types["blk.0.ffn_down.weight"] == "Q6_K"
    assert types["blk.0.attn_v.weight"] == "Q8_0"  # more bits than its neighbours
    assert types["token_embd.weight"] == output
    assert types["output_norm.weight"] == "F32"


def test_rows_that_do_not_divide_into_32_are_f16() -> None:
    kind = K_QUANTS["q4_k_m"][0]
    assert tensor_type("blk.4.attn_q.weight", (48, 48), kind, 30, True) == Quantization.F16
    assert tensor_type("token_embd.weight", (500, 48), kind, 30, True) == Quantization.F16
