"""From the cells of a recipe to jobs: models found, rows read and tokenised, everything checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_lora.adapters.targets import resolve_targets
from slm_lora.config.axes import AUTO, TuningSection
from slm_lora.config.grid import Cell, at_learning_rate
from slm_lora.config.learning_rate import SuggestedRate, rates_around, suggested_rate
from slm_lora.config.schema import (
    LATER_KEYS,
    CellConfig,
    ModelSection,
    TrainingSection,
)
from slm_lora.data.dataset import PreparedData, prepare_data
from slm_lora.data.sources import RowSet, read_rows
from slm_lora.data.splits import SPLIT_VERSION
from slm_lora.errors import UsageError
from slm_lora.experiment.job import ComputedName, Job, ScoredSet, tokens_per_micro_batch
from slm_lora.experiment.preflight import (
    check_frozen,
    check_headline,
    check_length,
    check_same_test_rows,
    check_token_ids,
    text_config,
)
from slm_lora.model.resolve import ModelSource, hash_config, resolve
from slm_lora.runs.folder import RUN_FORMAT
from slm_lora.runtime.checksums import content_hash

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from slm_lora.model.base import PrecisionName


def make_jobs(cells: Sequence[Cell], computed: ComputedName = "here") -> list[Job]:
    """Resolve models, read rows and tokenise them for all cells; nothing is loaded yet.

    Args:
        cells: from `load.load_recipe`.
        computed: unless it is here, the device need not be.

    Raises:
        SlmLoraError: whatever is wrong with models or rows, and cells on different test rows.
    """
    return JobResolver(computed).jobs(cells)


class JobResolver:
    """Makes jobs in several calls, with models, rows and tokens read once.

    Args:
        computed: as for `make_jobs`.
    """

    def __init__(self, computed: ComputedName = "here") -> None:
        self.computed = computed
        self._sources: dict[ModelSection, ModelSource] = {}
        self._tokenizers: dict[ModelSource, PreTrainedTokenizerBase] = {}
        self._row_sets: dict[str, RowSet] = {}
        self._sets: dict[tuple[ModelSource, str, int], PreparedData] = {}

    def jobs(self, cells: Sequence[Cell], scored_set: ScoredSet = "test") -> list[Job]:
        """As `make_jobs`, scored on one of the two held-out sets."""
        jobs = []
        for cell in cells:
            section = cell.config.data
            row_key = content_hash(section.model_dump(mode="json", include=_ROW_FIELDS))
            # Rows first: they are checked quickly, a model may have to be fetched.
            if row_key not in self._row_sets:
                self._row_sets[row_key] = read_rows(section)
            rows = self._row_sets[row_key]
            source = self._source(cell.config.model)
            if source not in self._tokenizers:
                from slm_lora.model.loading import load_tokenizer

                self._tokenizers[source] = load_tokenizer(source)
            tokenizer = self._tokenizers[source]
            check_length(section, source)
            set_key = (source, section.model_dump_json(), cell.config.data_seed)
            if set_key not in self._sets:
                self._sets[set_key] = prepare_data(rows, section, cell.config.data_seed, tokenizer)
            prepared = self._sets[set_key]
            check_token_ids(prepared, source, tokenizer)
            check_headline(cell.config, prepared)
            check_frozen(cell.config)
            if self.computed != "nowhere":
                resolve_targets(source, cell.config.adapter)
            suggested = None
            if cell.config.training.learning_rate == "auto":
                suggested = self.suggested_rate(cell.config)
                cell = at_learning_rate(cell, suggested.value)
            job = _job(cell, source, prepared, rows, self.computed, scored_set)
            jobs.append(replace(job, suggested_rate=suggested))
        check_same_test_rows(jobs)
        return jobs

    def suggested_rate(self, config: CellConfig) -> SuggestedRate:
        """The learning rate of ``auto`` for a setting.

        Raises:
            UsageError: the model's configuration gives no width.
        """
        source = self._source(config.model)
        settings = text_config(source)
        widths = (settings.get(key) for key in _WIDTH_KEYS)
        width = next((width for width in widths if isinstance(width, int) and width > 0), None)
        if width is None:
            raise UsageError(
                f"training.learning_rate = auto: config.json of {source.name} gives no hidden_size "
                "to derive it from; name a number, e.g. 1e-3"
            )
        model_type = str(settings.get("model_type", ""))
        return suggested_rate(model_type, width, config.adapter, config.training)

    def tuning_section(self, section: TuningSection, config: CellConfig) -> TuningSection:
        """The section with numbers for ``auto``, which depend on the setting."""
        if AUTO not in section.values:
            return section
        return section.with_rates(rates_around(self.suggested_rate(config).value))

    def _source(self, section: ModelSection) -> ModelSource:
        if section not in self._sources:
            self._sources[section] = resolve(section)
        return self._sources[section]


_WIDTH_KEYS = ("hidden_size", "n_embd", "n_embed", "d_model")
"""Of a model's configuration, by architecture."""
_ROW_FIELDS = {"name", "revision", "split", "format", "columns", "text_rows", "on_bad_row"}


