"""An adapter merged into its base: a plain transformers model."""

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
from slm_lora.export.trained import Trained, find_base, refuse_existing
from slm_lora.export.verify import PROMPTS, Proof, judge, prove
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
    trained: Trained,
    target: Path,
    dtype: PrecisionName,
    base: Path | None = None,
    reporter: Reporter | None = None,
) -> Proof:
    """Merge in fp32, cast, write, and prove it in a fresh process; complete or absent.

    Beside the weights lie the base's own tokenizer and configurations (see `model_folder`), the
    training template as the chat template, and slm_lora.json with what was merged and the proof.

    Args:
        trained: an adapter.
        target: folder to write; must not hold anything.
        dtype: of the weights that are written.
        base: folder of the base, where its name does not lead there.
        reporter: is told of every stage.

    Raises:
        UsageError: already a whole model; not LoRA or its kin; or on tied embeddings.
        IntegrityError: trained on another base; does not fit it; or the proof fails.
        NumericError: a merged weight is not finite in ``dtype``.
    """
    if trained.whole:
        raise UsageError(f"{trained.folder}: already a whole model; nothing to merge")
    refuse_existing(target)
    _check_kind(trained)
    reporter = reporter or Reporter(quiet=True)
    source = find_base(trained, base, reporter)
    with atomic_folder(target) as temporary:
        reporter.info(f"  merging {trained.name} into it in fp32, and writing it in {dtype}")
        write_merged(trained, source, temporary, DTYPES[dtype])
        gc.collect()  # layers that are `compilable` refer to themselves
        reporter.info(
            f"  proving it in a fresh process: {len(PROMPTS)} prompts by base+adapter, and by it"
        )
        proof = prove(temporary, source.path, trained.folder, dtype)
        judge(proof, dtype, str(trained.folder))
        told = {key: value for key, value in trained.about.items() if key not in (FILES, SEAL)}
        about = {**told, "merged": {"dtype": dtype, "proof": asdict(proof)}}
        text = json.dumps(sealed(about, temporary), indent=2, ensure_ascii=False) + "\n"
        (temporary / ABOUT).write_text(text, encoding="utf-8")
    return proof


def _check_kind(trained: Trained) -> None:
    if reason := unmergeable_reason(str(trained.adapter_config().get("peft_type"))):
        raise UsageError(f"{trained.folder}: cannot be merged: {reason}")


def write_merged(trained: Trained, source: ModelSource, folder: Path, dtype: torch.dtype) -> None:
    """Merge in fp32, cast, and write the model with its tokenizer; no proof."""
    base = load_base(source, device=torch.device("cpu"), precision="fp32", padded=True)
    peft_model = adapter_io.load(base, trained.folder, compare=False)
    _check_tied(peft_model, trained, source)
    merged: PreTrainedModel = peft_model.merge_and_unload()
    torch.nn.Module.to(merged, dtype)
    if bad := [n for n, p in merged.named_parameters() if not bool(p.isfinite().all())]:
        raise NumericError(
            f"{trained.folder}: {len(bad)} merged tensors are not finite in {dtype}, first {bad[0]}"
        )
    # (The base's own template is not what was trained with.)
    save_model(merged, source.path, folder, trained.chat_template)


def _check_tied(peft_model: PeftModel, trained: Trained, source: ModelSource) -> None:
    """Refuse what cannot be merged right: one matrix that is input and output embedding, with an
    adapter on one side of it (peft#2502, peft#2777)."""
    model: Any = peft_model.get_base_model()
    if not model.config.get_text_config().tie_word_embeddings:
        return
    ends: Mapping[str, Any] = {
        "input embedding": model.get_input_embeddings(),
        "output embedding": model.get_output_embeddings(),
    }
    touched = [name for name, end in ends.items() if type(end).__module__.startswith("peft.")]
    if touched:
        raise UsageError(
            f"{trained.folder}: has an adapter on the {' and the '.join(touched)} of "
            f"{source.name}, whose input and output embedding are one matrix; merging would "
            "change both, so it stays an adapter: load it with PEFT"
        )
