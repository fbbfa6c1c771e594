"""Every file of a checkpoint and of an adapter folder: cut short, removed, one bit flipped.

Damage to a checkpoint must be named and lead to the same result; damage to an adapter must be
refused, and one that lost its list of hashes must be told from one that has it."""

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
"""File, what is done to it, and how far in: tenths, or the number of the flip."""
CUTS, FLIPS = 10, 100


def damages(folder: Path) -> list[Damage]:
    """All that is done to the files of a folder."""
    names = sorted(path.name for path in folder.iterdir())
    cut = [(name, "cut", tenth) for name in names for tenth in range(CUTS)]
    gone = [(name, "removed", 0) for name in names]
    flipped = [(names[number % len(names)], "flipped", number) for number in range(FLIPS)]
    return cut + gone + flipped


def inflict(folder: Path, damage: Damage) -> None:
    """Do it."""
    name, kind, number = damage
    path = folder / name
    if kind == "removed":
        path.unlink()
        return
    content = bytearray(path.read_bytes())
    if kind == "cut":
        del content[len(content) * number // CUTS :]
    else:
        draw = random.Random(f"{name} {number}")
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def interrupted(lab: Lab) -> Path:
    """A case that was killed in its fourth step: two checkpoints are there."""
    folder = lab.folder / "interrupted"
    run(lab, folder, at_call(StepRunner, "step", 4, die))
    return folder


def newest(case: Path) -> list[Path]:
    """The case's checkpoints, newest first."""
    return sorted((case / "results" / NAME).glob("checkpoints/*/step-*"), reverse=True)


def damaged_checkpoint(lab: Lab, damage: Damage, both: bool, wanted: Any) -> dict[str, Any]:
    """Go on from a checkpoint that was damaged (and, if ``both``, so was the one before)."""
    folder = lab.folder / f"checkpoint-{'-'.join(map(str, damage))}-{both}"
    shutil.copytree(lab.folder / "interrupted", folder)
    hit = newest(folder)[: 2 if both else 1]
    for each in hit:
        inflict(each, damage)
    code = run(lab, folder)
    said = log_of(lab, folder)
    named = all(f"checkpoint passed over: {each}" in said for each in hit)
    named = named and ("from the beginning" in said) == both
    equal = code == 0 and outcome(folder) == wanted
    found = {"of": "checkpoint", "damage": damage, "both": both, "detected": named, "equal": equal}
    if named and equal:
        clean(lab, folder)
    else:
        found["said"] = said[-2000:]
    return found


def damaged_adapters(lab: Lab, folder: Path) -> list[dict[str, Any]]:
    """Load the adapter after each damage, all in one child, as the model stays as it is."""
    told = lab.folder / "adapters.json"
    child = os.fork()
    if not child:
        try:
            job = lab.jobs[0]
            base = load_base(job.source, device=job.device, precision=job.precision)
            found = [_damaged_adapter(lab, base, folder, each) for each in damages(folder)]
            told.write_text(json.dumps(found), encoding="utf-8")
        finally:
            os._exit(0)
    finish(child)
    verdicts: list[dict[str, Any]] = json.loads(told.read_text(encoding="utf-8"))
    return verdicts


def _damaged_adapter(lab: Lab, base: Any, folder: Path, damage: Damage) -> dict[str, Any]:
    copy = lab.folder / "damaged-adapter"
    shutil.copytree(folder, copy)
    inflict(copy, damage)
    detected, how = False, "loaded"
    try:
        attach.detach(adapter_io.load(base, copy))
        if not adapter_io.is_sealed(copy):
            detected, how = True, "loaded with a warning: nothing says its hashes"
    except IntegrityError as error:
        detected, how = True, str(error).replace(str(copy), "…")
    with contextlib.suppress(OSError):
        shutil.rmtree(copy)
    return {"of": "adapter", "damage": damage, "detected": detected, "how": how}
