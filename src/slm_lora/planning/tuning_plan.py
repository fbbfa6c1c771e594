"""Plan of an experiment with tuning: the searches, and final runs at values not chosen yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from slm_lora.config.grid import Cell, arm_name, tuned_cell
from slm_lora.experiment.candidates import is_done
from slm_lora.experiment.choice import check_validation
from slm_lora.experiment.job import Job
from slm_lora.experiment.resolve_jobs import JobResolver
from slm_lora.experiment.tuning import TuningPhase
from slm_lora.planning.plan import Estimator, Plan, PlannedCell, plan
from slm_lora.runtime import hardware
from slm_lora.runtime.progress import Reporter
from slm_lora.stats.search_cost import cost_range
from slm_lora.stats.tuning import Point, first_points

_FREE_KEYS = frozenset(
    (
        "training.learning_rate",
        "training.weight_decay",
        "adapter.lora_alpha",
        "adapter.lora_dropout",
    )
)
"""Tuned keys whose value does not change the cost of a run."""


@dataclass(frozen=True, slots=True)
class Range:
    """Least and most of a number."""

    least: float
    most: float

    def __add__(self, other: Range) -> Range:
        return Range(self.least + other.least, self.most + other.most)


@dataclass(frozen=True, slots=True)
class PlannedSearch:
    """The search of one setting.

    Attributes:
        name: of the setting.
        values: points that are tried for certain.
        finished: runs that are finished or were stopped.
        runs: left to run, without races.
        seconds: of these.
        run: one tuning run, at the dearest of the first values.
    """

    name: str
    values: tuple[Point, ...]
    finished: int
    runs: Range
    seconds: Range
    run: PlannedCell


@dataclass(frozen=True, slots=True)
class TunedPlan:
    """Both phases.

    Attributes:
        base: on the validation set.
        searches: one per setting; empty where the choice was made.
        final: bases and cells on the test set; each at the dearest of its first values until the
            choice is made.
        final_seconds: of those that are not finished.
    """

    base: PlannedCell | None
    searches: tuple[PlannedSearch, ...]
    final: Plan
    final_seconds: Range

    @property
    def seconds(self) -> Range:
        """Of both phases."""
        total = self.final_seconds
        for search in self.searches:
            total += search.seconds
        base = self.base.seconds if self.base and not self.base.finished else 0.0
        return total + Range(base, base)

    def memory(self) -> Plan:
        """All runs of both phases, for warnings about memory."""
        runs = [search.run for search in self.searches]
        return replace(self.final, cells=(*runs, *self.final.cells))


def plan_tuned(
    phase: TuningPhase,
    cells: Sequence[Cell],
    resolver: JobResolver,
    reporter: Reporter,
) -> TunedPlan:
    """Estimate both phases; nothing is trained.

    Args:
        phase: the searches.
        cells: of the grid.
        resolver: makes jobs.
        reporter: for notes on the validation set.

    Raises:
        DataError: the validation set is too small to choose by.
        IntegrityError, UsageError: tuning.json is broken, or of another machine.
    """
    paths = phase.experiment
    check_validation(phase.first_job().data, reporter)
    record = phase.read_sealed(reporter)
    if record is not None:
        final = plan(resolver.jobs(phase.final_cells(record)), paths)
        left = sum(cell.seconds for cell in final.cells if not cell.finished)
        return TunedPlan(None, (), final, Range(left, left))
    estimator = Estimator(resolver.jobs(cells))
    searches = tuple(_search(arm, phase, estimator) for arm in range(len(phase.arms)))
    base = estimator.base(phase.first_job(), phase.paths)
    bases, dearest, seconds = {}, [], Range(0.0, 0.0)
    for cell in cells:
        points = first_points(resolver.tuning_section(phase.section, cell.config))
        jobs = resolver.jobs(
            [tuned_cell(cell, dict(zip(phase.section.key, point, strict=True))) for point in points]
        )
        # Which run it will be is open: one at a first value may have been made for another end.
        runs = [replace(estimator.cell(job, paths), finished=False) for job in jobs]
        costs = [run.seconds for run in runs]
        seconds += Range(min(costs), max(costs))
        dearest.append(max(runs, key=lambda run: run.seconds))
        if jobs[0].base_identity not in bases:
            bases[jobs[0].base_identity] = estimator.base(jobs[0], paths)
    left = sum(base.seconds for base in bases.values() if not base.finished)
    final = Plan(
        (*bases.values(), *dearest), hardware.available_bytes(phase.first_job().device.type)
    )
    return TunedPlan(base, searches, final, seconds + Range(left, left))


def _search(arm: int, phase: TuningPhase, estimator: Estimator) -> PlannedSearch:
    _, outcomes = phase.known(arm)
    estimates: dict[tuple[float, ...], PlannedCell] = {}
    unfinished: dict[Point, list[Job]] = {}

    def left(point: Point) -> list[Job]:
        if point not in unfinished:
            jobs = phase.jobs_of(arm, point)
            unfinished[point] = [job for job in jobs if not is_done(job, phase.paths)]
        return unfinished[point]

    def estimate(point: Point) -> PlannedCell:
        keys = zip(phase.section.key, point, strict=True)
        kind = tuple(value for key, value in keys if key not in _FREE_KEYS)
        if kind not in estimates:
            estimates[kind] = estimator.cell(phase.jobs_of(arm, point)[0], phase.paths)
        return estimates[kind]

    def range_of(cost: Callable[[Point], float]) -> Range:
        least, most = cost_range(
            phase.sections[arm],
            outcomes,
            lambda point: len(left(point)) * cost(point),
            lambda point: phase.is_valid(arm, point),
        )
        return Range(least, most)

    points = first_points(phase.sections[arm])
    certain = tuple(point for point in points if phase.is_valid(arm, point))
    known = dict.fromkeys((*certain, *outcomes))
    return PlannedSearch(
        arm_name(phase.arms[arm]),
        certain,
        sum(len(phase.section.seeds) - len(left(point)) for point in known),
        range_of(lambda point: 1.0),
        range_of(lambda point: estimate(point).seconds),
        max((estimate(point) for point in certain), key=lambda run: run.seconds),
    )
