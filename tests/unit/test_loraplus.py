"""LoRA+ is refused where its ratio has no effect."""

from __future__ import annotations

import pytest
import torch

from slm_lora.config.schema import AdapterSection, CellConfig, TrainingSection
from slm_lora.errors import UsageError
from slm_lora.experiment.preflight import check_frozen
from slm_lora.training.optimizer import adamw

SECTION = TrainingSection(loraplus_lr_ratio=16, learning_rate=1e-3)


def test_loraplus_trains_b_matrices_at_a_multiple_of_the_rate() -> None:
    names = ("x.lora_A.weight", "x.lora_B.weight")
    named = {name: torch.nn.Parameter(torch.ones(2, 2)) for name in names}
    scales = {
        id(parameter): group["lr_scale"]
        for group in adamw(named, SECTION).param_groups
        for parameter in group["params"]
    }
    assert [scales[id(named[name])] for name in names] == [1.0, 16]


def test_loraplus_without_b_matrices_is_refused_not_ignored() -> None:
    named = {"x.vera_lambda_b": torch.nn.Parameter(torch.ones(2))}
    with pytest.raises(UsageError, match="no B matrices"):
        adamw(named, SECTION)


def test_loraplus_with_full_fine_tuning_is_refused_before_any_work() -> None:
    config = CellConfig(adapter=AdapterSection(kind="full"), training=SECTION)
    with pytest.raises(UsageError, match=r"loraplus_lr_ratio: has no effect .* full"):
        check_frozen(config)
