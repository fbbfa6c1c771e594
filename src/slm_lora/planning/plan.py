"""Plan of an experiment: cells, estimated time and memory, without training.

Times are measured on a slice of the model (`planning.probe`), memory is computed
(`planning.memory`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slm_lora.adapters.methods import trains_all
from slm_lora.data.collate import epoch_order, make_micro_batches
from slm_lora.experiment.cell import scoring_compiles
from slm_lora.experiment.job import Job
from slm_lora.experiment.paths import BASE, ExperimentPaths
from slm_lora.experiment.resume import finished
from slm_lora.experiment.reuse import same_run
from slm_lora.ops import compilation
from slm_lora.planning.memory import MicroBatchSizes, scoring_bytes, state_bytes, training_bytes
from slm_lora.planning.probe import ProbeResult, measure
from slm_lora.records import Example
from slm_lora.runs.folder import find_run
from slm_lora.runtime import hardware
from slm_lora.training.schedule import (
    micro_batch_limits,
    total_steps,
    training_tokens,
    usable_examples,
)

COMPILE_SECONDS = {"training": 6, "scoring": 3}
"""Tracing of code that is in the compile cache (measured on two CPU cores)."""


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
        """Peak memory of training and scoring."""
        return max(self.training_bytes, self.scoring_bytes)

    @property
    def seconds(self) -> float:
        """Seconds of training and scoring."""
        return self.training_seconds + self.scoring_seconds


@dataclass(frozen=True, slots=True)
class Plan:
    """The bases and every cell, in order of execution.

    Attributes:
        cells: bases and cells.
        free_bytes: memory available to the run, of the GPU or of the machine.
    """

    cells: tuple[PlannedCell, ...]
    free_bytes: int

    def too_large(self) -> list[PlannedCell]:
        """Unfinished cells that need more memory than is free."""
        return [c for c in self.cells if not c.finished and c.peak_bytes > self.free_bytes]

    def warning(self) -> str:
        """One line if a cell will not fit, else empty."""
        if not (cells := self.too_large()):
            return ""
        largest = max(cells, key=lambda cell: cell.peak_bytes)
        return (
            f"{_join_names([cell.name for cell in cells])} will not fit: "
            f"{largest.name} takes about {largest.peak_bytes / 1e9:.1f} GB, and "
            f"{self.free_bytes / 1e9:.1f} GB are free; {_REMEDY}"
        )


class Estimator:
    """Estimates runs from measured slices of their models.

    Args:
        jobs: whose slices are measured at once; those of others are measured when they are needed.

    Raises:
        UsageError: as `measure`.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._probes: dict[str, ProbeResult] = {}
        for job in jobs:
            self._probe(_count_job(job))
        hardware.release_freed_memory()
        self._process_bytes = _process_bytes(jobs)

    def _probe(self, counts: _JobCounts) -> ProbeResult:
        if counts.slice_key not in self._probes:
            self._probes[counts.slice_key] = measure(counts.job, counts.sizes.compiled)
        return self._probes[counts.slice_key]

    def cell(self, job: Job, paths: ExperimentPaths) -> PlannedCell:
        """The run of a cell."""
        counts = _count_job(job)
        return _plan_cell(counts, self._probe(counts), self._process_bytes, paths)

    def base(self, job: Job, paths: ExperimentPaths) -> PlannedCell:
        """The run of a cell's base on the rows that the cell is scored on."""
        counts = _count_job(job)
        return _plan_base(counts, self._probe(counts), self._process_bytes, paths)


def plan(jobs: Sequence[Job], paths: ExperimentPaths) -> Plan:
    """Measure slices of the models, and estimate the bases and every cell from them.

    Raises:
        UsageError: as `measure`.
    """
    estimator = Estimator(jobs)
    bases: dict[str, Job] = {}
    for job in jobs:
        bases.setdefault(job.base_identity, job)
    return Plan(
        (
            *(estimator.base(job, paths) for job in bases.values()),
            *(estimator.cell(job, paths) for job in jobs),
        ),
        hardware.available_bytes(jobs[0].device.type),
    )


def weights_warning(jobs: Sequence[Job], paths: ExperimentPaths) -> str:
    """One line if weights and optimizer state of unfinished cells alone exceed the free memory,
    else empty; measures nothing."""
    free = hardware.available_bytes(jobs[0].device.type)
    process_bytes = _process_bytes(jobs)
    minimum_bytes = {
        job.name: process_bytes + state_bytes(job, adapter_parameters=0) for job in jobs
    }
    too_large = [job for job in jobs if minimum_bytes[job.name] > free]
    if not (names := [job.name for job in too_large if finished(job, paths) is None]):
        return ""
    largest = max(names, key=minimum_bytes.__getitem__)
    return (
        f"{_join_names(names)} will not fit: weights and optimizer of {largest} alone take "
        f"{minimum_bytes[largest] / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; {_REMEDY}"
    )


