"""The rule of `training.learning_rate: auto`, against published numbers."""

from __future__ import annotations

import math

import pytest
from pydantic import ValidationError

from slm_lora.config.axes import TuningSection
from slm_lora.config.grid import Cell, at_learning_rate
from slm_lora.config.learning_rate import rates_around, suggested_rate
from slm_lora.config.schema import AdapterSection, CellConfig, Recipe, TrainingSection


def rate(
    model_type: str = "llama",
    width: int = 576,
    batch: int = 16,
    ratio: float | None = None,
    **adapter: object,
) -> float:
    training = TrainingSection(effective_batch_size=batch, loraplus_lr_ratio=ratio)
    section = AdapterSection.model_validate(adapter)
    return suggested_rate(model_type, width, section, training).value


@pytest.mark.parametrize(
    ("model_type", "width", "published"),
    [
        # tinker-cookbook 2025: 5e-5 · 10 · (2000 / width)^exponent
        ("llama", 2048, 4.9e-4),  # Llama-3.2-1B
        ("llama", 4096, 2.9e-4),  # Llama-3.1-8B
        ("llama", 8192, 1.7e-4),  # Llama-3.1-70B
        ("qwen3", 4096, 4.7e-4),  # Qwen3-8B
        ("qwen3_moe", 2048, 5.0e-4),  # Qwen3-30B-A3B
    ],
)
def test_the_formula_of_the_cookbook_at_its_alpha(
    model_type: str, width: int, published: float
) -> None:
    assert rate(model_type, width, lora_alpha=32, r=32) == published
    assert rate(model_type, width, lora_alpha=32, r=8) == published, "no rank at a fixed alpha"
    full = rate(model_type, width, kind="full")
    assert full == pytest.approx(published / 10, rel=0.02), "two digits each"


@pytest.mark.parametrize(
    ("model_type", "width", "best"),
    [
        # tinker-cookbook 2026: best of a sweep on Tulu 3 at batch 128, alpha 32
        ("llama", 2048, 1e-3),
        ("llama", 3072, 1e-3),
        ("llama", 4096, 3e-4),
        ("llama", 8192, 3e-4),
        ("qwen3", 4096, 1e-3),
    ],
)
def test_near_the_best_rates_of_a_later_sweep(model_type: str, width: int, best: float) -> None:
    ratio = rate(model_type, width, batch=128, lora_alpha=32) / best
    assert 1 / 3 < ratio < 3, "neighbours of that sweep are a factor of 2.5 to 3.3 apart"


def test_rank_at_a_constant_scale() -> None:
    rates = [rate(r=r, lora_alpha="2r") for r in (4, 16, 64)]
    assert rates == [2.6e-3, 1.3e-3, 6.6e-4], "1/√r"
    assert rate(r=16, lora_alpha=32) == rates[1]
    # α/√r = 32/√16 at r = 16: the same as LoRA with alpha 128.
    assert rate(kind="rslora", r=16, lora_alpha=32) == rate(r=16, lora_alpha=128)
    assert rate(kind="dora", r=16) == rates[1]


def test_batch_loraplus_and_other_families() -> None:
    assert rate(r=16, batch=64) == pytest.approx(2 * rate(r=16), rel=0.04)
    assert rate(r=16, ratio=16) == pytest.approx(rate(r=16) / 4, rel=0.04)
    assert rate(kind="full", ratio=16) == rate(kind="full"), "no B to speed up"
    assert rate("gpt2", 500, lora_alpha=32) == 1e-3, "(2000/500)^½ = 2"


def test_the_formula_gives_the_value() -> None:
    adapter = AdapterSection(kind="rslora", r=4)
    training = TrainingSection(effective_batch_size=32, loraplus_lr_ratio=9)
    suggested = suggested_rate("llama", 576, adapter, training)
    assert suggested.formula == (
        "5e-05 × (2000/width 576)^0.781 × 10 × √(32/alpha·√r 16) / √(LoRA+ ratio 9) "
        "× √(batch 32/16)"
    )
    expected = 5e-5 * (2000 / 576) ** 0.781 * 10 * math.sqrt(32 / 16) / 3 * math.sqrt(2)
    assert suggested.value == pytest.approx(expected, rel=0.02)


def test_values_around_a_rate() -> None:
    assert rates_around(1e-3) == (2.5e-4, 1e-3, 4e-3)
    assert rates_around(1.9e-3) == (2.5e-4, 1e-3, 4e-3)
    assert rates_around(2.1e-3) == (1e-3, 4e-3, 1.6e-2)
    assert rates_around(1.3e-4) == (6.3e-5, 2.5e-4, 1e-3)
    for exponent in range(-60, 0):
        low, middle, high = rates_around(10 ** (exponent / 10))
        assert 0.49 < middle / 10 ** (exponent / 10) < 2.05
        assert high / middle == pytest.approx(4, rel=0.05)
        assert middle / low == pytest.approx(4, rel=0.05)


def test_auto_is_no_number_before_it_is_resolved() -> None:
    section = TrainingSection()
    assert section.learning_rate == "auto"
    with pytest.raises(ValueError, match="not resolved"):
        _ = section.peak_rate
    assert TrainingSection(learning_rate=2e-4).peak_rate == 2e-4
    for value in (0, -1e-3, "fast", True):
        with pytest.raises(ValidationError):
            TrainingSection.model_validate({"learning_rate": value})


def test_a_cell_at_its_rate() -> None:
    options = Recipe(name="x").run_options
    cell = Cell("lrauto", {"training.learning_rate": "auto"}, CellConfig(), options)
    resolved = at_learning_rate(cell, 1.9e-3)
    assert resolved.config.training.learning_rate == 1.9e-3
    assert resolved.settings == {"training.learning_rate": 1.9e-3}
    assert resolved.name == "lrauto", "commands choose a cell by its name"
    assert at_learning_rate(Cell("r8", {"adapter.r": 8}, CellConfig(), options), 1e-3).settings == {
        "adapter.r": 8
    }


def test_tuning_without_values() -> None:
    section = TuningSection()
    assert (section.key, section.values) == (("training.learning_rate",), ("auto",))
    with pytest.raises(ValueError, match="not resolved"):
        _ = section.first_values
    assert section.with_rates([1e-3, 4e-3]).first_values == ((1e-3, 4e-3),)
    assert TuningSection.model_validate({"values": "auto"}) == section
    assert TuningSection.model_validate({"values": ["auto"]}) == section
    assert TuningSection.model_validate(section.model_dump(mode="json")) == section
    both = TuningSection.model_validate(
        {
            "key": ["training.learning_rate", "training.num_train_epochs"],
            "values": ["auto", [1, 2]],
        }
    )
    assert both.with_rates([1e-3, 4e-3]).first_values == ((1e-3, 4e-3), (1.0, 2.0))


@pytest.mark.parametrize(
    "section",
    [
        {"key": "training.num_train_epochs"},
        {"key": "training.num_train_epochs", "values": "auto"},
        {"values": [1e-3, "auto"]},
        {"values": "rule"},
    ],
)
def test_auto_is_for_the_learning_rate_alone(section: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        TuningSection.model_validate(section)
