"""Full fine-tuning with slm-lora."""

from __future__ import annotations

from slm_lora import machine

# As the command does, before anything is imported that takes its time.
machine.collect_garbage_rarely()

from ours import measure_training  # noqa: E402

from slm_lora.recipe.schema import AdapterSection  # noqa: E402

measure_training(AdapterSection(kind="full"))
