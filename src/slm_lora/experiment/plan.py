"""What an experiment would do, and about how long and how large it would be; trains nothing."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slm_lora.experiment.jobs import Job
from slm_lora.experiment.places import BASE, Places
from slm_lora.model.base import DTYPES
from slm_lora.model.source import tensor_shapes
from slm_lora.runs import run_folder
from slm_lora.training.loop import total_steps

TRAINING_EFFICIENCY, SCORING_EFFICIENCY = 0.5, 0.6
"""Share of the measured matrix-product rate that a step reaches, as seen on two CPU cores."""


@dataclass(frozen=True, slots=True)
class PlannedCell:
    """One run of the plan; seconds and bytes are estimates."""

    name: str
    finished: bool
    training_rows: int
    steps: int
    training_tokens: int
    test_tokens: int
    seconds: float
    peak_bytes: int


def plan(jobs: Sequence[Job], places: Places) -> list[PlannedCell]:
    """The base and every cell, in the order in which they would run."""
    planned = []
    seen: set[str] = set()
    for job in jobs:
        if job.base_identity not in seen:
            seen.add(job.base_identity)
            planned.append(_planned(job, places, BASE, job.base_identity))
    return planned + [_planned(job, places, job.cell.name, job.identity) for job in jobs]


def _planned(job: Job, places: Places, name: str, identity: str) -> PlannedCell:
    test_tokens = sum(example.length for example in job.prepared.test)
    training, rows = job.cell.recipe.training, job.prepared.train
    is_base = name == BASE
    steps = 0 if is_base else total_steps(len(rows), training)
    mean = sum(example.length for example in rows) / max(1, len(rows))
    # An epoch's last step is partial, so steps × batch would count too much.
    examples = min(steps * training.effective_batch_size, training.num_train_epochs * len(rows))
    training_tokens = 0 if is_base else round(examples * mean)
    weights = _matrix_weights(job)
    rate = _matrix_rate(job)
    # 2 FLOP a weight and token forward, 2 more for the gradient of the inputs, and 2 for that of
    # the weights, which frozen ones do not have.
    full = job.cell.recipe.adapter.kind == "full"
    seconds = (6 if full else 4) * weights * training_tokens / (rate * TRAINING_EFFICIENCY)
    seconds += 2 * weights * test_tokens / (rate * SCORING_EFFICIENCY)
    return PlannedCell(
        name=name,
        finished=run_folder(places.results, name, identity).exists(),
        training_rows=0 if is_base else len(rows),
        steps=steps,
        training_tokens=training_tokens,
        test_tokens=test_tokens,
        seconds=seconds,
        peak_bytes=_peak_bytes(job, mean, is_base),
    )


def _matrix_weights(job: Job) -> int:
    """Weights that every token is multiplied with: all matrices, but the input embedding only
    where it is the output embedding too."""
    shapes = tensor_shapes(job.source.path)
    tied = not any("lm_head" in name for name in shapes)
    return sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if len(shape) == 2 and (tied or "embed_tokens" not in name)
    )


def _peak_bytes(job: Job, mean_length: float, is_base: bool) -> int:
    config = json.loads((job.source.path / "config.json").read_text(encoding="utf-8"))
    size = torch.finfo(DTYPES[job.precision]).bits // 8
    many = sum(math.prod(s) for s in tensor_shapes(job.source.path).values())
    # Where all of it trains: weights, gradient and two moments in fp32, and a copy for products.
    full = job.cell.recipe.adapter.kind == "full" and not is_base
    weights = many * (16 + size if full else size)
    if job.cell.recipe.model.quantization:
        # Embeddings stay as they are; of the other matrices half a byte a weight, and scales.
        ends = sum(
            math.prod(s)
            for name, s in tensor_shapes(job.source.path).items()
            if "embed" in name or "lm_head" in name
        )
        weights = round(ends * size + (many - ends) * 0.55)
    config |= config.get("text_config") or {}
    hidden = int(config.get("hidden_size") or config.get("n_embd") or 0)
    layers = int(config.get("num_hidden_layers") or config.get("n_layer") or 0)
    inner = int(config.get("intermediate_size", 4 * hidden))
    training = job.cell.recipe.training
    # A step rarely holds twice the mean; a micro-batch never holds more than its budget.
    step = 2 * training.effective_batch_size * mean_length
    tokens = min(step, training.micro_batch_tokens) if not is_base else 0
    # Values a layer keeps for the backward pass, per token, as seen on Llama with q+v LoRA.
    of_layer = 16 * hidden + 6 * inner
    # With activation checkpointing every layer's input, and one layer's all.
    values = hidden * layers + of_layer if training.activation_checkpointing else of_layer * layers
    kept = size * values * tokens
    runtime = 0.7e9
    return round(weights + kept + runtime)


_rates: dict[tuple[str, str], float] = {}


def _matrix_rate(job: Job) -> float:
    """FLOP per second of matrix products in the job's precision on its device, measured now."""
    key = (job.device.type, job.precision)
    if key not in _rates:
        dtype = DTYPES[job.precision]
        left = torch.randn(1024, 1024, dtype=dtype, device=job.device)
        right = torch.randn(1024, 4096, dtype=dtype, device=job.device)
        flop = 2 * 1024 * 1024 * 4096
        best = math.inf
        for _ in range(8):
            began = time.perf_counter()
            (left @ right).sum().item()
            best = min(best, time.perf_counter() - began)
        _rates[key] = flop / best
    return _rates[key]
