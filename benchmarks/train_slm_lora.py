"""LoRA with slm-lora."""

from __future__ import annotations

from contender import DROPOUT, R
from ours import measure_training

from slm_lora.recipe.schema import AdapterSection

measure_training(AdapterSection(r=R, lora_dropout=DROPOUT))
