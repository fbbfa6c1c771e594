"""What an experiment would do, about how long, and whether it would fit; trains nothing.

Times are those of a slice of the model (`experiment.slice`). Memory is added up: what is there,
what the layers keep, and what the allocator was seen to need on top.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slm_lora import machine
from slm_lora.data.batches import by_token_budget, epoch_order
from slm_lora.experiment.jobs import Job
from slm_lora.experiment.places import BASE, Places, finished
from slm_lora.experiment.slice import Measured, measure
from slm_lora.model import fusion
from slm_lora.model.base import DTYPES
from slm_lora.model.loss import CHUNK, FULL_CHUNK
from slm_lora.model.source import tensor_shapes
from slm_lora.records import Example
from slm_lora.runs import find_run
from slm_lora.training.loop import tokens_at_once, total_steps

COMPILE_SECONDS = {"training": 15, "scoring": 6}
"""Of what compiles something that was compiled before: tracing it again (two CPU cores)."""


@dataclass(frozen=True, slots=True)
class PlannedCell:
    """One run of the plan; seconds and bytes are estimates."""

    name: str
    finished: bool
    training_rows: int
    steps: int
    training_tokens: int
    test_tokens: int
    training_seconds: float
    scoring_seconds: float
    training_bytes: int
    scoring_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Most memory at any time."""
        return max(self.training_bytes, self.scoring_bytes)

    @property
    def seconds(self) -> float:
        """Of training and scoring."""
        return self.training_seconds + self.scoring_seconds


@dataclass(frozen=True, slots=True)
class Plan:
    """The base and every cell, in the order in which they would run.

    Attributes:
        cells: all of them.
        free_bytes: memory that they may take, of the GPU or of the machine.
    """

    cells: tuple[PlannedCell, ...]
    free_bytes: int

    def too_large(self) -> list[PlannedCell]:
        """Unfinished cells that will not fit."""
        return [c for c in self.cells if not c.finished and c.peak_bytes > self.free_bytes]

    def warning(self) -> str:
        """One line where a cell will not fit; else empty."""
        if not (cells := self.too_large()):
            return ""
        most = max(cells, key=lambda cell: cell.peak_bytes)
        return (
            f"{', '.join(cell.name for cell in cells)} will not fit: "
            f"{most.name} takes about {most.peak_bytes / 1e9:.1f} GB, and "
            f"{self.free_bytes / 1e9:.1f} GB are free; {_REMEDY}"
        )


def plan(jobs: Sequence[Job], places: Places) -> Plan:
    """Measure slices of the models, and tell from them what the base and every cell would take."""
    counted = [_count(job) for job in jobs]
    slices: dict[str, Measured] = {}
    for each in counted:
        if each.slice_key not in slices:
            slices[each.slice_key] = measure(each.job, each.compiled)
    machine.release_freed_memory()
    runtime = _runtime(jobs)
    bases: dict[str, PlannedCell] = {}
    cells = []
    for each in counted:
        measured = slices[each.slice_key]
        bases.setdefault(each.job.base_identity, _base(each, measured, runtime, places))
        cells.append(_cell(each, measured, runtime, places))
    return Plan((*bases.values(), *cells), machine.free_bytes(jobs[0].device.type))


def will_not_fit(jobs: Sequence[Job]) -> str:
    """One line, without any measuring, where cells cannot fit as their weights alone are more than
    there is; else empty."""
    free = machine.free_bytes(jobs[0].device.type)
    runtime = _runtime(jobs)
    least = {job.cell.name: runtime + _held(job, adapter_weights=0) for job in jobs}
    if not (names := [name for name, size in least.items() if size > free]):
        return ""
    most = max(names, key=least.__getitem__)
    return (
        f"{', '.join(names)} will not fit: weights and optimizer of {most} alone take "
        f"{least[most] / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; {_REMEDY}"
    )


def _runtime(jobs: Sequence[Job]) -> int:
    """Bytes that libraries and rows take; a GPU's memory holds none."""
    return 0 if jobs[0].device.type == "cuda" else machine.resident_bytes()


_REMEDY = (
    "a smaller training.micro_batch_tokens, training.activation_checkpointing=true or "
    "model.quantization=nf4 need less"
)


@dataclass(frozen=True, slots=True)
class _Counted:
    """A job, counted.

    Attributes:
        job: the cell.
        steps: optimizer steps.
        tokens: of the whole training.
        largest: tokens of the largest micro-batch.
        largest_plain: the same where the code is plain, as in the first step it always is.
        several: whether a step has more than one.
        compiled: whether its training compiles.
        slice_key: equal for jobs whose slices would measure the same.
    """

    job: Job
    steps: int
    tokens: int
    largest: int
    largest_plain: int
    several: bool
    compiled: bool
    slice_key: str


def _count(job: Job) -> _Counted:
    recipe, rows = job.cell.recipe, job.prepared.train
    section, batch = recipe.training, recipe.training.effective_batch_size
    steps = total_steps(len(rows), section)
    # An epoch's last step is partial, so steps × batch would count too much.
    examples = min(steps * batch, section.num_train_epochs * len(rows))
    tokens = round(examples * sum(row.length for row in rows) / len(rows))
    compiled = _compiles(job, tokens)
    plain = tokens_at_once(section, compiled, recipe.adapter.kind != "full", job.device.type)
    order = epoch_order(rows, recipe.seed, 0)
    drawn = [order[start : start + batch] for start in range(0, len(order), batch)]
    largest_plain = _largest(drawn, plain)
    # Below rank 64 the rank takes no time that could be measured.
    same = recipe.model_dump(mode="json", include=_SLICE_KEYS)
    same["adapter"]["r"] = max(64, recipe.adapter.r)
    return _Counted(
        job,
        steps,
        tokens,
        _largest(drawn, section.micro_batch_tokens) if compiled else largest_plain,
        largest_plain,
        any(sum(row.length for row in step) > plain for step in drawn),
        compiled,
        f"{same} {compiled}",
    )


