"""A base and any number of its adapters in one model: loaded once, one of them at work at a
time, each prompted as it was trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from slm_lora.adapters import io as adapter_io
from slm_lora.config.schema import ModelSection
from slm_lora.data.chat_templates import (
    TEMPLATE_DATE,
    clock,
    default_template,
    is_frozen,
    read_template,
)
from slm_lora.data.templates import Template, as_chat_template
from slm_lora.data.tokenization import RowTokenizer
from slm_lora.errors import IntegrityError, UsageError
from slm_lora.model.base import Base
from slm_lora.model.cache import cache_is_exact
from slm_lora.model.loading import choose_device, choose_precision, load_base, load_tokenizer
from slm_lora.model.model_folder import MODEL_WEIGHTS
from slm_lora.model.resolve import resolve
from slm_lora.runtime.checksums import read_sealed

if TYPE_CHECKING:
    from peft import LoraModel, PeftModel
    from transformers import PreTrainedTokenizerBase

BASE = "base"
"""Name of the base among its variants."""


@dataclass
class AdapterSet:
    """The base and its adapters.

    Attributes:
        base: computes in transformers' own way, which knows a key-value cache.
        tokenizer: of the base.
        prompters: what makes prompts, of the base and of every adapter, by name.
        ends: ids of tokens that end a response.
        longest: tokens that the base's positions allow, prompt and response together.
        notes: what the user should know, a line each.
        cached: whether replies are computed with a key-value cache.
    """

    base: Base
    tokenizer: PreTrainedTokenizerBase
    prompters: dict[str, RowTokenizer]
    ends: frozenset[int]
    longest: int
    notes: tuple[str, ...]
    cached: bool
    _adapted: PeftModel | None
    _inner: dict[str, str]
    _used: str = field(default="", init=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The base first, then the adapters in the order in which they were given."""
        return tuple(self.prompters)

    def use(self, name: str) -> None:
        """Let the base, or the base with one adapter, compute what comes next."""
        if name == self._used or self._adapted is None:
            return
        inner: LoraModel = self._adapted.base_model  # type: ignore[assignment]
        if name == BASE:
            inner.disable_adapter_layers()
        else:
            inner.enable_adapter_layers()
            inner.set_adapter(self._inner[name], inference_mode=True)
        self._used = name


def open_variants(
    base: str | None,
    adapters: Sequence[Path],
    *,
    revision: str | None = None,
    device: str = "auto",
    precision: str = "auto",
) -> AdapterSet:
    """Load a base and adapters of it.

    Args:
        base: a model's name or folder; None: what the first adapter says it was trained on.
        adapters: folders, in PEFT's layout.
        revision: of a hub id.
        device: as in a recipe.
        precision: as in a recipe.

    Raises:
        UsageError: no such model or adapter; or neither is named.
        IntegrityError: an adapter of another base, or a template that is not the trained one.
    """
    for folder in adapters:
        _check_is_adapter(folder)
    section = ModelSection(name=base, revision=revision) if base else _trained_on(adapters)
    source = resolve(section)
    on = choose_device(device)
    loaded = load_base(source, device=on, precision=choose_precision(precision, on), plain=True)
    tokenizer = load_tokenizer(source)
    notes: list[str] = []
    prompters = {BASE: _own_prompter(source.path, tokenizer)}
    if not adapters and is_frozen(prompters[BASE].chat_template or ""):
        notes.append(
            f"{BASE}: its chat template asks for today's date: {TEMPLATE_DATE:%d %b %Y} stands in "
            "its place, as in training"
        )
    inner: dict[str, str] = {}
    for folder in adapters:
        name = folder.resolve().name
        if name in {BASE, *inner}:
            raise UsageError(f"{folder}: a second variant called {name}; rename its folder")
        inner[name] = f"variant{len(inner)}"
    by_name = dict(zip(inner.values(), adapters, strict=True))
    peft_model = adapter_io.load_several(loaded, by_name) if adapters else None
    for name, folder in zip(inner, adapters, strict=True):
        prompters[name] = _prompter(folder, tokenizer, prompters[BASE], notes)
    cached = cache_is_exact(loaded)
    if not cached:
        notes.append(
            f"{source.name} ({loaded.model.config.model_type}) has no key-value cache that gives "
            "its own logits: replies compute the whole text for every token, slowly"
        )
    found = AdapterSet(
        base=loaded,
        tokenizer=tokenizer,
        prompters=prompters,
        ends=_ends(loaded, tokenizer),
        longest=_longest(loaded),
        notes=tuple(notes),
        cached=cached,
        _adapted=peft_model,
        _inner=inner,
    )
    found.use(found.names[-1])
    return found


