"""slm-lora as the contenders run it: base model and rows, and its own loop, compiled."""

# ruff: noqa: E402
from __future__ import annotations

import sys

from slm_lora.runtime import hardware

# As the command does, before anything is imported that takes its time.
hardware.reduce_gc_frequency()

import torch
from contender import DROPOUT, LEARNING_RATE, MAX_LENGTH, Clock, R, Work, work

from slm_lora.adapters import attach
from slm_lora.config.schema import (
    AdapterSection,
    DataSection,
    EvaluationSection,
    ModelSection,
    TrainingSection,
)
from slm_lora.data.sources import read_rows
from slm_lora.data.templates import choose_template
from slm_lora.data.tokenization import RowTokenizer
from slm_lora.model.base import Base
from slm_lora.model.loading import load_base, load_tokenizer
from slm_lora.model.resolve import resolve
from slm_lora.ops import compilation
from slm_lora.records import Example
from slm_lora.training.loop import train


def base_and_examples(given: Work) -> tuple[Base, list[Example]]:
    """Load and tokenise."""
    source = resolve(ModelSection(name=str(given.model)))
    rows = read_rows(DataSection(name=str(given.rows), format="dolly"))
    template = choose_template("instruction_response", rows.format, include_context=False)
    examples, _ = RowTokenizer(load_tokenizer(source), template).encode(
        rows.rows, {row.row_id: row.row_id for row in rows.rows}, MAX_LENGTH
    )
    base = load_base(source, device=torch.device(given.device), precision=given.precision)
    return base, list(examples)


def micro_batch_tokens(given: Work, default: TrainingSection | EvaluationSection) -> int:
    """The recipe's default on a CPU; what an 80 GB GPU holds."""
    return 16_384 if given.on_gpu else default.micro_batch_tokens


LORA = AdapterSection(r=R, lora_dropout=DROPOUT)
"""The adapter of all contenders."""


def measure_training(trained: AdapterSection) -> None:
    """One epoch, as `slm-lora train` runs it; exits where the fast path did not run."""
    given = work()
    clock = Clock(given.device)
    base, examples = base_and_examples(given)
    peft_model = attach.attach(base, trained, seed=0)
    section = TrainingSection(
        num_train_epochs=1,
        effective_batch_size=given.batch,
        micro_batch_tokens=micro_batch_tokens(given, TrainingSection()),
        learning_rate=LEARNING_RATE,
        compile=True,
    )
    clock.begin()
    # The loop has waited for a step before it tells of it, and may have begun the next.
    result = train(
        base, peft_model, examples, section, seed=0, on_step=lambda step: clock.step(wait=False)
    )
    if not base.packed or not result.compiled:
        sys.exit(f"the fast path did not run: {base.fallback_reason or compilation.failure()}")
    # The first step runs plain, the second compiles.
    clock.tell_training([step.tokens for step in result.history], warm_up=2)
