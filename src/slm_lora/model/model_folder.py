"""Whole models in folders, as other programs read them.

transformers 5 writes configurations and tokenizers in a spelling that transformers 4, and what is
built on it, does not know: rotary frequencies are then computed with a default, silently. So
a folder is made from the base's own files, with what must change; and what transformers 5 wrote
is spelt in the older way besides, where transformers 5 itself reads the same from it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_WEIGHTS = "model.safetensors"
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip
_PROCESSORS = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
TOKENIZER_FILES = (
    *_VOCABULARIES, "merges.txt", "added_tokens.json", "special_tokens_map.json",
    _TOKENIZER_CONFIG, *_PROCESSORS,
)  # fmt: skip
"""What is copied of a base; files of other tokenizers (Mistral's tekken.json, say) would bring
another chat template with them."""

_DTYPES = ("torch_dtype", "dtype")
_PLACES = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file")
"""Keys under which older versions wrote paths of the machine that they ran on."""


def save_model(model: PreTrainedModel, base: Path, folder: Path, chat_template: str | None) -> None:
    """Write weights, configuration and tokenizer of a model that was made of a base.

    Args:
        model: what is written, all in one precision.
        base: folder of the base, whose configuration and tokenizer these are.
        folder: exists; what lies there is replaced.
        chat_template: the only one that the folder is to have; None: it has none.
    """
    _save_weights(model, folder)
    _write(folder / CONFIG, _config(model, base, _read(folder / CONFIG)))
    _spell_config_as_before(folder)
    (folder / GENERATION_CONFIG).unlink(missing_ok=True)
    if (base / GENERATION_CONFIG).is_file():
        shutil.copyfile(base / GENERATION_CONFIG, folder / GENERATION_CONFIG)
    _copy_tokenizer(base, folder, chat_template)


def spell_as_before(folder: Path) -> None:
    """Make what transformers 5 wrote readable for transformers 4, in place; no number, no token
    and no template that transformers 5 reads from it changes."""
    _spell_config_as_before(folder)
    _spell_tokenizer_as_before(folder)


def older_words(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration by transformers 5 says, in the words of transformers 4 where these are
    others: keys to be added to it."""
    kind = str(config.get("model_type", ""))
    found = _older_rope(config, kind)
    if kind.startswith("qwen3") and "num_local_experts" in config:
        found["num_experts"] = config["num_local_experts"]
    return found


_ROPE_WORDS = {
    "gpt_neox": ("rotary_emb_base", "rotary_pct", ""),
    "modernbert": ("global_rope_theta", "partial_rotary_factor", "local_rope_theta"),
    "": ("rope_theta", "partial_rotary_factor", "rope_local_base_freq"),
}
"""Base of the frequencies, share of a head that is rotated, base where layers see a window only; by
the beginning of the kind of model."""


def _older_rope(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict):
        return {}
    theta, share, local_theta = next(w for k, w in _ROPE_WORDS.items() if kind.startswith(k))
    # Where kinds of layers differ, those with all of the text are the ones of the older keys.
    whole = parameters.get("full_attention", parameters)
    local = parameters.get("sliding_attention")
    found: dict[str, Any] = {}
    if isinstance(whole, dict) and "rope_theta" in whole:
        found[theta] = whole["rope_theta"]
        if "partial_rotary_factor" in whole:
            found[share] = whole["partial_rotary_factor"]
        rest = {k: v for k, v in whole.items() if k not in ("rope_theta", "partial_rotary_factor")}
        # Said also where there is no scaling: the default of some models is another.
        scaled = rest.get("rope_type", "default") != "default"
        found["rope_scaling"] = rest if scaled else None
    if isinstance(local, dict) and "rope_theta" in local:
        found[local_theta] = local["rope_theta"]
    return found


def _save_weights(model: PreTrainedModel, folder: Path) -> None:
    from transformers import GenerationConfig

    # Its own is refused on saving where it contradicts itself, as some bases' do.
    empty = GenerationConfig()  # type: ignore[no-untyped-call]
    kept, model.generation_config = model.generation_config, empty
    try:
        model.save_pretrained(folder, max_shard_size="1000GB")
    finally:
        model.generation_config = kept


def _config(model: PreTrainedModel, base: Path, written: dict[str, Any]) -> dict[str, Any]:
    """The base's configuration for the weights that were saved."""
    config = _read(base / CONFIG)
    if config.get("model_type") != written.get("model_type"):
        config = written  # transformers took one part of a larger model
    name = str(model.dtype).removeprefix("torch.")
    if not _set_dtype(config, name):
        config["torch_dtype"] = name
    config["architectures"] = written.get("architectures")
    # transformers 5 unties on loading where both matrices are there and differ; 4 would not.
    if model.config.get_text_config().tie_word_embeddings and not _tied(model):
        config["tie_word_embeddings"] = False
        if isinstance(part := config.get("text_config"), dict):
            part["tie_word_embeddings"] = False
    config.pop("quantization_config", None)
    _leave_out_places(config)
    _leave_out_code(config)
    return config


def _tied(model: PreTrainedModel) -> bool:
    ends: Any = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
    return None in ends or ends[0].weight.data_ptr() == ends[1].weight.data_ptr()


def _set_dtype(config: dict[str, Any], name: str) -> bool:
    """Set it where it is said, also of a part; whether the model's own is."""
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            _set_dtype(value, name)
    said = [key for key in _DTYPES if key in config]
    config.update(dict.fromkeys(said, name))
    return bool(said)


def _leave_out_places(config: dict[str, Any]) -> None:
    for key in _PLACES:
        if isinstance(value := config.get(key), str) and Path(value).is_absolute():
            del config[key]


def _leave_out_code(config: dict[str, Any]) -> None:
    """Code in files of the base's folder is not handed on, so nothing may point to it."""
    if isinstance(code := config.get("auto_map"), dict) and "--" not in json.dumps(code):
        del config["auto_map"]


def _spell_config_as_before(folder: Path) -> None:
    path = folder / CONFIG
    text = path.read_text(encoding="utf-8")
    wanted = _read_by_transformers(folder)
    config: dict[str, Any] = json.loads(text)
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict):
            continue
        for key, value in older_words(part).items():
            if key in part:
                continue
            part[key] = value
            _write(path, config)
            if not _includes(_read_by_transformers(folder), wanted):
                del part[key]
                _write(path, config)


