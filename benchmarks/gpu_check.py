"""Checks on a GPU, with TinyLlama's architecture and random weights.

Losses compared to a CPU in fp32, in every precision of the device; bitwise equality of two runs
with one seed; a 4-bit base; speed, FLOP/s and memory of the described run (16 examples of up to 512
tokens per step, r=16 on q and v). Without a GPU a smaller version runs, and the record is marked as
incomplete. Exits with an error if a check fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from slm_lora.adapters import attach
from slm_lora.config.schema import AdapterSection, DataSection, ModelSection, TrainingSection
from slm_lora.data.sources import read_rows
from slm_lora.data.templates import choose_template
from slm_lora.data.tokenization import RowTokenizer
from slm_lora.evaluation.scoring import held_out_loss, score
from slm_lora.model.base import PrecisionName
from slm_lora.model.loading import choose_precision, load_base, load_tokenizer
from slm_lora.model.resolve import ModelSource, resolve
from slm_lora.records import Example
from slm_lora.runs.folder import to_json
from slm_lora.runtime import hardware
from slm_lora.runtime.storage import atomic_write_text
from slm_lora.training.loop import TrainingResult, train

EMBEDDED = "smollm2-135m-instruct-q4_1"
ARCHITECTURE = {  # config.json of TinyLlama/TinyLlama-1.1B-Chat-v1.0
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}  # fmt: skip
TOLERANCES: dict[PrecisionName, float] = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 5e-3}
"""Largest relative difference between a loss and the CPU's in fp32."""


@dataclass(frozen=True)
class TrainedRun:
    """A training and its results."""

    result: TrainingResult
    loss: float
    weights: dict[str, torch.Tensor]
    peak_bytes: int


class Check:
    """The model, its rows, and the checks."""

    def __init__(self, source: ModelSource, device: torch.device) -> None:
        self.source, self.device = source, device
        rows = read_rows(DataSection(name="ml-qa"))
        template = choose_template("instruction_response", rows.format, include_context=False)
        tokenizer = RowTokenizer(load_tokenizer(source), template)
        encoded, _ = tokenizer.encode(rows.rows, {r.row_id: r.row_id for r in rows.rows}, 512)
        self.examples: Sequence[Example] = list(encoded)

    def train(
        self,
        device: torch.device,
        precision: PrecisionName,
        n_rows: int,
        *,
        quantization: str | None = None,
        micro_batch_tokens: int = 2048,
        compiled: bool = False,
        plain: bool = False,
    ) -> TrainedRun:
        """Train one epoch on the first rows, and score the next sixteen."""
        base = load_base(
            self.source, device=device, precision=precision, quantization=quantization, padded=plain
        )
        hardware.reset_peak_memory(device.type)
        peft_model = attach.attach(
            base,
            AdapterSection(r=16, lora_dropout=0.05, target_modules=("q_proj", "v_proj")),
            seed=0,
        )
        config = TrainingSection(
            num_train_epochs=1,
            effective_batch_size=16 if self.device.type == "cuda" else 4,
            learning_rate=1e-3,
            micro_batch_tokens=micro_batch_tokens,
            compile=compiled,
        )
        result = train(base, peft_model, self.examples[:n_rows], config, seed=0)
        peak = hardware.peak_memory_bytes(device.type)
        scores = score(base, self.examples[n_rows : n_rows + 16], "test", micro_batch_tokens)
        weights = {n: p.detach().cpu() for n, p in peft_model.named_parameters() if p.requires_grad}
        return TrainedRun(result, held_out_loss(scores, "all").loss, weights, peak)

    def precisions(self) -> Iterator[PrecisionName]:
        """Precisions that the device computes fast."""
        yield "fp32"
        if self.device.type == "cuda":
            yield from ("bf16", "fp16")
        elif choose_precision("auto", self.device) == "bf16":
            yield "bf16"

    def agreement(self, n_rows: int) -> dict[str, Any]:
        """Compare losses of every step and after training to a CPU's in fp32, with transformers'
        attention on padded batches."""
        reference = self.train(torch.device("cpu"), "fp32", n_rows, plain=True)
        results: dict[str, Any] = {}
        for precision in self.precisions():
            run = self.train(self.device, precision, n_rows)
            steps = zip(run.result.history, reference.result.history, strict=True)
            distance = max(
                abs(run.loss / reference.loss - 1), *(abs(a.loss / b.loss - 1) for a, b in steps)
            )
            results[precision] = {
                "largest_relative_distance": distance,
                "tolerance": TOLERANCES[precision],
                "skipped_steps": sum(step.skipped for step in run.result.history),
                "holds": distance <= TOLERANCES[precision],
            }
        return results

    def repeats(self, precision: PrecisionName, n_rows: int) -> dict[str, Any]:
        """Compare the weights of two runs with one seed."""
        first, second = (self.train(self.device, precision, n_rows) for _ in range(2))
        same = all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)
        return {"precision": precision, "same_bits": same, "holds": same}

    def quantized(self, precision: PrecisionName, n_rows: int) -> dict[str, Any]:
        """Train on a 4-bit base, and record its memory beside that of the full-precision one."""
        if importlib.util.find_spec("bitsandbytes") is None:
            return {"left_out": "bitsandbytes is not installed (extra nf4)"}
        full_precision = self.train(self.device, precision, n_rows)
        quantized = self.train(self.device, precision, n_rows, quantization="nf4")
        return {
            "loss": quantized.loss,
            "loss_of_the_whole_base": full_precision.loss,
            "peak_bytes": quantized.peak_bytes,
            "peak_bytes_of_the_whole_base": full_precision.peak_bytes,
            # Rounding does not hurt random weights, so only the fall of the loss is checked.
            "holds": quantized.result.history[-1].loss < quantized.result.history[0].loss,
        }

    def speed(self, precision: PrecisionName, n_rows: int, weights: int) -> dict[str, Any]:
        """Tokens per second of the described run, and FLOP/s at 4·N FLOP per token."""
        on_gpu = self.device.type == "cuda"
        trained = self.train(
            self.device,
            precision,
            n_rows,
            micro_batch_tokens=16_384 if on_gpu else 2048,
            compiled=on_gpu,
        )
        rate = trained.result.tokens_per_s
        return {
            "precision": precision,
            "tokens_per_s": rate,
            "tflop_per_s": 4 * weights * rate / 1e12,
            "peak_bytes": trained.peak_bytes,
            "steps": len(trained.result.history),
            "first_step_seconds": trained.result.first_step_seconds,
        }


