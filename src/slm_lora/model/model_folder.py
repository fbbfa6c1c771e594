"""Write model folders that transformers 4 and 5 and programs built on them read alike.

transformers 4 does not know the keys of transformers 5's configurations and tokenizers, and then
computes, for example, rotary frequencies with a default, silently. So a folder consists of the
base's own files with the necessary changes, and where transformers 5 wrote these files, the keys of
transformers 4 are added if transformers 5 still reads the same configuration.
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
_VOCABULARY_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip
_PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
TOKENIZER_FILES = (
    *_VOCABULARY_FILES, "merges.txt", "added_tokens.json", "special_tokens_map.json",
    _TOKENIZER_CONFIG, *_PROCESSOR_FILES,
)  # fmt: skip
"""Tokenizer files that are copied from a base; others (Mistral's tekken.json) may contain another
chat template."""

_DTYPE_KEYS = ("torch_dtype", "dtype")
_PATH_KEYS = ("_name_or_path", "name_or_path", "tokenizer_file", "special_tokens_map_file")
"""Keys in which older versions of transformers wrote local paths."""


def save_model(model: PreTrainedModel, base: Path, folder: Path, chat_template: str | None) -> None:
    """Write weights, configuration and tokenizer of a model that was trained from a base.

    Args:
        model: all of its weights have one dtype.
        base: folder of the base, source of configuration and tokenizer.
        folder: an existing folder; its files are replaced.
        chat_template: the folder's only chat template; None: none.
    """
    _save_weights(model, folder)
    _write(folder / CONFIG, _config(model, base, _read(folder / CONFIG)))
    _add_transformers4_config_keys(folder)
    (folder / GENERATION_CONFIG).unlink(missing_ok=True)
    if (base / GENERATION_CONFIG).is_file():
        shutil.copyfile(base / GENERATION_CONFIG, folder / GENERATION_CONFIG)
    _copy_tokenizer(base, folder, chat_template)


def add_transformers4_format(folder: Path) -> None:
    """Add transformers 4's keys to a folder that transformers 5 wrote, in place; transformers 5
    reads the same configuration, tokens and chat template from it as before."""
    _add_transformers4_config_keys(folder)
    _convert_tokenizer_config(folder)


def transformers4_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys and values that transformers 4 needs in addition to a transformers 5 configuration."""
    model_type = str(config.get("model_type", ""))
    keys = _transformers4_rope_keys(config, model_type)
    if model_type.startswith("qwen3") and "num_local_experts" in config:
        keys["num_experts"] = config["num_local_experts"]
    return keys


_ROPE_KEYS = {
    "gpt_neox": ("rotary_emb_base", "rotary_pct", ""),
    "modernbert": ("global_rope_theta", "partial_rotary_factor", "local_rope_theta"),
    "": ("rope_theta", "partial_rotary_factor", "rope_local_base_freq"),
}
"""transformers 4's keys by prefix of the model type: base of the rotary frequencies, rotated share
of a head, and base for layers with a sliding window."""


def _transformers4_rope_keys(config: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict):
        return {}
    theta, share, local_theta = next(
        keys for prefix, keys in _ROPE_KEYS.items() if model_type.startswith(prefix)
    )
    # With several layer types the keys of transformers 4 describe full attention.
    full = parameters.get("full_attention", parameters)
    local = parameters.get("sliding_attention")
    values: dict[str, Any] = {}
    if isinstance(full, dict) and "rope_theta" in full:
        values[theta] = full["rope_theta"]
        if "partial_rotary_factor" in full:
            values[share] = full["partial_rotary_factor"]
        scaling = {
            k: v for k, v in full.items() if k not in ("rope_theta", "partial_rotary_factor")
        }
        # Also set without scaling: some models default to a scaling.
        is_scaled = scaling.get("rope_type", "default") != "default"
        values["rope_scaling"] = scaling if is_scaled else None
    if isinstance(local, dict) and "rope_theta" in local:
        values[local_theta] = local["rope_theta"]
    return values


def _save_weights(model: PreTrainedModel, folder: Path) -> None:
    from transformers import GenerationConfig

    # save_pretrained refuses inconsistent generation configurations, which some bases have.
    empty = GenerationConfig()  # type: ignore[no-untyped-call]
    original, model.generation_config = model.generation_config, empty
    try:
        model.save_pretrained(folder, max_shard_size="1000GB")
    finally:
        model.generation_config = original


def _config(model: PreTrainedModel, base: Path, written: dict[str, Any]) -> dict[str, Any]:
    """The base's configuration, adapted to the saved weights."""
    config = _read(base / CONFIG)
    if config.get("model_type") != written.get("model_type"):
        config = written  # transformers loaded the text part of a multimodal model
    name = str(model.dtype).removeprefix("torch.")
    if not _set_dtype(config, name):
        config["torch_dtype"] = name
    config["architectures"] = written.get("architectures")
    # transformers 5 unties differing matrices on loading; transformers 4 does not.
    if model.config.get_text_config().tie_word_embeddings and not _tied(model):
        config["tie_word_embeddings"] = False
        if isinstance(part := config.get("text_config"), dict):
            part["tie_word_embeddings"] = False
    config.pop("quantization_config", None)
    _remove_local_paths(config)
    _remove_local_code(config)
    return config


def _tied(model: PreTrainedModel) -> bool:
    embeddings: Any = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
    return None in embeddings or embeddings[0].weight.data_ptr() == embeddings[1].weight.data_ptr()


def _set_dtype(config: dict[str, Any], name: str) -> bool:
    """Set every dtype key, also in nested configurations; returns whether the outer one has any."""
    for key, value in config.items():
        if isinstance(value, dict) and key.endswith("_config"):
            _set_dtype(value, name)
    keys = [key for key in _DTYPE_KEYS if key in config]
    config.update(dict.fromkeys(keys, name))
    return bool(keys)


def _remove_local_paths(config: dict[str, Any]) -> None:
    for key in _PATH_KEYS:
        if isinstance(value := config.get(key), str) and Path(value).is_absolute():
            del config[key]


def _remove_local_code(config: dict[str, Any]) -> None:
    """Remove references to code files of the base's folder, which are not copied."""
    if isinstance(auto_map := config.get("auto_map"), dict) and "--" not in json.dumps(auto_map):
        del config["auto_map"]


def _add_transformers4_config_keys(folder: Path) -> None:
    path = folder / CONFIG
    text = path.read_text(encoding="utf-8")
    expected = _loaded_config(folder)
    config: dict[str, Any] = json.loads(text)
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict):
            continue
        for key, value in transformers4_keys(part).items():
            if key in part:
                continue
            part[key] = value
            _write(path, config)
            if not _includes(_loaded_config(folder), expected):
                del part[key]
                _write(path, config)


