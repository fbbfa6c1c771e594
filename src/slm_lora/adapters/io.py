"""Adapters in folders, saved, checked and loaded in PEFT's own format; and whole models where all
weights were trained."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from slm_lora.adapters.attach import BEGINNING, detach, is_adapter
from slm_lora.adapters.check import check_forward
from slm_lora.adapters.foreign import MERGE, check_biases, check_config, copies_of_base, ends
from slm_lora.data.chat_templates import default_template
from slm_lora.errors import IntegrityError, NumericError, UsageError
from slm_lora.model.base import Base
from slm_lora.model.model_folder import CHAT_TEMPLATE, MODEL_WEIGHTS, save_model
from slm_lora.model.quantization import import_bitsandbytes
from slm_lora.model.resolve import ModelSource
from slm_lora.ops.linear import patch_linears
from slm_lora.runtime.checksums import SEAL, check_files, inside, read_sealed, sealed
from slm_lora.runtime.storage import atomic_folder

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS = "adapter_model.safetensors"
ABOUT = "slm_lora.json"
"""Beside PEFT's own files: recipe, base and its hash, prompt template."""


def save(
    base: Base,
    peft_model: nn.Module,
    folder: Path,
    about: Mapping[str, Any],
    chat_template: str | None,
) -> None:
    """Write the adapter in PEFT's layout, with what it was trained on beside it; or the model in
    transformers' layout, in the base's precision, with its tokenizer (see `model_folder`).

    Args:
        base: what it was trained on.
        peft_model: from `attach`; altered, where its method modifies the base.
        folder: replaced if it exists; complete or absent.
        about: recipe, base, template; written as JSON, with the SHA-256 of every file.
        chat_template: the training template in the form of a tokenizer's chat template.

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
        if is_adapter(peft_model):
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
    # PEFT's model card names the base by its path on this machine.
    (folder / "README.md").unlink(missing_ok=True)
    if beginning := getattr(peft_model, BEGINNING, None):
        _fit_original_base(folder, beginning)
    _order_targets(folder / "adapter_config.json")


def _order_targets(path: Path) -> None:
    """PEFT writes a set of names in an order that differs from process to process."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def _fit_original_base(folder: Path, beginning: Mapping[str, torch.Tensor]) -> None:
    """Turn a PiSSA adapter in place into the LoRA adapter that does the same to the base as it
    was: the base lost B₀A₀, so it is BA - B₀A₀, of rank 2r."""
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file

    state = load_file(folder / WEIGHTS)
    for name, tensor in state.items():
        side, sign = (0, 1) if "lora_A" in name else (1, -1)
        state[name] = torch.cat([tensor, sign * beginning[name]], side)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config = LoraConfig.from_pretrained(str(folder))
    # Twice both: the scaling, alpha/r, stays.
    config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    config.init_lora_weights = True
    config.save_pretrained(str(folder))


def _save_model(base: Base, folder: Path, chat_template: str | None, keeps_own: bool) -> None:
    from slm_lora.model.loading import load_tokenizer

    if chat_template is None and keeps_own:
        # Others get other tokens with it, which was told; here it is what it is prompted by.
        chat_template = default_template(load_tokenizer(base.source))
    for parameter in base.model.parameters():
        parameter.data = parameter.data.to(base.dtype)
    save_model(base.model, base.source.path, folder, chat_template)


def weights_file(folder: Path) -> Path | None:
    """The file of the weights in a folder that `save` wrote, if there is one."""
    files = (folder / WEIGHTS, folder / MODEL_WEIGHTS)
    return next((file for file in files if file.is_file()), None)


