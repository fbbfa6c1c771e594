"""What an experiment would do, about how long, and whether it would fit; trains nothing.

Times are those of a slice of the model (`planning.probe`); memory is added up
(`planning.memory`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slm_lora.adapters.methods import trains_all
from slm_lora.data.collate import by_token_budget, epoch_order
from slm_lora.experiment.cell import scoring_compiles
from slm_lora.experiment.job import Job
from slm_lora.experiment.paths import BASE, ExperimentPaths
from slm_lora.experiment.resume import finished
from slm_lora.ops import compilation
from slm_lora.planning.memory import Sizes, held_bytes, scoring_bytes, training_bytes
from slm_lora.planning.probe import Measured, measure
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
            f"{_listed([cell.name for cell in cells])} will not fit: "
            f"{most.name} takes about {most.peak_bytes / 1e9:.1f} GB, and "
            f"{self.free_bytes / 1e9:.1f} GB are free; {_REMEDY}"
        )


def plan(jobs: Sequence[Job], paths: ExperimentPaths) -> Plan:
    """Measure slices of the models, and tell from them what the base and every cell would take."""
    counted = [_count(job) for job in jobs]
    slices: dict[str, Measured] = {}
    for each in counted:
        if each.slice_key not in slices:
            slices[each.slice_key] = measure(each.job, each.sizes.compiled)
    hardware.release_freed_memory()
    runtime = _runtime(jobs)
    bases: dict[str, PlannedCell] = {}
    cells = []
    for each in counted:
        measured = slices[each.slice_key]
        bases.setdefault(each.job.base_identity, _base(each, measured, runtime, paths))
        cells.append(_cell(each, measured, runtime, paths))
    return Plan((*bases.values(), *cells), hardware.available_bytes(jobs[0].device.type))


def will_not_fit(jobs: Sequence[Job], paths: ExperimentPaths) -> str:
    """One line, without any measuring, where unfinished cells cannot fit as their weights alone are
    more than there is; else empty."""
    free = hardware.available_bytes(jobs[0].device.type)
    runtime = _runtime(jobs)
    least = {job.name: runtime + held_bytes(job, adapter_weights=0) for job in jobs}
    large = [job for job in jobs if least[job.name] > free]
    if not (names := [job.name for job in large if finished(job, paths) is None]):
        return ""
    most = max(names, key=least.__getitem__)
    return (
        f"{_listed(names)} will not fit: weights and optimizer of {most} alone take "
        f"{least[most] / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; {_REMEDY}"
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _runtime(jobs: Sequence[Job]) -> int:
    """Bytes that libraries and rows take; a GPU's memory holds none."""
    return 0 if jobs[0].device.type == "cuda" else hardware.resident_bytes()


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
        sizes: of its micro-batches.
        slice_key: equal for jobs whose slices would measure the same.
    """

    job: Job
    steps: int
    tokens: int
    sizes: Sizes
    slice_key: str


def _count(job: Job) -> _Counted:
    recipe, rows = job.config, list(job.data.train)
    section, batch = recipe.training, recipe.training.effective_batch_size
    rows = usable_examples(rows, section) or list(rows)
    steps, tokens = total_steps(len(rows), section), training_tokens(rows, section)
    compiled = compilation.wanted(
        section.compile, tokens, job.device, job.low_precision, job.sharded
    )
    frozen = not trains_all(recipe.adapter)
    plain, fused = micro_batch_limits(section, compiled, frozen, job.device.type, job.low_precision)
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
        Sizes(
            _largest(drawn, fused) if compiled else largest_plain,
            largest_plain,
            any(sum(row.length for row in step) > plain for step in drawn),
            compiled,
        ),
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


def _base(each: _Counted, measured: Measured, runtime: int, paths: ExperimentPaths) -> PlannedCell:
    identity, test = each.job.base_identity, _test_tokens(each.job)
    return PlannedCell(
        name=BASE,
        finished=find_run(paths.results, BASE, identity) is not None,
        training_rows=0,
        steps=0,
        training_tokens=0,
        test_tokens=test,
        training_seconds=0.0,
        scoring_seconds=_scoring_seconds(each, measured),
        training_bytes=0,
        scoring_bytes=scoring_bytes(each.job, measured) + runtime,
    )


def _cell(each: _Counted, measured: Measured, runtime: int, paths: ExperimentPaths) -> PlannedCell:
    job, test = each.job, _test_tokens(each.job)
    return PlannedCell(
        name=job.name,
        finished=finished(job, paths) is not None,
        training_rows=len(job.data.train),
        steps=each.steps,
        training_tokens=each.tokens,
        test_tokens=test,
        training_seconds=each.tokens * measured.training
        + COMPILE_SECONDS["training"] * each.sizes.compiled,
        scoring_seconds=_scoring_seconds(each, measured),
        training_bytes=training_bytes(job, each.sizes, measured) + runtime,
        scoring_bytes=scoring_bytes(job, measured) + runtime,
    )


def _scoring_seconds(each: _Counted, measured: Measured) -> float:
    compiled = scoring_compiles(each.job, each.job.data.test)
    return _test_tokens(each.job) * measured.scoring + COMPILE_SECONDS["scoring"] * compiled


def _test_tokens(job: Job) -> int:
    return sum(example.length for example in job.data.test)
