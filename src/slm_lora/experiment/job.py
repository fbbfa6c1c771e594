"""From the cells of a recipe to jobs: everything found, checked and named before any training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slm_lora.adapters.methods import METHODS, method_of, trains_all
from slm_lora.adapters.targets import resolve_targets
from slm_lora.config.grid import Cell
from slm_lora.config.schema import LATER_KEYS, DataSection, ModelSection, TrainingSection
from slm_lora.data.dataset import Prepared, prepare
from slm_lora.data.sources import RowSet, read_rows
from slm_lora.data.splits import SPLIT_VERSION
from slm_lora.errors import DataError, UsageError
from slm_lora.model.resolve import ModelSource, hash_config, resolve
from slm_lora.ops import compilation
from slm_lora.records import PIECE
from slm_lora.runs.folder import RUN_FORMAT
from slm_lora.runtime import distributed
from slm_lora.runtime.checksums import content_hash
from slm_lora.training.loop import tokens_at_once, training_tokens, usable_examples

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from slm_lora.model.base import PrecisionName


@dataclass(frozen=True)
class Job:
    """A cell with its base model, its rows, and the identities of its runs.

    Attributes:
        identity: of the adapter's run; SHA-256 over resolved recipe, rows and base.
        base_identity: of the base's run on the same held-out rows.
        recipe: the resolved recipe, without anything that exists on this machine only.
    """

    cell: Cell
    source: ModelSource
    prepared: Prepared
    rows: RowSet
    device: torch.device
    precision: PrecisionName
    identity: str
    base_identity: str
    recipe: dict[str, Any]

    @property
    def low_precision(self) -> bool:
        """Whether it computes in half precision."""
        return self.precision != "fp32"

    @property
    def sharded(self) -> bool:
        """Whether the base's layers are shared out over the processes."""
        return self.cell.recipe.training.fsdp and not distributed.is_single()


ComputedName = Literal["here", "elsewhere", "nowhere"]
"""Where a job is computed: on this machine, on others, or not at all (plans, looks at data)."""


def make_jobs(cells: Sequence[Cell], computed: ComputedName = "here") -> list[Job]:
    """Resolve models, read rows and tokenise them for all cells; nothing is loaded yet.

    Args:
        cells: from `reading.load_recipe`.
        computed: unless it is here, the device need not be.

    Raises:
        SlmLoraError: whatever is wrong with models or rows, and cells on different test rows.
    """
    sources: dict[ModelSection, ModelSource] = {}
    tokenizers: dict[ModelSource, PreTrainedTokenizerBase] = {}
    row_sets: dict[str, RowSet] = {}
    sets: dict[tuple[ModelSource, str, int], Prepared] = {}
    jobs = []
    for cell in cells:
        section = cell.recipe.data
        row_key = content_hash(section.model_dump(mode="json", include=_ROW_FIELDS))
        # Rows first: they are checked quickly, a model may have to be fetched.
        if row_key not in row_sets:
            row_sets[row_key] = read_rows(section)
        rows = row_sets[row_key]
        if cell.recipe.model not in sources:
            sources[cell.recipe.model] = resolve(cell.recipe.model)
        source = sources[cell.recipe.model]
        if source not in tokenizers:
            from slm_lora.model.loading import load_tokenizer

            tokenizers[source] = load_tokenizer(source)
        _check_length(section, source)
        set_key = (source, section.model_dump_json(), cell.recipe.data_seed)
        if set_key not in sets:
            sets[set_key] = prepare(rows, section, cell.recipe.data_seed, tokenizers[source])
        _check_token_ids(sets[set_key], source, tokenizers[source])
        _check_headline(cell, sets[set_key])
        _check_frozen(cell)
        if computed != "nowhere":
            resolve_targets(source, cell.recipe.adapter)
        jobs.append(_job(cell, source, sets[set_key], rows, computed))
    _check_same_test_rows(jobs)
    return jobs


_ROW_FIELDS = {"name", "revision", "split", "format", "columns", "text_rows", "on_bad_row"}


