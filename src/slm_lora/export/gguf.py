"""GGUF files for llama.cpp: a model of the Llama family, or a LoRA adapter for one.

Names, layouts and keys are those that llama.cpp reads for the architecture ``llama``. It rotates
neighbouring pairs of a head's dimensions, transformers the two halves of a head: so the rows of
q and k, and of their lora_B, are put in llama.cpp's order.
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
from slm_lora.export.gguf_tokenizer import WAY_OUT, Vocabulary, vocabulary
from slm_lora.model.loading import load_tokenizer
from slm_lora.model.resolve import ModelSource, weight_files

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

FileType = Literal["f32", "f16", "q8_0"]
_TYPES = {
    "f32": (Quantization.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (Quantization.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (Quantization.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_ARCHITECTURE = "llama"

_OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_INSIDE = {
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
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class _Tensor:
    """One tensor of a file; its values are made only when they are written."""

    name: str
    shape: tuple[int, ...]
    type: Quantization
    values: Callable[[], npt.NDArray[Any]]


def write_model(
    source: ModelSource, target: Path, kind: FileType, template: Template, chat: str | None
) -> Vocabulary:
    """Write a model folder as one GGUF file, tokenizer and chat template included.

    Args:
        source: of the Llama family.
        target: the file.
        kind: ``f32`` and ``f16`` as they say; ``q8_0``: blocks of 32 weights of 8 bits with one
            scale. Vectors stay F32, and what does not divide into blocks F16.
        template: the training template; for what it says of BOS.
        chat: the training template as a chat template.

    Raises:
        UsageError: not of that family, or llama.cpp would compute or tokenize otherwise.
        NumericError: a weight is not finite in F16.
    """
    config = read_config(source)
    tokenizer = load_tokenizer(source)
    words = _vocabulary(source, config, tokenizer, template)
    writer = _writer(target, gguf.GGUFType.MODEL, source.name)
    _add_shape(writer, config, kind)
    _add_vocabulary(writer, words, tokenizer, chat)
    _write(writer, [*_rope(config), *_model_tensors(source, config, _TYPES[kind][0])])
    return words


def check_model(source: ModelSource, template: Template) -> None:
    """Raise what `write_model` would raise of a model's kind and tokenizer, before other work."""
    _vocabulary(source, read_config(source), load_tokenizer(source), template)


def write_adapter(
    folder: Path, settings: dict[str, Any], source: ModelSource, target: Path
) -> None:
    """Write a LoRA adapter as a GGUF file, in F32, for the base's GGUF file.

    llama.cpp scales by alpha/r only: an rsLoRA adapter's alpha becomes alpha·√r.

    Args:
        folder: the adapter.
        settings: its adapter_config.json.
        source: its base.
        target: the file.

    Raises:
        UsageError: llama.cpp cannot apply it.
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
    """Refuse adapters that llama.cpp has no way to apply.

    Raises:
        UsageError: it is one.
    """
    unfit = {
        f"peft_type {settings.get('peft_type')}": settings.get("peft_type") != "LORA",
        "DoRA": settings.get("use_dora"),
        "biases": settings.get("bias", "none") != "none" or settings.get("lora_bias"),
        "ranks or alphas of single modules": settings.get("rank_pattern")
        or settings.get("alpha_pattern"),
        "modules trained whole": settings.get("modules_to_save")
        or settings.get("trainable_token_indices"),
    }
    if found := [what for what, there in unfit.items() if there]:
        raise UsageError(
            f"{folder}: llama.cpp applies no adapter with {', '.join(found)}; "
            "export the merged model instead: --as merged"
        )


def read_config(source: ModelSource) -> PretrainedConfig:
    """The configuration of a model that this module can write.

    Raises:
        UsageError: it cannot.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(
        source.path, local_files_only=True, trust_remote_code=False
    )
    kind = config.model_type
    if kind != "llama":
        raise UsageError(
            f"{source.name}: GGUF is written of the Llama family, not {kind}; {WAY_OUT}"
        )
    rope = config.rope_parameters
    unfit = {
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        f"hidden_act {config.hidden_act}": config.hidden_act != "silu",
        "quantized weights": getattr(config, "quantization_config", None),
        f"rope_type {rope['rope_type']}": rope["rope_type"] not in ("default", "linear", "llama3"),
        "a partial rotary embedding": rope.get("partial_rotary_factor", 1.0) != 1.0,
    }
    if found := [what for what, there in unfit.items() if there]:
        raise UsageError(f"{source.name}: no GGUF is written of {', '.join(found)}; {WAY_OUT}")
    return config  # type: ignore[no-any-return]


def _vocabulary(
    source: ModelSource,
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
) -> Vocabulary:
    adds_bos = RowTokenizer(tokenizer, template).bos_id is not None
    return vocabulary(tokenizer, int(config.vocab_size), adds_bos, source.name)


def _writer(target: Path, kind: str, name: str) -> GGUFWriter:
    writer = GGUFWriter(target, _ARCHITECTURE)
    writer.add_type(kind)
    writer.add_name(name)
    return writer


