"""GGUF files for llama.cpp: a model of the Llama family, or a LoRA adapter for one.

Names, layouts and keys are those of llama.cpp's architecture ``llama``. Its rotary embedding pairs
neighbouring dimensions of a head, that of transformers the two halves; the rows of q and k, and of
their lora_B, are therefore permuted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Quantization
from gguf import GGUFWriter
from safetensors import safe_open

from slm_lora.data.templates import Template
from slm_lora.data.tokenization import RowTokenizer
from slm_lora.errors import NumericError, UsageError
from slm_lora.export import k_quants
from slm_lora.export.gguf_tokenizer import CONVERT_INSTEAD, Vocabulary, describe_tokenizer
from slm_lora.model.loading import load_tokenizer
from slm_lora.model.resolve import ModelSource, weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

FileType = Literal["f32", "f16", "q8_0", "q4_k_m", "q5_k_m", "q6_k"]
_TYPES = {
    **k_quants.K_QUANTS,
    "f32": (Quantization.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Quantization.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (Quantization.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_ARCHITECTURE = "llama"

_TOP_LEVEL_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_MODULE = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of a file; its values are loaded when it is written."""

    name: str
    shape: tuple[int, ...]
    type: Quantization
    values: Callable[[], npt.NDArray[Any]]


def write_model(
    source: ModelSource,
    target: Path,
    file_type: FileType,
    template: Template,
    chat_template: str | None,
) -> Vocabulary:
    """Write a model folder as one GGUF file, tokenizer and chat template included.

    Args:
        source: a model of the Llama family.
        target: path of the file.
        file_type: ``f32``, ``f16``, ``q8_0`` (blocks of 32 8-bit weights with one scale), or a
            K-quant. Vectors are always F32; with ``q8_0``, rows not divisible into blocks are F16.
        template: the training template; decides whether a text begins with BOS.
        chat_template: the training template as a chat template.

    Raises:
        UsageError: another family, or a model or tokenizer that llama.cpp would treat differently.
        NumericError: a weight is not finite in the type.
    """
    config = read_config(source)
    tokenizer = load_tokenizer(source)
    vocab = _describe_vocabulary(source, config, tokenizer, template)
    writer = _writer(target, gguf.GGUFType.MODEL, source.name)
    _add_architecture(writer, config, file_type)
    _add_vocabulary(writer, vocab, tokenizer, chat_template)
    _write(writer, [*_rope_factors(config), *_model_tensors(source, config, _TYPES[file_type][0])])
    return vocab


def check_model(source: ModelSource, template: Template) -> None:
    """Raise the errors of `write_model` about model and tokenizer without writing a file."""
    _describe_vocabulary(source, read_config(source), load_tokenizer(source), template)


def write_adapter(
    folder: Path, settings: dict[str, Any], source: ModelSource, target: Path
) -> None:
    """Write a LoRA adapter as a GGUF file in F32.

    llama.cpp always scales by alpha/r, so alpha of an rsLoRA adapter is written as alpha·√r.

    Args:
        folder: folder of the adapter.
        settings: content of its adapter_config.json.
        source: its base.
        target: path of the file.

    Raises:
        UsageError: llama.cpp does not support the adapter.
    """
    config = read_config(source)
    check_adapter(folder, settings)
    r, alpha = int(settings["r"]), float(settings["lora_alpha"])
    writer = _writer(target, gguf.GGUFType.ADAPTER, folder.resolve().name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    scaled = alpha * math.sqrt(r) if settings.get("use_rslora") else alpha
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, scaled)
    _write(writer, list(_adapter_tensors(folder / "adapter_model.safetensors", config)))


