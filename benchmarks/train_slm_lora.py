"""LoRA with slm-lora."""

from __future__ import annotations

from ours import LORA, measure_training

measure_training(LORA)
