"""Recipes with a section `forgetting` that cannot be measured: refused before any training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ..support.further_sets import also, german
from ..support.lab import Lab
from ..support.rows import write_jsonl

CELLS = "grid.cells=[{training.learning_rate: 1e-30}, {training.learning_rate: 1e-3}]"
KEYS = ("data.size=40", "adapter.r=4")


def test_rows_of_the_training_set_are_named(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = Lab(tmp_path / "lab", tiny_folder)
    rows = [json.loads(line) for line in lab.rows.read_text().splitlines()]
    leaking = [{**row, "instruction": row["instruction"].upper() + " !"} for row in rows]
    path = write_jsonl(tmp_path / "leak.jsonl", leaking)
    override = also(path, format="dolly", rows=5)
    assert lab.run(CELLS, *KEYS, override) == 3
    message = capsys.readouterr().err
    # All 36 training rows are in it, though 5 rows would be drawn.
    assert "forgetting.also.german: 36 of its 120 rows have the prompt of a training row" in message
    assert "leak.jsonl:" in message
    assert "= rows.jsonl:" in message
    assert not list(lab.results.glob("runs/*"))


@pytest.mark.parametrize(
    ("keys", "code", "message"),
    [
        ({"name": "nowhere.jsonl"}, 3, "forgetting.also.german: no such file"),
        ({"format": "xml"}, 2, "forgetting.also.german.format = xml"),
        ({"rows": 0}, 2, "forgetting.also.german.rows = 0"),
        ({"margin": 0}, 2, "forgetting.also.german.margin = 0"),
        ({"margin": -0.1}, 2, "forgetting.also.german.margin = -0.1"),
        ({"rowz": 3}, 2, "unknown key 'forgetting.also.german.rowz'"),
        ({"template": "none"}, 2, "forgetting.also.german: data.template = none"),
        ({"columns": {"output": "nothing"}}, 3, "forgetting.also.german: "),
    ],
)
def test_bad_set_is_refused_before_training(
    tmp_path: Path,
    tiny_folder: Path,
    keys: dict[str, object],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lab = Lab(tmp_path / "lab", tiny_folder)
    assert lab.run(CELLS, *KEYS, also(german(tmp_path), **keys)) == code
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(lab.results.glob("runs/*"))


@pytest.mark.parametrize(
    ("overrides", "code", "message"),
    [
        (("forgetting.drift=false",), 2, "nothing to measure"),
        (("forgetting.prompts=201",), 2, "forgetting.prompts"),
        (("forgetting.also={drift: {name: a.jsonl}}",), 2, "none of drift, replies"),
        (("forgetting.also={A: {name: a.jsonl}}",), 2, "must be a name of lower-case"),
        (("forgetting.also={a: {rows: 3}}",), 2, "'forgetting.also.a.name' is missing"),
        (("forgetting.prompts=3", "keep_adapters=false"), 2, "needs the adapters"),
        (("forgetting.max_new_tokens=511",), 2, "no room for a prompt"),
    ],
)
def test_bad_section_is_refused(
    tmp_path: Path,
    tiny_folder: Path,
    overrides: tuple[str, ...],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lab = Lab(tmp_path / "lab", tiny_folder)
    assert lab.run(CELLS, *KEYS, *overrides) == code
    assert message in capsys.readouterr().err


def test_empty_file_is_refused(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = Lab(tmp_path / "lab", tiny_folder)
    (tmp_path / "empty.jsonl").write_text("")
    assert lab.run(CELLS, *KEYS, also(tmp_path / "empty.jsonl")) == 3
    assert "forgetting.also.german: " in capsys.readouterr().err