def run_of(folder: Path) -> str | None:
    """Identity of the run that a folder says to be of; None for what is not ours, or broken."""
    try:
        return str(json.loads((folder / ABOUT).read_text(encoding="utf-8"))["run"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def load(base: Base, folder: Path, compare: bool = True) -> PeftModel:
    """Put a saved adapter on the base; see `load_several`."""
    return load_several(base, {"default": folder}, compare)


def load_several(base: Base, folders: Mapping[str, Path], compare: bool = True) -> PeftModel:
    """Put saved adapters on the base; nothing is guessed, nothing is left out.

    An adapter of ours is compared with the SHA-256 of its files; one of others has none
    (`is_sealed`), and only its tensors are compared with the base.

    Args:
        base: what they were trained on, without any adapter.
        folders: one or more, by the names that PEFT is to know them by. (They become parts of
            names of modules: no dots.)
        compare: with `PeftModel.forward`, as whoever computes with it here must.

    Raises:
        UsageError: no adapter in a folder, or of a kind that is not loaded here.
        IntegrityError: a file was changed; made for another base; tensors that are missing or
            do not fit.
    """
    import_bitsandbytes()
    from peft import PeftModel

    # All before any: the check wants the base bare.
    for folder in folders.values():
        _check(base, folder)
    peft_model: PeftModel | None = None
    for name, folder in folders.items():
        try:
            if peft_model is None:
                peft_model = PeftModel.from_pretrained(
                    base.model, os.fspath(folder), adapter_name=name
                )
            else:
                peft_model.load_adapter(os.fspath(folder), adapter_name=name)
        except _LOADING_FAILS as error:
            if peft_model is None:
                raise _does_not_load(folder, error) from error
            detach(peft_model)
            # Each fits the base: PEFT keeps some kinds of them (LoRA on an embedding that another
            # holds whole, say) not in one model.
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
            check_forward(base, peft_model, *_told(base, folder))
    return peft_model


def _told(base: Base, folder: Path) -> tuple[str, str]:
    """What the adapter is, where it is on more than the layers, and the way out."""
    at_ends = ends(_shapes(folder))
    what = f"{folder}, an adapter on {' and '.join(at_ends)}" if at_ends else os.fspath(folder)
    if at_ends and base.model.config.get_text_config().tie_word_embeddings:
        return what, (
            f"input and output embedding of {base.source.name} are one matrix, so merging would "
            "change both: use it with PEFT itself"
        )
    return what, MERGE


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import safe_open

    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _check(base: Base, folder: Path) -> None:
    wrong_base = _other_base(base.source, folder)
    config = _check_is_adapter(folder)
    try:
        saved = _shapes(folder)
        check_biases(folder, config, saved)
        misfits = _misfits(base, folder, saved)
    except _LOADING_FAILS as error:
        raise _does_not_load(folder, error) from error
    if misfits and not wrong_base:
        extra = [name for name in misfits if name in saved]
        copies = copies_of_base(base, folder / WEIGHTS, folder, extra)
        misfits = [name for name in misfits if name not in copies]
    if misfits:
        shown = ", ".join(misfits[:MOST_NAMED]) + (", …" if len(misfits) > MOST_NAMED else "")
        fit = f"{len(misfits)} tensors do not fit {base.source.name}: {shown}"
        raise IntegrityError(f"{wrong_base}; {fit}" if wrong_base else f"{folder}: {fit}")
    if wrong_base:
        raise IntegrityError(wrong_base)


_LOADING_FAILS = (SafetensorError, RuntimeError, ValueError, TypeError, KeyError)


def _does_not_load(folder: Path, error: Exception) -> IntegrityError:
    return IntegrityError(f"{folder}: the adapter does not load: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


MOST_NAMED = 32
"""Tensors that a message names one by one."""


def _misfits(base: Base, folder: Path, saved: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of tensors that the base lacks or has in another shape, or that the file lacks.

    A fresh adapter of the same configuration says which there should be.
    """
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(folder))
    if hasattr(config, "init_lora_weights"):
        config.init_lora_weights = True  # its numbers are not looked at
    config.base_model_name_or_path = base.source.name
    try:
        fresh = get_peft_model(base.model, config, low_cpu_mem_usage=True)
    except ValueError:  # none of the modules is there
        return sorted(saved)
    state = get_peft_model_state_dict(fresh, save_embedding_layers=False)
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    detach(fresh)
    return sorted(n for n in wanted.keys() | saved.keys() if wanted.get(n) != saved.get(n))


def _check_is_adapter(folder: Path) -> dict[str, Any]:
    """Its configuration; what is no adapter is refused, and one that is not computed with here or
    would have PEFT read or run something else."""
    if not (folder / "adapter_config.json").is_file() or not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").exists()
        hint = "; its pickled weights (.bin) are not loaded: save it as safetensors" * pickled
        raise UsageError(f"{folder}: no adapter (adapter_config.json and {WEIGHTS}) in it{hint}")
    for name in ("adapter_config.json", WEIGHTS):
        inside(folder, name)
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
    """Whether the folder says the SHA-256 of its files, so that a changed one is found out.

    Raises:
        IntegrityError: what it says is broken.
    """
    try:
        return SEAL in read_sealed(folder / ABOUT)
    except FileNotFoundError:
        return False


def quantization(folder: Path) -> str | None:
    """How the base was quantised that a sealed adapter was trained on; None: it was not."""
    found = read_sealed(folder / ABOUT)["base"].get("quantization")
    return None if found is None else str(found)


def check_base(source: ModelSource, folder: Path) -> None:
    """What says which base it was trained on is only used with that one, and as it was saved.

    Raises:
        IntegrityError: it was another base, or a file is not as it was saved.
    """
    if why := _other_base(source, folder):
        raise IntegrityError(why)


def _other_base(source: ModelSource, folder: Path) -> str:
    """Why it was trained on another base; empty where it was not, or nothing is said."""
    try:
        about = read_sealed(folder / ABOUT)
        name, weights = str(about["base"]["name"]), str(about["base"]["sha256"])
    except FileNotFoundError:
        return ""
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"{folder / ABOUT}: broken ({error})") from error
    check_files(folder, about)
    if weights == source.sha256:
        return ""
    return (
        f"{folder}: was trained on {name} with weights {weights[:12]}…, "
        f"not on {source.name} with weights {source.sha256[:12]}…"
    )
