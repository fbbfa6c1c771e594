"""Compare promised and measured rates of the statistics, in a table.

Reads the runs of `recipes/calibration.yaml`; writes calibration.json and calibration.md beside
them. Exits with 1 if a rate is outside its bounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from checks import CHECKS
from rich.progress import track
from world import read_world

from slm_lora.report.blocks import markdown_table
from slm_lora.runtime.storage import atomic_write_text
from slm_lora.stats.clustered import effective_groups


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results/calibration"))
    parser.add_argument("--cases", type=int, default=1000)
    args = parser.parse_args()
    world, start = read_world(args.results), time.perf_counter()
    checks = [check for group in track(CHECKS, "checks") for check in group(world, args.cases)]
    table = markdown_table(
        ["tested", "promised", "measured", "cases"],
        [[c.name, c.promise, c.measured_text, f"{c.cases:,}"] for c in checks],
    )
    record = {
        "command": "make calibration",
        "seconds": round(time.perf_counter() - start),
        "real_seeds": len(world.deviations),
        "groups": len(world.tokens),
        "effective_groups": effective_groups(world.tokens),
        "seed_deviation": world.seed_deviation,
        "checks": [asdict(check) | {"holds": check.holds} for check in checks],
    }
    atomic_write_text(args.results / "calibration.json", json.dumps(record, indent=2) + "\n")
    atomic_write_text(args.results / "calibration.md", table)
    print(table)
    for check in checks:
        if not check.holds:
            print(f"outside its bounds: {check.name}: {check.measured_text}")
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