def _join_names(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _process_bytes(jobs: Sequence[Job]) -> int:
    """Bytes of libraries and rows in the process; they take no GPU memory."""
    return 0 if jobs[0].device.type == "cuda" else hardware.resident_bytes()


_REMEDY = (
    "a smaller training.micro_batch_tokens, training.activation_checkpointing=true or "
    "model.quantization=nf4 need less"
)


@dataclass(frozen=True, slots=True)
class _JobCounts:
    """Steps and tokens of a job.

    Attributes:
        job: the cell.
        steps: optimizer steps.
        tokens: tokens of the whole training.
        sizes: sizes of its micro-batches.
        slice_key: equal for jobs that can share a slice.
    """

    job: Job
    steps: int
    tokens: int
    sizes: MicroBatchSizes
    slice_key: str


def _count_job(job: Job) -> _JobCounts:
    config, rows = job.config, list(job.data.train)
    training, batch_size = config.training, config.training.effective_batch_size
    rows = usable_examples(rows, training) or list(rows)
    steps, tokens = total_steps(len(rows), training), training_tokens(rows, training)
    compiled = compilation.should_compile(
        training.compile, tokens, job.device, job.low_precision, job.sharded
    )
    frozen = not trains_all(config.adapter)
    eager_limit, compiled_limit = micro_batch_limits(
        training, compiled, frozen, job.device.type, job.low_precision
    )
    order = epoch_order(rows, config.seed, 0)
    step_examples = [
        order[start : start + batch_size] for start in range(0, len(order), batch_size)
    ]
    largest_eager = _largest_micro_batch(step_examples, eager_limit)
    # Ranks below 64 have no measurable effect on time.
    probe_settings = config.model_dump(mode="json", include=_SLICE_KEYS)
    probe_settings["adapter"]["r"] = max(64, config.adapter.r)
    return _JobCounts(
        job,
        steps,
        tokens,
        MicroBatchSizes(
            _largest_micro_batch(step_examples, compiled_limit) if compiled else largest_eager,
            largest_eager,
            any(sum(row.length for row in step) > eager_limit for step in step_examples),
            compiled,
        ),
        f"{probe_settings} {compiled}",
    )


def _largest_micro_batch(steps: Sequence[Sequence[Example]], max_tokens: int) -> int:
    """Tokens in the largest micro-batch of the steps."""
    micro_batches = [micro for step in steps for micro in make_micro_batches(step, max_tokens)]
    return max(sum(row.length for row in micro) for micro in micro_batches)


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


def _plan_base(
    counts: _JobCounts, probe: ProbeResult, process_bytes: int, paths: ExperimentPaths
) -> PlannedCell:
    identity, test_tokens = counts.job.base_identity, _test_tokens(counts.job)
    return PlannedCell(
        name=BASE,
        finished=find_run(paths.results, BASE, identity) is not None,
        training_rows=0,
        steps=0,
        training_tokens=0,
        test_tokens=test_tokens,
        training_seconds=0.0,
        scoring_seconds=_scoring_seconds(counts, probe),
        training_bytes=0,
        scoring_bytes=scoring_bytes(counts.job, probe) + process_bytes,
    )


def _plan_cell(
    counts: _JobCounts, probe: ProbeResult, process_bytes: int, paths: ExperimentPaths
) -> PlannedCell:
    job, test_tokens = counts.job, _test_tokens(counts.job)
    return PlannedCell(
        name=job.name,
        finished=finished(job, paths) is not None or same_run(job, paths) is not None,
        training_rows=len(job.data.train),
        steps=counts.steps,
        training_tokens=counts.tokens,
        test_tokens=test_tokens,
        training_seconds=counts.tokens * probe.training_s_per_token
        + COMPILE_SECONDS["training"] * counts.sizes.compiled,
        scoring_seconds=_scoring_seconds(counts, probe),
        training_bytes=training_bytes(job, counts.sizes, probe) + process_bytes,
        scoring_bytes=scoring_bytes(job, probe) + process_bytes,
    )


def _scoring_seconds(counts: _JobCounts, probe: ProbeResult) -> float:
    compiled = scoring_compiles(counts.job, counts.job.scored_rows)
    return (
        _test_tokens(counts.job) * probe.scoring_s_per_token + COMPILE_SECONDS["scoring"] * compiled
    )


def _test_tokens(job: Job) -> int:
    return sum(example.length for example in job.scored_rows)
