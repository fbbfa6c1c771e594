"""Load a frozen base model; choose device and precision."""

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
from slm_lora.ops.compilation import make_layers_compilable
from slm_lora.ops.linear import patch_linears
from slm_lora.ops.output_head import HeadForm
from slm_lora.runtime import hardware

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def choose_device(name: str) -> torch.device:
    """``auto``: CUDA, else Apple's GPU, else the CPU.

    Raises:
        UsageError: the device is not available.
    """
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(
            next(candidate for candidate, is_available in available.items() if is_available)
        )
    if not available[name]:
        raise UsageError(f"training.device = {name}: this machine or this torch has none")
    return torch.device(name)


def choose_precision(name: str, device: torch.device) -> PrecisionName:
    """``auto``: bf16 where the device multiplies faster in it than in fp32, fp16 on older NVIDIA
    cards, else fp32.

    Raises:
        UsageError: fp16 on another device than CUDA (loss scaling is implemented there only).
    """
    if name == "fp16" and device.type != "cuda":
        raise UsageError(
            "training.precision = fp16: needs a CUDA device; "
            "use training.precision=bf16 or fp32 on this machine"
        )
    if name != "auto":
        return name  # type: ignore[return-value]
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and cpu_is_faster_in_bf16():
        return "bf16"
    return "fp32"


@functools.cache
def cpu_is_faster_in_bf16() -> bool:
    """Whether matrix products of this CPU are faster in bf16: with AMX, and with AVX512-BF16 on
    AMD's. Of Intel's with AVX512-BF16 but without AMX one was measured (an Emerald Rapids: 147 to
    160 GFLOP/s, and 250 to 290 in fp32); CPUs without either emulate bf16."""
    if torch.cpu._is_amx_tile_supported():
        return True
    return torch.cpu._is_avx512_bf16_supported() and hardware.is_amd_processor()


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The model's own tokenizer.

    Raises:
        UsageError: the folder has none that loads.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source.path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the tokenizers library raises plain Exception
        raise UsageError(
            f"model {source.name}: its tokenizer cannot be loaded: {_first_line(error)}"
        ) from error
    return tokenizer


def load_base(
    source: ModelSource,
    *,
    device: torch.device,
    precision: PrecisionName,
    padded: bool = False,
    quantization: str | None = None,
    sharded: bool = False,
) -> Base:
    """Load the base with all weights frozen.

    Args:
        source: from `resolve.resolve`.
        device: of its weights.
        precision: of its weights.
        padded: use padded batches with transformers' own attention, the reference for packing.
        sharded: shard its layers over the processes of the run (`model.fsdp`); a collective call.
        quantization: ``nf4`` for weights in 4 bits (Dettmers et al. 2023, arXiv 2305.14314).

    Raises:
        UsageError: not a causal language model that transformers loads without remote code, or an
            output layer that `head_form` does not support.
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
        make_layers_compilable(decoder_layers(model))
    packed, reason = (False, "asked for") if padded else _try_packed(model, head)
    return Base(source, model, device, precision, packed, reason, quantization, sharded, head)


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
    # transformers initialises missing tensors at random.
    if missing := sorted(loaded[1]["missing_keys"]):
        raise IntegrityError(
            f"model {source.name}: {len(missing)} tensors are missing, first {missing[0]}; "
            "the folder is incomplete or for another architecture"
        )
    # PEFT writes this into the adapter's configuration, where a local path would be useless.
    model.name_or_path = model.config._name_or_path = source.name
    return model


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _sample(model: PreTrainedModel, length: int, seed: int) -> torch.Tensor:
    vocab_size = int(model.config.get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (length,), generator=generator)


def _measured_head(source: ModelSource, model: PreTrainedModel) -> HeadForm:
    """Measure the output layer; the model's first forward pass, so all its errors appear here."""
    try:
        head = measure_head(model, source.name)
        ids = _sample(model, 7, seed=1).unsqueeze(0).to(model.device)
        check_head(model, head, ids, source.name)
    except (SlmLoraError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # any error of the model's code
        raise UsageError(
            f"model {source.name}: transformers does not compute it here "
            f"({model.config.model_type}: {type(error).__name__}: {_first_line(error)})"
        ) from error
    return head


def _try_packed(model: PreTrainedModel, head: HeadForm) -> tuple[bool, str]:
    """Enable packed attention if the model gives the same logits with it, up to rounding.

    Two short documents, packed, are compared with each alone by transformers' own attention. This
    detects attention, positions and output layers that packing does not support.
    """
    original: Any = model.config._attn_implementation
    documents = [_sample(model, length, seed=length) for length in (13, 7)]
    try:
        with torch.no_grad():
            alone = [model(d.unsqueeze(0).to(model.device)).logits[0] for d in documents]
            attention.register()
            model.set_attn_implementation(attention.PACKED)
            calls = attention.calls()
            packed = packed_logits(model, head, documents)
        # transformers does not report a model with its own attention code; with a mask over the
        # whole batch its logits are right, but it computes attention between documents.
        if attention.calls() == calls:
            raise ValueError("its attention cannot be exchanged")
        reference = torch.cat(alone).float()
        # Softmax is invariant to the mean of the logits.
        spread = (reference - reference.mean(1, keepdim=True)).norm()
        error = ((packed.float() - reference).norm() / spread).item()
        # Rounding with two orders of summation: transformers' own attention implementations differ
        # by up to 0.08 in emulated bf16; attention between documents gives 0.6.
        bound = 1e-4 if model.dtype == torch.float32 else 0.2
        if not error <= bound:
            raise ValueError(f"logits differ by {error:.1e} of their spread")
    except Exception as error:
        model.set_attn_implementation(original)
        return False, f"{model.config.model_type} computes padded batches: {_first_line(error)}"
    return True, ""
