"""The sealed choice: found for its own search, kept where another takes its place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from slm_lora.errors import DataError, IntegrityError, UsageError
from slm_lora.experiment.choice import (
    check_runs,
    check_validation,
    find_choice,
    note_machine,
    seal_choice,
)
from slm_lora.experiment.paths import ExperimentPaths
from slm_lora.runs.tuning import TuningRecord, read_tuning
from slm_lora.runtime import hardware
from slm_lora.runtime.progress import Reporter

SECTION = {"key": ["training.learning_rate"], "values": [[0.001, 0.01]], "refine": 2}
SEARCH = "ab" * 32


class Notes(Reporter):
    """A reporter that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.lines: list[str] = []

    def info(self, line: str) -> None:
        self.lines.append(line)


def record(search: str = SEARCH, **changes: Any) -> TuningRecord:
    candidate = {
        "values": {"training.learning_rate": 0.01}, "loss": 2.0, "stopped": "",
        "above_lowest": None, "kept": True, "tokens": 10, "tokens_to_end": 10,
        "folders": ["r4-lr0.01-seed1000-0123abcd"],
    }  # fmt: skip
    arm = {
        "name": "r4", "settings": {}, "chosen": {"training.learning_rate": 0.01}, "edges": {},
        "candidates": [candidate],
    }  # fmt: skip
    fields = {
        "format": 1, "experiment": "x", "search": search, "section": SECTION, "metric": "all",
        "validation_rows": 20, "validation_groups": 20, "base_loss": 3.0,
        "machine": {"device": "cpu", "precision": "fp32", "processor": "Abacus"}, "arms": [arm],
    }  # fmt: skip
    return TuningRecord.model_validate({**fields, **changes})


def job(device: str = "cpu", precision: str = "fp32", wanted: str = "auto") -> Any:
    """On a machine; the recipe wants a device, or leaves it to the machine."""
    training = SimpleNamespace(device=wanted, precision="auto")
    return SimpleNamespace(
        device=SimpleNamespace(type=device),
        precision=precision,
        config=SimpleNamespace(training=training),
    )


@pytest.fixture
def paths(tmp_path: Path) -> ExperimentPaths:
    (tmp_path / "tuning" / "runs" / "r4-lr0.01-seed1000-0123abcd").mkdir(parents=True)
    return ExperimentPaths("x", tmp_path, tmp_path / "adapter")


def find(
    paths: ExperimentPaths, search: str = SEARCH, on: Any = None, **section: Any
) -> tuple[str | None, list[str]]:
    """The search of the choice that is found, and the notes."""
    notes = Notes()
    found = find_choice(paths, search, {**SECTION, **section}, on or job(), notes)
    return (found.search if found else None), notes.lines


def search_of(paths: ExperimentPaths, file: str = "tuning.json") -> str:
    sealed = read_tuning(paths.results, file)
    assert sealed is not None
    return sealed.search


def test_choice_is_of_its_own_search(paths: ExperimentPaths) -> None:
    assert find(paths) == (None, [])
    seal_choice(paths, record(), Notes())
    assert find(paths) == (SEARCH, [])
    assert find(paths, "cd" * 32, refine=1) == (None, [])


def test_other_search_keeps_the_earlier_choice_and_finds_it_again(paths: ExperimentPaths) -> None:
    notes = Notes()
    other = record("cd" * 32, section={**SECTION, "refine": 1})
    seal_choice(paths, record(), notes)
    seal_choice(paths, other, notes)
    kept = paths.results / "tuning-abababab.json"
    assert notes.lines == [f"  note: the earlier choice (tuning.refine: 2 → 1) is kept as {kept}"]
    assert search_of(paths) == "cd" * 32
    found, _ = find(paths)
    assert found == search_of(paths) == SEARCH
    assert search_of(paths, "tuning-cdcdcdcd.json") == "cd" * 32
    assert not kept.exists()


