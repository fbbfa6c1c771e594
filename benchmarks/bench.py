"""Benchmark of slm-lora, other libraries, and the machine's limit on the same rows.

Every contender runs in its own process, in repeated rounds, so that drift of the machine's speed
affects all. Medians over the rounds are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from contender import MAX_LENGTH, PREFIX, R, add_options
from rich.console import Console
from rich.table import Table

from slm_lora.config.schema import DataSection, ModelSection
from slm_lora.data.sources import read_rows
from slm_lora.data.splits import seeded_order
from slm_lora.model.resolve import resolve
from slm_lora.runtime import hardware
from slm_lora.runtime.storage import atomic_path

HERE = Path(__file__).parent
CONTENDERS = (
    "limit",
    "train_slm_lora",
    "train_slm_lora_full",
    "train_trl",
    "train_trainer",
    "score_slm_lora",
    "score_padded",
)
Figures = dict[str, Any]


def run(contender: str, model: Path, rows: Path, options: list[str]) -> Figures:
    """Figures of one process, with peak memory, time to the first step and tokens per second."""
    start = time.time()
    process = subprocess.Popen(
        [sys.executable, HERE / f"{contender}.py", model, rows, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    output, errors = process.communicate()
    if process.returncode:
        sys.exit(f"{contender} failed:\n{errors[-2000:]}{output[-500:]}")
    lines = [line for line in output.splitlines() if line.startswith(PREFIX)]
    figures: Figures = json.loads(lines[-1].removeprefix(PREFIX))
    if "first_step_at" in figures:
        figures["first_step_seconds"] = figures.pop("first_step_at") - start
    if "tokens" in figures:
        figures["tokens_per_s"] = figures["tokens"] / figures["seconds"]
    return figures


def write_rows(data: str, n_rows: int, path: Path) -> None:
    """Write the rows of all contenders, drawn by a seeded hash of their content."""
    rows_by_id = {row.row_id: row for row in read_rows(DataSection(name=data, format="dolly")).rows}
    row_ids = seeded_order(rows_by_id, "bench", 0)[:n_rows]
    with path.open("w", encoding="utf-8") as file:
        for row_id in row_ids:
            instruction, response = (turn.content for turn in rows_by_id[row_id].turns)
            row = {"instruction": instruction, "context": "", "response": response}
            file.write(json.dumps(row) + "\n")


def summary(rounds: list[dict[str, Figures]]) -> Figures:
    """Medians over rounds, and medians of the ratios within a round."""

    def median(contender: str, key: str) -> float:
        return statistics.median(figures[contender][key] for figures in rounds)

    def ratio(key: str, first: str, second: str, second_key: str = "") -> float:
        return statistics.median(run[first][key] / run[second][second_key or key] for run in rounds)

    ours, full, trl, trainer = "train_slm_lora", "train_slm_lora_full", "train_trl", "train_trainer"
    return {
        "limit": {
            key: median("limit", key)
            for key in (
                "gflop_per_s",
                "training_tokens_per_s",
                "full_training_tokens_per_s",
                "scoring_tokens_per_s",
            )
        },
        "training": {
            "tokens_per_s": median(ours, "tokens_per_s"),
            "trl_best_tokens_per_s": median(trl, "tokens_per_s"),
            "trainer_tokens_per_s": median(trainer, "tokens_per_s"),
            "ratio_to_trl_best": ratio("tokens_per_s", ours, trl),
            "ratio_to_trainer": ratio("tokens_per_s", ours, trainer),
            "fraction_of_limit": ratio("tokens_per_s", ours, "limit", "training_tokens_per_s"),
            "model_tflop_per_s": median(ours, "tokens_per_s")
            * 4
            * median("limit", "weights")
            / 1e12,
            "warm_up_seconds": median(ours, "warm_up_seconds"),
        },
        "full_training": {
            "tokens_per_s": median(full, "tokens_per_s"),
            "fraction_of_limit": ratio("tokens_per_s", full, "limit", "full_training_tokens_per_s"),
            "peak_bytes": median(full, "peak_memory_bytes"),
        },
        "evaluation": {
            "tokens_per_s": median("score_slm_lora", "tokens_per_s"),
            "padded_tokens_per_s": median("score_padded", "tokens_per_s"),
            "ratio_to_padded": ratio("tokens_per_s", "score_slm_lora", "score_padded"),
            "fraction_of_limit": ratio(
                "tokens_per_s", "score_slm_lora", "limit", "scoring_tokens_per_s"
            ),
            "loss": median("score_slm_lora", "loss"),
            "padded_loss": median("score_padded", "loss"),
        },
        "memory": {
            "peak_bytes": median(ours, "peak_memory_bytes"),
            "trl_best_peak_bytes": median(trl, "peak_memory_bytes"),
            "trainer_peak_bytes": median(trainer, "peak_memory_bytes"),
            "ratio_to_trl_best": ratio("peak_memory_bytes", ours, trl),
        },
        "first_step": {
            "seconds": median(ours, "first_step_seconds"),
            "trl_seconds": median(trl, "first_step_seconds"),
            "trainer_seconds": median(trainer, "first_step_seconds"),
            "ratio_to_trl": ratio("first_step_seconds", ours, trl),
        },
    }


def show(figures: Figures) -> None:
    """Print the table."""
    training, full, evaluation, memory, first = (
        figures[key] for key in ("training", "full_training", "evaluation", "memory", "first_step")
    )
    table = Table("", "slm-lora", "TRL", "Trainer + PEFT", "padded fp32 loop", "of the limit")
    table.add_row(
        "training, tokens/s",
        f"{training['tokens_per_s']:.0f}",
        f"{training['trl_best_tokens_per_s']:.0f}  ({training['ratio_to_trl_best']:.2f} ×)",
        f"{training['trainer_tokens_per_s']:.0f}  ({training['ratio_to_trainer']:.2f} ×)",
        "",
        f"{training['fraction_of_limit']:.0%}",
    )
    table.add_row(
        "full fine-tuning, tokens/s",
        f"{full['tokens_per_s']:.0f}",
        "",
        "",
        "",
        f"{full['fraction_of_limit']:.0%}",
    )
    table.add_row(
        "scoring, tokens/s",
        f"{evaluation['tokens_per_s']:.0f}",
        "",
        "",
        f"{evaluation['padded_tokens_per_s']:.0f}  ({evaluation['ratio_to_padded']:.2f} ×)",
        f"{evaluation['fraction_of_limit']:.0%}",
    )
    table.add_row(
        "peak memory, GB",
        f"{memory['peak_bytes'] / 1e9:.2f}",
        f"{memory['trl_best_peak_bytes'] / 1e9:.2f}",
        f"{memory['trainer_peak_bytes'] / 1e9:.2f}",
    )
    table.add_row(
        "start to first step, s",
        f"{first['seconds']:.1f}",
        f"{first['trl_seconds']:.1f}",
        f"{first['trainer_seconds']:.1f}",
    )
    Console(width=120).print(table)


def arguments_line(words: list[str]) -> str:
    """Arguments of `make bench`, with absolute paths reduced to names."""
    names = (Path(word).name if Path(word).is_absolute() else word for word in words)
    return f" ARGS='{' '.join(names)}'" if words else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="databricks/databricks-dolly-15k")
    parser.add_argument("--model", default=ModelSection().name, help="name or folder")
    add_options(parser)
    parser.add_argument("--rows", type=int, default=304)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/bench/bench.json"))
    args = parser.parse_args()
    source = resolve(ModelSection(name=args.model))
    options = [
        *("--device", args.device),
        *("--precision", args.precision),
        *("--batch", str(args.batch)),
    ]
    rounds: list[dict[str, Figures]] = []
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        write_rows(args.data, args.rows, rows)
        # An unrecorded run fills the compile cache.
        run("train_slm_lora", source.path, rows, options)
        for round_index in range(args.rounds):
            rounds.append({})
            for contender in CONTENDERS:
                figures = rounds[-1][contender] = run(contender, source.path, rows, options)
                rate = figures.get("tokens_per_s", figures.get("training_tokens_per_s"))
                print(f"round {round_index + 1}  {contender:20} {rate:6.0f} tokens/s", flush=True)
    medians = summary(rounds)
    record = {
        **medians,
        "command": f"make bench{arguments_line(sys.argv[1:])}",
        "work": {
            "model": source.name,
            "r": R,
            "data": Path(args.data).name,
            "rows": args.rows,
            "max_length": MAX_LENGTH,
            "effective_batch_size": args.batch,
            "precision": args.precision,
        },
        "machine": hardware.describe(args.device),
        "versions": hardware.versions() | {"trl": version("trl")},
        "rounds": rounds,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(args.out) as path:
        path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    show(medians)
    print(f"\n{args.out}")


main()