def _add_shape(writer: GGUFWriter, config: Any, kind: FileType) -> None:
    writer.add_file_type(_TYPES[kind][1])
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
    writer: GGUFWriter, words: Vocabulary, tokenizer: PreTrainedTokenizerBase, chat: str | None
) -> None:
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.model == "gpt2":
        writer.add_token_merges(words.merges)
    else:
        writer.add_token_scores(words.scores)
        writer.add_add_space_prefix(words.adds_space)
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if number is not None:
            add(number)
    writer.add_add_bos_token(words.adds_bos)
    writer.add_add_eos_token(False)
    if chat is not None:
        # Behind a BOS that is written out llama.cpp puts the tokenizer's own space by itself,
        # transformers does not: there the template has it.
        spaced = words.adds_space and words.adds_bos
        writer.add_chat_template(
            chat.replace("{{ bos_token + ' ' }}", "{{ bos_token }}") if spaced else chat
        )


def _rope(config: Any) -> list[_Tensor]:
    """Where rotary frequencies are scaled: what llama.cpp is to divide each of them by."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope, width = config.rope_parameters, config.head_dim
    if rope["rope_type"] == "default":
        return []
    # transformers' own frequencies, so that no formula of theirs is written a second time.
    scaled = LlamaRotaryEmbedding(config).inv_freq.double().cpu().numpy()
    plain = float(rope["rope_theta"]) ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    factors = (plain / scaled).astype(np.float32)
    return [_Tensor("rope_freqs.weight", factors.shape, Quantization.F32, lambda: factors)]


def _model_tensors(source: ModelSource, config: Any, wanted: Quantization) -> Iterator[_Tensor]:
    for file in weight_files(source.path):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                if name == "lm_head.weight" and config.tie_word_embeddings:
                    continue
                shape = tuple(tensors.get_slice(name).get_shape())
                yield _Tensor(
                    f"{_translate(name.removesuffix('.weight'), source.name)}.weight",
                    shape,
                    _fitting(shape, wanted),
                    lambda file=file, name=name: _read(file, name, config),  # type: ignore[misc]
                )


def _adapter_tensors(file: Path, config: Any) -> Iterator[_Tensor]:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            module, _, side = name.removesuffix(".weight").rpartition(".")
            if side not in ("lora_A", "lora_B"):
                raise UsageError(
                    f"{file}: {name} is no LoRA of a linear layer; "
                    "export the merged model instead: --as merged"
                )
            translated = _translate(module.removeprefix("base_model.model."), str(file))
            yield _Tensor(
                f"{translated}.weight.{side.lower()}",
                tuple(tensors.get_slice(name).get_shape()),
                Quantization.F32,
                lambda name=name: _read(file, name, config),  # type: ignore[misc]
            )


def _translate(module: str, where: str) -> str:
    """llama.cpp's name of one of transformers' modules."""
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    if (match := _LAYER.fullmatch(module)) and match[2] in _INSIDE:
        return f"blk.{match[1]}.{_INSIDE[match[2]]}"
    raise UsageError(f"{where}: has {module}, which the Llama family has not; {WAY_OUT}")


def _read(file: Path, name: str, config: Any) -> npt.NDArray[np.float32]:
    with safe_open(file, framework="pt") as tensors:
        values: npt.NDArray[np.float32] = tensors.get_tensor(name).to(torch.float32).numpy()
    if "lora_A" in name:
        return values
    for projection, heads in (
        (".self_attn.q_proj.", config.num_attention_heads),
        (".self_attn.k_proj.", config.num_key_value_heads),
    ):
        if projection in name:
            return values[_pairs_first(heads, values.shape[0] // heads)]
    return values


def _pairs_first(heads: int, width: int) -> npt.NDArray[np.int64]:
    """Order of rows in which those that are rotated together, i and i + width/2 of a head, are
    neighbours."""
    rows = np.arange(heads * width).reshape(heads, 2, width // 2)
    return rows.transpose(0, 2, 1).ravel()


def _fitting(shape: tuple[int, ...], wanted: Quantization) -> Quantization:
    if len(shape) < 2:
        return Quantization.F32
    if wanted == Quantization.Q8_0 and shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0]:
        return Quantization.F16
    return wanted


def _write(writer: GGUFWriter, tensors: list[_Tensor]) -> None:
    """Write header and tensors, one tensor in memory at a time."""
    for tensor in tensors:
        shape, dtype = _stored(tensor)
        size = math.prod(shape) * dtype.itemsize
        writer.add_tensor_info(tensor.name, shape, dtype, size, raw_dtype=tensor.type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        with np.errstate(over="ignore"):
            values = gguf.quants.quantize(np.ascontiguousarray(tensor.values()), tensor.type)
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise NumericError(f"{tensor.name}: not finite in {tensor.type.name}; use --type f32")
        writer.write_tensor_data(values)
    writer.close()


def _stored(tensor: _Tensor) -> tuple[tuple[int, ...], np.dtype[Any]]:
    if tensor.type == Quantization.Q8_0:
        return gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type), np.dtype(np.uint8)
    return tensor.shape, np.dtype(np.float16 if tensor.type == Quantization.F16 else np.float32)
