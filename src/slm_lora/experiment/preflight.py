"""Checks of jobs before any work: lengths, token ids, settings that exclude each other, space."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slm_lora.adapters.methods import METHODS, method_of, trains_all
from slm_lora.config.schema import (
    CellConfig,
    DataSection,
)
from slm_lora.data.dataset import PreparedData
from slm_lora.errors import DataError, UsageError
from slm_lora.experiment.job import Job
from slm_lora.experiment.paths import ExperimentPaths
from slm_lora.model.resolve import ModelSource
from slm_lora.records import PIECE
from slm_lora.runtime.storage import require_space
from slm_lora.training.checkpoint import space_needed
from slm_lora.training.schedule import total_steps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_length(section: DataSection, source: ModelSource) -> None:
    """Positions beyond those that the model was made for have no meaning, or no embedding."""
    config = text_config(source)
    most = config.get("max_position_embeddings") or config.get("n_positions")
    if isinstance(most, int) and section.max_length > most:
        raise UsageError(
            f"data.max_length = {section.max_length}: {source.name} takes {most} tokens at most"
        )


def text_config(source: ModelSource) -> dict[str, Any]:
    """The configuration of a model's text part, as written."""
    config: dict[str, Any] = json.loads((source.path / "config.json").read_text(encoding="utf-8"))
    return config | (config.get("text_config") or {})


def check_token_ids(
    prepared: PreparedData, source: ModelSource, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Tokens that were added to a tokenizer, and not to its model, would be looked up outside of
    the embedding."""
    rows = text_config(source).get("vocab_size")
    examples = (*prepared.test, *prepared.validation, *prepared.train)
    largest = max((int(example.ids.max()) for example in examples), default=0)
    if isinstance(rows, int) and largest >= rows:
        raise UsageError(
            f"model {source.name}: its tokenizer makes the token {largest} "
            f"({tokenizer.convert_ids_to_tokens(largest)!a:.40}), its embedding has {rows} rows; "
            "save a model whose embedding was resized to its tokenizer (resize_token_embeddings)"
        )


def check_headline(config: CellConfig, prepared: PreparedData) -> None:
    """The headline's tokens are among the test rows."""
    if config.evaluation.headline == "response" and not any(
        example.response[1:].any() for example in prepared.test
    ):
        raise DataError(
            "no label tokens left: no test row has a response token to score "
            "(evaluation.headline = response); raise data.max_length, or check the template"
        )


def check_frozen(config: CellConfig) -> None:
    """Methods that modify the base need it whole and unquantised; LoRA+ needs an adapter."""
    if config.training.loraplus_lr_ratio and trains_all(config.adapter):
        raise UsageError(
            f"training.loraplus_lr_ratio: has no effect with adapter.kind = {config.adapter.kind}; "
            "leave it out"
        )
    kind, quantization = config.adapter.kind, config.model.quantization
    modifies = method_of(config.adapter).modifies_base
    if quantization and modifies:
        raise UsageError(
            f"adapter.kind = {kind}: changes weights of the base, which {quantization} "
            "(model.quantization) holds in 4 bits; use "
            f"{', '.join(name for name, method in METHODS.items() if not method.modifies_base)}"
        )
    if config.training.fsdp and (quantization or modifies):
        other = f"model.quantization = {quantization}" if quantization else f"adapter.kind = {kind}"
        raise UsageError(
            f"training.fsdp: shares out a frozen, unquantised base; leave it out with {other}"
        )


def check_same_test_rows(jobs: Sequence[Job]) -> None:
    """All cells are scored on the same rows, and one model\'s on the same tokens."""
    first = jobs[0]
    wanted = [example.row_id for example in first.data.test]
    for job in jobs[1:]:
        rows = [example.row_id for example in job.data.test] == wanted
        # Models with other tokenizers share rows, not tokens; one model's cells share both.
        tokens = job.data.held_out_hash == first.data.held_out_hash
        if not rows or (job.source == first.source and not tokens):
            raise UsageError(
                f"grid: cells {first.name} and {job.name} would be scored on different "
                f"test {'tokens' if rows else 'rows'}, so they could not be compared"
                f"{_pieces_differ(first, job)}; run them as two experiments"
            )


def _pieces_differ(first: Job, other: Job) -> str:
    rows = [
        {example.row_id.partition(PIECE)[0] for example in job.data.test} for job in (first, other)
    ]
    if rows[0] == rows[1] and "split" in {j.config.data.on_long_row for j in (first, other)}:
        return " (data.on_long_row = split cuts the same rows into other pieces)"
    return ""


def require_room(job: Job, paths: ExperimentPaths, parameters: int) -> None:
    """Room for checkpoints, adapter and scores, before any training.

    Raises:
        StorageError: there is none, or the folders cannot be written.
    """
    cell = job.config
    saved = 4 * parameters * method_of(cell.adapter).saved_rank + 1_000_000
    steps = total_steps(len(job.data.train), cell.training)
    points = space_needed(parameters, cell.training.eval_steps is not None, steps)
    held = paths.checkpoint(job.name, job.identity)
    there = sum(path.stat().st_size for path in held.rglob("*") if path.is_file())
    scores = 500 * len(job.scored_rows) + 400 * steps
    if job.options.keep_adapters:
        require_space(paths.adapters, saved, "the adapter")
    require_space(
        paths.results, max(0, points - there) + saved + scores, "checkpoints, adapter and scores"
    )
