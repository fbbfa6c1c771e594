"""The sealed choice of tuned values: rows that it needs, the search that it is of, earlier ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from slm_lora.config.schema import Recipe
from slm_lora.data.dataset import PreparedData
from slm_lora.errors import DataError, IntegrityError, UsageError
from slm_lora.experiment.job import Job
from slm_lora.experiment.paths import ExperimentPaths
from slm_lora.runs.folder import named
from slm_lora.runs.tuning import (
    TUNING_FILE,
    TuningRecord,
    kept_file,
    read_tuning,
    tuning_folder,
    write_tuning,
)
from slm_lora.runtime import hardware
from slm_lora.runtime.progress import Reporter
from slm_lora.stats.inference import LEAST_GROUPS
from slm_lora.stats.power import detectable, groups_to_detect

TYPICAL_SPREAD = 0.05
"""Nats per token: standard deviation, between rows, of the difference of two learning rates near
the best one: 0.03 between neighbours of a refined search, 0.08 between 0.003 and 0.01 at r=4
(results/learning-rates)."""
USEFUL_SIZE = 0.01
"""Nats per token: differences of this size should be seen by a choice."""


def check_validation(data: PreparedData, reporter: Reporter) -> None:
    """Whether the validation set is large enough to choose by; a note where it is small.

    Raises:
        DataError: fewer than `LEAST_GROUPS` groups.
    """
    rows, groups = len(data.validation), len({row.group_id for row in data.validation})
    wanted = groups_to_detect(USEFUL_SIZE, TYPICAL_SPREAD)
    rows_wanted = math.ceil(wanted * rows / max(1, groups))
    if groups < LEAST_GROUPS:
        raise DataError(
            f"tuning: {rows} validation rows in {groups} groups are too few to choose by; at least "
            f"{LEAST_GROUPS} groups are needed, {rows_wanted or wanted} rows tell values apart by "
            f"{USEFUL_SIZE:g} nats per token (data.validation_rows)"
        )
    if groups < wanted:
        reporter.info(
            f"  note: {rows} validation rows in {groups} groups tell values apart that differ by "
            f"about {detectable(groups, TYPICAL_SPREAD):.2f} nats per token; {USEFUL_SIZE:g} takes "
            f"about {rows_wanted} rows (data.validation_rows)"
        )


def note_replaced(recipe: Recipe, reporter: Reporter) -> None:
    """A note for each value of the recipe that tuning replaces."""
    for key in recipe.tuning.key if recipe.tuning else ():
        name, _, field = key.partition(".")
        section = getattr(recipe, name)
        if field in section.model_fields_set and getattr(section, field) != "auto":
            reporter.info(
                f"  note: {key} = {getattr(section, field)} is replaced: tuning chooses it"
            )


def find_choice(
    paths: ExperimentPaths,
    search: str,
    section: Mapping[str, Any],
    job: Job,
    reporter: Reporter,
    restores: bool = True,
) -> TuningRecord | None:
    """The sealed choice of this very search, if it was made.

    Args:
        paths: of the experiment.
        search: identity of the search.
        section: the recipe's ``tuning``.
        job: any tuning run: its device and precision are those of the search.
        reporter: for a note where another search's choice is replaced.
        restores: put a choice that a later one replaced back as tuning.json; a plan changes no
            file.

    Raises:
        UsageError: the choice was made on another device, or in another precision.
        IntegrityError: tuning.json is broken.
    """
    record = read_tuning(paths.results)
    if record is not None and record.search != search:
        _check_device(record, section, job, paths)
        record = None
    if record is None:
        kept = read_tuning(paths.results, kept_file(search))
        if kept is not None and kept.search == search:
            if restores:
                _keep_earlier(paths, kept, reporter)
                (paths.results / kept_file(search)).replace(paths.results / TUNING_FILE)
            record = kept
    return record


def _check_device(
    record: TuningRecord, section: Mapping[str, Any], job: Job, paths: ExperimentPaths
) -> None:
    """Refuse a second search for the same recipe only because the machine is another kind."""
    device, precision = record.machine.get("device"), record.machine.get("precision")
    training = job.config.training
    # As the recipe names them: a plan may be made where they are not.
    now = (
        job.device.type if training.device == "auto" else training.device,
        job.precision if training.precision == "auto" else training.precision,
    )
    if record.section != section or (device, precision or now[1]) == now:
        return
    settings = f"training.device={device}"
    if precision:
        settings += f" training.precision={precision}"
    raise UsageError(
        f"{paths.results / TUNING_FILE}: chosen on {device} in {precision or 'another precision'}, "
        f"and this experiment is on {now[0]} in {now[1]}, where other values may be best; add "
        f"{settings}, or move the file away to choose again"
    )


def check_runs(record: TuningRecord, paths: ExperimentPaths) -> None:
    """The runs behind a choice are there: without them no report can be written.

    Raises:
        IntegrityError: some were deleted.
    """
    runs = tuning_folder(paths.results) / "runs"
    missing = [
        folder
        for arm in record.arms
        for candidate in arm.candidates
        for folder in candidate.folders
        if not (runs / folder).is_dir()
    ]
    if missing:
        raise IntegrityError(
            f"{runs}: without {named(missing)}, which {TUNING_FILE} was chosen by; restore it, or "
            f"remove {paths.results / TUNING_FILE}: the same command makes run and choice again"
        )


def note_machine(record: TuningRecord, device: str, reporter: Reporter) -> None:
    """A note where final runs are computed on another machine than the choice was made on."""
    then, now = _machine(record.machine), _machine(hardware.describe(device))
    if then != now:
        reporter.info(
            f"  note: values were chosen on {then}, this machine is {now}; last digits may differ"
        )


def _machine(facts: Mapping[str, Any]) -> str:
    return ", ".join(str(facts[key]) for key in ("gpu", "processor", "system") if facts.get(key))


def seal_choice(paths: ExperimentPaths, record: TuningRecord, reporter: Reporter) -> None:
    """Write tuning.json; that of another search is kept beside it."""
    _keep_earlier(paths, record, reporter)
    write_tuning(paths.results, record)


def _keep_earlier(paths: ExperimentPaths, record: TuningRecord, reporter: Reporter) -> None:
    earlier = read_tuning(paths.results)
    if earlier is None or earlier.search == record.search:
        return
    kept = paths.results / kept_file(earlier.search)
    (paths.results / TUNING_FILE).replace(kept)
    changes = _changes(earlier.section, record.section)
    reporter.info(f"  note: the earlier choice ({changes}) is kept as {kept}")


def _changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    changed = [
        f"tuning.{key}: {then.get(key)} → {now.get(key)}"
        for key in dict.fromkeys([*then, *now])
        if then.get(key) != now.get(key)
    ]
    return "; ".join(changed) or "of other rows, settings or base"


def log_choice(record: TuningRecord, reporter: Reporter) -> None:
    """One line per setting."""
    for arm in record.arms:
        chosen = ", ".join(
            f"{key.rpartition('.')[2]} {value:g}" for key, value in arm.chosen.items()
        )
        kept = len(arm.kept)
        edge = "".join(
            f"; the {'largest' if end == 'high' else 'smallest'} tried, so not shown to be the best"
            for end in arm.edges.values()
        )
        reporter.info(
            f"  {arm.name}  {chosen} of {len(arm.candidates)} tried, {kept} may be the best{edge}"
        )
