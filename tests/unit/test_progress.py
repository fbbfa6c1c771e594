"""What is said off a terminal."""

import io

import pytest
from rich.console import Console

from slm_lora import progress


def test_time_left_rests_on_this_sitting_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 20.0, 40.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    said = io.StringIO()
    task = progress.Task(Console(file=said, width=100), "r8", 100, "steps")
    task.advance(1, tokens=200, earlier=49)
    task.advance(1, tokens=200)
    assert said.getvalue().splitlines() == [
        "  r8  50/100 steps  10 tok/s  16:40 left",
        "  r8  51/100 steps  10 tok/s  16:20 left",
    ]
