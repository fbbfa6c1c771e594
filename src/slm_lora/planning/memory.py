"""Estimates of peak memory in training and scoring.

Sums of weights, optimizer state, tensors saved for the backward pass (measured on a slice of the
model), and constants fitted to the overhead of the allocator.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from slm_lora.adapters.methods import trains_all
from slm_lora.experiment.job import Job
from slm_lora.model.base import DTYPES
from slm_lora.model.resolve import tensor_shapes
from slm_lora.ops.cross_entropy import CHUNK, TRAINED_HEAD_CHUNK
from slm_lora.planning.probe import ProbeResult

LOGITS_FACTOR = 3.0
"""Peak memory of loss and gradient of a chunk, as a multiple of its fp32 logits. Measured for 256
positions and a vocabulary of 49,152: 153 MB compiled, 115 MB eager."""

HEAP_FRAGMENTATION = {"eager": 2.3, "compiled": 0.66, "full": 1.0}
"""Peak of a CPU's heap, as a multiple of the tensors that eager layers save: sizes vary, and freed
memory is not returned, so the heap fragments. Compiled layers save two thirds, and return large
blocks. Fitted to peaks on two CPU cores; docs/performance.md has others."""

RUNTIME_OVERHEAD = 250_000_000
"""Bytes of everything else on a CPU: library buffers, intermediate values of a layer."""


@dataclass(frozen=True, slots=True)
class MicroBatchSizes:
    """Sizes that determine a training's peak memory.

    Attributes:
        largest: tokens in the largest micro-batch.
        largest_eager: the same in eager mode, which includes the first step of every training.
        accumulates: whether a step has more than one micro-batch.
        compiled: whether the training compiles.
    """

    largest: int
    largest_eager: int
    accumulates: bool
    compiled: bool


def training_bytes(job: Job, sizes: MicroBatchSizes, probe: ProbeResult) -> int:
    """Peak memory of a training, without libraries and rows."""
    full, on_cpu = trains_all(job.config.adapter), job.device.type == "cpu"
    # Jobs that share a slice may differ in rank.
    adapter_parameters = probe.adapter_parameters * job.config.adapter.r / probe.r
    state = state_bytes(job, round(adapter_parameters))
    chunk = min(TRAINED_HEAD_CHUNK if full else CHUNK, sizes.largest)
    saved = probe.saved_fixed_bytes + max(
        probe.saved_bytes_per_token
        * sizes.largest_eager
        * (HEAP_FRAGMENTATION["full" if full else "eager"] if on_cpu else 1),
        probe.saved_bytes_per_token
        * sizes.largest
        * HEAP_FRAGMENTATION["compiled"]
        * sizes.compiled,
    )
    forward = saved + LOGITS_FACTOR * 4 * chunk * probe.vocab_size
    gradients = 4 * _count_parameters(job) if full else 0
    if full:
        forward += (
            4 * probe.vocab_size * probe.hidden_size
        )  # the head's gradient comes with the loss
    # Gradients of all weights exist during a second micro-batch, and at the update.
    peak = forward + gradients if sizes.accumulates else max(forward, gradients)
    return round(state + peak + RUNTIME_OVERHEAD * on_cpu)


def scoring_bytes(job: Job, probe: ProbeResult) -> int:
    """Peak memory of scoring the base or an adapter, without libraries and rows."""
    on_cpu = job.device.type == "cpu"
    test = sum(example.length for example in job.scored_rows)
    tokens = min(job.config.evaluation.micro_batch_tokens, test)
    # Layers are computed one after the other, and save nothing.
    layer_values = (
        probe.saved_bytes_per_token
        / probe.num_layers
        * tokens
        * (HEAP_FRAGMENTATION["eager"] if on_cpu else 1)
    )
    weights = state_bytes(job, 0, trained=False)
    return round(
        weights
        + layer_values
        + LOGITS_FACTOR * 4 * CHUNK * probe.vocab_size
        + RUNTIME_OVERHEAD * on_cpu
    )


def state_bytes(job: Job, adapter_parameters: int, trained: bool = True) -> int:
    """Bytes of weights, and of gradients and optimizer state if ``trained``."""
    dtype_bytes = torch.finfo(DTYPES[job.precision]).bits // 8
    parameters, config = _count_parameters(job), job.config
    if trains_all(config.adapter) and trained:
        # fp32 weights and two moments; in low precision a copy for the matrix products.
        return parameters * (12 + dtype_bytes % 4)
    model_bytes = parameters * dtype_bytes
    if config.model.quantization:
        # Embeddings are not quantised; other weights take half a byte, and scales.
        unquantized = sum(
            math.prod(shape)
            for name, shape in _shapes(job.source.path).items()
            if _is_embedding(name)
        )
        model_bytes = round(unquantized * dtype_bytes + (parameters - unquantized) * 0.55)
    # Weights, gradients and two moments.
    return model_bytes + 16 * adapter_parameters * trained


def _is_embedding(name: str) -> bool:
    return "embed" in name or "lm_head" in name


@functools.cache  # grids have thousands of cells
def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return tensor_shapes(folder)


def _count_parameters(job: Job) -> int:
    return sum(math.prod(shape) for shape in _shapes(job.source.path).values())
