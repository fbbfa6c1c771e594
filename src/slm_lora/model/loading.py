"""Load a frozen base model, and decide on what and in which precision it computes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from slm_lora.errors import IntegrityError, SlmLoraError, UsageError
from slm_lora.model.base import DTYPES, Base, PrecisionName, decoder_layers
from slm_lora.model.forward import packed_logits
from slm_lora.model.fsdp import shard_layers
from slm_lora.model.head_form import check_head, measure_head
from slm_lora.model.quantization import prepare_quantized, quantized_loading
from slm_lora.model.resolve import ModelSource, weight_files
from slm_lora.ops import attention
from slm_lora.ops.compilation import fuse_layers
from slm_lora.ops.linear import patch_linears
from slm_lora.ops.output_head import HeadForm
from slm_lora.runtime import hardware

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def choose_device(wanted: str) -> torch.device:
    """``auto``: CUDA, else Apple's GPU, else the CPU.

    Raises:
        UsageError: the wanted device is not there.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        return torch.device(next(name for name, there in available.items() if there))
    if not available[wanted]:
        raise UsageError(f"training.device = {wanted}: this machine or this torch has none")
    return torch.device(wanted)


def choose_precision(wanted: str, device: torch.device) -> PrecisionName:
    """``auto``: what the device computes fast: bf16 where it has instructions for it, fp16 on
    older NVIDIA cards, else fp32.

    Raises:
        UsageError: fp16 elsewhere than on a CUDA device (it needs loss scaling there).
    """
    if wanted == "fp16" and device.type != "cuda":
        raise UsageError(
            "training.precision = fp16: needs a CUDA device; "
            "use training.precision=bf16 or fp32 on this machine"
        )
    if wanted != "auto":
        return wanted  # type: ignore[return-value]
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and _cpu_has_bf16():
        return "bf16"
    return "fp32"


@functools.cache
def _cpu_has_bf16() -> bool:
    # AVX512-BF16 or AMX; torch computes bf16 elsewhere too, but slower than fp32.
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's own tokenizer.

    Raises:
        UsageError: the folder has none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UsageError(
            f"model {source.name}: its tokenizer cannot be loaded: {_first_line(error)}"
        ) from error
    return tokenizer


def load_base(
    source: ModelSource,
    *,
    device: torch.device,
    precision: PrecisionName,
    plain: bool = False,
    quantization: str | None = None,
    sharded: bool = False,
) -> Base:
    """Load the base with all weights frozen.

    Args:
        source: from `source.resolve`.
        device: where to put it.
        precision: of its weights.
        plain: compute padded batches with transformers' own attention, as the twin that the
            packed way is tested against.
        sharded: over the processes of this run, see `model.fsdp`; all call this alike.
        quantization: ``nf4`` for weights in 4 bits (Dettmers et al. 2023, arXiv 2305.14314).

    Raises:
        UsageError: not a causal language model that transformers can load without remote code,
            or one whose logits are more than a product with the output embedding.
        IntegrityError: tensors are missing or do not fit the configuration.
    """
    if device.type == "cpu":
        hardware.disable_trim()
        hardware.cap_onednn_cache()
    model = _read(source, precision, device, quantization)
    model.requires_grad_(False)
    if sharded:
        shard_layers(model, device)
    torch.nn.Module.to(model, device)
    torch.nn.Module.eval(model)
    head = _measured_head(source, model)
    if not sharded:
        patch_linears(model, device)
        fuse_layers(decoder_layers(model))
    packed, why = (False, "asked for") if plain else _try_packed(model, head)
    return Base(source, model, device, precision, packed, why, quantization, sharded, head)


def _read(
    source: ModelSource, precision: PrecisionName, device: torch.device, quantization: str | None
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    weight_files(source.path)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.path,
            dtype=DTYPES[precision],
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            **quantized_loading(precision, device) if quantization else {},
        )
    except RuntimeError as error:  # shapes that do not fit the configuration
        raise IntegrityError(f"model {source.name}: does not load: {_first_line(error)}") from error
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(f"model {source.name}: cannot be loaded: {_first_line(error)}") from error
    model: PreTrainedModel = loaded[0]
    if quantization:
        prepare_quantized(model)
    # Weights that transformers would initialise at random are a broken model here.
    if missing := sorted(loaded[1]["missing_keys"]):
        raise IntegrityError(
            f"model {source.name}: {len(missing)} tensors are missing, first {missing[0]}; "
            "the folder is incomplete or for another architecture"
        )
    # PEFT writes this into the adapter: a name that exists for others, no path of this machine.
    model.name_or_path = model.config._name_or_path = source.name
    return model


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _sample(model: PreTrainedModel, length: int, seed: int) -> torch.Tensor:
    vocabulary = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (length,), generator=generator)


def _measured_head(source: ModelSource, model: PreTrainedModel) -> HeadForm:
    """Its output layer; the first thing that the model computes here."""
    try:
        head = measure_head(model, source.name)
        ids = _sample(model, 7, seed=1).unsqueeze(0).to(model.device)
        check_head(model, head, ids, source.name)
    except (SlmLoraError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model's code, which may fail in any way
        raise UsageError(
            f"model {source.name}: transformers does not compute it here "
            f"({model.config.model_type}: {type(error).__name__}: {_first_line(error)})"
        ) from error
    return head


def _try_packed(model: PreTrainedModel, head: HeadForm) -> tuple[bool, str]:
    """Turn packed attention on if the model gives the same logits with it, to rounding.

    The test is the proof: two short documents, packed, against each alone in transformers'
    own way. It catches models whose attention, head or positions the packed way does not know.
    """
    before: Any = model.config._attn_implementation
    documents = [_sample(model, length, seed=length) for length in (13, 7)]
    try:
        with torch.no_grad():
            alone = [model(d.unsqueeze(0).to(model.device)).logits[0] for d in documents]
            attention.register()
            model.set_attn_implementation(attention.PACKED)
            calls = attention.calls()
            packed = packed_logits(model, head, documents)
        # transformers returns silently where a model's code has attention of its own; with
        # a mask over the whole batch its logits are right, and its cost is not.
        if attention.calls() == calls:
            raise ValueError("its attention cannot be exchanged")
        reference = torch.cat(alone).float()
        # What softmax makes of logits does not change with their mean.
        spread = (reference - reference.mean(1, keepdim=True)).norm()
        error = ((packed.float() - reference).norm() / spread).item()
        # Rounding of two orders of summation, through all layers: transformers' own ways differ
        # by up to 0.08 in bf16 without instructions for it; documents that see each other, 0.6.
        bound = 1e-4 if model.dtype == torch.float32 else 0.2
        if not error <= bound:
            raise ValueError(f"logits differ by {error:.1e} of their spread")
    except Exception as error:
        model.set_attn_implementation(before)
        return False, f"{model.config.model_type} computes padded batches: {_first_line(error)}"
    return True, ""
