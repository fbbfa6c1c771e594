"""How much memory training and scoring take at the most, added up.

What is there, what the layers keep (measured on a slice of the model), and constants for what the
allocator was seen to need on top.
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
from slm_lora.planning.probe import Measured

LOGITS = 3.0
"""What loss and gradient of a chunk of positions hold at once, as a multiple of its logits in fp32:
measured, 153 MB for 256 positions of 49,152 words where they are compiled, 115 MB where not."""

HEAP_FRAGMENTATION = {"plain": 2.3, "compiled": 0.66, "full": 1.0}
"""What a CPU's heap holds at the peak, as a multiple of what plain layers keep: it is in pieces
where sizes vary and nothing is returned. Compiled layers keep two thirds, and large blocks are
returned. Fitted to peaks measured on two CPU cores; docs/performance.md has others."""

RUNTIME_OVERHEAD = 250_000_000
"""Bytes of everything else on a CPU: buffers of libraries, a layer's intermediate values."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What decides how much a training holds at once.

    Attributes:
        largest: tokens of the largest micro-batch.
        largest_plain: the same where the code is plain, as in the first step it always is.
        several: whether a step has more than one micro-batch.
        compiled: whether the training compiles.
    """

    largest: int
    largest_plain: int
    several: bool
    compiled: bool


def training_bytes(job: Job, sizes: Sizes, measured: Measured) -> int:
    """Peak of a training, without libraries and rows."""
    full, on_cpu = trains_all(job.config.adapter), job.device.type == "cpu"
    # The slice's rank may have been another one of its kind.
    adapter = measured.adapter * job.config.adapter.r / measured.r
    held = held_bytes(job, round(adapter))
    chunk = min(TRAINED_HEAD_CHUNK if full else CHUNK, sizes.largest)
    kept = measured.kept_beside + max(
        measured.kept
        * sizes.largest_plain
        * (HEAP_FRAGMENTATION["full" if full else "plain"] if on_cpu else 1),
        measured.kept * sizes.largest * HEAP_FRAGMENTATION["compiled"] * sizes.compiled,
    )
    forward = kept + LOGITS * 4 * chunk * measured.words
    gradients = 4 * _weights(job) if full else 0
    if full:
        forward += 4 * measured.words * measured.width  # the head's gradient comes with the loss
    # Gradients of all weights are there while a second micro-batch is computed, and at the update.
    peak = forward + gradients if sizes.several else max(forward, gradients)
    return round(held + peak + RUNTIME_OVERHEAD * on_cpu)


def scoring_bytes(job: Job, measured: Measured) -> int:
    """Peak of scoring the base or an adapter, without libraries and rows."""
    on_cpu = job.device.type == "cpu"
    test = sum(example.length for example in job.data.test)
    tokens = min(job.config.evaluation.micro_batch_tokens, test)
    of_layer = (
        measured.kept / measured.layers * tokens * (HEAP_FRAGMENTATION["plain"] if on_cpu else 1)
    )
    # A layer's intermediate values at a time.
    weights = held_bytes(job, 0, trained=False)
    return round(
        weights + of_layer + LOGITS * 4 * CHUNK * measured.words + RUNTIME_OVERHEAD * on_cpu
    )


def held_bytes(job: Job, adapter_weights: int, trained: bool = True) -> int:
    """Bytes of weights, and of the optimizer where there is one."""
    size = torch.finfo(DTYPES[job.precision]).bits // 8
    many, recipe = _weights(job), job.config
    if trains_all(recipe.adapter) and trained:
        # In fp32, with two moments; in half precision a copy for the products.
        return many * (12 + size % 4)
    held = many * size
    if recipe.model.quantization:
        # Embeddings stay as they are; of the other matrices half a byte a weight, and scales.
        ends = sum(
            math.prod(shape) for name, shape in _shapes(job.source.path).items() if _is_end(name)
        )
        held = round(ends * size + (many - ends) * 0.55)
    # Weights, gradients and two moments.
    return held + 16 * adapter_weights * trained


def _is_end(name: str) -> bool:
    return "embed" in name or "lm_head" in name


@functools.cache  # grids have thousands of cells
def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return tensor_shapes(folder)


def _weights(job: Job) -> int:
    return sum(math.prod(shape) for shape in _shapes(job.source.path).values())
