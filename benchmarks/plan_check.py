"""Predictions of `--plan` compared to runs: time, and peak memory of training.

Six configurations on a CPU that the constants were not fitted on; with --fitted, those of the fit.
Each is planned and then run, in separate processes.

    make plan-check            # writes results/plan/plan.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from slm_lora.runtime import hardware

RECIPE = Path(__file__).parent / "short.yaml"
ALWAYS = (
    "grid.cells=[]",
    "training.num_train_epochs=1",
    "training.precision=fp32",
    "data.test_rows=60",
    "data.validation_rows=10",
    "data.size=96",
)
OTHER = "another architecture"
"""Placeholder for the folder of a synthetic model."""

HELD_OUT: dict[str, tuple[str, ...]] = {
    "LoRA r=4 on q, k, v, o; batch 8": (
        "adapter.r=4",
        "adapter.target_modules=[q_proj,k_proj,v_proj,o_proj]",
        "training.effective_batch_size=8",
    ),
    "DoRA r=8 on q, v": ("adapter.kind=dora",),
    "LoRA r=16 on q, k, v, o, compiled; batch 32": (
        "adapter.r=16",
        "adapter.target_modules=[q_proj,k_proj,v_proj,o_proj]",
        "training.effective_batch_size=32",
        "training.compile=true",
    ),
    "QLoRA (NF4) r=16 on all linear": (
        "model.quantization=nf4",
        "adapter.r=16",
        "adapter.target_modules=all-linear",
    ),
    "full, batch 8": (
        "adapter.kind=full",
        "training.learning_rate=1e-5",
        "training.effective_batch_size=8",
        "data.size=48",
    ),
    "LoRA r=8 on q, v of a Qwen2 of 8 layers, 1,024 wide": (f"model.name={OTHER}",),
}
FITTED: dict[str, tuple[str, ...]] = {
    "LoRA r=8 on q, v": (),
    "LoRA r=16 on all linear": ("adapter.r=16", "adapter.target_modules=all-linear"),
    "LoRA r=8 on q, v, 256 tokens at once": ("training.micro_batch_tokens=256",),
    "LoRA r=8 on q, v, compiled": ("training.compile=true",),
    "LoRA r=8 on q, v, activation checkpointing": ("training.activation_checkpointing=true",),
    "QLoRA (NF4) r=8 on q, v": ("model.quantization=nf4",),
    "full, batch 16": ("adapter.kind=full", "training.learning_rate=1e-5", "data.size=48"),
}


def predict(overrides: list[str]) -> dict[str, float]:
    """The plan's figures of the cell, computed in this process."""
    from slm_lora.config.load import load_recipe
    from slm_lora.experiment.paths import ExperimentPaths
    from slm_lora.experiment.resolve_jobs import make_jobs
    from slm_lora.planning.plan import plan

    recipe, cells = load_recipe(RECIPE, overrides)
    nowhere = Path(tempfile.mkdtemp())
    cell = plan(make_jobs(cells, "nowhere"), ExperimentPaths(recipe.name, nowhere, nowhere)).cells[
        -1
    ]
    return {
        "seconds": cell.seconds,
        "training_s": cell.training_seconds,
        "scoring_s": cell.scoring_seconds,
        "memory_gb": cell.training_bytes / 1e9,
        "tokens": cell.training_tokens,
    }


def measure(overrides: list[str], folder: Path) -> dict[str, float]:
    """Run the cell; the figures of its record."""
    command = [sys.executable, "-m", "slm_lora", "experiment", str(RECIPE), *overrides]
    folders = ["--results", str(folder / "results"), "--adapters", str(folder / "adapter")]
    subprocess.run([*command, *folders], check=True, capture_output=True)
    [record] = (folder / "results").glob("*/runs/r*/run.json")
    run = json.loads(record.read_text(encoding="utf-8"))
    training, scoring = run["training"]["seconds"], run["evaluation"]["seconds"]
    return {
        "seconds": training + scoring,
        "training_s": training,
        "scoring_s": scoring,
        "memory_gb": run["training"]["peak_memory_bytes"] / 1e9,
        "tokens": run["training"]["tokens"],
    }


def other_architecture(folder: Path) -> Path:
    """A Qwen2 with other dimensions, random weights, and the embedded model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from slm_lora.config.schema import ModelSection
    from slm_lora.model.resolve import resolve

    tokenizer = AutoTokenizer.from_pretrained(resolve(ModelSection()).path)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/plan/plan.json"))
    parser.add_argument("--fitted", action="store_true", help="the configurations of the fit")
    parser.add_argument(
        "--only",
        default="",
        help="configurations whose name contains this; others are kept from the file",
    )
    parser.add_argument("--planned", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.planned is not None:
        print(json.dumps(predict(args.planned)))
        return
    runs: dict[str, Any] = {}
    if args.only and args.out.exists():
        runs = json.loads(args.out.read_text(encoding="utf-8"))["runs"]
    with tempfile.TemporaryDirectory() as folder:
        model = other_architecture(Path(folder) / "model")
        for name, settings in (FITTED if args.fitted else HELD_OUT).items():
            if args.only not in name:
                continue
            overrides = [word.replace(OTHER, str(model)) for word in (*ALWAYS, *settings)]
            # A later override of the same key wins.
            plan = [sys.executable, __file__, "--planned", *overrides]
            output = subprocess.run(plan, check=True, capture_output=True, text=True).stdout
            runs[name] = {
                "settings": settings,
                "predicted": json.loads(output.splitlines()[-1]),
                "measured": measure(overrides, Path(tempfile.mkdtemp(dir=folder))),
            }
            print(line(name, runs[name]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": hardware.describe("cpu"), "versions": hardware.versions(), "runs": runs}
    args.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def line(name: str, run: dict[str, dict[str, float]]) -> str:
    """Predicted and measured time and memory, with relative errors."""
    parts = []
    for key, unit in (("seconds", "s"), ("memory_gb", "GB")):
        predicted, measured = run["predicted"][key], run["measured"][key]
        error = 100 * (predicted / measured - 1)
        parts.append(f"{predicted:.2f} for {measured:.2f} {unit} ({error:+.0f} %)")
    return f"{name}: {', '.join(parts)}"


if __name__ == "__main__":
    main()
