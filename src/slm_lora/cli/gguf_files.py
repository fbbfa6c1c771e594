"""Scores of GGUF files beside the same model in PyTorch, for evaluate and export gguf."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_lora.cli.options import console
from slm_lora.errors import UsageError

if TYPE_CHECKING:
    from slm_lora.experiment.job import Job
    from slm_lora.experiment.saved_adapter import Evaluated
    from slm_lora.runtime.progress import Reporter


def score_files(
    files: Sequence[Path], job: Job, reference: Evaluated, name: str, reporter: Reporter
) -> list[dict[str, Any]]:
    """Score files through llama.cpp on the rows of a job.

    Args:
        files: GGUF files of whole models.
        job: gives the rows, and the base's tokenizer.
        reference: the same rows scored in PyTorch.
        name: of the model scored in PyTorch.
        reporter: for progress.

    Returns:
        For each file its path, bytes and speed, and for ``all`` and ``response`` the loss, its
        difference from PyTorch (nats per token) and the 95 % interval over groups of rows.
    """
    import torch

    from slm_lora.evaluation.gguf_scoring import score_file
    from slm_lora.evaluation.scoring import held_out_loss
    from slm_lora.experiment.saved_adapter import Evaluated
    from slm_lora.model.loading import load_tokenizer
    from slm_lora.records import LossOn

    tokenizer = load_tokenizer(job.source)
    tokens = sum(example.length for example in job.scored_rows)
    scopes: tuple[LossOn, ...] = ("all", "response")
    results = []
    for file in files:
        with reporter.task(file.name, tokens, f"{job.scored_set} tokens") as task:
            scored = score_file(
                file,
                job.scored_rows,
                job.scored_set,
                tokenizer,
                torch.get_num_threads(),
                lambda done, task=task: task.advance(done, done),  # type: ignore[misc]
            )
            task.close(f"scored {len(scored.scores)} {job.scored_set} rows through llama.cpp")
        result: dict[str, Any] = {
            "file": str(file),
            "bytes": file.stat().st_size,
            "tokens_per_s": scored.tokens_per_s,
            "reference": name,
            "reference_precision": job.precision,
        }
        pair = Evaluated(scored.scores, {}, reference.scores)
        for scope in scopes:
            if scope not in reference.record:
                continue
            value, low, high = pair.difference(scope)
            finite = math.isfinite(low + high)
            result[scope] = {
                "loss": held_out_loss(scored.scores, scope).loss,
                "reference_loss": reference.record[scope]["loss"],
                "difference": value,
                "low": low if finite else None,
                "high": high if finite else None,
            }
        results.append(result)
    return results


def print_files(results: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Print one line per file, of the whole text, or JSON."""
    if as_json:
        print(json.dumps({"files": list(results)}, indent=2))
        return
    for result in results:
        loss = result["all"]
        interval = (
            f" (95 % {loss['low']:+.5f} to {loss['high']:+.5f})" if loss["low"] is not None else ""
        )
        console().print(
            f"{Path(result['file']).name}  loss {loss['loss']:.5f}  "
            f"{loss['difference']:+.5f} nats per token{interval} to {result['reference']} in "
            f"PyTorch {result['reference_precision']}  {result['bytes'] / 1e6:.1f} MB  "
            f"{result['tokens_per_s']:.0f} tok/s",
            soft_wrap=True,
        )


def score_export(
    job: Job, trained: Any, files: Sequence[Path], reporter: Reporter
) -> list[dict[str, Any]]:
    """Score exported model files, and the folder they were made of, on the same test rows.

    Args:
        job: see `export_job`.
        trained: the exported folder.
        files: the GGUF files.
        reporter: for progress.
    """
    from slm_lora.experiment.runner import evaluate_adapter

    reference = evaluate_adapter(job, trained.folder, reporter, with_base=False)
    return score_files(files, job, reference, trained.name, reporter)


def export_job(recipe: Path, trained: Any) -> Job:
    """The job of the recipe's cell that trained a folder.

    Raises:
        UsageError: the recipe does not load, or has no such cell.
    """
    from slm_lora.config.load import load_recipe
    from slm_lora.experiment.resolve_jobs import make_jobs

    _, cells = load_recipe(recipe, [])
    name = trained.metadata.get("cell")
    matching = [cell for cell in cells if cell.name == name]
    if not matching:
        raise UsageError(
            f"--score {recipe}: has no cell {name}, which trained {trained.folder}; score the file "
            "with slm-lora evaluate RECIPE --adapter FOLDER --gguf FILE"
        )
    return make_jobs(matching)[0]


def check_llama_cpp() -> None:
    """Refuse to score before work is done that would be in vain.

    Raises:
        UsageError: llama.cpp is not installed, or unknown.
    """
    from slm_lora.evaluation.llama_library import load

    load()
