"""slm-lora's own loop, compiled, as `slm-lora train` runs it."""

from __future__ import annotations

import sys

from contender import DROPOUT, EFFECTIVE_BATCH_SIZE, LEARNING_RATE, Clock, R, work
from ours import base_and_examples

from slm_lora.model import adapter, fusion
from slm_lora.recipe.schema import AdapterSection, TrainingSection
from slm_lora.training.loop import train


def main() -> None:
    clock = Clock()
    base, examples = base_and_examples(work())
    adapted = adapter.attach(base, AdapterSection(r=R, lora_dropout=DROPOUT), seed=0)
    section = TrainingSection(
        num_train_epochs=1,
        effective_batch_size=EFFECTIVE_BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        compile=True,
    )
    clock.begin()
    result = train(base, adapted, examples, section, seed=0, on_step=lambda step: clock.step())
    if not base.packed or not result.compiled:
        sys.exit(f"the fast path did not run: {base.why_plain or fusion.failure()}")
    # The first step runs plain, the second compiles.
    clock.tell_training([step.tokens for step in result.history], warm_up=2)


main()
