"""A folder for llama.cpp and Ollama: GGUF files and a Modelfile."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from slm_lora.adapters.io import check_base
from slm_lora.errors import UsageError
from slm_lora.export.gguf import FileType, check_adapter, check_model, write_adapter, write_model
from slm_lora.export.merge import merge
from slm_lora.export.ollama import modelfile, write_modelfile
from slm_lora.export.trained import Trained, find_base, refuse_existing
from slm_lora.model.loading import load_tokenizer
from slm_lora.model.resolve import ModelSource, hash_weights
from slm_lora.runtime.progress import Reporter
from slm_lora.runtime.storage import atomic_folder

Form = Literal["merged", "adapter"]


def export(
    trained: Trained,
    target: Path,
    form: Form,
    kind: FileType,
    base: Path | None = None,
    reporter: Reporter | None = None,
) -> list[Path]:
    """Write GGUF files and a Modelfile; complete or absent.

    Args:
        trained: an adapter, or a whole model.
        target: folder to write; must not hold anything.
        form: of an adapter: ``merged`` into one model (with `merge`'s proof), or ``adapter``: a
            file of its own, beside one of the base.
        kind: type of the model's weights; an adapter's are F32.
        base: folder of the base, where its name does not lead there.
        reporter: is told of every stage.

    Returns:
        The files.

    Raises:
        UsageError: llama.cpp would compute otherwise; says what to do instead.
        IntegrityError: trained on another base, or the merged model is not base+adapter.
    """
    refuse_existing(target)
    if trained.whole and form == "adapter":
        raise UsageError(f"{trained.folder}: a whole model, not an adapter; use --as merged")
    reporter = reporter or Reporter(quiet=True)
    with atomic_folder(target) as temporary:
        if trained.whole:
            path = trained.folder
            whole = ModelSource(trained.name, None, path, hash_weights(path))
            _model(whole, trained, temporary, kind, reporter)
        elif form == "merged":
            check_model(find_base(trained, base, reporter), trained.template)
            with TemporaryDirectory(prefix=".merging.", dir=target.parent) as name:
                merged = Path(name) / "merged"
                merge(trained, merged, "fp32", base, reporter)
                whole = ModelSource(trained.name, None, merged, hash_weights(merged))
                _model(whole, trained, temporary, kind, reporter)
        else:
            _base_and_adapter(
                trained, find_base(trained, base, reporter), temporary, kind, reporter
            )
    return sorted(target.iterdir())


def _model(
    source: ModelSource, trained: Trained, folder: Path, kind: FileType, reporter: Reporter
) -> None:
    file = f"{source.name}-{kind}.gguf"
    reporter.info(f"  writing {file}")
    write_model(source, folder / file, kind, trained.template, trained.chat_template)
    _modelfile(trained, source, folder, file, None)


def _base_and_adapter(
    trained: Trained, source: ModelSource, folder: Path, kind: FileType, reporter: Reporter
) -> None:
    check_base(source, trained.folder)
    check_adapter(trained.folder, trained.adapter_config())
    name = source.name.rsplit("/", 1)[-1]
    file, adapter = f"{name}-{kind}.gguf", f"{trained.name}-lora.gguf"
    reporter.info(f"  writing {file} and {adapter}")
    # The base's file carries the training template: an adapter's has no place for one.
    write_model(source, folder / file, kind, trained.template, trained.chat_template)
    write_adapter(trained.folder, trained.adapter_config(), source, folder / adapter)
    _modelfile(trained, source, folder, file, adapter)


def _modelfile(
    trained: Trained, source: ModelSource, folder: Path, model: str, adapter: str | None
) -> None:
    named = load_tokenizer(source).special_tokens_map
    tokens = {name: str(token) for name, token in named.items() if isinstance(token, str)}
    text = modelfile(model, adapter, trained.template, trained.chat_template, tokens)
    write_modelfile(folder, text)