def _check_is_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        return
    if (folder / MODEL_WEIGHTS).is_file():
        raise UsageError(f"{folder}: a whole model, no adapter; name it as the base (--base)")
    raise UsageError(f"{folder}: no adapter (adapter_config.json) in it")


def _trained_on(adapters: Sequence[Path]) -> ModelSection:
    """The base that the first adapter names, in our own file or in PEFT's."""
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
        raise IntegrityError(f"{folder}: does not say its base ({error}); use --base") from error


def _own_prompter(folder: Path, tokenizer: PreTrainedTokenizerBase) -> RowTokenizer:
    """A base's own way: as its weights were trained here, else its chat template, else the
    plain instruction."""
    if template := _trained_template(folder):
        return RowTokenizer(tokenizer, template)
    return RowTokenizer(
        tokenizer, Template("chat" if default_template(tokenizer) else "instruction_response")
    )


def _prompter(
    folder: Path, tokenizer: PreTrainedTokenizerBase, own: RowTokenizer, notes: list[str]
) -> RowTokenizer:
    shipped = folder / "chat_template.jinja"
    text = read_template(shipped)
    if template := _trained_template(folder):
        made = RowTokenizer(tokenizer, template)
        if text is None or text == made.chat_template:
            return made
        if text != _of_earlier_versions(tokenizer, made):
            raise IntegrityError(
                f"{shipped}: not the template that the adapter was trained with "
                f"({template.kind}); train again, or put the file back as it was"
            )
        notes.append(
            f"{folder.name}: its chat_template.jinja writes today's date, training wrote "
            f"{TEMPLATE_DATE:%d %b %Y}, as is done here; merge and export hand on that date"
        )
        return made
    if text is not None:
        date = f", with the date {TEMPLATE_DATE:%d %b %Y}" if clock(text, str(shipped)) else ""
        notes.append(f"{folder.name}: prompted by its chat_template.jinja{date}; not trained here")
        return RowTokenizer(tokenizer, Template("jinja", source=text))
    notes.append(
        f"{folder.name}: says nothing of the prompts it was trained on; prompted as its base is "
        f"({own.template.kind})"
    )
    return own


def _of_earlier_versions(tokenizer: PreTrainedTokenizerBase, made: RowTokenizer) -> str | None:
    own = default_template(tokenizer)
    return as_chat_template(
        made.template, made.bos_id is not None, own, made.space_after_bos, frozen=False
    )


def _trained_template(folder: Path) -> Template | None:
    try:
        return Template(**read_sealed(folder / adapter_io.ABOUT)["template"])
    except FileNotFoundError:
        return None
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"{folder / adapter_io.ABOUT}: broken ({error})") from error


def _ends(base: Base, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """EOS of the tokenizer, and what the model itself ends a turn with."""
    configured = getattr(base.model.generation_config, "eos_token_id", None)
    found = {configured} if isinstance(configured, int) else set(configured or ())
    return frozenset(found | {tokenizer.eos_token_id} - {None})


def _longest(base: Base) -> int:
    config = base.model.config.get_text_config()
    return int(getattr(config, "max_position_embeddings", None) or 1_000_000_000)
