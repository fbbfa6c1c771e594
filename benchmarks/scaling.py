"""Scaling of a run and of a grid: measured constants, a simulation, and its validation.

Measured: seconds per token and per step of one process with one thread, an all-reduce of the
adapter's gradients, the start of a process, the size of a checkpoint. Simulated: the steps of a run
on 1 to 16 processes (16 examples per step), and a grid of 1,000 cells on 1 to 1,024 workers.
Validated: runs with 1, 2 and 4 processes on this machine, compared to the simulation.
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

RECIPE = Path("benchmarks/short.yaml")
WORK = (
    "grid.cells=[{data.size: 128, adapter.r: 16}]", "data.test_rows=48", "data.validation_rows=16",
    "training.compile=false", "checkpoint_seconds=3600",
)  # fmt: skip
CHECKED, RANKS = (1, 2, 4), (1, 2, 4, 8, 16)
CELLS, WORKERS = 1000, (1, 4, 16, 64, 256, 1024)


@dataclass(frozen=True)
class Constants:
    """Constants of the simulation, in seconds and bytes.

    Attributes:
        step: fixed cost of a step: optimizer, clipping, bookkeeping.
        token: cost of a training token, one thread.
        test_token: cost of a scored token, one thread.
        start: from the command to the first step.
        latency: of a message in an all-reduce.
        bandwidth: bytes per second of a link.
        gradient_bytes: size of an all-reduce.
    """

    step: float
    token: float
    test_token: float
    start: float
    latency: float
    bandwidth: float
    gradient_bytes: int

    def all_reduce(self, ranks: int) -> float:
        """Seconds of a ring all-reduce: 2(n-1) messages of 1/n of the bytes."""
        if ranks == 1:
            return 0.0
        messages = 2 * (ranks - 1)
        return messages * (self.latency + self.gradient_bytes / ranks / self.bandwidth)


def simulated_steps(
    constants: Constants, steps: Sequence[Sequence[int]], ranks: int, cores: int
) -> float:
    """Seconds of a run's steps; ``steps`` holds the lengths of each step's examples.

    A step takes as long as the process with the most tokens; processes beyond the number of cores
    share them.
    """
    contention = max(1.0, ranks / cores)
    seconds = 0.0
    for lengths in steps:
        most_tokens = max(map(sum, distributed.partition(lengths, lambda length: length, ranks)))
        seconds += (
            constants.step
            + contention * constants.token * most_tokens
            + constants.all_reduce(ranks)
        )
    return seconds


def simulated_grid(cell_seconds: Sequence[float], workers: int, dispatch: float) -> float:
    """Seconds of a grid whose cells are dispatched in order to the next free worker."""
    free_at = [0.0] * workers
    heapq.heapify(free_at)
    end = 0.0
    for index, seconds in enumerate(cell_seconds):
        start = max(heapq.heappop(free_at), index * dispatch)
        heapq.heappush(free_at, start + seconds)
        end = max(end, start + seconds)
    return end


# --- measured ----------------------------------------------------------------------------------


def run(ranks: int, folder: Path) -> dict[str, Any]:
    """Run a training; seconds of its steps, of scoring, and in total."""
    folders = ("--results", folder / "results", "--adapters", folder / "adapter")
    command = [sys.executable, "-m", "slm_lora", "train", RECIPE, *WORK, *folders]
    if ranks > 1:
        command += ["--processes", ranks]
    start = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, command)), check=True, capture_output=True, env=environment)
    total = time.monotonic() - start
    run_folder = next((folder / "results").rglob("run.json")).parent
    record = json.loads((run_folder / "run.json").read_text(encoding="utf-8"))
    lines = (run_folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()
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
    """Latency and bandwidth between two local processes, from a tiny and a full all-reduce."""
    processes = [
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
    output, _ = [process.communicate()[0] for process in processes]
    small, large = (float(line.split()[1]) for line in output.splitlines())
    return small / 2, 4 * parameters / max(1e-9, large - small)


def measure() -> tuple[Constants, dict[int, dict[str, Any]]]:
    """Constants, and the runs for constants and validation."""
    runs = {}
    for ranks in CHECKED:
        with tempfile.TemporaryDirectory() as folder:
            runs[ranks] = run(ranks, Path(folder))
        print(f"{ranks} process(es): {sum(runs[ranks]['steps'][1:]):.1f} s of steps", flush=True)
    alone = runs[1]
    with tempfile.TemporaryDirectory() as folder:
        latency, bandwidth = measured_all_reduce(alone["trainable"], Path(folder))
    # Fit seconds on tokens, without the first step, a warm-up.
    token, step = np.polyfit(alone["tokens"][1:], alone["steps"][1:], 1)
    if step < 0:  # noise of few steps
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
    """Lengths of the examples in every step of the measured run."""
    _, cells = load_recipe(RECIPE, list(WORK))
    job = make_jobs(cells)[0]
    section = job.config.training
    total = -(-len(job.data.train) // section.effective_batch_size)
    steps = epoch_steps(job.data.train, section.effective_batch_size, job.config.seed, total)
    return [[example.length for example in step] for step in steps]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/scaling/scaling.json"))
    args = parser.parse_args()
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
    single_process = simulated_steps(constants, steps, 1, 1)
    run_table = [
        {
            "processes": ranks,
            "seconds": (seconds := simulated_steps(constants, steps, ranks, ranks)),
            "speedup": single_process / seconds,
            "efficiency": single_process / seconds / ranks,
            "all_reduce_share": len(steps) * constants.all_reduce(ranks) / seconds,
        }
        for ranks in RANKS
    ]
    # Sizes of cells in doublings, as in recipes/data-size.yaml.
    test = constants.test_token * runs[1]["test_tokens"]
    cells = [constants.start + test + single_process * 2 ** (n % 4 - 1) for n in range(CELLS)]
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
    args.out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(args.out, json.dumps(record, indent=2) + "\n")
    for title, rows in (("check", check), ("one run", run_table), ("grid", grid_table)):
        table = Table(*rows[0], title=title)
        for row in rows:
            table.add_row(*(f"{value:.4g}" for value in row.values()))
        Console(width=110).print(table)


if __name__ == "__main__":
    main()
