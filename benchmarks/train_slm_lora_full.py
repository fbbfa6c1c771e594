"""Full fine-tuning with slm-lora."""

from __future__ import annotations

from ours import measure_training

from slm_lora.config.schema import AdapterSection

measure_training(AdapterSection(kind="full"))
