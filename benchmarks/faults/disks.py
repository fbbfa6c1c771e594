"""Disk full at twenty levels, and read-only: exit 6, and existing checkpoints remain intact.

As root the disk is a small tmpfs. Otherwise the size of files is limited, which fails like a full
disk during a write, and the folder's write permission is removed."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

from corruptions import newest
from lab import Hook, Lab, at_call, clean, die, log_of, outcome, run

from slm_lora.errors import IntegrityError
from slm_lora.training.checkpoint import read_manifest
from slm_lora.training.step import StepRunner

DISK = 8 * 2**20
LEVELS_BEFORE, LEVELS_WITHIN = 10, 10


def can_mount(folder: Path) -> bool:
    """Whether this process can mount a tmpfs."""
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    process = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False, capture_output=True
    )
    if process.returncode == 0:
        subprocess.run(["umount", folder], check=True)
    return process.returncode == 0


def disk_cases() -> list[tuple[str, int]]:
    """Disk full before training, full during it, read-only."""
    before = [("full before", level) for level in range(LEVELS_BEFORE)]
    during = [("full within", level) for level in range(LEVELS_WITHIN)]
    return [*before, *during, ("read-only", 0)]


def verdict(lab: Lab, case: tuple[str, int], expected: Any, mounting: bool) -> dict[str, Any]:
    """Run a case: fill the disk, run, check, free the disk, run again."""
    kind, level = case
    folder = lab.folder / f"{kind.replace(' ', '-')}-{level}"
    folder.mkdir()
    if mounting:
        _mount(folder, "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs")
    try:
        # Two checkpoints of a killed process; the newest must remain intact.
        run(lab, folder, at_call(StepRunner, "step", 4, die))
        before = [checkpoint.name for checkpoint in newest(folder)]
        filler = folder / "filler"
        code, steps = _run_on_bad_disk(lab, folder, kind, level, filler, mounting)
        filler.unlink(missing_ok=True)
        after = [checkpoint for checkpoint in newest(folder) if _is_intact(checkpoint)]
        kept = bool(after) and after[0].name >= before[0]
        second_code = run(lab, folder)
        equal = second_code == 0 and outcome(folder) == expected
    finally:
        if mounting:
            subprocess.run(["umount", folder], check=True)
    result = {
        "kind": kind,
        "level": level,
        "code": code,
        "trained_steps": steps,
        "checkpoint_kept": kept,
        "equal": equal,
        "held": code == 6 and kept and equal and (kind == "full within" or steps == 0),
    }
    if not result["held"]:
        result["said"] = log_of(lab, folder)[-2000:]
    clean(lab, folder)
    return result


def _run_on_bad_disk(
    lab: Lab, folder: Path, kind: str, level: int, filler: Path, mounting: bool
) -> tuple[int, int]:
    """Exit code of the process, and its number of optimizer steps."""
    steps = lab.folder / f"{folder.name}.steps"
    steps.write_bytes(b"")

    def count_steps() -> None:
        function = StepRunner.step

        def step(*arguments: Any) -> Any:
            with steps.open("ab") as file:
                file.write(b".")
            return function(*arguments)

        StepRunner.step = step  # type: ignore[method-assign, assignment]

    def run_with(*hooks: Hook) -> int:
        def prepare() -> None:
            for hook in (count_steps, *hooks):
                hook()

        return run(lab, folder, prepare)

    if kind == "read-only":
        code = _read_only(folder, run_with, mounting)
    elif kind == "full before":
        # Up to just below the space that a training of this size requires.
        free_bytes = 120_000 * level
        code = run_with(lambda: _fill(filler, free_bytes, mounting, simulated=True))
    else:
        # Nine pages suffice for the remaining writes; zero pages at two different steps.
        free_bytes, call = 4096 * max(0, level - 1), 2 if level == 0 else 1
        code = run_with(
            at_call(StepRunner, "step", call, lambda: _fill(filler, free_bytes, mounting))
        )
    return code, len(steps.read_bytes())


def _fill(filler: Path, free_bytes: int, mounting: bool, simulated: bool = False) -> None:
    """Leave ``free_bytes``; without a mount, simulate `disk_usage` or limit the size of files."""
    usage = shutil.disk_usage(filler.parent)
    if mounting:
        with filler.open("wb") as file:
            file.write(b"\0" * max(0, usage.free - free_bytes))
    elif simulated:
        shutil.disk_usage = lambda _: usage._replace(free=free_bytes)  # type: ignore[assignment]
    else:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (min(free_bytes, 4096), resource.RLIM_INFINITY))


def _read_only(folder: Path, process: Any, mounting: bool) -> int:
    if mounting:
        _mount(folder, "-o", "remount,ro")
    folders = [path for path in (folder, *folder.rglob("*")) if path.is_dir()]
    if not mounting:
        for path in folders:
            path.chmod(0o555)
    code: int = process()
    if mounting:
        _mount(folder, "-o", "remount,rw")
    else:
        for path in folders:
            path.chmod(0o755)
    return code


def _mount(folder: Path, *args: str) -> None:
    subprocess.run(["mount", *args, folder], check=True)


def _is_intact(generation: Path) -> bool:
    try:
        read_manifest(generation)
    except IntegrityError:
        return False
    return True
