"""Settings with tuned keys: their searches with per-row validation scores."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from slm_lora.errors import IntegrityError
from slm_lora.runs.folder import read_run
from slm_lora.runs.scored_run import read_scored_run
from slm_lora.runs.tuning import ArmRecord, CandidateRecord, TuningRecord, tuning_folder
from slm_lora.stats.settings import Setting


@dataclass(frozen=True)
class TunedArm:
    """The search for one setting.

    Attributes:
        record: of tuning.json.
        settings: finished candidates with their validation scores, by the place of their record.
    """

    record: ArmRecord
    settings: Mapping[int, Setting]

    def at(self, values: Mapping[str, float]) -> Setting | None:
        """The finished candidate at some values; None where it was not run to its end."""
        for index, candidate in enumerate(self.record.candidates):
            if candidate.values == dict(values):
                return self.settings.get(index)
        return None

    @property
    def chosen(self) -> Setting:
        """The candidate that was chosen."""
        chosen = self.at(self.record.chosen)
        assert chosen is not None, f"{self.record.name}: chosen, but not run"
        return chosen


def read_arms(results: Path, record: TuningRecord) -> list[TunedArm]:
    """The searches of an experiment with their validation scores.

    Raises:
        IntegrityError: a tuning run is missing or broken.
    """
    return [
        TunedArm(
            arm,
            {
                index: _setting(results, candidate, record)
                for index, candidate in enumerate(arm.candidates)
                if candidate.folders
            },
        )
        for arm in record.arms
    ]


def _setting(results: Path, candidate: CandidateRecord, record: TuningRecord) -> Setting:
    runs = []
    for name in candidate.folders:
        folder = tuning_folder(results) / "runs" / name
        if not folder.is_dir():
            raise IntegrityError(
                f"{folder}: missing, and tuning.json chose by it; restore it, or remove "
                "tuning.json and run the experiment again"
            )
        run = read_scored_run(read_run(folder))
        runs.append(replace(run, headline=record.metric, tuned=record.keys))
    return Setting(tuple(runs))


def arm_of(setting: Setting, arms: Sequence[TunedArm]) -> TunedArm | None:
    """The search of a setting of the experiment."""
    own = _own_keys(setting.first_run.run.record.settings, setting.first_run.tuned)
    for arm in arms:
        if _own_keys(arm.record.settings, setting.first_run.tuned) == own:
            return arm
    return None


def _own_keys(settings: Mapping[str, Any], tuned: Sequence[str]) -> str:
    kept = {k: v for k, v in settings.items() if k not in ("seed", "data_seed", *tuned)}
    return json.dumps(kept, sort_keys=True, default=list)


def common_values(arms: Sequence[TunedArm], record: TuningRecord) -> dict[str, float] | None:
    """Values that all arms finished: the recipe's common value of the first key with the lowest
    mean loss, or any; None where there are none."""
    finished = [
        {
            json.dumps(candidate.values, sort_keys=True): candidate
            for candidate in arm.record.candidates
            if candidate.loss is not None
        }
        for arm in arms
    ]
    shared = [key for key in finished[0] if all(key in own for own in finished[1:])]
    wanted = record.section.get("common_value")
    if wanted is not None:
        shared = [key for key in shared if json.loads(key)[record.keys[0]] == wanted] or shared
    if not shared:
        return None
    best = min(shared, key=lambda key: sum(own[key].loss or 0.0 for own in finished))
    return dict(finished[0][best].values)
