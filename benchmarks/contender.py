"""What every contender shares: its rows, and how it tells what it measured."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig

from slm_lora import machine

PREFIX = "measured: "
LEARNING_RATE, R, DROPOUT = 2e-4, 8, 0.05
EFFECTIVE_BATCH_SIZE, MAX_LENGTH = 16, 512


@dataclass(frozen=True)
class Work:
    """The command line of a contender: model folder and rows.

    Attributes:
        model: folder of the base model.
        rows: JSON lines with ``instruction`` and ``response``.
    """

    model: Path
    rows: Path

    def read(self) -> list[dict[str, str]]:
        """The rows, in their order."""
        return [json.loads(line) for line in self.rows.read_text(encoding="utf-8").splitlines()]


def work() -> Work:
    """From the command line: MODEL ROWS."""
    return Work(Path(sys.argv[1]), Path(sys.argv[2]))


def text(row: dict[str, str], eos: str) -> str:
    """A row in the template that all contenders train on."""
    return f"Instruction:\n{row['instruction']}\nResponse:\n{row['response']}{eos}"


def tell(**figures: Any) -> None:
    """Print the figures, and this process's peak memory, for the one who started it."""
    figures["peak_memory_bytes"] = machine.peak_memory_bytes("cpu")
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
    """Times of finished optimizer steps, by the clock that the starting process also reads."""

    def __init__(self) -> None:
        self.began = time.time()
        self.steps: list[float] = []

    def begin(self) -> None:
        """The training loop begins now."""
        self.began = time.time()

    def step(self) -> None:
        """An optimizer step is finished."""
        self.steps.append(time.time())

    def tell_training(self, tokens: list[int], warm_up: int) -> None:
        """Print tokens and seconds, those of the first ``warm_up`` steps apart.

        Args:
            tokens: real tokens (no padding) of every optimizer step.
            warm_up: steps that start caches and compilers.
        """
        tell(
            first_step_at=self.steps[0],
            warm_up_steps=warm_up,
            warm_up_seconds=self.steps[warm_up - 1] - self.began,
            tokens=sum(tokens[warm_up:]),
            seconds=self.steps[-1] - self.steps[warm_up - 1],
        )