def random_model(folder: Path, layers: int) -> int:
    """TinyLlama's architecture with random weights and the embedded model's tokenizer.

    Returns:
        Number of weights that multiply every token.
    """
    tokenizer = AutoTokenizer.from_pretrained(resolve(ModelSection(name=EMBEDDED)).path)
    config = LlamaConfig(
        **cast("Any", {**ARCHITECTURE, "num_hidden_layers": layers}), vocab_size=len(tokenizer)
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    matrices = [p.numel() for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    return sum(matrices)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default=None)
    parser.add_argument("--out", type=Path, default=Path("results/gpu/gpu-check.json"))
    args = parser.parse_args()
    console = Console(highlight=False)
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    on_gpu = name == "cuda"
    layers, n_rows = (ARCHITECTURE["num_hidden_layers"], 64) if on_gpu else (2, 8)
    with tempfile.TemporaryDirectory() as folder:
        console.print(f"TinyLlama's architecture, {layers} layers, random weights, on {name}")
        weights = random_model(Path(folder), int(layers))
        check = Check(resolve(ModelSection(name=folder)), device)
        precision = choose_precision("auto", device)
        low_precision: PrecisionName = "fp16" if on_gpu else precision
        record: dict[str, Any] = {
            "complete": on_gpu,
            "layers": layers,
            "machine": hardware.describe(name),
            "versions": hardware.versions(),
        }
        if not on_gpu:
            record["left_out"] = "no GPU: two layers, no fp16, and none of this is about one"
        for check_name, work in (
            ("agreement", lambda: check.agreement(n_rows)),
            ("repeats", lambda: check.repeats(low_precision, n_rows)),
            ("quantized", lambda: check.quantized(precision, n_rows)),
            ("speed", lambda: check.speed(low_precision, 1600 if on_gpu else 3 * n_rows, weights)),
        ):
            record[check_name] = work()
            console.print(f"  {check_name}: {record[check_name]}", soft_wrap=True)
    atomic_write_text(args.out, to_json(record))
    console.print(f"{args.out}")
    checks = [*record["agreement"].values(), record["repeats"], record["quantized"]]
    if not all(result.get("holds", True) for result in checks):
        sys.exit("a check does not hold")


main()
