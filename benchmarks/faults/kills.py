"""kill -9: at every file operation, at random times, while scoring, twice in a row; and through
the real command line. What the next sitting ends with must equal the run that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab import (
    NAME,
    Lab,
    at_call,
    at_operation,
    be_asked_to_stop,
    clean,
    die,
    finish,
    log_of,
    outcome,
    run,
    start,
)

from slm_lora.errors import STOPPED_RESUMABLE
from slm_lora.evaluation import scoring
from slm_lora.training import step

Case = tuple[str, int]
"""Kind and number; the number decides where exactly."""
Verdict = dict[str, Any]

KILLED = -signal.SIGKILL
RANDOM, SCORING, TWICE, THROUGH_COMMAND = 40, 24, 30, 10
STEPS, VALIDATIONS, OPERATIONS_STOPPED, COMMANDS_STOPPED = 11, 4, 4, 2


def kill_cases(operations: int) -> list[Case]:
    """All kills; those through the command line first, as they take longest."""
    kinds = [
        ("command", THROUGH_COMMAND),
        ("operation", operations),
        ("random", RANDOM),
        ("scoring", SCORING),
        ("twice", TWICE),
    ]
    return [(kind, number) for kind, many in kinds for number in range(1, many + 1)]


def stop_cases() -> list[Case]:
    """All requests to stop: within a step, in validation and scoring, in a save, by command."""
    kinds = [
        ("stopped command", COMMANDS_STOPPED),
        ("step", STEPS),
        ("validation or scoring", VALIDATIONS),
        ("save", OPERATIONS_STOPPED),
    ]
    return [(kind, number) for kind, many in kinds for number in range(1, many + 1)]


def verdict(lab: Lab, case: Case, wanted: Any, operations: int, seconds: float) -> Verdict:
    """Do one case.

    Args:
        lab: what to run.
        case: what to do to it.
        wanted: outcome of the run that was left alone.
        operations: file operations of that run.
        seconds: that it took.
    """
    kind, number = case
    folder = lab.folder / f"{kind.replace(' ', '-')}-{number}"
    folder.mkdir()
    draw = random.Random(f"{kind} {number}")
    begun = {
        "random": lambda: _kill_after(lab, folder, draw.uniform(0, seconds)),
        "operation": lambda: run(lab, folder, at_operation(folder, number, die)),
        "scoring": lambda: run(lab, folder, at_call(scoring, "score_documents", number, die)),
        "twice": lambda: _kill_twice(lab, folder, draw, operations),
        "command": lambda: _command(lab, folder, number, KILLED),
        "step": lambda: run(
            lab, folder, at_call(step, "batch_nll", 1 + number * 3 // 2, be_asked_to_stop)
        ),
        "validation or scoring": lambda: run(
            lab, folder, at_call(scoring, "score_documents", number * 5, be_asked_to_stop)
        ),
        "save": lambda: run(
            lab,
            folder,
            at_operation(folder, draw.randint(1, operations), be_asked_to_stop),
        ),
        "stopped command": lambda: _command(lab, folder, number, STOPPED_RESUMABLE),
    }[kind]()
    through_command = "command" in kind
    ended = _launch(lab, folder).wait() if through_command else run(lab, folder)
    found = {"kind": kind, "number": number, "first": begun, "second": ended}
    if ended == 0:
        left = outcome(folder)
        # Some are done before the fault comes; none may end in another way.
        expected = (KILLED, STOPPED_RESUMABLE, 0)
        found["equal"] = left == wanted and begun in expected
    else:
        found["equal"] = False
    if found["equal"]:
        clean(lab, folder)
    else:
        found["said"] = log_of(lab, folder)[-2000:] if not through_command else ""
    return found


def _kill_after(lab: Lab, folder: Path, seconds: float) -> int:
    child = start(lab, folder)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return finish(child)


def _kill_twice(lab: Lab, folder: Path, draw: random.Random, operations: int) -> int:
    first = run(lab, folder, at_operation(folder, draw.randint(1, operations), die))
    second = run(lab, folder, at_operation(folder, draw.randint(1, operations // 2), die))
    # The second sitting may be done before it is killed: it has fewer operations left.
    return first if second in (KILLED, 0) else second


def _launch(lab: Lab, folder: Path) -> subprocess.Popen[bytes]:
    words = ["experiment", str(lab.folder / "faults.yaml")]
    where = ["--results", str(folder / "results"), "--adapters", str(folder / "adapter")]
    main = "from slm_lora.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", main, *words, *where],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def _command(lab: Lab, folder: Path, number: int, wanted: int) -> int:
    """Start the command, and end it once a certain file appears."""
    results = folder / "results" / NAME
    signs: list[Callable[[], bool]] = [
        lambda: any(results.glob("runs/base-*")),
        lambda: any(results.glob("checkpoints/*/step-000001")),
        lambda: any(results.glob("checkpoints/*/step-000002")),
        lambda: any(results.glob("checkpoints/*/.step-000003*")),
        lambda: any(results.glob("checkpoints/*/step-000005")),
        lambda: any((folder / "adapter").glob(".faults-*")),
        lambda: (folder / "adapter" / "faults-r2").exists(),
        lambda: any(results.glob("runs/.r2-*")),
        lambda: any(results.glob("runs/r2-*")),
        lambda: (results / "experiment_table.md").exists(),
    ]
    sign = signs[number - 1] if wanted == KILLED else signs[number]
    process = _launch(lab, folder)
    while process.poll() is None and not sign():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL if wanted == KILLED else signal.SIGTERM)
    return process.wait()
