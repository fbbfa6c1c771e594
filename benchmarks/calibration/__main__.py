"""Compare promised and measured rates of the statistics, in a table.

Reads the runs of `recipes/calibration.yaml` and, for tuned settings, those of results/dolly-grid
and results/learning-rates. Writes calibration.json and calibration.md beside the former, and
widening.md: by how much the choice of tuned values lengthens an interval. Exits with 1 if a rate is
outside its bounds.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checks import CHECKS, Check
from rich.progress import track
from tuned import check_tuned, widening
from tuned_world import read_tuned_world
from world import read_world

from slm_lora.report.blocks import markdown_table
from slm_lora.runtime.hardware import processor
from slm_lora.runtime.storage import atomic_write_text
from slm_lora.stats.clustered import effective_groups


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results/calibration"))
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument(
        "--only", help="Run one group of checks, e.g. check_tuned; keep the other rows."
    )
    args = parser.parse_args()
    world = read_world(args.results)
    tuned_world = read_tuned_world(args.results.parent)
    groups: dict[str, Callable[[int], list[Check]]] = {
        check.__name__: functools.partial(check, world) for check in CHECKS
    }
    groups["check_tuned"] = functools.partial(check_tuned, tuned_world)
    if args.only is not None and args.only not in groups:
        parser.error(f"--only: one of {', '.join(groups)}")
    path = args.results / "calibration.json"
    record = json.loads(path.read_text(encoding="utf-8")) if args.only else {"checks": []}
    results: list[dict[str, Any]] = record["checks"]
    for name in track([args.only] if args.only else list(groups), "checks"):
        start = time.perf_counter()
        checks = groups[name](args.cases)
        run = {
            "group": name,
            "processor": processor(),
            "seconds": round(time.perf_counter() - start),
        }
        places = [i for i, result in enumerate(results) if result.get("group") == name]
        place = places[0] if places else len(results)
        results = [result for result in results if result.get("group") != name]
        results[place:place] = [run | asdict(check) | {"holds": check.holds} for check in checks]
    record |= {
        "command": "make calibration",
        "real_seeds": len(world.deviations),
        "groups": len(world.tokens),
        "effective_groups": effective_groups(world.tokens),
        "seed_deviation": world.seed_deviation,
        "checks": results,
    }
    if args.only in (None, "check_tuned"):
        record["widening"] = widening(tuned_world, args.cases)
    atomic_write_text(path, json.dumps(record, indent=2) + "\n")
    table = markdown_table(
        ["tested", "promised", "measured", "cases"],
        [
            [result["name"], result["promise"], _text(result), f"{result['cases']:,}"]
            for result in results
        ],
    )
    atomic_write_text(args.results / "calibration.md", table)
    atomic_write_text(args.results / "widening.md", _widening_table(record["widening"]))
    print(table)
    outside = [result for result in results if not result["holds"]]
    for result in outside:
        print(f"outside its bounds: {result['name']}: {_text(result)}")
    return 1 if outside else 0


def _text(result: dict[str, Any]) -> str:
    return Check("", "", tuple(result["measured"]), 0).measured_text


def _widening_table(records: list[dict[str, float]]) -> str:
    header = [
        "deviation between seeds",
        "validation rows",
        "tuning seeds",
        "mean regret",
        "mean bound",
        "half-length, choice ignored",
        "half-length",
    ]
    names = ("regret", "bound", "half_length_ordinary", "half_length")
    return markdown_table(
        header,
        [
            [
                f"{row['seed_deviation']:.4f}",
                f"{row['validation_rows']:,}",
                f"{row['tuning_seeds']}",
                *(f"{row[name]:.4f}" for name in names),
            ]
            for row in records
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
