"""A full disk, at twenty levels, and one that may only be read: exit 6, and what was there stays.

As root the disk is a small tmpfs of its own. Elsewhere files are limited in size, which fails
like a full disk while a file is written, and the folder's rights are taken away."""

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
    """Whether this process may make a disk of its own."""
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False, capture_output=True
    )
    if done.returncode == 0:
        subprocess.run(["umount", folder], check=True)
    return done.returncode == 0


def disk_cases() -> list[tuple[str, int]]:
    """Full before training, full within it, read-only."""
    before = [("full before", level) for level in range(LEVELS_BEFORE)]
    within = [("full within", level) for level in range(LEVELS_WITHIN)]
    return [*before, *within, ("read-only", 0)]


def verdict(lab: Lab, case: tuple[str, int], wanted: Any, mounting: bool) -> dict[str, Any]:
    """Do one case: fill, run, look, make room, run again."""
    kind, level = case
    folder = lab.folder / f"{kind.replace(' ', '-')}-{level}"
    folder.mkdir()
    if mounting:
        _mount(folder, "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs")
    try:
        # What a killed sitting left: two checkpoints, of which the newest must stay as it is.
        run(lab, folder, at_call(StepRunner, "step", 4, die))
        before = [each.name for each in newest(folder)]
        filler = folder / "filler"
        code, steps = _on_a_bad_disk(lab, folder, kind, level, filler, mounting)
        filler.unlink(missing_ok=True)
        after = [each for each in newest(folder) if _whole(each)]
        kept = bool(after) and after[0].name >= before[0]
        ended = run(lab, folder)
        equal = ended == 0 and outcome(folder) == wanted
    finally:
        if mounting:
            subprocess.run(["umount", folder], check=True)
    found = {
        "kind": kind,
        "level": level,
        "code": code,
        "trained_steps": steps,
        "checkpoint_kept": kept,
        "equal": equal,
        "held": code == 6 and kept and equal and (kind == "full within" or steps == 0),
    }
    if not found["held"]:
        found["said"] = log_of(lab, folder)[-2000:]
    clean(lab, folder)
    return found


def _on_a_bad_disk(
    lab: Lab, folder: Path, kind: str, level: int, filler: Path, mounting: bool
) -> tuple[int, int]:
    """Exit code of the sitting, and the optimizer steps that it did."""
    steps = lab.folder / f"{folder.name}.steps"
    steps.write_bytes(b"")

    def counted() -> None:
        function = StepRunner.step

        def step(*arguments: Any) -> Any:
            with steps.open("ab") as file:
                file.write(b".")
            return function(*arguments)

        StepRunner.step = step  # type: ignore[method-assign, assignment]

    def hooked(*more: Hook) -> int:
        def prepare() -> None:
            for hook in (counted, *more):
                hook()

        return run(lab, folder, prepare)

    if kind == "read-only":
        code = _read_only(folder, hooked, mounting)
    elif kind == "full before":
        # Up to a little below what a training of this size asks for.
        room = 120_000 * level
        code = hooked(lambda: _fill(filler, room, mounting, said=True))
    else:
        # Nine pages are enough for all that is left to write; without any, once earlier, once
        # later.
        room, when = 4096 * max(0, level - 1), 2 if level == 0 else 1
        code = hooked(at_call(StepRunner, "step", when, lambda: _fill(filler, room, mounting)))
    return code, len(steps.read_bytes())


def _fill(filler: Path, room: int, mounting: bool, said: bool = False) -> None:
    """Leave ``room`` bytes; where the disk is not ours, say so to who asks, or limit files."""
    usage = shutil.disk_usage(filler.parent)
    if mounting:
        with filler.open("wb") as file:
            file.write(b"\0" * max(0, usage.free - room))
    elif said:
        shutil.disk_usage = lambda _: usage._replace(free=room)  # type: ignore[assignment]
    else:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (min(room, 4096), resource.RLIM_INFINITY))


def _read_only(folder: Path, sitting: Any, mounting: bool) -> int:
    if mounting:
        _mount(folder, "-o", "remount,ro")
    folders = [path for path in (folder, *folder.rglob("*")) if path.is_dir()]
    if not mounting:
        for path in folders:
            path.chmod(0o555)
    code: int = sitting()
    if mounting:
        _mount(folder, "-o", "remount,rw")
    else:
        for path in folders:
            path.chmod(0o755)
    return code


def _mount(folder: Path, *words: str) -> None:
    subprocess.run(["mount", *words, folder], check=True)


def _whole(generation: Path) -> bool:
    try:
        read_manifest(generation)
    except IntegrityError:
        return False
    return True
