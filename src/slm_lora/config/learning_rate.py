"""A learning rate from published rules: the value of ``training.learning_rate: auto``.

A starting point, not a tuned value: the sources measured other models, rows and schedules. Nothing
here was fitted to results of this project.

    rate = 5e-5 × 10 × (2000 / width)^p × √(32 / α) × √(batch / 16)

- *Base, factor, width*: "LoRA Without Regret" (Schulman et al., Thinking Machines Lab, 2025): over
  Llama and Qwen models the best rate of LoRA is about 10 times that of full fine-tuning, with
  random A, zero B and α = 32. Base 5e-5, width 2000 and exponents are those of their
  tinker-cookbook (``hyperparam_utils.get_lr`` of 2025): 0.781 for Llama, 0.0775 for Qwen. It names
  no exponent for other families; these get ½, the exponent of the width in the next source.
- *Rank and scale*: "Learning Rate Scaling across LoRA Ranks and Transfer to Full Finetuning" (Chen,
  Villar, Hayou 2026, arXiv 2602.06204): with random A and zero B the best rate falls as 1/√r if B·A
  is multiplied by a constant, and does not depend on r if it is multiplied by 1/r. So it falls as
  1/√(scale × r), which is α = 32 in the first source: √(32/α). rsLoRA multiplies by α/√r, so its
  α is α·√r in these terms.
- *Batch*: proportional to the square root (Malladi et al. 2022, arXiv 2205.10287, for Adam; the
  cookbook says the same). The cookbook does not state the batch size of its formula. 16, this
  tool's default, is the assumption here; at batch 128 it gives within a factor of 3 what the
  cookbook's later sweep found best at batch 128 for Llama of 1B to 70B and Qwen3-8B.
- *Full fine-tuning*: the same without factor 10 and without rank.
- *LoRA+*: the geometric mean of the rates of A and B is the rate above, as in "LoRA+" (Hayou et al.
  2024), where width^-½ for both becomes width^-1 and 1.

PiSSA has no term: Lee et al. 2026 (arXiv 2602.04998) find its best rate below LoRA's, and by a
factor that differs between models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slm_lora.config.schema import AdapterSection, TrainingSection

BASE_RATE, LORA_FACTOR, BASE_WIDTH = 5e-5, 10, 2000
BASE_ALPHA, BASE_BATCH = 32, 16
WIDTH_EXPONENTS = {"llama": 0.781, "qwen": 0.0775}
"""By the start of a configuration's ``model_type``."""
OTHER_EXPONENT = 0.5
DISTANCE = 4.0
"""Ratio of neighbouring values of ``tuning.values: auto``."""


@dataclass(frozen=True, slots=True)
class SuggestedRate:
    """A learning rate and its origin.

    Attributes:
        value: rounded to two digits.
        formula: the rule with its inputs, on one line.
    """

    value: float
    formula: str


def suggested_rate(
    model_type: str, hidden_size: int, adapter: AdapterSection, training: TrainingSection
) -> SuggestedRate:
    """The rule's rate for a setting.

    Args:
        model_type: of the base's configuration.
        hidden_size: of the base.
        adapter: method, rank, alpha.
        training: batch size and LoRA+ ratio; its learning rate is not read.
    """
    exponent = next(
        (power for family, power in WIDTH_EXPONENTS.items() if model_type.startswith(family)),
        OTHER_EXPONENT,
    )
    rate = BASE_RATE * (BASE_WIDTH / hidden_size) ** exponent
    formula = f"{BASE_RATE:g} × ({BASE_WIDTH}/width {hidden_size})^{exponent:g}"
    if adapter.kind != "full":
        rsl = adapter.kind == "rslora"
        alpha = adapter.alpha * (math.sqrt(adapter.r) if rsl else 1)
        rate *= LORA_FACTOR * math.sqrt(BASE_ALPHA / alpha)
        label = "alpha·√r" if rsl else "alpha"
        formula += f" × {LORA_FACTOR} × √({BASE_ALPHA}/{label} {alpha:.4g})"
        if training.loraplus_lr_ratio:
            rate /= math.sqrt(training.loraplus_lr_ratio)
            formula += f" / √(LoRA+ ratio {training.loraplus_lr_ratio:g})"
    batch_size = training.effective_batch_size
    rate *= math.sqrt(batch_size / BASE_BATCH)
    formula += f" × √(batch {batch_size}/{BASE_BATCH})"
    return SuggestedRate(_two_digits(rate), formula)


def rates_around(rate: float) -> tuple[float, float, float]:
    """The value of 1e-3 × 4^k next to a rate, and its two neighbours.

    Fixed values rather than multiples of the rate: settings with different rates then share most of
    theirs, also those halfway between, so that they can be compared at one learning rate without
    further runs.
    """
    nearest = round(math.log(rate / 1e-3, DISTANCE))
    low, middle, high = (_two_digits(1e-3 * DISTANCE ** (nearest + step)) for step in (-1, 0, 1))
    return low, middle, high


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")
