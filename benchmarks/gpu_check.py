"""What only a GPU can show, checked on one: TinyLlama's architecture with random weights.

Losses against those of a CPU in fp32, in every precision that the device has; two runs of one seed;
a base in 4 bits; speed, use of the device and memory of the described run (16 examples of up to 512
tokens a step, r=16 on q and v). On a machine without a GPU what can run runs smaller, and the file
says so. Fails if a check does.
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
"""Largest relative distance of a loss from the CPU's in fp32."""


@dataclass(frozen=True)
class Trained:
    """One training, and what it left."""

    result: TrainingResult
    loss: float
    weights: dict[str, torch.Tensor]
    peak_bytes: int


class Check:
    """The model, its rows, and the trainings that are compared."""

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
        many: int,
        *,
        quantization: str | None = None,
        micro_batch_tokens: int = 2048,
        compiled: bool = False,
        plain: bool = False,
    ) -> Trained:
        """One epoch over the first rows; the loss after it on the next sixteen."""
        base = load_base(
            self.source, device=device, precision=precision, quantization=quantization, padded=plain
        )
        hardware.reset_peak_memory(device.type)
        peft_model = attach.attach(base, AdapterSection(r=16, lora_dropout=0.05), seed=0)
        section = TrainingSection(
            num_train_epochs=1,
            effective_batch_size=16 if self.device.type == "cuda" else 4,
            learning_rate=1e-3,
            micro_batch_tokens=micro_batch_tokens,
            compile=compiled,
        )
        result = train(base, peft_model, self.examples[:many], section, seed=0)
        peak = hardware.peak_memory_bytes(device.type)
        scores = score(base, self.examples[many : many + 16], "test", micro_batch_tokens)
        weights = {n: p.detach().cpu() for n, p in peft_model.named_parameters() if p.requires_grad}
        return Trained(result, held_out_loss(scores, "all").loss, weights, peak)

    def precisions(self) -> Iterator[PrecisionName]:
        """That the device computes fast."""
        yield "fp32"
        if self.device.type == "cuda":
            yield from ("bf16", "fp16")
        elif choose_precision("auto", self.device) == "bf16":
            yield "bf16"

    def agreement(self, many: int) -> dict[str, Any]:
        """Losses of the device against those of a CPU in fp32 with transformers' own attention on
        padded batches, step by step and after training."""
        wanted = self.train(torch.device("cpu"), "fp32", many, plain=True)
        found: dict[str, Any] = {}
        for precision in self.precisions():
            got = self.train(self.device, precision, many)
            steps = zip(got.result.history, wanted.result.history, strict=True)
            apart = max(
                abs(got.loss / wanted.loss - 1), *(abs(a.loss / b.loss - 1) for a, b in steps)
            )
            found[precision] = {
                "largest_relative_distance": apart,
                "tolerance": TOLERANCES[precision],
                "skipped_steps": sum(step.skipped for step in got.result.history),
                "holds": apart <= TOLERANCES[precision],
            }
        return found

    def repeats(self, precision: PrecisionName, many: int) -> dict[str, Any]:
        """Two runs of one seed."""
        one, other = (self.train(self.device, precision, many) for _ in range(2))
        same = all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
        return {"precision": precision, "same_bits": same, "holds": same}

    def quantized(self, precision: PrecisionName, many: int) -> dict[str, Any]:
        """A base in 4 bits: it trains, and takes less memory than the whole one."""
        if importlib.util.find_spec("bitsandbytes") is None:
            return {"left_out": "bitsandbytes is not installed (extra nf4)"}
        whole = self.train(self.device, precision, many)
        four = self.train(self.device, precision, many, quantization="nf4")
        return {
            "loss": four.loss,
            "loss_of_the_whole_base": whole.loss,
            "peak_bytes": four.peak_bytes,
            "peak_bytes_of_the_whole_base": whole.peak_bytes,
            # Random weights are no worse for being rounded; that it learns is what counts.
            "holds": four.result.history[-1].loss < four.result.history[0].loss,
        }

    def speed(self, precision: PrecisionName, many: int, weights: int) -> dict[str, Any]:
        """The described run: tokens a second, and FLOP a second at 4·N a token."""
        on_gpu = self.device.type == "cuda"
        done = self.train(
            self.device,
            precision,
            many,
            micro_batch_tokens=16_384 if on_gpu else 2048,
            compiled=on_gpu,
        )
        rate = done.result.tokens_per_s
        return {
            "precision": precision,
            "tokens_per_s": rate,
            "tflop_per_s": 4 * weights * rate / 1e12,
            "peak_bytes": done.peak_bytes,
            "steps": len(done.result.history),
            "first_step_seconds": done.result.first_step_seconds,
        }


def random_model(folder: Path, layers: int) -> int:
    """TinyLlama's architecture with random weights and the embedded model's tokenizer.

    Returns:
        Weights that every token is multiplied with.
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
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--device", choices=["cuda", "cpu"], default=None)
    arguments.add_argument("--out", type=Path, default=Path("results/gpu/gpu-check.json"))
    given = arguments.parse_args()
    console = Console(highlight=False)
    name = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    whole = name == "cuda"
    layers, many = (ARCHITECTURE["num_hidden_layers"], 64) if whole else (2, 8)
    with tempfile.TemporaryDirectory() as folder:
        console.print(f"TinyLlama's architecture, {layers} layers, random weights, on {name}")
        weights = random_model(Path(folder), int(layers))
        check = Check(resolve(ModelSection(name=folder)), device)
        precision = choose_precision("auto", device)
        half: PrecisionName = "fp16" if whole else precision
        found: dict[str, Any] = {
            "complete": whole,
            "layers": layers,
            "machine": hardware.describe(name),
            "versions": hardware.versions(),
        }
        if not whole:
            found["left_out"] = "no GPU: two layers, no fp16, and none of this is about one"
        for what, work in (
            ("agreement", lambda: check.agreement(many)),
            ("repeats", lambda: check.repeats(half, many)),
            ("quantized", lambda: check.quantized(precision, many)),
            ("speed", lambda: check.speed(half, 1600 if whole else 3 * many, weights)),
        ):
            found[what] = work()
            console.print(f"  {what}: {found[what]}", soft_wrap=True)
    atomic_write_text(given.out, to_json(found))
    console.print(f"{given.out}")
    checks = [*found["agreement"].values(), found["repeats"], found["quantized"]]
    if not all(each.get("holds", True) for each in checks):
        sys.exit("a check does not hold")


main()
