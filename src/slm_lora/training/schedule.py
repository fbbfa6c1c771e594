"""The schedule of a training: its steps, their examples, micro-batch limits, learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from slm_lora.config.schema import TrainingSection
from slm_lora.data.collate import epoch_order, label_count, steps_per_epoch
from slm_lora.records import Example


def total_steps(rows: int, section: TrainingSection) -> int:
    """Optimizer steps of a training on ``rows`` examples."""
    steps = math.ceil(
        section.num_train_epochs * steps_per_epoch(rows, section.effective_batch_size)
    )
    return steps if section.max_steps is None else min(steps, section.max_steps)


def usable_examples(examples: Sequence[Example], section: TrainingSection) -> list[Example]:
    """Those that have a label to train on."""
    return [example for example in examples if label_count(example, section.loss_on)]


def training_tokens(usable: Sequence[Example], section: TrainingSection) -> int:
    """Real tokens that a training on these examples computes, about."""
    steps = total_steps(len(usable), section)
    epochs = steps / steps_per_epoch(len(usable), section.effective_batch_size)
    return round(epochs * sum(example.length for example in usable))


def epoch_steps(
    examples: Sequence[Example], batch: int, seed: int, total: int
) -> Iterator[list[Example]]:
    """The examples of each optimizer step; an epoch's last, partial step is one too."""
    done = 0
    for epoch in range(total):
        order = epoch_order(examples, seed, epoch)
        for start in range(0, len(order), batch):
            if done == total:
                return
            yield order[start : start + batch]
            done += 1


EAGER_CPU_TOKENS = 512
"""Tokens at once where a CPU computes plain code: that is a tenth faster than 2,048, and half the
memory (of 5.1 GB then, no more than 2.3 were in use: the heap was in pieces)."""


FP32_TOKENS = 768
"""Tokens at once where a CPU computes compiled code in fp32, in which each holds twice what it does
in bf16: no slower than 2,048, and 2.1 instead of 2.7 GB."""


def micro_batch_limits(
    section: TrainingSection, compiled: bool, frozen: bool, device: str, low_precision: bool
) -> tuple[int, int]:
    """Most tokens of a micro-batch (a longer document is one of its own): of plain code, and of
    compiled.

    Args:
        section: how to train.
        compiled: whether the training compiles; its first step is plain, and is to hold no more
            than the others.
        frozen: whether there are weights that do not train. Where all do, every micro-batch sums
            up gradients of all: few, large ones then.
        device: where it computes.
        low_precision: whether in half precision.
    """
    most = section.micro_batch_tokens
    few_on_cpu = frozen and device == "cpu"
    plain = min(most, EAGER_CPU_TOKENS) if compiled or few_on_cpu else most
    return plain, min(most, FP32_TOKENS) if few_on_cpu and not low_precision else most


def learning_rate(section: TrainingSection, step: int, total_steps: int) -> float:
    """Rate of optimizer step ``step`` (from 0) of ``total_steps``.

    Rises linearly over the warm-up, then follows the schedule to 0 at ``total_steps``; the same
    values as transformers' ``get_scheduler``.
    """
    warmup = math.ceil(section.warmup_ratio * total_steps)
    if step < warmup:
        return section.peak_rate * step / max(1, warmup)
    if section.lr_scheduler_type == "constant":
        return section.peak_rate
    progress = (step - warmup) / max(1, total_steps - warmup)
    if section.lr_scheduler_type == "cosine":
        return section.peak_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return section.peak_rate * (1 - progress)
