"""The tuning phase: each setting's own values of the tuned keys, chosen on the validation set.

Tuning runs are ordinary trainings with seeds and rows of their own, scored on the validation set
alone. What is tried next is decided by `stats.tuning` from finished runs, so the same command goes
on after an interruption. The choice is sealed in tuning.json before a final run begins.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slm_lora.config.axes import TuningSection
from slm_lora.config.grid import (
    Cell,
    arm_key,
    arm_name,
    arms_of,
    name_without,
    tuned_cell,
    tuning_cell,
)
from slm_lora.config.schema import Recipe
from slm_lora.data.collate import steps_per_epoch
from slm_lora.errors import UsageError
from slm_lora.experiment.choice import (
    check_runs,
    check_validation,
    find_choice,
    note_machine,
    seal_choice,
)
from slm_lora.experiment.job import Job
from slm_lora.experiment.paths import BASE, ExperimentPaths
from slm_lora.experiment.resolve_jobs import JobResolver
from slm_lora.runs.folder import Run, find_run, named
from slm_lora.runs.scored_run import ScoredRun, read_scored_run
from slm_lora.runs.tuning import (
    TUNING_FILE,
    ArmRecord,
    StoppedRun,
    TuningRecord,
    read_stopped,
    tuning_folder,
)
from slm_lora.runtime import distributed
from slm_lora.runtime.checksums import content_hash
from slm_lora.runtime.progress import Reporter
from slm_lora.stats.choice import Candidate, arm_record
from slm_lora.stats.racing import Race, rungs
from slm_lora.stats.tuning import Point, Progress, progress
from slm_lora.training.schedule import total_steps, training_tokens, usable_examples

RunTuningJobs = Callable[[Sequence[Job], ExperimentPaths], None]
"""Computes tuning jobs that are not finished, and the base's validation scores."""


@dataclass(frozen=True)
class _Outcome:
    """A point's runs, one per tuning seed, and those that were stopped."""

    runs: tuple[Run, ...]
    stopped: tuple[StoppedRun, ...]

    @property
    def loss(self) -> float:
        """Mean over seeds; infinite where a run was stopped."""
        if self.stopped or not self.runs:
            return math.inf
        losses = [_headline(run) for run in self.runs]
        return math.fsum(losses) / len(losses)


def _headline(run: Run) -> float:
    evaluation = run.record.evaluation
    loss = evaluation.loss(evaluation.headline)
    assert loss is not None
    return loss.loss


