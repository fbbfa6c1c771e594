"""One base with several adapters: loaded once, one active at a time, each with the prompt template
of its training."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from slm_lora.adapters import io as adapter_io
from slm_lora.config.schema import ModelSection
from slm_lora.data.chat_templates import (
    TEMPLATE_DATE,
    date_macro,
    default_template,
    has_frozen_date,
    read_template,
)
from slm_lora.data.templates import Template, as_chat_template
from slm_lora.data.tokenization import RowTokenizer
from slm_lora.errors import IntegrityError, UsageError
from slm_lora.model.base import Base
from slm_lora.model.cache import batch_is_exact, cache_is_exact
from slm_lora.model.loading import choose_device, choose_precision, load_base, load_tokenizer
from slm_lora.model.model_folder import MODEL_WEIGHTS
from slm_lora.model.resolve import resolve
from slm_lora.runtime.checksums import read_sealed

if TYPE_CHECKING:
    from peft import LoraModel, PeftModel
    from transformers import PreTrainedTokenizerBase

BASE = "base"
"""Name of the base without an adapter."""


@dataclass
class AdapterSet:
    """A base and its adapters.

    Attributes:
        base: padded, so that transformers' attention can use a key-value cache.
        tokenizer: of the base.
        row_tokenizers: by name, the tokenizer with the template of the base or adapter.
        stop_ids: ids of tokens that end a response.
        max_length: most tokens of prompt and response together, by the base's positions.
        notes: lines for the user.
        uses_cache: whether generation uses a key-value cache.
    """

    base: Base
    tokenizer: PreTrainedTokenizerBase
    row_tokenizers: dict[str, RowTokenizer]
    stop_ids: frozenset[int]
    max_length: int
    notes: tuple[str, ...]
    uses_cache: bool
    _peft_model: PeftModel | None
    _peft_names: dict[str, str]
    _active: str = field(default="", init=False)

    @functools.cached_property
    def batches_exactly(self) -> bool:
        """Whether texts can be generated together, with the logits that they have alone."""
        return self.uses_cache and batch_is_exact(self.base)

    @property
    def names(self) -> tuple[str, ...]:
        """`BASE`, then the adapters in the order of loading."""
        return tuple(self.row_tokenizers)

    def activate(self, name: str) -> None:
        """Activate one adapter, or none for `BASE`."""
        if name == self._active or self._peft_model is None:
            return
        lora_model: LoraModel = self._peft_model.base_model  # type: ignore[assignment]
        if name == BASE:
            lora_model.disable_adapter_layers()
        else:
            lora_model.enable_adapter_layers()
            lora_model.set_adapter(self._peft_names[name], inference_mode=True)
        self._active = name


def load_adapter_set(
    base: str | None,
    adapters: Sequence[Path],
    *,
    revision: str | None = None,
    device: str = "auto",
    precision: str = "auto",
    quantization: str | None = None,
) -> AdapterSet:
    """Load a base and its adapters; the last one is active.

    Args:
        base: a model's name or folder; None: the base named by the first adapter.
        adapters: folders, in PEFT's layout.
        revision: of a hub id.
        device: as in a recipe.
        precision: as in a recipe.
        quantization: of the base, as in a recipe.

    Raises:
        UsageError: no such model or adapter, or none is named.
        IntegrityError: an adapter of another base, or a changed chat template.
    """
    for folder in adapters:
        _check_is_adapter(folder)
    section = ModelSection(name=base, revision=revision) if base else _base_of(adapters)
    source = resolve(section)
    chosen_device = choose_device(device)
    loaded_base = load_base(
        source,
        device=chosen_device,
        precision=choose_precision(precision, chosen_device),
        padded=True,
        quantization=quantization,
    )
    tokenizer = load_tokenizer(source)
    notes: list[str] = []
    row_tokenizers = {BASE: _base_row_tokenizer(source.path, tokenizer)}
    if not adapters and has_frozen_date(row_tokenizers[BASE].chat_template or ""):
        notes.append(
            f"{BASE}: its chat template contains today's date; it is fixed to "
            f"{TEMPLATE_DATE:%d %b %Y}, as in training"
        )
    peft_names: dict[str, str] = {}
    for folder in adapters:
        name = folder.resolve().name
        if name in {BASE, *peft_names}:
            raise UsageError(f"{folder}: the name {name} is taken; rename the folder")
        peft_names[name] = f"variant{len(peft_names)}"
    by_name = dict(zip(peft_names.values(), adapters, strict=True))
    peft_model = adapter_io.load_several(loaded_base, by_name) if adapters else None
    for name, folder in zip(peft_names, adapters, strict=True):
        row_tokenizers[name] = _adapter_row_tokenizer(
            folder, tokenizer, row_tokenizers[BASE], notes
        )
    uses_cache = cache_is_exact(loaded_base)
    if not uses_cache:
        notes.append(
            f"{source.name} ({loaded_base.model.config.model_type}) has no key-value cache that "
            "gives its own logits: generation recomputes the whole text for every token, slowly"
        )
    adapter_set = AdapterSet(
        base=loaded_base,
        tokenizer=tokenizer,
        row_tokenizers=row_tokenizers,
        stop_ids=_stop_ids(loaded_base, tokenizer),
        max_length=_max_length(loaded_base),
        notes=tuple(notes),
        uses_cache=uses_cache,
        _peft_model=peft_model,
        _peft_names=peft_names,
    )
    adapter_set.activate(adapter_set.names[-1])
    return adapter_set


def _check_is_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        return
    if (folder / MODEL_WEIGHTS).is_file():
        raise UsageError(f"{folder}: a whole model, no adapter; name it as the base (--base)")
    raise UsageError(f"{folder}: no adapter (adapter_config.json) in it")


def _base_of(adapters: Sequence[Path]) -> ModelSection:
    """The base named by the first adapter: in our metadata, else in PEFT's configuration."""
    if not adapters:
        return ModelSection()
    folder = adapters[0]
    try:
        if (folder / adapter_io.ABOUT).is_file():
            about = read_sealed(folder / adapter_io.ABOUT)["base"]
            return ModelSection(name=about["name"], revision=about["revision"])
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        return ModelSection(name=config["base_model_name_or_path"], revision=config.get("revision"))
    except (ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{folder}: does not name its base ({error}); use --base") from error


def _base_row_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> RowTokenizer:
    """The base's template: that of its training here, else its chat template, else
    instruction and response."""
    if template := _trained_template(folder):
        return RowTokenizer(tokenizer, template)
    return RowTokenizer(
        tokenizer, Template("chat" if default_template(tokenizer) else "instruction_response")
    )


def _adapter_row_tokenizer(
    folder: Path, tokenizer: PreTrainedTokenizerBase, base_tokenizer: RowTokenizer, notes: list[str]
) -> RowTokenizer:
    shipped = folder / "chat_template.jinja"
    text = read_template(shipped)
    if template := _trained_template(folder):
        trained = RowTokenizer(tokenizer, template)
        if text is None or text == trained.chat_template:
            return trained
        if text != _unfrozen_template(tokenizer, trained):
            raise IntegrityError(
                f"{shipped}: not the template that the adapter was trained with "
                f"({template.kind}); train again, or put the file back as it was"
            )
        notes.append(
            f"{folder.name}: its chat_template.jinja writes today's date; training, prompts here, "
            f"merge and export use {TEMPLATE_DATE:%d %b %Y}"
        )
        return trained
    if text is not None:
        date = f", with the date {TEMPLATE_DATE:%d %b %Y}" if date_macro(text, str(shipped)) else ""
        notes.append(f"{folder.name}: prompted by its chat_template.jinja{date}; not trained here")
        return RowTokenizer(tokenizer, Template("jinja", source=text))
    notes.append(
        f"{folder.name}: has no record of its training prompts; prompted like its base "
        f"({base_tokenizer.template.kind})"
    )
    return base_tokenizer


def _unfrozen_template(
    tokenizer: PreTrainedTokenizerBase, row_tokenizer: RowTokenizer
) -> str | None:
    own = default_template(tokenizer)
    return as_chat_template(
        row_tokenizer.template,
        row_tokenizer.bos_id is not None,
        own,
        row_tokenizer.space_after_bos,
        frozen=False,
    )


def _trained_template(folder: Path) -> Template | None:
    try:
        return Template(**read_sealed(folder / adapter_io.ABOUT)["template"])
    except FileNotFoundError:
        return None
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"{folder / adapter_io.ABOUT}: broken ({error})") from error


def _stop_ids(base: Base, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """EOS of the tokenizer and the end-of-turn tokens of the generation configuration."""
    configured = getattr(base.model.generation_config, "eos_token_id", None)
    ids = {configured} if isinstance(configured, int) else set(configured or ())
    return frozenset(ids | {tokenizer.eos_token_id} - {None})


def _max_length(base: Base) -> int:
    config = base.model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1_000_000_000)
