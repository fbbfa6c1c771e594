"""What training left in a folder: an adapter or a whole model, and on which base."""

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
class Trained:
    """A folder that training, or `merged.merge`, wrote.

    Attributes:
        folder: where it lies.
        about: its slm_lora.json: recipe, base, template.
        whole: whether it holds all weights; else an adapter.
    """

    folder: Path
    about: Mapping[str, Any]
    whole: bool

    @property
    def name(self) -> str:
        """The folder's own name, without the path to it."""
        return self.folder.resolve().name

    @property
    def base_name(self) -> str:
        """The base as the recipe named it."""
        return str(self.about["base"]["name"])

    @property
    def template(self) -> Template:
        """The template that it was trained with."""
        return Template(**self.about["template"])

    @property
    def chat_template(self) -> str | None:
        """The training template as a chat template, if it can be one.

        Earlier versions wrote one that asks for today's date, which training never did.
        """
        path = self.folder / CHAT_TEMPLATE
        text = read_template(path)
        return None if text is None else freeze_date(text, str(path))

    def adapter_config(self) -> dict[str, Any]:
        """PEFT's configuration of an adapter."""
        text = (self.folder / ADAPTER_CONFIG).read_text(encoding="utf-8")
        config: dict[str, Any] = json.loads(text)
        return config


def read(folder: Path) -> Trained:
    """Look at a folder; weights are not read.

    Raises:
        UsageError: neither an adapter nor a model that this program wrote.
        IntegrityError: what says what it was trained on is broken.
    """
    adapter = (folder / ADAPTER_CONFIG).is_file() and (folder / WEIGHTS).is_file()
    whole = not adapter and (folder / MODEL_WEIGHTS).is_file()
    if not adapter and not whole:
        raise UsageError(
            f"{folder}: neither an adapter ({ADAPTER_CONFIG} and {WEIGHTS}) nor a model "
            f"({MODEL_WEIGHTS}) in it"
        )
    if not (folder / ABOUT).is_file():
        raise UsageError(
            f"{folder}: no {ABOUT}, which says what it was trained on; "
            "only what `slm-lora` trained can be handed on"
        )
    try:
        about = read_sealed(folder / ABOUT)
        check_files(folder, about)
        trained = Trained(folder, about, whole)
        # Asked for here, so that a broken file is found before any work is done.
        _ = trained.template, str(about["base"]["sha256"]), trained.base_name
        if adapter:
            trained.adapter_config()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{folder}: its {ABOUT} or configuration is broken ({error})"
        ) from error
    return trained


def find_base(
    trained: Trained, place: Path | None, reporter: Reporter | None = None
) -> ModelSource:
    """The base that it was trained on; that the weights are the same is checked on loading.

    Args:
        trained: an adapter.
        place: folder of the base, where its name does not lead there.
        reporter: is told that this is looked for.

    Raises:
        UsageError: it is not here under the name that it had in training.
        StorageError: the hub, or the package index, does not give it.
    """
    if reporter is not None:
        reporter.info_once(f"  looking for {trained.base_name}, and at the SHA-256 of its weights")
    if place is not None:
        # A path as a hub id would be looked up on the hub.
        if not place.is_dir():
            raise UsageError(f"--base {place}: no such folder")
        return replace(resolve(ModelSection(name=str(place))), name=trained.base_name)
    try:
        base = trained.about["base"]
        return resolve(ModelSection(name=trained.base_name, revision=base.get("revision")))
    except UsageError as error:
        raise UsageError(
            f"{trained.folder}: its base {trained.base_name} is not found by that name; "
            "name its folder: --base PATH"
        ) from error


def refuse_existing(target: Path) -> None:
    """Exports replace nothing: a wrong name would cost what lies there.

    Raises:
        UsageError: there is something.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(f"{target}: exists, and nothing is replaced; choose another name")