def _loaded_config(folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    values: dict[str, Any] = config.to_dict()
    return values


def _includes(larger: Any, smaller: Any) -> bool:
    if isinstance(larger, dict) and isinstance(smaller, dict):
        return all(key in larger and _includes(larger[key], smaller[key]) for key in smaller)
    return bool(larger == smaller)


def _copy_tokenizer(base: Path, folder: Path, chat_template: str | None) -> None:
    for name in TOKENIZER_FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    if not any((folder / name).is_file() for name in _VOCABULARY_FILES):
        _tokenizer(base).save_pretrained(folder)
    _convert_tokenizer_config(folder)
    for name in (_TOKENIZER_CONFIG, *_PROCESSOR_FILES):
        _set_chat_template(folder / name, chat_template)
    path = folder / CHAT_TEMPLATE
    path.unlink(missing_ok=True)
    if chat_template is not None:
        path.write_text(chat_template, encoding="utf-8", newline="")


def _set_chat_template(path: Path, chat_template: str | None) -> None:
    """Replace a file's chat template, or its list of named templates, by this one."""
    if not path.is_file():
        return
    config = _read(path)
    original = dict(config)
    if "chat_template" in config:
        config["chat_template"] = chat_template
        if chat_template is None:
            del config["chat_template"]
    _remove_local_paths(config)
    _remove_local_code(config)
    if config != original:
        _write(path, config)


def _convert_tokenizer_config(folder: Path) -> None:
    path = folder / _TOKENIZER_CONFIG
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    original: dict[str, Any] = json.loads(text)
    config = transformers4_tokenizer_config(original)
    if config == original:
        return
    expected = _tokenizer_behaviour(folder)
    _write(path, config)
    if _tokenizer_behaviour(folder) != expected:
        path.write_text(text, encoding="utf-8", newline="")


def transformers4_tokenizer_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A transformers 5 tokenizer configuration with the keys of transformers 4, which reads named
    tokens from ``extra_special_tokens`` only."""
    converted = dict(config)
    if converted.get("tokenizer_class") == "TokenizersBackend":
        converted["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = converted.get("extra_special_tokens")
    if isinstance(extra, list):
        del converted["extra_special_tokens"]
        others = converted.get("additional_special_tokens") or []
        converted["additional_special_tokens"] = [
            *others,
            *(token for token in extra if token not in others),
        ]
    named_tokens = converted.get("model_specific_special_tokens")
    if isinstance(named_tokens, dict) and not converted.get("extra_special_tokens"):
        del converted["model_specific_special_tokens"]
        converted["extra_special_tokens"] = named_tokens
    return converted


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


_SAMPLE_TEXT = "It's 1,234.5 km —\tto {}\n\n  São Paulo; 東京 🙂 {}<s> x"


def _tokenizer_behaviour(folder: Path) -> list[Any]:
    """Everything that determines encoding, decoding and prompts, to compare two configurations."""
    tokenizer = _tokenizer(folder)
    special = [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]
    texts = [_SAMPLE_TEXT, *(_SAMPLE_TEXT.format(token, token) for token in special[:50])]
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
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _write(path: Path, config: Mapping[str, Any]) -> None:
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="")