def _job(
    cell: Cell,
    source: ModelSource,
    prepared: PreparedData,
    rows: RowSet,
    computed: ComputedName,
    scored_set: ScoredSet,
) -> Job:
    device, precision = _device_and_precision(cell.config.training, computed)
    resolved = _portable(cell, source, precision, device.type)
    resolved["data"]["include_context"] = prepared.template.include_context
    scored = {
        "format": RUN_FORMAT,
        "split": SPLIT_VERSION,
        "base": source.sha256,
        "config": hash_config(source.path),
        "held_out": prepared.held_out_hash,
        "precision": precision,
        "device": device.type,
        "compile": resolved["training"]["compile"],
        "micro_batch_tokens": resolved["evaluation"]["micro_batch_tokens"],
    }
    if cell.config.model.quantization:
        scored["quantization"] = cell.config.model.quantization
    if scored_set != "test":
        scored["scored_set"] = scored_set
    training = {
        **resolved["training"],
        "micro_batch_tokens": _budget(cell.config, prepared, device, precision),
    }
    trained = {
        "train": prepared.train_hash,
        "adapter": resolved["adapter"],
        "training": _without_later_keys(training),
        "seed": resolved["seed"],
    }
    return Job(
        name=cell.name,
        settings=cell.settings,
        config=cell.config,
        options=cell.options,
        resolved=resolved,
        source=source,
        data=prepared,
        rows=rows,
        device=device,
        precision=precision,
        identity=content_hash({**scored, **trained}),
        base_identity=content_hash(scored),
        scored_set=scored_set,
    )


def _budget(
    config: CellConfig, prepared: PreparedData, device: torch.device, precision: PrecisionName
) -> int:
    """``training.micro_batch_tokens`` as part of a run's identity: the default, where its limits on
    this device make it the same."""
    section = config.training
    default = TrainingSection.model_fields["micro_batch_tokens"].default
    same = tokens_per_micro_batch(config, prepared, device, precision, default)
    if (
        tokens_per_micro_batch(config, prepared, device, precision, section.micro_batch_tokens)
        == same
    ):
        return int(default)
    return section.micro_batch_tokens


def _device_and_precision(
    training: TrainingSection, computed: ComputedName
) -> tuple[torch.device, PrecisionName]:
    import torch

    from slm_lora.model.loading import choose_device, choose_precision

    try:
        device = choose_device(training.device)
    except UsageError:
        if computed == "here":
            raise
        if computed == "elsewhere":
            if training.precision == "auto":
                raise UsageError(
                    f"training.precision = auto: this machine has no {training.device} to choose "
                    "for; name bf16, fp16 or fp32"
                ) from None
            return torch.device(training.device), training.precision
        device = choose_device("auto")
    try:
        return device, choose_precision(training.precision, device)
    except UsageError:
        if computed != "nowhere":
            raise
        return device, choose_precision("auto", device)


def _without_later_keys(training: dict[str, Any]) -> dict[str, Any]:
    later = LATER_KEYS["training"]
    return {k: v for k, v in training.items() if k not in later or v != later[k]}


def _portable(cell: Cell, source: ModelSource, precision: str, device: str) -> dict[str, Any]:
    """The recipe with every choice made, and local paths reduced to the file's name."""
    recipe: dict[str, Any] = cell.config.model_dump(mode="json")
    recipe["model"] |= {"name": source.name, "revision": source.revision}
    for key in ("name", "template"):
        if Path(recipe["data"][key]).exists():
            recipe["data"][key] = Path(recipe["data"][key]).name
    recipe["adapter"]["lora_alpha"] = cell.config.adapter.alpha
    recipe["training"] |= {"precision": precision, "device": device}
    return recipe