@pytest.mark.parametrize(
    ("device", "precision"), [("cuda", "fp32"), ("cpu", "bf16"), ("cuda", "bf16")]
)
def test_device_or_precision_of_the_choice_is_needed(
    paths: ExperimentPaths, device: str, precision: str
) -> None:
    seal_choice(paths, record(), Notes())
    with pytest.raises(UsageError) as error:
        find(paths, "cd" * 32, job(device, precision))
    assert f"chosen on cpu in fp32, and this experiment is on {device} in {precision}" in str(
        error.value
    )
    assert "add training.device=cpu training.precision=fp32, or move the file away" in str(
        error.value
    )
    # Another section is another search anyway.
    assert find(paths, "cd" * 32, job(device, precision), refine=1) == (None, [])


def test_plan_on_a_machine_without_the_device_is_not_refused(paths: ExperimentPaths) -> None:
    machine = {"device": "cuda", "precision": "fp32"}
    seal_choice(paths, record(machine=machine), Notes())
    assert find(paths, "cd" * 32, job("cpu", wanted="cuda")) == (None, [])
    with pytest.raises(UsageError, match="chosen on cuda in fp32"):
        find(paths, "cd" * 32, job("cpu"))


def test_runs_behind_the_choice_are_there(paths: ExperimentPaths) -> None:
    check_runs(record(), paths)
    (folder,) = (paths.results / "tuning" / "runs").iterdir()
    folder.rmdir()
    with pytest.raises(IntegrityError, match=f"without {folder.name}, which tuning.json was"):
        check_runs(record(), paths)


def test_broken_choice_is_not_replaced(paths: ExperimentPaths) -> None:
    seal_choice(paths, record(), Notes())
    path = paths.results / "tuning.json"
    path.write_text(path.read_text().replace("0.01", "0.02"))
    for attempt in (lambda: find(paths), lambda: seal_choice(paths, record(), Notes())):
        with pytest.raises(IntegrityError, match="restore it, or remove it"):
            attempt()
    assert "0.02" in path.read_text()


def test_other_machine_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    notes = Notes()
    monkeypatch.setattr(hardware, "describe", lambda device: {"processor": "Abacus"})
    note_machine(record(), "cpu", notes)
    assert notes.lines == []
    monkeypatch.setattr(hardware, "describe", lambda device: {"processor": "Slide rule"})
    note_machine(record(), "cpu", notes)
    assert "chosen on Abacus, this machine is Slide rule" in notes.lines[0]


def rows(groups: int) -> Any:
    """Two rows a group."""
    examples = [SimpleNamespace(group_id=str(number // 2)) for number in range(2 * groups)]
    return SimpleNamespace(validation=examples)


def test_validation_set_is_large_enough_to_choose_by() -> None:
    notes = Notes()
    with pytest.raises(DataError, match="18 validation rows in 9 groups are too few") as error:
        check_validation(rows(9), notes)
    # (1.96 + 0.84)² × (0.05 / 0.01)² = 196.2 groups of two rows.
    assert "at least 10 groups are needed, 394 rows tell values apart" in str(error.value)
    with pytest.raises(DataError, match="0 validation rows in 0 groups"):
        check_validation(rows(0), notes)
    check_validation(rows(197), notes)
    assert notes.lines == []
    check_validation(rows(50), notes)
    (note,) = notes.lines
    # 2.80 × 0.05 / √50 = 0.0198
    assert "that differ by about 0.02 nats per token; 0.01 takes about 394 rows" in note


def test_plan_finds_an_earlier_choice_and_changes_no_file(paths: ExperimentPaths) -> None:
    seal_choice(paths, record(), Notes())
    seal_choice(paths, record("cd" * 32, section={**SECTION, "refine": 1}), Notes())
    before = sorted(paths.results.glob("*.json"))
    found = find_choice(paths, SEARCH, SECTION, job(), Notes(), restores=False)
    assert found is not None
    assert found.search == SEARCH
    assert sorted(paths.results.glob("*.json")) == before
    assert search_of(paths) == "cd" * 32
