"""Push what was trained to the hub, with a card: the files that belong, and no others."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from slm_lora.adapters.io import ABOUT, WEIGHTS
from slm_lora.errors import IntegrityError, StorageError, UsageError
from slm_lora.export.model_card import card
from slm_lora.export.trained import ADAPTER_CONFIG, Trained, refuse_existing
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
_WRITTEN_HERE = {ADAPTER_CONFIG, ABOUT, CONFIG, GENERATION_CONFIG, "tokenizer_config.json"}
"""Small files that name things; a vocabulary holds every string."""
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")


def dry_run(trained: Trained, repository: str, results: Path, target: Path) -> list[Path]:
    """Write the folder that `push` would send; the network is not asked.

    Raises:
        UsageError: the repository's name is none, or ``target`` exists.
        IntegrityError: a file names a path of this machine, or holds a token.
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
    trained: Trained,
    repository: str,
    results: Path,
    *,
    private: bool = False,
    endpoint: str | None = None,
    reporter: Reporter | None = None,
) -> str:
    """Make the repository if it is not there, and send everything as one commit.

    Args:
        trained: an adapter, or a whole model.
        repository: ``owner/name``.
        results: folder of experiments' results, for the card.
        private: whether a new repository is.
        endpoint: another hub than the one that huggingface_hub is set up for.
        reporter: is told of every stage.

    Returns:
        Address of the repository.

    Raises:
        UsageError: the repository's name is none, or no login.
        IntegrityError: a file names a path of this machine, or holds a token.
        StorageError: the hub does not answer, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    _check_name(repository)
    if get_token() is None:
        raise UsageError("push: not logged in to the hub; `hf auth login`, or set HF_TOKEN")
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
    except Exception as error:  # its HTTP library is another from release to release
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise StorageError(
            f"push: the hub does not take {repository}: {reason}; check network, token and name "
            "(--dry-run DIR shows what would be sent)"
        ) from error
    return str(url)


def _check_name(repository: str) -> None:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UsageError(f"{repository}: not the name of a repository; give owner/name")


def _files(trained: Trained) -> list[Path]:
    names = _MODEL_FILES if trained.whole else _ADAPTER_FILES
    files = [trained.folder / name for name in names if (trained.folder / name).is_file()]
    for file in files:
        if file.name in _WRITTEN_HERE:
            _check_private(file, trained.folder)
    return files


def _check_private(file: Path, folder: Path) -> None:
    text = file.read_text(encoding="utf-8")
    paths = {f"{Path.home()}/", f"{folder.resolve().parent}/", f"{Path.cwd()}/"} - {"//"}
    if any(place in text for place in paths):
        raise IntegrityError(f"{file}: names a path of this machine; take it out, then push")
    if _TOKEN.search(text):
        raise IntegrityError(f"{file}: holds what looks like a token of the hub; take it out")
