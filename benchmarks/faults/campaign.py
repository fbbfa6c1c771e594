"""Fault campaign: inject hundreds of faults into a tiny experiment, resume it, and compare its
results to those of an undisturbed run.

Two workers, forked from a process with all imports done, fork a child for every process of a case.
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


def in_workers(work: Callable[[Any], dict[str, Any]], cases: Sequence[Any], title: str) -> Verdicts:
    """Verdicts of all cases, two at a time; workers are forked, so that cases are not pickled."""
    global _work
    _work = work
    start = time.monotonic()
    with multiprocessing.get_context("fork").Pool(_WORKERS) as pool:
        verdicts = list(pool.imap_unordered(_do, cases))
    print(f"{title:34} {len(verdicts):4} cases  {time.monotonic() - start:6.1f} s", flush=True)
    return verdicts


_work: Callable[[Any], dict[str, Any]]


def _do(case: Any) -> dict[str, Any]:
    return _work(case)


def campaign(folder: Path, every: int | None) -> dict[str, Any]:
    """Run all cases.

    Args:
        folder: for all files.
        every: run every n-th case only, to test the campaign itself.
    """
    lab = make_lab(folder)
    start = time.monotonic()
    operations = count_operations(lab, folder / "whole")
    expected = outcome(folder / "whole")
    second_run, seconds = _run_undisturbed(lab)
    if outcome(second_run) != expected:
        sys.exit("two undisturbed runs differ, so there is no reference")

    def sample(cases: Sequence[Any]) -> list[Any]:
        return list(cases[every - 1 :: every]) if every else list(cases)

    def killed(case: Any) -> dict[str, Any]:
        return kills.verdict(lab, case, expected, operations, seconds)

    def damaged(case: Any) -> dict[str, Any]:
        return corruptions.damaged_checkpoint(lab, case[0], case[1], expected)

    mounting = disks.can_mount(_make_folder(folder / "mount"))

    def filled(case: Any) -> dict[str, Any]:
        return disks.verdict(lab, case, expected, mounting)

    kill_cases = in_workers(killed, sample(kills.kill_cases(operations)), "kill -9")
    stop_cases = in_workers(killed, sample(kills.stop_cases()), "SIGTERM")
    disk_cases = in_workers(filled, sample(disks.disk_cases()), "disk full or read-only")
    template = corruptions.newest(corruptions.interrupted(lab))[0]
    damages = corruptions.damages(template)
    damages_of_both = [damage for damage in damages if damage[1] != "flipped"]
    cases = [
        *((damage, False) for damage in damages),
        *((damage, True) for damage in damages_of_both),
    ]
    checkpoint_cases = in_workers(damaged, sample(cases), "damaged checkpoints")
    adapter_cases = corruptions.damaged_adapters(lab, next((second_run / "adapter").iterdir()))
    number_cases = in_workers(
        lambda name: spoilt_numbers.verdict(lab, name), [*spoilt_numbers.NUMBERS], "NaN, inf"
    )
    kinds = [kind for kind in rows.KINDS if rows.detected(kind, folder)]
    killed_runs = [verdict for verdict in kill_cases if verdict["first"] == kills.KILLED]
    stopped = [verdict for verdict in stop_cases if verdict["first"] == 75]
    damage_cases = [*checkpoint_cases, *adapter_cases]
    return {
        "kills": len(killed_runs),
        "kills_equal": sum(verdict["equal"] for verdict in killed_runs),
        "kills_by_kind": dict(Counter(verdict["kind"] for verdict in killed_runs)),
        "sigterms": len(stopped),
        "sigterms_equal": sum(verdict["equal"] for verdict in stopped),
        "sigterms_by_kind": dict(Counter(verdict["kind"] for verdict in stopped)),
        "disk_faults": len(disk_cases),
        "disk_faults_held": sum(verdict["held"] for verdict in disk_cases),
        "disk": "a tmpfs" if mounting else "limits on file size, and rights taken away",
        "corruptions": len(damage_cases),
        "corruptions_detected": sum(verdict["detected"] for verdict in damage_cases),
        "corruptions_of_checkpoints_equal": sum(verdict["equal"] for verdict in checkpoint_cases),
        "corruptions_by_kind": dict(
            Counter(f"{verdict['of']} {verdict['damage'][1]}" for verdict in damage_cases)
        ),
        "numbers": len(number_cases),
        "numbers_held": sum(verdict["held"] for verdict in number_cases),
        "bad_rows_kinds": len(kinds),
        "bad_rows_kinds_tried": len(rows.KINDS),
        "done_before_the_fault": len(kill_cases)
        + len(stop_cases)
        - len(killed_runs)
        - len(stopped),
        "seconds": time.monotonic() - start,
        "file_operations_of_a_run": operations,
        "failed": [
            verdict
            for verdict in (
                *kill_cases,
                *stop_cases,
                *disk_cases,
                *damage_cases,
                *number_cases,
            )
            if not verdict.get("held", verdict.get("equal", True))
            or not verdict.get("detected", True)
        ],
    }


def _run_undisturbed(lab: Lab) -> tuple[Path, float]:
    start = time.monotonic()
    folder = lab.folder / "again"
    run(lab, folder)
    return folder, time.monotonic() - start


def _make_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, help="run every n-th case only; not recorded")
    parser.add_argument("--out", type=Path, default=Path("results/faults/faults.json"))
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    results = campaign(folder, args.every)
    record = {
        **results,
        "command": "make faults",
        "machine": hardware.describe("cpu"),
        "versions": hardware.versions(),
    }
    text = json.dumps(record, indent=2) + "\n"
    if args.every:
        print(text)
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(args.out, text)
        print(args.out)
    if results["failed"]:
        sys.exit(f"{len(results['failed'])} cases failed; their files are in {folder}")
    shutil.rmtree(folder)


main()
