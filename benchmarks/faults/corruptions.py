"""Damage to every file of a checkpoint and of an adapter folder: truncated, removed, a bit flipped.

Damage to a checkpoint must be reported, and the result must not change; a damaged adapter must be
refused, and one without its list of hashes must load with a warning."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

from lab import NAME, Lab, at_call, clean, die, finish, log_of, outcome, run

from slm_lora.adapters import attach
from slm_lora.adapters import io as adapter_io
from slm_lora.errors import IntegrityError
from slm_lora.model.loading import load_base
from slm_lora.training.step import StepRunner

Damage = tuple[str, str, int]
"""File, kind of damage, and its position: tenths of the file, or the number of the flip."""
CUTS, FLIPS = 10, 100


def damages(folder: Path) -> list[Damage]:
    """All damages to the files of a folder."""
    names = sorted(path.name for path in folder.iterdir())
    cuts = [(name, "cut", tenth) for name in names for tenth in range(CUTS)]
    removals = [(name, "removed", 0) for name in names]
    flips = [(names[number % len(names)], "flipped", number) for number in range(FLIPS)]
    return cuts + removals + flips


def inflict(folder: Path, damage: Damage) -> None:
    """Damage a file."""
    name, kind, number = damage
    path = folder / name
    if kind == "removed":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    if kind == "cut":
        del content[len(content) * number // CUTS :]
    else:
        rng = random.Random(f"{name} {number}")
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def interrupted(lab: Lab) -> Path:
    """A case killed in its fourth step, with two checkpoints."""
    folder = lab.folder / "interrupted"
    run(lab, folder, at_call(StepRunner, "step", 4, die))
    return folder


def newest(case: Path) -> list[Path]:
    """The case's checkpoints, newest first."""
    return sorted((case / "results" / NAME).glob("checkpoints/*/step-*"), reverse=True)


def damaged_checkpoint(lab: Lab, damage: Damage, both: bool, expected: Any) -> dict[str, Any]:
    """Resume after damage to the newest checkpoint, or to ``both`` checkpoints."""
    folder = lab.folder / f"checkpoint-{'-'.join(map(str, damage))}-{both}"
    shutil.copytree(lab.folder / "interrupted", folder)
    damaged = newest(folder)[: 2 if both else 1]
    for checkpoint in damaged:
        inflict(checkpoint, damage)
    code = run(lab, folder)
    log = log_of(lab, folder)
    detected = all(f"checkpoint passed over: {checkpoint}" in log for checkpoint in damaged)
    detected = detected and ("from the beginning" in log) == both
    equal = code == 0 and outcome(folder) == expected
    verdict = {
        "of": "checkpoint",
        "damage": damage,
        "both": both,
        "detected": detected,
        "equal": equal,
    }
    if detected and equal:
        clean(lab, folder)
    else:
        verdict["said"] = log[-2000:]
    return verdict


def damaged_adapters(lab: Lab, folder: Path) -> list[dict[str, Any]]:
    """Load the adapter after each damage, in a single child, as the model does not change."""
    results_file = lab.folder / "adapters.json"
    child = os.fork()
    if not child:
        try:
            job = lab.jobs[0]
            base = load_base(job.source, device=job.device, precision=job.precision)
            results = [_damaged_adapter(lab, base, folder, damage) for damage in damages(folder)]
            results_file.write_text(json.dumps(results), encoding="utf-8")
        finally:
            os._exit(0)
    finish(child)
    verdicts: list[dict[str, Any]] = json.loads(results_file.read_text(encoding="utf-8"))
    return verdicts


def _damaged_adapter(lab: Lab, base: Any, folder: Path, damage: Damage) -> dict[str, Any]:
    copy = lab.folder / "damaged-adapter"
    shutil.copytree(folder, copy)
    inflict(copy, damage)
    detected, reaction = False, "loaded"
    try:
        attach.detach(adapter_io.load(base, copy))
        if not adapter_io.is_sealed(copy):
            detected, reaction = True, "loaded with a warning: no hashes"
    except IntegrityError as error:
        detected, reaction = True, str(error).replace(str(copy), "…")
    with contextlib.suppress(OSError):
        shutil.rmtree(copy)
    return {"of": "adapter", "damage": damage, "detected": detected, "how": reaction}
