"""Save, check and load adapters in PEFT's format, and fully fine-tuned models in transformers'."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from slm_lora.adapters.attach import INITIAL_STATE, detach, has_adapter
from slm_lora.adapters.check import check_forward
from slm_lora.adapters.foreign import (
    MERGE_HINT,
    check_biases,
    check_config,
    copies_of_base,
    modules_outside_layers,
)
from slm_lora.data.chat_templates import default_template
from slm_lora.errors import IntegrityError, NumericError, UsageError
from slm_lora.model.base import Base
from slm_lora.model.model_folder import CHAT_TEMPLATE, MODEL_WEIGHTS, save_model
from slm_lora.model.quantization import import_bitsandbytes
from slm_lora.model.resolve import ModelSource
from slm_lora.ops.linear import patch_linears
from slm_lora.runtime.checksums import SEAL, check_files, read_sealed, resolve_inside, sealed
from slm_lora.runtime.storage import atomic_folder

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS = "adapter_model.safetensors"
ABOUT = "slm_lora.json"
"""Metadata file beside PEFT's own: recipe, base and its hash, prompt template."""


def save(
    base: Base,
    peft_model: nn.Module,
    folder: Path,
    about: Mapping[str, Any],
    chat_template: str | None,
) -> None:
    """Write an adapter in PEFT's layout, or a fully trained model in transformers' layout, in the
    base's precision and with its tokenizer (see `model_folder`); metadata is written beside it.

    Args:
        base: the base that it was trained on.
        peft_model: from `attach`; altered if its method modifies the base.
        folder: replaced if it exists; written atomically.
        about: metadata (recipe, base, template); written as JSON with the SHA-256 of every file.
        chat_template: the training template as a tokenizer's chat template.

    Raises:
        NumericError: a weight is not finite; nothing is written.
        StorageError: no space, or no right to write.
    """
    for name, parameter in peft_model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise NumericError(
                f"{folder.name}: {name} is not finite, so nothing was saved; "
                "lower training.learning_rate"
            )
    with atomic_folder(folder) as temporary:
        if has_adapter(peft_model):
            _save_adapter(peft_model, temporary)
            if chat_template is not None:
                (temporary / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
        else:
            kind = about.get("template", {}).get("kind")
            _save_model(base, temporary, chat_template, keeps_own=kind == "chat")
        (temporary / ABOUT).write_text(
            json.dumps(sealed(about, temporary), indent=2, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )


def _save_adapter(peft_model: PeftModel, folder: Path) -> None:
    peft_model.save_pretrained(str(folder), save_embedding_layers=False)
    # PEFT's model card contains the base's local path.
    (folder / "README.md").unlink(missing_ok=True)
    if initial_state := getattr(peft_model, INITIAL_STATE, None):
        _convert_to_original_base(folder, initial_state)
    _order_targets(folder / "adapter_config.json")


def _order_targets(path: Path) -> None:
    """Sort the target modules: PEFT writes a set, whose order differs between processes."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _convert_to_original_base(folder: Path, initial_state: Mapping[str, torch.Tensor]) -> None:
    """Convert a PiSSA adapter in place into the equivalent LoRA adapter of the original base, from
    which B₀A₀ was subtracted: BA - B₀A₀, of rank 2r."""
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file

    state = load_file(folder / WEIGHTS)
    for name, tensor in state.items():
        side, sign = (0, 1) if "lora_A" in name else (1, -1)
        state[name] = torch.cat([tensor, sign * initial_state[name]], side)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config = LoraConfig.from_pretrained(str(folder))
    # Both doubled, so that the scaling alpha/r is unchanged.
    config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    config.init_lora_weights = True
    config.save_pretrained(str(folder))


def _save_model(base: Base, folder: Path, chat_template: str | None, keeps_own: bool) -> None:
    from slm_lora.model.loading import load_tokenizer

    if chat_template is None and keeps_own:
        # It may give other programs other tokens, which a note reported; here it is used as it is.
        chat_template = default_template(load_tokenizer(base.source))
    for parameter in base.model.parameters():
        parameter.data = parameter.data.to(base.dtype)
    save_model(base.model, base.source.path, folder, chat_template)


def weights_file(folder: Path) -> Path | None:
    """The weights file in a folder that `save` wrote, or None."""
    files = (folder / WEIGHTS, folder / MODEL_WEIGHTS)
    return next((file for file in files if file.is_file()), None)


def run_of(folder: Path) -> str | None:
    """Run hash in a folder's metadata; None if there is no metadata, or it is broken."""
    try:
        return str(json.loads((folder / ABOUT).read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def load(base: Base, folder: Path, compare: bool = True) -> PeftModel:
    """Load one adapter onto the base; see `load_several`."""
    return load_several(base, {"default": folder}, compare)


def load_several(base: Base, folders: Mapping[str, Path], compare: bool = True) -> PeftModel:
    """Load one or more adapters onto the base; every tensor must be used and must fit.

    The files of an adapter that was saved here are compared with their SHA-256; an adapter of
    another program has none (`is_sealed`), and only its tensors are compared with the base.

    Args:
        base: the base that they were trained on, without any adapter.
        folders: one or more, by PEFT's adapter name (part of module names, so without dots).
        compare: compare logits with `PeftModel.forward`; required before computing with `base`.

    Raises:
        UsageError: no adapter in a folder, or one that is not supported.
        IntegrityError: a changed file, another base, or tensors that are missing or do not fit.
    """
    import_bitsandbytes()
    from peft import PeftModel

    # All checks come first: they need the base without adapters.
    for folder in folders.values():
        _check_folder(base, folder)
    peft_model: PeftModel | None = None
    for name, folder in folders.items():
        try:
            if peft_model is None:
                peft_model = PeftModel.from_pretrained(
                    base.model, os.fspath(folder), adapter_name=name
                )
            else:
                peft_model.load_adapter(os.fspath(folder), adapter_name=name)
        except _LOADING_ERRORS as error:
            if peft_model is None:
                raise _loading_error(folder, error) from error
            detach(peft_model)
            # Each fits the base, but PEFT cannot hold some combinations in one model (LoRA on an
            # embedding of which another adapter has a trained copy).
            raise UsageError(
                f"{folder}: PEFT does not load it beside {next(iter(folders.values()))} "
                f"({_first_line(error)}); use one at a time"
            ) from error
    assert peft_model is not None
    if not base.sharded:
        patch_linears(peft_model, base.device)
    peft_model.eval()
    if compare and not base.sharded:
        for name, folder in folders.items():
            peft_model.set_adapter(name, inference_mode=True)
            check_forward(base, peft_model, *_subject_and_remedy(base, folder))
    return peft_model


def _subject_and_remedy(base: Base, folder: Path) -> tuple[str, str]:
    """Subject and remedy for the error message of `check_forward`."""
    outer_modules = modules_outside_layers(_shapes(folder))
    subject = (
        f"{folder}, an adapter on {' and '.join(outer_modules)}"
        if outer_modules
        else os.fspath(folder)
    )
    if outer_modules and base.model.config.get_text_config().tie_word_embeddings:
        return subject, (
            f"input and output embedding of {base.source.name} are one matrix, so merging would "
            "change both: use it with PEFT itself"
        )
    return subject, MERGE_HINT


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _check_folder(base: Base, folder: Path) -> None:
    base_error = _base_mismatch(base.source, folder)
    config = _read_adapter_config(folder)
    try:
        saved = _shapes(folder)
        check_biases(folder, config, saved)
        mismatched = _mismatched_tensors(base, folder, saved)
    except _LOADING_ERRORS as error:
        raise _loading_error(folder, error) from error
    if mismatched and not base_error:
        extra = [name for name in mismatched if name in saved]
        copies = copies_of_base(base, folder / WEIGHTS, folder, extra)
        mismatched = [name for name in mismatched if name not in copies]
    if mismatched:
        shown = ", ".join(mismatched[:MAX_NAMED_TENSORS]) + (
            ", …" if len(mismatched) > MAX_NAMED_TENSORS else ""
        )
        misfit = f"{len(mismatched)} tensors do not fit {base.source.name}: {shown}"
        raise IntegrityError(f"{base_error}; {misfit}" if base_error else f"{folder}: {misfit}")
    if base_error:
        raise IntegrityError(base_error)


_LOADING_ERRORS = (SafetensorError, RuntimeError, ValueError, TypeError, KeyError)


def _loading_error(folder: Path, error: Exception) -> IntegrityError:
    return IntegrityError(f"{folder}: the adapter does not load: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


MAX_NAMED_TENSORS = 32
"""Tensor names in one error message."""


def _mismatched_tensors(
    base: Base, folder: Path, saved: Mapping[str, tuple[int, ...]]
) -> list[str]:
    """Names of tensors that are missing, unexpected or of another shape.

    A new adapter of the same configuration gives the expected names and shapes.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(folder))
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # the values are not used
    config.base_model_name_or_path = base.source.name
    try:
        new_adapter = get_peft_model(base.model, config, low_cpu_mem_usage=True)
    except ValueError:  # the base has none of the modules
        return sorted(saved)
    state = get_peft_model_state_dict(new_adapter, save_embedding_layers=False)
    expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    detach(new_adapter)
    return sorted(n for n in expected.keys() | saved.keys() if expected.get(n) != saved.get(n))


def _read_adapter_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration; refuses folders without an adapter, unsupported adapters, and
    files outside of the folder."""
    if not (folder / "adapter_config.json").is_file() or not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").exists()
        hint = "; its pickled weights (.bin) are not loaded: save it as safetensors" * pickled
        raise UsageError(f"{folder}: no adapter (adapter_config.json and {WEIGHTS}) in it{hint}")
    for name in ("adapter_config.json", WEIGHTS):
        resolve_inside(folder, name)
    path = folder / "adapter_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        config["peft_type"], config.get("megatron_config")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{path}: broken ({error})") from error
    import_bitsandbytes()
    check_config(path, config)
    return config


def is_sealed(folder: Path) -> bool:
    """Whether the folder's metadata has the SHA-256 of its files, so that changes are detected.

    Raises:
        IntegrityError: the metadata is broken.
    """
    try:
        return SEAL in read_sealed(folder / ABOUT)
    except FileNotFoundError:
        return False


def quantization(folder: Path) -> str | None:
    """Quantization of the base that a sealed adapter was trained on; None: unquantised."""
    kind = read_sealed(folder / ABOUT)["base"].get("quantization")
    return None if kind is None else str(kind)


def check_base(source: ModelSource, folder: Path) -> None:
    """Check that an adapter with metadata was trained on this base and that its files are intact.

    Raises:
        IntegrityError: another base, or a file that was changed.
    """
    if error := _base_mismatch(source, folder):
        raise IntegrityError(error)


def _base_mismatch(source: ModelSource, folder: Path) -> str:
    """Message on another base in the metadata; empty if it is this one or there is no metadata."""
    try:
        about = read_sealed(folder / ABOUT)
        name, sha256 = str(about["base"]["name"]), str(about["base"]["sha256"])
    except FileNotFoundError:
        return ""
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"{folder / ABOUT}: broken ({error})") from error
    check_files(folder, about)
    if sha256 == source.sha256:
        return ""
    return (
        f"{folder}: was trained on {name} with weights {sha256[:12]}…, "
        f"not on {source.name} with weights {source.sha256[:12]}…"
    )
