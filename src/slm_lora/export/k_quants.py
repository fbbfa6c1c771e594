"""K-quants of GGUF: the type of each tensor, and its blocks by llama.cpp's own quantiser.

Types are those that `llama-quantize` chooses without an importance matrix (llama.cpp,
src/llama-quant.cpp): more bits for the output matrix, and for attn_v and ffn_down in the first and
last eighth of the layers and in every third layer between. Its exception for
Llama's 80-layer model (attn_v in Q5_K) is left out.
"""

from __future__ import annotations

import ctypes
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Quantization

from slm_lora.errors import NumericError
from slm_lora.evaluation.llama_library import load

K_QUANTS = {
    "q4_k_m": (Quantization.Q4_K, gguf.LlamaFileType.MOSTLY_Q4_K_M),
    "q5_k_m": (Quantization.Q5_K, gguf.LlamaFileType.MOSTLY_Q5_K_M),
    "q6_k": (Quantization.Q6_K, gguf.LlamaFileType.MOSTLY_Q6_K),
}
"""By the name of the file's type: type of most tensors, and its number in the file."""

_FOR_OTHER_ROWS = {
    Quantization.Q4_K: Quantization.Q5_0,
    Quantization.Q5_K: Quantization.Q5_1,
    Quantization.Q6_K: Quantization.Q8_0,
}
"""Blocks of 32 for rows that do not divide into blocks of 256."""


def tensor_type(
    name: str, shape: tuple[int, ...], file_type: Quantization, n_layers: int, tied: bool
) -> Quantization:
    """Type of a tensor in a K-quant file of architecture ``llama``.

    Args:
        name: in GGUF, such as ``blk.3.attn_v.weight``.
        shape: [rows, columns], or [length].
        file_type: of most tensors: Q4_K, Q5_K or Q6_K.
        n_layers: of the model.
        tied: whether the embeddings are the output matrix, too.
    """
    if len(shape) < 2:
        return Quantization.F32
    columns = shape[-1]
    chosen = file_type
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        if columns % gguf.GGML_QUANT_SIZES[file_type][0]:
            chosen = Quantization.Q8_0
        else:
            chosen = Quantization.Q6_K
    elif name.endswith((".attn_v.weight", ".ffn_down.weight")) and _has_more_bits(
        int(name.split(".")[1]), n_layers
    ):
        chosen = Quantization.Q6_K
    if columns % gguf.GGML_QUANT_SIZES[chosen][0]:
        chosen = _FOR_OTHER_ROWS.get(chosen, Quantization.F16)
    if columns % gguf.GGML_QUANT_SIZES[chosen][0]:
        chosen = Quantization.F16
    return chosen


def _has_more_bits(layer: int, n_layers: int) -> bool:
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def quantize(values: npt.NDArray[np.float32], kind: Quantization) -> npt.NDArray[np.uint8]:
    """Blocks of a matrix, uint8 [rows, bytes], by llama.cpp's quantiser in xllamacpp.

    Args:
        values: [rows, columns]; columns divisible by the block size.
        kind: a type with blocks.

    Raises:
        UsageError: xllamacpp is not installed, or does not export the quantiser.
        NumericError: a value is not finite.
    """
    if not np.isfinite(values).all():
        raise NumericError("a weight is not finite, so it has no blocks")
    rows, columns = values.shape
    _, n_bytes = gguf.quant_shape_to_byte_shape((rows, columns), kind)
    source = np.ascontiguousarray(values, np.float32)
    blocks = np.empty((rows, n_bytes), np.uint8)
    library: Any = load()
    written = library.ggml_quantize_chunk(
        int(kind),
        source.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
        blocks.ctypes.data,
        0,
        rows,
        columns,
        None,
    )
    if written != blocks.nbytes:
        raise NumericError(f"llama.cpp wrote {written} bytes of {kind.name}, not {blocks.nbytes}")
    return blocks
