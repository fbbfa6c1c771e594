"""slm-lora as a contender: its compiled training loop on the shared model and rows."""

# ruff: noqa: E402
from __future__ import annotations

import sys

from slm_lora.runtime import hardware

# As in the command, before slow imports.
hardware.reduce_gc_frequency()

import torch
from contender import DROPOUT, LEARNING_RATE, MAX_LENGTH, Clock, R, Work, parse_work

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


def base_and_examples(args: Work) -> tuple[Base, list[Example]]:
    """Load the base, and tokenise the rows."""
    source = resolve(ModelSection(name=str(args.model)))
    rows = read_rows(DataSection(name=str(args.rows), format="dolly"))
    template = choose_template("instruction_response", rows.format, include_context=False)
    examples, _ = RowTokenizer(load_tokenizer(source), template).encode(
        rows.rows, {row.row_id: row.row_id for row in rows.rows}, MAX_LENGTH
    )
    base = load_base(source, device=torch.device(args.device), precision=args.precision)
    return base, list(examples)


def micro_batch_tokens(args: Work, default: TrainingSection | EvaluationSection) -> int:
    """The recipe's default on a CPU; the capacity of an 80 GB GPU."""
    return 16_384 if args.on_gpu else default.micro_batch_tokens


LORA = AdapterSection(r=R, lora_dropout=DROPOUT, target_modules=("q_proj", "v_proj"))
"""The adapter of all contenders."""


def measure_training(adapter: AdapterSection) -> None:
    """Train one epoch as `slm-lora train` does; exit if the fast path did not run."""
    args = parse_work()
    clock = Clock(args.device)
    base, examples = base_and_examples(args)
    peft_model = attach.attach(base, adapter, seed=0)
    training = TrainingSection(
        num_train_epochs=1,
        effective_batch_size=args.batch,
        micro_batch_tokens=micro_batch_tokens(args, TrainingSection()),
        learning_rate=LEARNING_RATE,
        compile=True,
    )
    clock.begin()
    # The loop synchronises before it reports a step, and may have launched the next.
    result = train(
        base, peft_model, examples, training, seed=0, on_step=lambda step: clock.step(wait=False)
    )
    if not base.packed or not result.compiled:
        sys.exit(f"the fast path did not run: {base.fallback_reason or compilation.failure()}")
    # The first step is eager, the second compiles.
    clock.report_training([step.tokens for step in result.history], warm_up=2)
