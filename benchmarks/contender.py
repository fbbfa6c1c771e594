"""Shared by all contenders: command line, rows, adapter, report of figures."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from slm_lora.model.base import DTYPES, PrecisionName
from slm_lora.runtime import hardware

PREFIX = "measured: "
LEARNING_RATE, R, DROPOUT = 2e-4, 8, 0.05
MAX_LENGTH = 512


@dataclass(frozen=True)
class Work:
    """The command line of a contender.

    Attributes:
        model: folder of the base model.
        rows: JSON lines with ``instruction`` and ``response``.
        device: ``cpu`` or ``cuda``.
        precision: precision of the base's weights and of matrix products.
        batch: examples per optimizer step.
    """

    model: Path
    rows: Path
    device: str
    precision: PrecisionName
    batch: int

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the base's weights."""
        return DTYPES[self.precision]

    @property
    def on_gpu(self) -> bool:
        """Whether to run on a GPU, with large micro-batches."""
        return self.device == "cuda"

    def read(self) -> list[dict[str, str]]:
        """The rows, in file order."""
        return [json.loads(line) for line in self.rows.read_text(encoding="utf-8").splitlines()]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options shared by `bench` and the contenders."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--batch", type=int, default=16, help="examples per step")


def parse_work() -> Work:
    """Parse the command line: MODEL ROWS, and `add_options`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    add_options(parser)
    return Work(**vars(parser.parse_args()))


def text(row: dict[str, str], eos: str) -> str:
    """A row in the template of all contenders."""
    return f"Instruction:\n{row['instruction']}\nResponse:\n{row['response']}{eos}"


def report(device: str, **figures: Any) -> None:
    """Print the figures and the peak memory of this process or its GPU for the parent."""
    figures["peak_memory_bytes"] = hardware.peak_memory_bytes(device)
    print(PREFIX + json.dumps(figures), flush=True)


def lora() -> LoraConfig:
    """The adapter of all contenders."""
    return LoraConfig(
        r=R,
        lora_alpha=2 * R,
        lora_dropout=DROPOUT,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )


class Clock:
    """Times of finished optimizer steps, by the wall clock shared with the parent."""

    def __init__(self, device: str) -> None:
        """
        Args:
            device: training device.
        """
        self._device = device
        self.began = time.time()
        self.steps: list[float] = []

    def begin(self) -> None:
        """Mark the start of the training loop."""
        self.began = time.time()

    def step(self, wait: bool = True) -> None:
        """Mark the end of an optimizer step; ``wait`` to synchronise with the GPU first."""
        if wait and self._device == "cuda":
            torch.cuda.synchronize()
        self.steps.append(time.time())

    def report_training(self, tokens: list[int], warm_up: int) -> None:
        """Report tokens and seconds, with the first ``warm_up`` steps separate.

        Args:
            tokens: tokens without padding per optimizer step.
            warm_up: number of steps that fill caches and compile.
        """
        report(
            self._device,
            first_step_at=self.steps[0],
            warm_up_steps=warm_up,
            warm_up_seconds=self.steps[warm_up - 1] - self.began,
            tokens=sum(tokens[warm_up:]),
            seconds=self.steps[-1] - self.steps[warm_up - 1],
        )