def _largest(drawn: Sequence[Sequence[Example]], budget: int) -> int:
    """Tokens of the largest micro-batch of some steps."""
    divided = [micro for step in drawn for micro in by_token_budget(step, budget)]
    return max(sum(row.length for row in micro) for micro in divided)


_SLICE_KEYS: dict[str, Any] = {
    "model": True,
    "data": {"name", "template", "max_length"},
    "adapter": {"kind", "r", "target_modules", "lora_dropout"},
    "training": {
        "micro_batch_tokens",
        "effective_batch_size",
        "activation_checkpointing",
        "precision",
        "device",
    },
}


def _base(each: _Counted, measured: Measured, runtime: int, places: Places) -> PlannedCell:
    identity, test = each.job.base_identity, _test_tokens(each.job)
    return PlannedCell(
        name=BASE,
        finished=find_run(places.results, BASE, identity) is not None,
        training_rows=0,
        steps=0,
        training_tokens=0,
        test_tokens=test,
        training_seconds=0.0,
        scoring_seconds=_scoring_seconds(each, measured),
        training_bytes=0,
        scoring_bytes=_scoring_bytes(each.job, measured) + runtime,
    )


def _cell(each: _Counted, measured: Measured, runtime: int, places: Places) -> PlannedCell:
    job, test = each.job, _test_tokens(each.job)
    return PlannedCell(
        name=job.cell.name,
        finished=finished(job, places) is not None,
        training_rows=len(job.prepared.train),
        steps=each.steps,
        training_tokens=each.tokens,
        test_tokens=test,
        training_seconds=each.tokens * measured.training
        + COMPILE_SECONDS["training"] * each.compiled,
        scoring_seconds=_scoring_seconds(each, measured),
        training_bytes=_training_bytes(each, measured) + runtime,
        scoring_bytes=_scoring_bytes(job, measured) + runtime,
    )


def _scoring_seconds(each: _Counted, measured: Measured) -> float:
    compiled = _compiles(each.job, _test_tokens(each.job))
    return _test_tokens(each.job) * measured.scoring + COMPILE_SECONDS["scoring"] * compiled


def _compiles(job: Job, tokens: int) -> bool:
    setting = job.cell.recipe.training.compile
    return fusion.wanted(setting, tokens, job.device, job.precision != "fp32")


def _test_tokens(job: Job) -> int:
    return sum(example.length for example in job.prepared.test)


LOGITS = 4.6
"""What loss and gradient of a chunk of positions hold at once, as a multiple of its logits in fp32:
measured, 232 MB for 256 positions of 49,152 words."""

IN_PIECES = {"plain": 2.3, "compiled": 0.66, "full": 1.0}
"""What a CPU's heap holds at the peak, as a multiple of what plain layers keep: it is in pieces
where sizes vary and nothing is returned. Compiled layers keep two thirds, and large blocks are
returned. Fitted to peaks measured on two CPU cores; docs/performance.md has others."""

BESIDE = 250_000_000
"""Bytes of everything else on a CPU: buffers of libraries, a layer's intermediate values."""


def _training_bytes(each: _Counted, measured: Measured) -> int:
    job = each.job
    full, on_cpu = job.cell.recipe.adapter.kind == "full", job.device.type == "cpu"
    # The slice's rank may have been another one of its kind.
    adapter = measured.adapter * job.cell.recipe.adapter.r / measured.r
    held = _held(job, round(adapter))
    chunk = min(FULL_CHUNK if full else CHUNK, each.largest)
    kept = measured.kept_beside + max(
        measured.kept
        * each.largest_plain
        * (IN_PIECES["full" if full else "plain"] if on_cpu else 1),
        measured.kept * each.largest * IN_PIECES["compiled"] * each.compiled,
    )
    forward = kept + LOGITS * 4 * chunk * measured.words
    gradients = 4 * _weights(job) if full else 0
    if full:
        forward += 4 * measured.words * measured.width  # the head's gradient comes with the loss
    # Gradients of all weights are there while a second micro-batch is computed, and at the update.
    peak = forward + gradients if each.several else max(forward, gradients)
    return round(held + peak + BESIDE * on_cpu)


def _scoring_bytes(job: Job, measured: Measured) -> int:
    """Of the base or an adapter: a layer's intermediate values at a time."""
    on_cpu = job.device.type == "cpu"
    tokens = min(job.cell.recipe.evaluation.micro_batch_tokens, _test_tokens(job))
    of_layer = measured.kept / measured.layers * tokens * (IN_PIECES["plain"] if on_cpu else 1)
    weights = _held(job, 0, trained=False)
    return round(weights + of_layer + LOGITS * 4 * CHUNK * measured.words + BESIDE * on_cpu)


def _held(job: Job, adapter_weights: int, trained: bool = True) -> int:
    """Bytes of weights, and of the optimizer where there is one."""
    size = torch.finfo(DTYPES[job.precision]).bits // 8
    many, recipe = _weights(job), job.cell.recipe
    if recipe.adapter.kind == "full" and trained:
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
