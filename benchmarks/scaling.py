"""How far one run and one grid scale: constants measured here, a simulation, and its check.

Measured: seconds a token and a step of one process with one thread, an all-reduce of the adapter's
gradients, the start of a process, the size of a checkpoint. Simulated: the steps of one run over
1 to 16 processes (a step has 16 examples), and a grid of 1,000 cells over 1 to 1,024 workers.
Checked: 1, 2 and 4 processes really run on this machine, against what the simulation says of them.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from slm_lora.config.load import load_recipe
from slm_lora.experiment.resolve_jobs import make_jobs
from slm_lora.runtime import distributed, hardware
from slm_lora.runtime.storage import atomic_write_text
from slm_lora.training.schedule import epoch_steps

RECIPE = Path("recipes/quickstart.yaml")
WORK = (
    "grid.cells=[{data.size: 128, adapter.r: 16}]", "data.test_rows=48", "data.validation_rows=16",
    "training.compile=false", "checkpoint_seconds=3600",
)  # fmt: skip
CHECKED, RANKS = (1, 2, 4), (1, 2, 4, 8, 16)
CELLS, WORKERS = 1000, (1, 4, 16, 64, 256, 1024)


@dataclass(frozen=True)
class Constants:
    """What the simulation is made of; seconds and bytes.

    Attributes:
        step: of a step, whatever it holds: optimizer, clipping, bookkeeping.
        token: of a training token, one thread.
        test_token: of a scored token, one thread.
        start: from the command to the first step.
        latency: of one message of an all-reduce.
        bandwidth: bytes a second of one link.
        gradient_bytes: that an all-reduce sums.
    """

    step: float
    token: float
    test_token: float
    start: float
    latency: float
    bandwidth: float
    gradient_bytes: int

    def all_reduce(self, ranks: int) -> float:
        """A ring: 2(n-1) messages, each of an nth of the bytes."""
        if ranks == 1:
            return 0.0
        messages = 2 * (ranks - 1)
        return messages * (self.latency + self.gradient_bytes / ranks / self.bandwidth)


def simulated_steps(
    constants: Constants, steps: Sequence[Sequence[int]], ranks: int, cores: int
) -> float:
    """Seconds of a run's steps; ``steps`` are the lengths of each one's examples.

    A step takes as long as the process with the most tokens; where there are more processes than
    cores, they take turns.
    """
    crowd = max(1.0, ranks / cores)
    seconds = 0.0
    for lengths in steps:
        most = max(map(sum, distributed.partition(lengths, lambda length: length, ranks)))
        seconds += constants.step + crowd * constants.token * most + constants.all_reduce(ranks)
    return seconds


def simulated_grid(cell_seconds: Sequence[float], workers: int, dispatch: float) -> float:
    """Seconds of a grid whose cells go to whoever is free, one dispatch after the other."""
    free = [0.0] * workers
    heapq.heapify(free)
    end = 0.0
    for number, seconds in enumerate(cell_seconds):
        begin = max(heapq.heappop(free), number * dispatch)
        heapq.heappush(free, begin + seconds)
        end = max(end, begin + seconds)
    return end


# --- measured ----------------------------------------------------------------------------------


def run(ranks: int, folder: Path) -> dict[str, Any]:
    """One real training; seconds of its steps, of its scoring, and of all."""
    where = ("--results", folder / "results", "--adapters", folder / "adapter")
    words = [sys.executable, "-m", "slm_lora", "train", RECIPE, *WORK, *where]
    if ranks > 1:
        words += ["--processes", ranks]
    began = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, words)), check=True, capture_output=True, env=environment)
    total = time.monotonic() - began
    made = next((folder / "results").rglob("run.json")).parent
    record = json.loads((made / "run.json").read_text(encoding="utf-8"))
    lines = (made / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    ends = [json.loads(line)["seconds"] for line in lines]
    return {
        "steps": np.diff(ends, prepend=0.0).tolist(),
        "tokens": [json.loads(line)["tokens"] for line in lines],
        "scoring": record["evaluation"]["seconds"],
        "test_tokens": record["data"]["sets"]["test"]["tokens"],
        "trainable": record["adapter"]["trainable_parameters"],
        "total": total,
    }


ALL_REDUCE = """
import sys, time, torch
from slm_lora.runtime import distributed
torch.set_num_threads(1)
with distributed.process_group():
    for size in map(int, sys.argv[1:]):
        tensor = torch.zeros(size)
        times = []
        for _ in range(30):
            distributed.barrier()
            began = time.perf_counter()
            distributed.all_reduce_sum(tensor)
            times.append(time.perf_counter() - began)
        if distributed.is_main():
            print(size, sorted(times)[15])
