"""Files of the tuning phase: runs that were stopped, and tuning.json, the sealed choice.

Finished tuning runs are ordinary run folders in ``<results>/tuning/runs``, scored on the validation
set.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from slm_lora.errors import IntegrityError
from slm_lora.runs.folder import STEPS_FILE, to_json, write_lines
from slm_lora.runtime.checksums import SEAL, content_hash, read_sealed
from slm_lora.runtime.storage import atomic_folder, atomic_write_text

TUNING_FILE, STOPPED_FILE = "tuning.json", "stopped.json"
TUNING_FORMAT = 1


def tuning_folder(results: Path) -> Path:
    """Folder of an experiment's tuning runs."""
    return results / "tuning"


@dataclass(frozen=True, slots=True)
class StoppedRun:
    """A tuning run that was stopped before its end.

    Attributes:
        reason: why, in a few words.
        steps: that it had finished.
    """

    reason: str
    steps: tuple[Mapping[str, Any], ...]

    @property
    def tokens(self) -> int:
        """Tokens that it computed."""
        return sum(int(step["tokens"]) for step in self.steps)


def stopped_folder(tuning: Path, cell: str, identity: str) -> Path:
    """Folder of a stopped run: ``<results>/tuning/stopped/<cell>-<hash8>``."""
    return tuning / "stopped" / f"{cell}-{identity[:8]}"


def write_stopped(
    tuning: Path, cell: str, identity: str, reason: str, steps: Sequence[Mapping[str, Any]]
) -> None:
    """Record a run as stopped."""
    with atomic_folder(stopped_folder(tuning, cell, identity)) as folder:
        record = {"format": TUNING_FORMAT, "cell": cell, "hash": identity, "reason": reason}
        (folder / STOPPED_FILE).write_text(to_json(record), encoding="utf-8")
        write_lines(folder / STEPS_FILE, steps)


def read_stopped(tuning: Path, cell: str, identity: str) -> StoppedRun | None:
    """The record of a stopped run, if there is one.

    Raises:
        IntegrityError: it is another run's, or broken.
    """
    folder = stopped_folder(tuning, cell, identity)
    if not folder.exists():
        return None
    try:
        record = json.loads((folder / STOPPED_FILE).read_text(encoding="utf-8"))
        lines = (folder / STEPS_FILE).read_text(encoding="utf-8").splitlines()
        steps = tuple(json.loads(line) for line in lines)
        same = record["hash"] == identity and record["format"] == TUNING_FORMAT
        stopped = StoppedRun(str(record["reason"]), steps)
        sum(int(step["tokens"]) for step in steps)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{folder}: broken ({error}); remove it, and the run is made again"
        ) from error
    if not same:
        raise IntegrityError(f"{folder}: holds another run; remove it, and the run is made again")
    return stopped


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class CandidateRecord(_Part):
    """One point of a search.

    Attributes:
        values: of the tuned keys.
        loss: on the validation set, mean over tuning seeds; None where a run was stopped.
        stopped: why; empty for finished ones.
        above_lowest: paired difference to the lowest, nats per token, with its 95 % interval.
        kept: whether it may be the best: not worse than the lowest beyond chance.
        tokens: computed in training, over tuning seeds.
        tokens_to_end: as many as without stopping.
        folders: of its finished runs, in ``tuning/runs``.
    """

    values: dict[str, float]
    loss: float | None
    stopped: str = ""
    above_lowest: tuple[float, float, float] | None = None
    kept: bool = False
    tokens: int
    tokens_to_end: int
    folders: tuple[str, ...] = ()


class ArmRecord(_Part):
    """The search for one setting of the grid.

    Attributes:
        name: of the setting.
        settings: keys that set it apart.
        chosen: value of every tuned key.
        edges: keys whose chosen value is at an end of what was tried.
        candidates: in the order of the search.
    """

    name: str
    settings: dict[str, Any]
    chosen: dict[str, float]
    edges: dict[str, Literal["low", "high"]]
    candidates: tuple[CandidateRecord, ...]

    @property
    def kept(self) -> tuple[CandidateRecord, ...]:
        """Candidates that may be the best."""
        return tuple(candidate for candidate in self.candidates if candidate.kept)


class TuningRecord(_Part):
    """tuning.json: what was tried, and the choice.

    Attributes:
        format: of the file.
        experiment: its name.
        search: SHA-256 of section, settings, rows and base: equal for the same search.
        section: the recipe's ``tuning``.
        metric: of the choice.
        validation_rows: that it was made on.
        validation_groups: of related rows among them.
        base_loss: of the base model on them.
        machine: that scored the base, with its device and precision.
        arms: one search per setting.
    """

    format: int
    experiment: str
    search: str
    section: dict[str, Any]
    metric: str
    validation_rows: int
    validation_groups: int
    base_loss: float
    machine: dict[str, Any]
    arms: tuple[ArmRecord, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """The tuned keys."""
        return tuple(self.section["key"])

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the tuning runs."""
        return tuple(self.section["seeds"])


def write_tuning(results: Path, record: TuningRecord) -> None:
    """Write tuning.json with its seal."""
    document = record.model_dump(mode="json")
    atomic_write_text(results / TUNING_FILE, to_json({**document, SEAL: content_hash(document)}))


def kept_file(search: str) -> str:
    """Name that tuning.json gets when the choice of another search takes its place."""
    return f"tuning-{search[:8]}.json"


def read_tuning(results: Path, file: str = TUNING_FILE) -> TuningRecord | None:
    """The choice of an experiment with tuning, if it was made.

    Args:
        results: folder of the experiment.
        file: name of the choice, where it is an earlier one.

    Raises:
        IntegrityError: the file was changed, or is broken.
    """
    path = results / file
    try:
        document = read_sealed(path)
    except FileNotFoundError:
        return None
    except IntegrityError as error:
        reason = str(error).rpartition(";")[0] or str(error)
        raise IntegrityError(f"{reason}; {_AGAIN}") from error
    if SEAL not in document:
        raise IntegrityError(f"{path}: has no seal; {_AGAIN}")
    try:
        record = TuningRecord.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise IntegrityError(f"{path}: broken ({where}: {first['msg']}); {_AGAIN}") from error
    if record.format != TUNING_FORMAT:
        raise IntegrityError(
            f"{path}: of another version of slm-lora (format {record.format}); {_AGAIN}"
        )
    return record


_AGAIN = "restore it, or remove it: the same experiment makes the choice again from its tuning runs"
