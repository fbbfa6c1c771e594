"""Push a trained folder to the hub with a model card; only known files are sent."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from slm_lora.adapters.io import ABOUT, WEIGHTS
from slm_lora.errors import IntegrityError, StorageError, UsageError
from slm_lora.export.model_card import card
from slm_lora.export.trained import ADAPTER_CONFIG, TrainedFolder, refuse_existing
from slm_lora.model.model_folder import (
    CHAT_TEMPLATE,
    CONFIG,
    GENERATION_CONFIG,
    MODEL_WEIGHTS,
    TOKENIZER_FILES,
)
from slm_lora.runtime.progress import Reporter
from slm_lora.runtime.storage import atomic_folder

CARD = "README.md"
_ADAPTER_FILES = (ADAPTER_CONFIG, WEIGHTS, ABOUT, CHAT_TEMPLATE)
_MODEL_FILES = (
    CONFIG, GENERATION_CONFIG, MODEL_WEIGHTS, *TOKENIZER_FILES, ABOUT, CHAT_TEMPLATE,
)  # fmt: skip
_CHECKED_FILES = {ADAPTER_CONFIG, ABOUT, CONFIG, GENERATION_CONFIG, "tokenizer_config.json"}
"""Files that can contain paths or tokens. (A vocabulary may contain any string.)"""
_TOKEN_PATTERN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def dry_run(trained: TrainedFolder, repository: str, results: Path, target: Path) -> list[Path]:
    """Write the files that `push` would send, without network access.

    Raises:
        UsageError: the repository name is invalid, or ``target`` exists.
        IntegrityError: a file contains a path of this machine or a token.
    """
    _check_name(repository)
    refuse_existing(target)
    text = card(trained, repository, results)
    files = _files(trained)
    with atomic_folder(target) as temporary:
        for file in files:
            shutil.copyfile(file, temporary / file.name)
        (temporary / CARD).write_text(text, encoding="utf-8", newline="\n")
    return sorted(target.iterdir())


def push(
    trained: TrainedFolder,
    repository: str,
    results: Path,
    *,
    private: bool = False,
    endpoint: str | None = None,
    reporter: Reporter | None = None,
) -> str:
    """Create the repository if it does not exist, and send all files in one commit.

    Args:
        trained: an adapter or a full model.
        repository: ``owner/name``.
        results: results folder, for the losses in the card.
        private: whether a new repository is private.
        endpoint: URL of another hub than huggingface_hub's default.
        reporter: prints the progress.

    Returns:
        URL of the repository.

    Raises:
        UsageError: the repository name is invalid, or there is no login.
        IntegrityError: a file contains a path of this machine or a token.
        StorageError: the hub is not reachable or rejects the request.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    _check_name(repository)
    if get_token() is None:
        raise UsageError("push: not logged in to the hub; run `hf auth login` or set HF_TOKEN")
    text = card(trained, repository, results)
    files = _files(trained)
    size = sum(file.stat().st_size for file in files) / 1e6
    (reporter or Reporter(quiet=True)).info(
        f"  sending {len(files) + 1} files, {size:.1f} MB, to {repository}"
    )
    operations = [CommitOperationAdd(file.name, file) for file in files]
    operations.append(CommitOperationAdd(CARD, text.encode()))
    api = HfApi(endpoint=endpoint)
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(repository, operations, commit_message=f"{trained.name}, by slm-lora")
    except Exception as error:  # the type depends on huggingface_hub's HTTP library
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StorageError(
            f"push: uploading {repository} failed: {reason}; check network, token and name "
            "(--dry-run DIR writes the files without sending them)"
        ) from error
    return str(url)


def _check_name(repository: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UsageError(f"{repository}: not a repository name; give owner/name")


def _files(trained: TrainedFolder) -> list[Path]:
    names = _MODEL_FILES if trained.is_full_model else _ADAPTER_FILES
    files = [trained.folder / name for name in names if (trained.folder / name).is_file()]
    for file in files:
        if file.name in _CHECKED_FILES:
            _check_no_secrets(file, trained.folder)
    return files


def _check_no_secrets(file: Path, folder: Path) -> None:
    text = file.read_text(encoding="utf-8")
    paths = {f"{Path.home()}/", f"{folder.resolve().parent}/", f"{Path.cwd()}/"} - {"//"}
    if any(path in text for path in paths):
        raise IntegrityError(f"{file}: contains a path of this machine; remove it")
    if _TOKEN_PATTERN.search(text):
        raise IntegrityError(f"{file}: contains what looks like a hub token; remove it")