"""


def measured_all_reduce(parameters: int, folder: Path) -> tuple[float, float]:
    """Latency and bandwidth of two processes here, from an empty and a real all-reduce."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", ALL_REDUCE, "1", str(parameters)],
            env={
                **os.environ, "RANK": f"{rank}", "WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo",
                distributed.STORE: str(folder / "store"),
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    told, _ = [each.communicate()[0] for each in started]
    small, large = (float(line.split()[1]) for line in told.splitlines())
    return small / 2, 4 * parameters / max(1e-9, large - small)


def measure() -> tuple[Constants, dict[int, dict[str, Any]]]:
    """Constants, and the runs that they and the check come from."""
    runs = {}
    for ranks in CHECKED:
        with tempfile.TemporaryDirectory() as folder:
            runs[ranks] = run(ranks, Path(folder))
        print(f"{ranks} process(es): {sum(runs[ranks]['steps'][1:]):.1f} s of steps", flush=True)
    alone = runs[1]
    with tempfile.TemporaryDirectory() as folder:
        latency, bandwidth = measured_all_reduce(alone["trainable"], Path(folder))
    # The first step warms up; of the others, seconds against tokens.
    token, step = np.polyfit(alone["tokens"][1:], alone["steps"][1:], 1)
    if step < 0:  # within the noise of so few steps
        token, step = statistics.mean(alone["steps"][1:]) / statistics.mean(alone["tokens"][1:]), 0
    return Constants(
        step=float(step),
        token=float(token),
        test_token=alone["scoring"] / alone["test_tokens"],
        start=alone["total"] - sum(alone["steps"]) - alone["scoring"],
        latency=latency,
        bandwidth=bandwidth,
        gradient_bytes=4 * alone["trainable"],
    ), runs


def lengths_of_steps() -> list[list[int]]:
    """Lengths of the examples of every step of the measured work."""
    _, cells = load_recipe(RECIPE, list(WORK))
    job = make_jobs(cells)[0]
    section = job.config.training
    total = -(-len(job.data.train) // section.effective_batch_size)
    steps = epoch_steps(job.data.train, section.effective_batch_size, job.config.seed, total)
    return [[example.length for example in step] for step in steps]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, default=Path("results/scaling/scaling.json"))
    given = arguments.parse_args()
    constants, runs = measure()
    cores = os.cpu_count() or 1
    steps = lengths_of_steps()
    check = [
        {
            "processes": ranks,
            "measured_seconds": sum(runs[ranks]["steps"][1:]),
            "simulated_seconds": simulated_steps(constants, steps[1:], ranks, cores),
        }
        for ranks in CHECKED
    ]
    one = simulated_steps(constants, steps, 1, 1)
    run_table = [
        {
            "processes": ranks,
            "seconds": (seconds := simulated_steps(constants, steps, ranks, ranks)),
            "speedup": one / seconds,
            "efficiency": one / seconds / ranks,
            "all_reduce_share": len(steps) * constants.all_reduce(ranks) / seconds,
        }
        for ranks in RANKS
    ]
    # Cells of a grid differ: sizes in doublings, as in recipes/data-size.yaml.
    test = constants.test_token * runs[1]["test_tokens"]
    cells = [constants.start + test + one * 2 ** (n % 4 - 1) for n in range(CELLS)]
    cells.sort(reverse=True)
    dispatch = 0.01
    grid_table = [
        {
            "workers": workers,
            "hours": (seconds := simulated_grid(cells, workers, dispatch)) / 3600,
            "efficiency": sum(cells) / seconds / workers,
            "worker_seconds_a_cell": seconds * workers / CELLS,
        }
        for workers in WORKERS
    ]
    record = {
        "command": "make scaling",
        "constants": asdict(constants),
        "check": check,
        "one_run": run_table,
        "grid": {"cells": CELLS, "dispatch_seconds": dispatch, "table": grid_table},
        "machine": hardware.describe("cpu"),
        "versions": hardware.versions(),
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(given.out, json.dumps(record, indent=2) + "\n")
    for title, rows in (("check", check), ("one run", run_table), ("grid", grid_table)):
        table = Table(*rows[0], title=title)
        for row in rows:
            table.add_row(*(f"{value:.4g}" for value in row.values()))
        Console(width=110).print(table)


if __name__ == "__main__":
    main()