def _read_by_transformers(folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    found: dict[str, Any] = config.to_dict()
    return found


def _includes(whole: Any, part: Any) -> bool:
    if isinstance(whole, dict) and isinstance(part, dict):
        return all(key in whole and _includes(whole[key], part[key]) for key in part)
    return bool(whole == part)


def _copy_tokenizer(base: Path, folder: Path, chat_template: str | None) -> None:
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        _tokenizer(base).save_pretrained(folder)
    _spell_tokenizer_as_before(folder)
    for name in (_TOKENIZER_CONFIG, *_PROCESSORS):
        _put_in_place(folder / name, chat_template)
    path = folder / CHAT_TEMPLATE
    path.unlink(missing_ok=True)
    if chat_template is not None:
        path.write_text(chat_template, encoding="utf-8", newline="")


def _put_in_place(path: Path, chat_template: str | None) -> None:
    """Where the file has a chat template, or a list of named ones, it has this one instead."""
    if not path.is_file():
        return
    config = _read(path)
    before = dict(config)
    if "chat_template" in config:
        config["chat_template"] = chat_template
        if chat_template is None:
            del config["chat_template"]
    _leave_out_places(config)
    _leave_out_code(config)
    if config != before:
        _write(path, config)


def _spell_tokenizer_as_before(folder: Path) -> None:
    path = folder / _TOKENIZER_CONFIG
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    before: dict[str, Any] = json.loads(text)
    config = older_tokenizer(before)
    if config == before:
        return
    wanted = _described(folder)
    _write(path, config)
    if _described(folder) != wanted:
        path.write_text(text, encoding="utf-8", newline="")


def older_tokenizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer's configuration by transformers 5 in the words of transformers 4, which looks
    for named tokens only under ``extra_special_tokens``."""
    found = dict(config)
    if found.get("tokenizer_class") == "TokenizersBackend":
        found["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = found.get("extra_special_tokens")
    if isinstance(extra, list):
        del found["extra_special_tokens"]
        others = found.get("additional_special_tokens") or []
        found["additional_special_tokens"] = [*others, *(e for e in extra if e not in others)]
    named = found.get("model_specific_special_tokens")
    if isinstance(named, dict) and not found.get("extra_special_tokens"):
        del found["model_specific_special_tokens"]
        found["extra_special_tokens"] = named
    return found


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


_TEXT = "It's 1,234.5 km —\tto {}\n\n  São Paulo; 東京 🙂 {}<s> x"


def _described(folder: Path) -> list[Any]:
    """All that makes ids of a text and text of ids."""
    tokenizer = _tokenizer(folder)
    special = [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]
    texts = [_TEXT, *(_TEXT.format(token, token) for token in special[:50])]
    return [
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else None,
        len(tokenizer),
        {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        sorted(tokenizer.all_special_ids),
        tokenizer.model_max_length,
        tokenizer.padding_side,
        tokenizer.chat_template,
        [tokenizer(text)["input_ids"] for text in texts],
    ]


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _write(path: Path, config: Mapping[str, Any]) -> None:
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="")
