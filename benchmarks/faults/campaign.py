"""The fault campaign: break a tiny experiment in every way that can be thought of, hundreds of
times, and compare what it ends with to the run that was left alone.

Two workers, forked from one process that has the imports done, fork a child for every sitting.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive a fork

import corruptions
import disks
import kills
import rows
import spoilt_numbers
from lab import Lab, count_operations, make_lab, outcome, run

from slm_lora.runtime import hardware
from slm_lora.runtime.storage import atomic_write_text

Verdicts = list[dict[str, Any]]
_WORKERS = 2


def in_workers(work: Callable[[Any], dict[str, Any]], cases: Sequence[Any], what: str) -> Verdicts:
    """All cases, two at a time; forked, so that they need not be pickled on the way there."""
    global _work
    _work = work
    began = time.monotonic()
    with multiprocessing.get_context("fork").Pool(_WORKERS) as pool:
        found = list(pool.imap_unordered(_do, cases))
    print(f"{what:34} {len(found):4} cases  {time.monotonic() - began:6.1f} s", flush=True)
    return found


_work: Callable[[Any], dict[str, Any]]


def _do(case: Any) -> dict[str, Any]:
    return _work(case)


def campaign(folder: Path, keep: int | None) -> dict[str, Any]:
    """All of it.

    Args:
        folder: for everything; nothing else is written.
        keep: only every so manieth case, to try the campaign itself.
    """
    lab = make_lab(folder)
    began = time.monotonic()
    operations = count_operations(lab, folder / "whole")
    wanted = outcome(folder / "whole")
    again, seconds = _alone(lab)
    if outcome(again) != wanted:
        sys.exit("two undisturbed runs differ: nothing can be compared")

    def some(cases: Sequence[Any]) -> list[Any]:
        return list(cases[keep - 1 :: keep]) if keep else list(cases)

    def killed(case: Any) -> dict[str, Any]:
        return kills.verdict(lab, case, wanted, operations, seconds)

    def damaged(case: Any) -> dict[str, Any]:
        return corruptions.damaged_checkpoint(lab, case[0], case[1], wanted)

    mounting = disks.can_mount(_new(folder / "mount"))

    def filled(case: Any) -> dict[str, Any]:
        return disks.verdict(lab, case, wanted, mounting)

    kill = in_workers(killed, some(kills.kill_cases(operations)), "kill -9")
    stop = in_workers(killed, some(kills.stop_cases()), "SIGTERM")
    disk = in_workers(filled, some(disks.disk_cases()), "disk full or read-only")
    template = corruptions.newest(corruptions.interrupted(lab))[0]
    hits = corruptions.damages(template)
    both = [each for each in hits if each[1] != "flipped"]
    cases = [*((each, False) for each in hits), *((each, True) for each in both)]
    points = in_workers(damaged, some(cases), "damaged checkpoints")
    adapters = corruptions.damaged_adapters(lab, next((again / "adapter").iterdir()))
    number = in_workers(
        lambda name: spoilt_numbers.verdict(lab, name), [*spoilt_numbers.NUMBERS], "NaN, inf"
    )
    kinds = [kind for kind in rows.KINDS if rows.detected(kind, folder)]
    real = [each for each in kill if each["first"] == kills.KILLED]
    asked = [each for each in stop if each["first"] == 75]
    damage = [*points, *adapters]
    return {
        "kills": len(real),
        "kills_equal": sum(each["equal"] for each in real),
        "kills_by_kind": dict(Counter(each["kind"] for each in real)),
        "sigterms": len(asked),
        "sigterms_equal": sum(each["equal"] for each in asked),
        "sigterms_by_kind": dict(Counter(each["kind"] for each in asked)),
        "disk_faults": len(disk),
        "disk_faults_held": sum(each["held"] for each in disk),
        "disk": "a tmpfs" if mounting else "limits on file size, and rights taken away",
        "corruptions": len(damage),
        "corruptions_detected": sum(each["detected"] for each in damage),
        "corruptions_of_checkpoints_equal": sum(each["equal"] for each in points),
        "corruptions_by_kind": dict(
            Counter(f"{each['of']} {each['damage'][1]}" for each in damage)
        ),
        "numbers": len(number),
        "numbers_held": sum(each["held"] for each in number),
        "bad_rows_kinds": len(kinds),
        "bad_rows_kinds_tried": len(rows.KINDS),
        "done_before_the_fault": len(kill) + len(stop) - len(real) - len(asked),
        "seconds": time.monotonic() - began,
        "file_operations_of_a_run": operations,
        "failed": [
            each
            for each in (*kill, *stop, *disk, *damage, *number)
            if not each.get("held", each.get("equal", True)) or not each.get("detected", True)
        ],
    }


def _alone(lab: Lab) -> tuple[Path, float]:
    began = time.monotonic()
    folder = lab.folder / "again"
    run(lab, folder)
    return folder, time.monotonic() - began


def _new(folder: Path) -> Path:
    folder.mkdir()
    return folder


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--every", type=int, help="Only every so manieth case; not recorded.")
    arguments.add_argument("--out", type=Path, default=Path("results/faults/faults.json"))
    given = arguments.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    found = campaign(folder, given.every)
    record = {
        **found,
        "command": "make faults",
        "machine": hardware.describe("cpu"),
        "versions": hardware.versions(),
    }
    text = json.dumps(record, indent=2) + "\n"
    if given.every:
        print(text)
    else:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(given.out, text)
        print(given.out)
    if found["failed"]:
        sys.exit(f"{len(found['failed'])} cases failed; what they left is in {folder}")
    shutil.rmtree(folder)


main()
