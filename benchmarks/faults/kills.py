"""kill -9 at every file operation, at random times, during scoring, twice in a row, and through
the command line. The results of the resumed process must equal those of an undisturbed run."""

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
    clean,
    die,
    finish,
    log_of,
    outcome,
    request_stop,
    run,
    start,
)

from slm_lora.errors import STOPPED_RESUMABLE
from slm_lora.evaluation import scoring
from slm_lora.training import step

Case = tuple[str, int]
"""Kind and number; the number determines the position."""
Verdict = dict[str, Any]

KILLED = -signal.SIGKILL
RANDOM, SCORING, TWICE, THROUGH_COMMAND = 40, 24, 30, 10
STEPS, VALIDATIONS, OPERATIONS_STOPPED, COMMANDS_STOPPED = 11, 4, 4, 2


def kill_cases(operations: int) -> list[Case]:
    """All kills, the slowest first: those through the command line."""
    kinds = [
        ("command", THROUGH_COMMAND),
        ("operation", operations),
        ("random", RANDOM),
        ("scoring", SCORING),
        ("twice", TWICE),
    ]
    return [(kind, number) for kind, count in kinds for number in range(1, count + 1)]


def stop_cases() -> list[Case]:
    """All stop requests: in a step, in validation and scoring, in a save, by command."""
    kinds = [
        ("stopped command", COMMANDS_STOPPED),
        ("step", STEPS),
        ("validation or scoring", VALIDATIONS),
        ("save", OPERATIONS_STOPPED),
    ]
    return [(kind, number) for kind, count in kinds for number in range(1, count + 1)]


def verdict(lab: Lab, case: Case, expected: Any, operations: int, seconds: float) -> Verdict:
    """Run a case.

    Args:
        lab: the experiment.
        case: the fault.
        expected: outcome of the undisturbed run.
        operations: file operations of that run.
        seconds: duration of that run.
    """
    kind, number = case
    folder = lab.folder / f"{kind.replace(' ', '-')}-{number}"
    folder.mkdir()
    rng = random.Random(f"{kind} {number}")
    first_code = {
        "random": lambda: _kill_after(lab, folder, rng.uniform(0, seconds)),
        "operation": lambda: run(lab, folder, at_operation(folder, number, die)),
        "scoring": lambda: run(lab, folder, at_call(scoring, "score_documents", number, die)),
        "twice": lambda: _kill_twice(lab, folder, rng, operations),
        "command": lambda: _command(lab, folder, number, KILLED),
        "step": lambda: run(
            lab, folder, at_call(step, "batch_nll", 1 + number * 3 // 2, request_stop)
        ),
        "validation or scoring": lambda: run(
            lab, folder, at_call(scoring, "score_documents", number * 5, request_stop)
        ),
        "save": lambda: run(
            lab,
            folder,
            at_operation(folder, rng.randint(1, operations), request_stop),
        ),
        "stopped command": lambda: _command(lab, folder, number, STOPPED_RESUMABLE),
    }[kind]()
    through_command = "command" in kind
    second_code = _launch(lab, folder).wait() if through_command else run(lab, folder)
    result = {"kind": kind, "number": number, "first": first_code, "second": second_code}
    if second_code == 0:
        actual = outcome(folder)
        # Some finish before the fault; no other exit code is allowed.
        allowed_codes = (KILLED, STOPPED_RESUMABLE, 0)
        result["equal"] = actual == expected and first_code in allowed_codes
    else:
        result["equal"] = False
    if result["equal"]:
        clean(lab, folder)
    else:
        result["said"] = log_of(lab, folder)[-2000:] if not through_command else ""
    return result


def _kill_after(lab: Lab, folder: Path, seconds: float) -> int:
    child = start(lab, folder)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return finish(child)


def _kill_twice(lab: Lab, folder: Path, rng: random.Random, operations: int) -> int:
    first = run(lab, folder, at_operation(folder, rng.randint(1, operations), die))
    second = run(lab, folder, at_operation(folder, rng.randint(1, operations // 2), die))
    # The second process has fewer operations left, and may finish before the kill.
    return first if second in (KILLED, 0) else second


def _launch(lab: Lab, folder: Path) -> subprocess.Popen[bytes]:
    args = ["experiment", str(lab.folder / "faults.yaml")]
    folders = ["--results", str(folder / "results"), "--adapters", str(folder / "adapter")]
    main = "from slm_lora.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", main, *args, *folders],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def _command(lab: Lab, folder: Path, number: int, code: int) -> int:
    """Start the command, and end it once the trigger's file appears."""
    results = folder / "results" / NAME
    triggers: list[Callable[[], bool]] = [
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
    trigger = triggers[number - 1] if code == KILLED else triggers[number]
    process = _launch(lab, folder)
    while process.poll() is None and not trigger():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL if code == KILLED else signal.SIGTERM)
    return process.wait()
