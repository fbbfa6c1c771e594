"""Progress on a terminal and in log lines."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from slm_lora.runtime import progress


def test_time_left_uses_units_of_this_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]  # not a call count: other threads read the clock as well
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    output = io.StringIO()
    task = progress.Task(Console(file=output, width=100), "r8", 100, "steps")
    now[0] = 20.0
    task.advance(1, tokens=200, earlier=49)
    now[0] = 40.0
    task.advance(1, tokens=200)
    assert output.getvalue().splitlines() == [
        "  r8  50/100 steps  10 tok/s  16:40 left",
        "  r8  51/100 steps  10 tok/s  16:20 left",
    ]


def test_live_table_shows_time_left_from_the_first_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=78, force_terminal=True)
    task = progress.Task(console, "r16-3000-seed0", 10, "steps")

    def table_text() -> str:
        # A separate console: the live one adds its table to all output.
        page = io.StringIO()
        Console(file=page, width=78, force_terminal=True).print(task.table())
        return " ".join(Text.from_ansi(page.getvalue()).plain.split())

    now[0] = 30.0
    assert "0/10" in table_text() and "0:30 —" in table_text()
    now[0] = 60.0  # the first step, which compiles
    task.advance(1, 4000, "loss 2.345")
    assert "1/10 2.345 67 1:00 9:00" in table_text()
    now[0] = 100.0  # the second takes 40 seconds, the estimate for the others
    task.advance(1, 4000, "loss 2.300")
    assert "2/10 2.300 80 1:40 5:20" in table_text()
    now[0] = 110.0  # counted down
    assert "1:50 5:10" in table_text()
    # Long lines are truncated, not wrapped.
    task.advance(1, 4000, "loss 2.300  validation 2.200")
    assert "r16-3000-seed0 3/10" in table_text() and "…" in table_text()
    task.close("done")


def test_time_left_for_the_experiment_follows_the_cost_of_cells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    overall = progress.Overall(400.0)
    written = io.StringIO()
    task = progress.Task(Console(file=written, width=100), "r8", 10, "steps", overall, cost=200.0)
    assert overall.left() is None
    now[0] = 30.0
    task.advance(1, earlier=5)  # five of ten steps were paid by an earlier process
    # 20 of 300 took 30 s: 280 are left.
    assert overall.left() == pytest.approx(420.0)
    assert "7:00 for the experiment" in written.getvalue()


def test_experiment_without_anything_to_do_has_no_time_left() -> None:
    assert progress.Overall(0.0).left() is None