def _check_length(section: DataSection, source: ModelSource) -> None:
    """Positions beyond those that the model was made for have no meaning, or no embedding."""
    config = _text_config(source)
    most = config.get("max_position_embeddings") or config.get("n_positions")
    if isinstance(most, int) and section.max_length > most:
        raise UsageError(
            f"data.max_length = {section.max_length}: {source.name} takes {most} tokens at most"
        )


def _text_config(source: ModelSource) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    return config | (config.get("text_config") or {})


def _check_token_ids(
    prepared: Prepared, source: ModelSource, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Tokens that were added to a tokenizer, and not to its model, would be looked up outside of
    the embedding."""
    rows = _text_config(source).get("vocab_size")
    examples = (*prepared.test, *prepared.validation, *prepared.train)
    largest = max((int(example.ids.max()) for example in examples), default=0)
    if isinstance(rows, int) and largest >= rows:
        raise UsageError(
            f"model {source.name}: its tokenizer makes the token {largest} "
            f"({tokenizer.convert_ids_to_tokens(largest)!a:.40}), its embedding has {rows} rows; "
            "save a model whose embedding was resized to its tokenizer (resize_token_embeddings)"
        )


def _check_headline(cell: Cell, prepared: Prepared) -> None:
    if cell.recipe.evaluation.headline == "response" and not any(
        example.response[1:].any() for example in prepared.test
    ):
        raise DataError(
            "no label tokens left: no test row has a response token to score "
            "(evaluation.headline = response); raise data.max_length, or check the template"
        )


def _check_frozen(cell: Cell) -> None:
    kind, quantization = cell.recipe.adapter.kind, cell.recipe.model.quantization
    modifies = method_of(cell.recipe.adapter).modifies_base
    if quantization and modifies:
        raise UsageError(
            f"adapter.kind = {kind}: changes weights of the base, which {quantization} "
            "(model.quantization) holds in 4 bits; use "
            f"{', '.join(name for name, method in METHODS.items() if not method.modifies_base)}"
        )
    if cell.recipe.training.fsdp and (quantization or modifies):
        other = f"model.quantization = {quantization}" if quantization else f"adapter.kind = {kind}"
        raise UsageError(
            f"training.fsdp: shares out a frozen, unquantised base; leave it out with {other}"
        )


def _job(
    cell: Cell, source: ModelSource, prepared: Prepared, rows: RowSet, computed: ComputedName
) -> Job:
    device, precision = _device_and_precision(cell.recipe.training, computed)
    recipe = _portable_recipe(cell, source, precision, device.type)
    recipe["data"]["include_context"] = prepared.template.include_context
    scored = {
        "format": RUN_FORMAT,
        "split": SPLIT_VERSION,
        "base": source.sha256,
        "config": hash_config(source.path),
        "held_out": prepared.held_out_hash,
        "precision": precision,
        "device": device.type,
        "compile": recipe["training"]["compile"],
        "micro_batch_tokens": recipe["evaluation"]["micro_batch_tokens"],
    }
    if cell.recipe.model.quantization:
        scored["quantization"] = cell.recipe.model.quantization
    training = {
        **recipe["training"],
        "micro_batch_tokens": _budget(cell, prepared, device, precision),
    }
    trained = {
        "train": prepared.train_hash,
        "adapter": recipe["adapter"],
        "training": _without_later_keys(training),
        "seed": recipe["seed"],
    }
    return Job(
        cell=cell,
        source=source,
        prepared=prepared,
        rows=rows,
        device=device,
        precision=precision,
        identity=content_hash({**scored, **trained}),
        base_identity=content_hash(scored),
        recipe=recipe,
    )


def _budget(cell: Cell, prepared: Prepared, device: torch.device, precision: PrecisionName) -> int:
    """``training.micro_batch_tokens`` as part of a run's identity: the default, where its limits on
    this device make it the same."""
    section = cell.recipe.training
    default = TrainingSection.model_fields["micro_batch_tokens"].default
    same = _at_once(cell, prepared, device, precision, default)
    if _at_once(cell, prepared, device, precision, section.micro_batch_tokens) == same:
        return int(default)
    return section.micro_batch_tokens


def _at_once(
    cell: Cell, prepared: Prepared, device: torch.device, precision: PrecisionName, budget: int
) -> tuple[int, ...]:
    """Most tokens of a micro-batch, of every kind of code that this training runs."""
    section = cell.recipe.training.model_copy(update={"micro_batch_tokens": budget})
    usable, low_precision = usable_examples(prepared.train, section), precision != "fp32"
    tokens = training_tokens(usable, section) if usable else 0
    # (A compiler that is missing here does not make another run of it.)
    compiled = compilation.pays(section.compile, tokens, device, low_precision, sharded=False)
    frozen = not trains_all(cell.recipe.adapter)
    plain, fused = tokens_at_once(section, compiled, frozen, device.type, low_precision)
    return (plain, fused) if compiled else (plain,)


def capped(job: Job) -> str:
    """One line where ``training.micro_batch_tokens`` was chosen and is more than is computed at
    once; else empty."""
    budget = job.cell.recipe.training.micro_batch_tokens
    default = TrainingSection.model_fields["micro_batch_tokens"].default
    most = max(_at_once(job.cell, job.prepared, job.device, job.precision, budget))
    if budget == default or most >= budget:
        return ""
    return (
        f"training.micro_batch_tokens = {budget}: on a {job.device.type.upper()} {most} tokens are "
        "computed at once, which is as fast; more would only take memory"
    )


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


def _portable_recipe(
    cell: Cell, source: ModelSource, precision: str, device: str
) -> dict[str, Any]:
    """The recipe with every choice made, and local paths reduced to the file's name."""
    recipe: dict[str, Any] = cell.recipe.model_dump(mode="json")
    recipe["model"] |= {"name": source.name, "revision": source.revision}
    for key in ("name", "template"):
        if Path(recipe["data"][key]).exists():
            recipe["data"][key] = Path(recipe["data"][key]).name
    recipe["adapter"]["lora_alpha"] = cell.recipe.adapter.alpha
    recipe["training"] |= {"precision": precision, "device": device}
    return recipe


def _check_same_test_rows(jobs: Sequence[Job]) -> None:
    first = jobs[0]
    wanted = [example.row_id for example in first.prepared.test]
    for job in jobs[1:]:
        rows = [example.row_id for example in job.prepared.test] == wanted
        # Models with other tokenizers share rows, not tokens; one model's cells share both.
        tokens = job.prepared.held_out_hash == first.prepared.held_out_hash
        if not rows or (job.source == first.source and not tokens):
            raise UsageError(
                f"grid: cells {first.cell.name} and {job.cell.name} would be scored on different "
                f"test {'tokens' if rows else 'rows'}, so they could not be compared"
                f"{_pieces_differ(first, job)}; run them as two experiments"
            )


def _pieces_differ(first: Job, other: Job) -> str:
    rows = [
        {example.row_id.partition(PIECE)[0] for example in job.prepared.test}
        for job in (first, other)
    ]
    if rows[0] == rows[1] and "split" in {j.cell.recipe.data.on_long_row for j in (first, other)}:
        return " (data.on_long_row = split cuts the same rows into other pieces)"
    return ""


def data_record(job: Job) -> dict[str, Any]:
    """What a run says of its rows."""
    prepared = job.prepared
    return {
        "origin": job.rows.origin,
        "format": job.rows.format,
        "template": asdict(prepared.template),
        "rows_available": prepared.rows_available,
        "groups": prepared.groups,
        "duplicates_dropped": prepared.duplicates,
        "bad_rows_skipped": prepared.bad_rows,
        "split_version": SPLIT_VERSION,
        "held_out_sha256": prepared.held_out_hash,
        "train_sha256": prepared.train_hash,
        "sets": {
            name: {"rows": len(examples), "tokens": sum(e.length for e in examples)}
            for name, examples in (
                ("test", prepared.test),
                ("validation", prepared.validation),
                ("train", prepared.train),
            )
        },
        "long_rows": {
            name: {"policy": job.cell.recipe.data.on_long_row, **asdict(counted)}
            for name, counted in prepared.long.items()
        },
    }
