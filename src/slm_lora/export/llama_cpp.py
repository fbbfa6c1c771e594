"""Export a folder for llama.cpp and Ollama: GGUF files and a Modelfile."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from slm_lora.adapters.io import check_base
from slm_lora.errors import UsageError
from slm_lora.evaluation import llama_library
from slm_lora.export.gguf import FileType, check_adapter, check_model, write_adapter, write_model
from slm_lora.export.k_quants import K_QUANTS
from slm_lora.export.merge import merge
from slm_lora.export.ollama import modelfile, write_modelfile
from slm_lora.export.trained import TrainedFolder, find_base, refuse_existing
from slm_lora.model.loading import load_tokenizer
from slm_lora.model.resolve import ModelSource, hash_weights
from slm_lora.runtime.progress import Reporter
from slm_lora.runtime.storage import atomic_folder

Layout = Literal["merged", "adapter"]


def export(
    trained: TrainedFolder,
    target: Path,
    layout: Layout,
    file_type: FileType,
    base: Path | None = None,
    reporter: Reporter | None = None,
) -> list[Path]:
    """Write GGUF files and a Modelfile. Nothing is written on failure.

    Args:
        trained: an adapter or a full model.
        target: folder to write; absent or empty.
        layout: for an adapter: ``merged``, one verified model file, or ``adapter``, one file for
            the adapter and one for the base.
        file_type: type of the model's weights; an adapter is always F32.
        base: folder of the base, if its recorded name does not resolve.
        reporter: prints the progress.

    Returns:
        The files.

    Raises:
        UsageError: llama.cpp does not support the model, its tokenizer or the adapter.
        IntegrityError: another base, or the verification of the merged model failed.
    """
    refuse_existing(target)
    if file_type in K_QUANTS:
        llama_library.load()  # refuse before anything is merged
    if trained.is_full_model and layout == "adapter":
        raise UsageError(f"{trained.folder}: a full model, not an adapter; use --as merged")
    reporter = reporter or Reporter(quiet=True)
    with atomic_folder(target) as temporary:
        if trained.is_full_model:
            folder = trained.folder
            source = ModelSource(trained.name, None, folder, hash_weights(folder))
            _write_full_model(source, trained, temporary, file_type, reporter)
        elif layout == "merged":
            check_model(find_base(trained, base, reporter), trained.template)
            with TemporaryDirectory(prefix=".merging.", dir=target.parent) as merging:
                merged = Path(merging) / "merged"
                merge(trained, merged, "fp32", base, reporter)
                source = ModelSource(trained.name, None, merged, hash_weights(merged))
                _write_full_model(source, trained, temporary, file_type, reporter)
        else:
            _write_base_and_adapter(
                trained, find_base(trained, base, reporter), temporary, file_type, reporter
            )
    return sorted(target.iterdir())


def _write_full_model(
    source: ModelSource,
    trained: TrainedFolder,
    folder: Path,
    file_type: FileType,
    reporter: Reporter,
) -> None:
    file = f"{source.name}-{file_type}.gguf"
    reporter.info(f"  writing {file}")
    write_model(source, folder / file, file_type, trained.template, trained.chat_template)
    _write_modelfile(trained, source, folder, file, None)


def _write_base_and_adapter(
    trained: TrainedFolder,
    source: ModelSource,
    folder: Path,
    file_type: FileType,
    reporter: Reporter,
) -> None:
    check_base(source, trained.folder)
    check_adapter(trained.folder, trained.adapter_config())
    name = source.name.rsplit("/", 1)[-1]
    file, adapter = f"{name}-{file_type}.gguf", f"{trained.name}-lora.gguf"
    reporter.info(f"  writing {file} and {adapter}")
    # Only a model file has a key for the chat template.
    write_model(source, folder / file, file_type, trained.template, trained.chat_template)
    write_adapter(trained.folder, trained.adapter_config(), source, folder / adapter)
    _write_modelfile(trained, source, folder, file, adapter)


def _write_modelfile(
    trained: TrainedFolder, source: ModelSource, folder: Path, model: str, adapter: str | None
) -> None:
    special_tokens = load_tokenizer(source).special_tokens_map
    tokens = {name: str(token) for name, token in special_tokens.items() if isinstance(token, str)}
    text = modelfile(model, adapter, trained.template, trained.chat_template, tokens)
    write_modelfile(folder, text)
