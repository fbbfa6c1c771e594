"""Merge an adapter into its base; the result is a plain transformers model."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from slm_lora.adapters import io as adapter_io
from slm_lora.adapters.io import ABOUT
from slm_lora.adapters.methods import unmergeable_reason
from slm_lora.errors import NumericError, UsageError
from slm_lora.export.trained import TrainedFolder, find_base, refuse_existing
from slm_lora.export.verify import PROMPTS, Verification, check_bounds, verify
from slm_lora.model.base import DTYPES, PrecisionName
from slm_lora.model.loading import load_base
from slm_lora.model.model_folder import save_model
from slm_lora.model.resolve import ModelSource
from slm_lora.runtime.checksums import FILES, SEAL, sealed
from slm_lora.runtime.progress import Reporter
from slm_lora.runtime.storage import atomic_folder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def merge(
    trained: TrainedFolder,
    target: Path,
    dtype: PrecisionName,
    base: Path | None = None,
    reporter: Reporter | None = None,
) -> Verification:
    """Merge in fp32, cast, write, and verify in a new process. Nothing is written on failure.

    Beside the weights the folder has the base's tokenizer and configurations (see `model_folder`),
    the training template as chat template, and slm_lora.json with the source and the verification.

    Args:
        trained: an adapter.
        target: folder to write; absent or empty.
        dtype: dtype of the written weights.
        base: folder of the base, if its recorded name does not resolve.
        reporter: prints the progress.

    Raises:
        UsageError: a full model; a method that cannot be merged; an adapter on tied embeddings.
        IntegrityError: another base; a checkpoint that does not fit it; a failed verification.
        NumericError: a merged weight is not finite in ``dtype``.
    """
    if trained.is_full_model:
        raise UsageError(f"{trained.folder}: a full model, not an adapter; nothing to merge")
    refuse_existing(target)
    _check_mergeable(trained)
    reporter = reporter or Reporter(quiet=True)
    source = find_base(trained, base, reporter)
    with atomic_folder(target) as temporary:
        reporter.info(f"  merging {trained.name} in fp32, writing {dtype}")
        write_merged(trained, source, temporary, DTYPES[dtype])
        gc.collect()  # a layer with a replaced forward is a reference cycle
        reporter.info(
            f"  verifying in a new process: logits on {len(PROMPTS)} prompts against base+adapter"
        )
        verification = verify(temporary, source.path, trained.folder, dtype)
        check_bounds(verification, dtype, str(trained.folder))
        inherited = dict(trained.metadata)
        for key in (FILES, SEAL):
            inherited.pop(key, None)
        metadata = {**inherited, "merged": {"dtype": dtype, "proof": asdict(verification)}}
        text = json.dumps(sealed(metadata, temporary), indent=2, ensure_ascii=False) + "\n"
        (temporary / ABOUT).write_text(text, encoding="utf-8")
    return verification


def _check_mergeable(trained: TrainedFolder) -> None:
    if reason := unmergeable_reason(str(trained.adapter_config().get("peft_type"))):
        raise UsageError(f"{trained.folder}: cannot be merged: {reason}")


def write_merged(
    trained: TrainedFolder, source: ModelSource, folder: Path, dtype: torch.dtype
) -> None:
    """Merge in fp32, cast, and write the model with its tokenizer, without verification."""
    base = load_base(source, device=torch.device("cpu"), precision="fp32", padded=True)
    peft_model = adapter_io.load(base, trained.folder, compare=False)
    _check_tied(peft_model, trained, source)
    merged: PreTrainedModel = peft_model.merge_and_unload()
    torch.nn.Module.to(merged, dtype)
    non_finite = [
        name for name, weight in merged.named_parameters() if not bool(weight.isfinite().all())
    ]
    if non_finite:
        raise NumericError(
            f"{trained.folder}: {len(non_finite)} merged tensors are not finite in {dtype}, first "
            f"{non_finite[0]}; use --dtype fp32"
        )
    # Replace the base's chat template by the training template.
    save_model(merged, source.path, folder, trained.chat_template)


def _check_tied(peft_model: PeftModel, trained: TrainedFolder, source: ModelSource) -> None:
    """Refuse an adapter on tied embeddings: merging would change input and output embedding
    (peft#2502, peft#2777)."""
    model: Any = peft_model.get_base_model()
    if not model.config.get_text_config().tie_word_embeddings:
        return
    embeddings: Mapping[str, Any] = {
        "input embedding": model.get_input_embeddings(),
        "output embedding": model.get_output_embeddings(),
    }
    adapted = [
        name for name, module in embeddings.items() if type(module).__module__.startswith("peft.")
    ]
    if adapted:
        raise UsageError(
            f"{trained.folder}: has an adapter on the {' and the '.join(adapted)} of "
            f"{source.name}, which are tied: merging would change both; load it with PEFT instead"
        )