class TuningPhase:
    """The searches of an experiment.

    Args:
        recipe: with a tuning section.
        cells: of its grid.
        resolver: makes jobs.
        paths: of the experiment.
    """

    def __init__(
        self, recipe: Recipe, cells: Sequence[Cell], resolver: JobResolver, paths: ExperimentPaths
    ) -> None:
        assert recipe.tuning is not None
        self.section: TuningSection = recipe.tuning
        self.paths = replace(paths, results=tuning_folder(paths.results))
        self.experiment, self._resolver = paths, resolver
        self._cells = cells
        # Adapters of tuning runs are scored and removed.
        self.arms = [
            replace(arm, options=replace(arm.options, keep_adapters=False))
            for arm in arms_of(cells)
        ]
        self.sections = [resolver.tuning_section(self.section, arm.config) for arm in self.arms]
        self._jobs: dict[tuple[int, Point], list[Job]] = {}
        self._places: dict[str, tuple[int, Point]] = {}

    def jobs_of(self, arm: int, point: Point) -> list[Job]:
        """The runs of a point, one per tuning seed."""
        key = (arm, point)
        if key not in self._jobs:
            values = self._values(point)
            cells = [tuning_cell(self.arms[arm], values, seed) for seed in self.section.seeds]
            self._jobs[key] = self._resolver.jobs(cells, "validation")
            self._places |= {job.identity: key for job in self._jobs[key]}
        return self._jobs[key]

    def job_at(self, cell: str, values: Mapping[str, float]) -> Job:
        """One tuning run.

        Args:
            cell: of a setting with a tuning seed, without tuned values: ``r16-1500-seed1000``.
            values: of every tuned key.

        Raises:
            UsageError: there is no such cell, or a value is missing or not allowed.
        """
        if set(values) != set(self.section.key):
            raise UsageError(f"--at: give a value of each of {', '.join(self.section.key)}")
        point = tuple(values[key] for key in self.section.key)
        places = {}
        for arm, seed in itertools.product(range(len(self.arms)), self.section.seeds):
            if not self.is_valid(arm, point):
                given = " ".join(f"{key}={value:g}" for key, value in values.items())
                raise UsageError(f"--at {given}: beyond the limits of the key")
            tuned = tuning_cell(self.arms[arm], values, seed)
            places[name_without(tuned.config, tuned.settings, self.section.key)] = arm, seed
        if cell not in places:
            raise UsageError(f"--cell {cell}: no tuning cell; they are {named(list(places))}")
        arm, seed = places[cell]
        return next(job for job in self.jobs_of(arm, point) if job.config.seed == seed)

    def _values(self, point: Point) -> dict[str, float]:
        return dict(zip(self.section.key, point, strict=True))

    def is_valid(self, arm: int, point: Point) -> bool:
        """Whether the recipe allows a point."""
        try:
            tuning_cell(self.arms[arm], self._values(point), self.section.seeds[0])
        except ValueError:  # beyond a limit of the key
            return False
        return True

    def progress(self, arm: int) -> Progress:
        """Where one search stands, from the runs on disk."""
        return self.known(arm)[0]

    def known(self, arm: int) -> tuple[Progress, dict[Point, float]]:
        """Where one search stands, and the losses that led there."""
        outcomes: dict[Point, float] = {}
        while True:
            state = progress(self.sections[arm], outcomes, lambda p: self.is_valid(arm, p))
            found = {
                point: outcome.loss
                for point in state.missing
                if (outcome := self._outcome(arm, point)) is not None
            }
            if not found:
                return state, outcomes
            outcomes |= found

    def _outcome(self, arm: int, point: Point) -> _Outcome | None:
        """None where a run is missing."""
        runs, stopped = [], []
        for job in self.jobs_of(arm, point):
            if (run := find_run(self.paths.results, job.name, job.identity)) is not None:
                runs.append(run)
            elif (record := read_stopped(self.paths.results, job.name, job.identity)) is not None:
                stopped.append(record)
            else:
                return None
        return _Outcome(tuple(runs), tuple(stopped))

    def next_jobs(self) -> list[Job]:
        """The runs that all searches need next; none at their end. In the first of several
        processes: files may be seen late by others."""
        points = distributed.run_on_main(
            lambda: [
                [arm, list(point)]
                for arm in range(len(self.arms))
                for point in self.progress(arm).missing
            ]
        )
        return [job for arm, point in points for job in self.jobs_of(arm, tuple(point))]

    def race_of(self, job: Job) -> Race | None:
        """What a tuning job is compared with while it trains; None where nothing is stopped.

        Rivals are the runs before it in the search, of the same setting, seed and other values.
        """
        arm, point = self._places[job.identity]
        forced = point[0] == self.section.common_value
        base = self._base()
        if not self.section.race or forced or base is None:
            return None
        rivals = {}
        for other in itertools.takewhile(lambda tried: tried != point, self.progress(arm).tried):
            if other[1:] != point[1:]:
                continue
            rival = next(
                rival for rival in self.jobs_of(arm, other) if rival.config.seed == job.config.seed
            )
            if (run := find_run(self.paths.results, rival.name, rival.identity)) is not None:
                rivals[other[0]] = run.steps()
            elif stopped := read_stopped(self.paths.results, rival.name, rival.identity):
                rivals[other[0]] = [dict(step) for step in stopped.steps]
        training = job.config.training
        rows = usable_examples(job.data.train, training)
        in_epoch = steps_per_epoch(len(rows), training.effective_batch_size)
        return Race(
            point[0],
            rivals,
            rungs(in_epoch, total_steps(len(rows), training)),
            _headline(base),
            training.num_train_epochs,
        )

    def run(self, compute: RunTuningJobs, reporter: Reporter) -> TuningRecord:
        """Run all searches to their end, and seal the choice.

        Args:
            compute: runs jobs; stops candidates in a race.
            reporter: for progress.

        Raises:
            UsageError: every run of a setting was stopped or diverged.
            IntegrityError: a run or tuning.json is broken.
        """
        check_validation(self.first_job().data, reporter)
        if (sealed := self.sealed(reporter)) is not None:
            distributed.run_on_main(lambda: check_runs(sealed, self.experiment))
            reporter.info(f"  tuning  finished earlier ({self.experiment.results / TUNING_FILE})")
            return sealed
        while jobs := self.next_jobs():
            compute(jobs, self.paths)
        if distributed.run_on_main(lambda: self._base() is None):
            compute(self.jobs_of(0, self.progress(0).tried[0]), self.paths)

        def choose() -> Any:
            record = self._choose(self._identity())
            seal_choice(self.experiment, record, reporter)
            return record.model_dump(mode="json")

        return TuningRecord.model_validate(distributed.run_on_main(choose))

    def sealed(self, reporter: Reporter) -> TuningRecord | None:
        """The choice, if it was made, as the first of several processes reads it.

        Raises:
            UsageError: it was made on another device, or in another precision.
            IntegrityError: tuning.json is broken.
        """

        def read() -> Any:
            record = self.read_sealed(reporter)
            return record.model_dump(mode="json") if record else None

        document = distributed.run_on_main(read)
        return TuningRecord.model_validate(document) if document else None

    def read_sealed(self, reporter: Reporter) -> TuningRecord | None:
        """As `sealed`, in one process; a note where this machine is another than the choice's."""
        search, job = self._identity(), self.first_job()
        section = self.section.model_dump(mode="json")
        restores = self._resolver.computed != "nowhere"
        record = find_choice(self.experiment, search, section, job, reporter, restores)
        if record is not None and self._resolver.computed == "here":
            note_machine(record, job.device.type, reporter)
        return record

    def chosen_cells(self, recipe: Path, reporter: Reporter) -> list[Cell]:
        """`final_cells` of the sealed choice, for runs of single cells.

        Raises:
            UsageError: no choice was made; names the command that makes it.
        """
        if (record := self.sealed(reporter)) is None:
            raise UsageError(
                f"{self.experiment.results / TUNING_FILE}: missing, or of another recipe; its "
                f"{', '.join(self.section.key)} is chosen first: run slm-lora experiment {recipe}"
            )
        return self.final_cells(record)

    def _identity(self) -> str:
        """Of the search: what its outcome depends on, but for the machine."""
        arms = [self.jobs_of(arm, point) for arm, point in self._first_points()]
        return content_hash(
            {
                "section": self.section.model_dump(mode="json"),
                "runs": [[job.identity for job in jobs] for jobs in arms],
            }
        )

    def first_job(self) -> Job:
        """Any tuning run; the base on the validation set is the same for all of one model."""
        return self.jobs_of(*self._first_points()[0])[0]

    def _base(self) -> Run | None:
        """The base model's run on the validation set."""
        return find_run(self.paths.results, BASE, self.first_job().base_identity)

    def _first_points(self) -> list[tuple[int, Point]]:
        return [
            (arm, tuple(values[0] for values in section.first_values))
            for arm, section in enumerate(self.sections)
        ]

    def _choose(self, search: str) -> TuningRecord:
        arms = [self._arm(index) for index in range(len(self.arms))]
        job, base = self.first_job(), self._base()
        assert base is not None
        scored = read_scored_run(base)
        return TuningRecord(
            format=1,
            experiment=self.paths.experiment,
            search=search,
            section=self.section.model_dump(mode="json"),
            metric=scored.headline,
            validation_rows=len(scored.scores),
            validation_groups=len({score.group_id for score in scored.scores}),
            base_loss=_headline(base),
            machine={**base.raw["machine"], "precision": job.precision},
            arms=tuple(arms),
        )

    def _arm(self, index: int) -> ArmRecord:
        state = self.progress(index)
        arm = self.arms[index]
        name = arm_name(arm)
        if state.lowest is None:
            reasons = {
                stopped.reason
                for point in state.tried
                if (outcome := self._outcome(index, point)) is not None
                for stopped in outcome.stopped
            }
            raise UsageError(
                f"tuning: no value of {', '.join(self.section.key)} trains {name}: "
                f"{'; '.join(sorted(reasons)[:2])}; try smaller values (tuning.values)"
            )
        candidates = []
        for point in state.tried:
            outcome = self._outcome(index, point)
            assert outcome is not None
            candidates.append(self._candidate(index, point, outcome))
        return arm_record(
            name,
            {key: value for key, value in arm.settings.items() if key not in ("seed", "data_seed")},
            candidates,
            self._values(state.lowest),
            {self.section.key[key]: end for key, end in state.edges.items()},
        )

    def _candidate(self, arm: int, point: Point, outcome: _Outcome) -> Candidate:
        runs: tuple[ScoredRun, ...] = ()
        if not outcome.stopped:
            runs = tuple(read_scored_run(run) for run in outcome.runs)
        to_end = 0
        for job in self.jobs_of(arm, point):
            usable = usable_examples(job.data.train, job.config.training)
            to_end += training_tokens(usable, job.config.training)
        tokens = sum(run.record.trained.tokens for run in outcome.runs)
        tokens += sum(stopped.tokens for stopped in outcome.stopped)
        reasons = dict.fromkeys(stopped.reason for stopped in outcome.stopped)
        return Candidate(self._values(point), runs, "; ".join(reasons), tokens, to_end)

    def final_cells(self, record: TuningRecord) -> list[Cell]:
        """The cells of the grid at the values chosen for their settings."""
        chosen = {
            arm_key(arm): arm_record.chosen
            for arm, arm_record in zip(self.arms, record.arms, strict=True)
        }
        return [tuned_cell(cell, chosen[arm_key(cell)]) for cell in self._cells]