def check_adapter(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse adapters that llama.cpp does not support.

    Raises:
        UsageError: the adapter is not plain LoRA on linear layers with one rank and alpha.
    """
    unsupported = {
        f"peft_type {settings.get('peft_type')}": settings.get("peft_type") != "LORA",
        "DoRA": settings.get("use_dora"),
        "biases": settings.get("bias", "none") != "none" or settings.get("lora_bias"),
        "ranks or alphas per module": settings.get("rank_pattern") or settings.get("alpha_pattern"),
        "fully trained modules or tokens": settings.get("modules_to_save")
        or settings.get("trainable_token_indices"),
    }
    if reasons := [feature for feature, present in unsupported.items() if present]:
        raise UsageError(
            f"{folder}: llama.cpp does not support adapters with {', '.join(reasons)}; "
            "export the merged model instead: --as merged"
        )


def read_config(source: ModelSource) -> PretrainedConfig:
    """Read the configuration of a model.

    Raises:
        UsageError: the export does not support the model.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(
        source.path, local_files_only=True, trust_remote_code=False
    )
    model_type = config.model_type
    if model_type != "llama":
        raise UsageError(
            f"{source.name}: GGUF export supports the Llama family only, not {model_type}; "
            f"{CONVERT_INSTEAD}"
        )
    rope = config.rope_parameters
    unsupported = {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        f"hidden_act {config.hidden_act}": config.hidden_act != "silu",
        "quantized weights": getattr(config, "quantization_config", None),
        f"rope_type {rope['rope_type']}": rope["rope_type"] not in ("default", "linear", "llama3"),
        "a partial rotary embedding": rope.get("partial_rotary_factor", 1.0) != 1.0,
    }
    if reasons := [feature for feature, present in unsupported.items() if present]:
        raise UsageError(
            f"{source.name}: GGUF export does not support {', '.join(reasons)}; {CONVERT_INSTEAD}"
        )
    return config  # type: ignore[no-any-return]


def _describe_vocabulary(
    source: ModelSource,
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
) -> Vocabulary:
    adds_bos = RowTokenizer(tokenizer, template).bos_id is not None
    return describe_tokenizer(tokenizer, int(config.vocab_size), adds_bos, source.name)


def _writer(target: Path, content_type: str, name: str) -> GGUFWriter:
    writer = GGUFWriter(target, _ARCHITECTURE)
    writer.add_type(content_type)
    writer.add_name(name)
    return writer


def _add_architecture(writer: GGUFWriter, config: Any, file_type: FileType) -> None:
    writer.add_file_type(_TYPES[file_type][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _add_vocabulary(
    writer: GGUFWriter,
    vocab: Vocabulary,
    tokenizer: PreTrainedTokenizerBase,
    chat_template: str | None,
) -> None:
    writer.add_tokenizer_model(vocab.model)
    writer.add_tokenizer_pre(vocab.pre)
    writer.add_token_list(vocab.tokens)
    writer.add_token_types(vocab.types)
    if vocab.model == "gpt2":
        writer.add_token_merges(vocab.merges)
    else:
        writer.add_token_scores(vocab.scores)
        writer.add_add_space_prefix(vocab.adds_space)
    for add, token_id in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if token_id is not None:
            add(token_id)
    writer.add_add_bos_token(vocab.adds_bos)
    writer.add_add_eos_token(False)
    if chat_template is not None:
        # After a literal BOS llama.cpp inserts the tokenizer's leading space itself; for
        # transformers the template has to contain it.
        runtime_adds_space = vocab.adds_space and vocab.adds_bos
        writer.add_chat_template(
            chat_template.replace("{{ bos_token + ' ' }}", "{{ bos_token }}")
            if runtime_adds_space
            else chat_template
        )


def _rope_factors(config: Any) -> list[_Tensor]:
    """Divisors of the rotary frequencies, fp32 [head_dim / 2]; empty without RoPE scaling."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope, head_dim = config.rope_parameters, config.head_dim
    if rope["rope_type"] == "default":
        return []
    # Take the scaled frequencies from transformers instead of copying its formulas.
    scaled = LlamaRotaryEmbedding(config).inv_freq.double().cpu().numpy()
    unscaled = float(rope["rope_theta"]) ** (
        -np.arange(0, head_dim, 2, dtype=np.float64) / head_dim
    )
    factors = (unscaled / scaled).astype(np.float32)
    return [_Tensor("rope_freqs.weight", factors.shape, Quantization.F32, lambda: factors)]


def _model_tensors(
    source: ModelSource, config: Any, tensor_type: Quantization
) -> Iterator[_Tensor]:
    for file in weight_files(source.path):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dictionary)
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                shape = tuple(tensors.get_slice(name).get_shape())
                own = f"{_gguf_name(name.removesuffix('.weight'), source.name)}.weight"
                yield _Tensor(
                    own,
                    shape,
                    _storage_type(own, shape, tensor_type, config),
                    lambda file=file, name=name: _load_tensor(file, name, config),  # type: ignore[misc]
                )


def _adapter_tensors(file: Path, config: Any) -> Iterator[_Tensor]:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            module, _, side = name.removesuffix(".weight").rpartition(".")
            if side not in ("lora_A", "lora_B"):
                raise UsageError(
                    f"{file}: {name} is not a LoRA matrix of a linear layer; "
                    "export the merged model instead: --as merged"
                )
            translated = _gguf_name(module.removeprefix("base_model.model."), str(file))
            yield _Tensor(
                f"{translated}.weight.{side.lower()}",
                tuple(tensors.get_slice(name).get_shape()),
                Quantization.F32,
                lambda name=name: _load_tensor(file, name, config),  # type: ignore[misc]
            )


def _gguf_name(module: str, source: str) -> str:
    """llama.cpp's name of a transformers module.

    Raises:
        UsageError: the module is not part of the Llama architecture.
    """
    if module in _TOP_LEVEL_NAMES:
        return _TOP_LEVEL_NAMES[module]
    if (match := _LAYER_MODULE.fullmatch(module)) and match[2] in _LAYER_NAMES:
        return f"blk.{match[1]}.{_LAYER_NAMES[match[2]]}"
    raise UsageError(f"{source}: {module} is not part of the Llama architecture; {CONVERT_INSTEAD}")


def _load_tensor(file: Path, name: str, config: Any) -> npt.NDArray[np.float32]:
    with safe_open(file, framework="pt") as tensors:
        values: npt.NDArray[np.float32] = tensors.get_tensor(name).to(torch.float32).numpy()
    if "lora_A" in name:
        return values
    for projection, n_heads in (
        (".self_attn.q_proj.", config.num_attention_heads),
        (".self_attn.k_proj.", config.num_key_value_heads),
    ):
        if projection in name:
            return values[_interleaved_rows(n_heads, values.shape[0] // n_heads)]
    return values


def _interleaved_rows(n_heads: int, head_dim: int) -> npt.NDArray[np.int64]:
    """Row permutation that places rows i and i + head_dim/2 of each head next to each other."""
    rows = np.arange(n_heads * head_dim).reshape(n_heads, 2, head_dim // 2)
    return rows.transpose(0, 2, 1).ravel()


def _storage_type(
    name: str, shape: tuple[int, ...], requested: Quantization, config: Any
) -> Quantization:
    if any(requested == kind for kind, _ in k_quants.K_QUANTS.values()):
        n_layers, tied = config.num_hidden_layers, config.tie_word_embeddings
        return k_quants.tensor_type(name, shape, requested, n_layers, tied)
    if len(shape) < 2:
        return Quantization.F32
    if requested == Quantization.Q8_0 and shape[-1] % gguf.GGML_QUANT_SIZES[requested][0]:
        return Quantization.F16
    return requested


def _write(writer: GGUFWriter, tensors: list[_Tensor]) -> None:
    """Write header and tensors with one tensor in memory at a time."""
    for tensor in tensors:
        shape, dtype = _storage_layout(tensor)
        size = math.prod(shape) * dtype.itemsize
        writer.add_tensor_info(tensor.name, shape, dtype, size, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        with np.errstate(over="ignore"):
            values = _stored(np.ascontiguousarray(tensor.values()), tensor.type)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise NumericError(f"{tensor.name}: not finite in {tensor.type.name}; use --type f32")
        writer.write_tensor_data(values)
    writer.close()


def _stored(values: npt.NDArray[np.float32], kind: Quantization) -> npt.NDArray[Any]:
    if kind in (Quantization.F32, Quantization.F16, Quantization.Q8_0):
        return gguf.quants.quantize(values, kind)
    return k_quants.quantize(values, kind)


def _storage_layout(tensor: _Tensor) -> tuple[tuple[int, ...], np.dtype[Any]]:
    if tensor.type not in (Quantization.F32, Quantization.F16):
        return gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type), np.dtype(np.uint8)
    return tensor.shape, np.dtype(np.float16 if tensor.type == Quantization.F16 else np.float32)
