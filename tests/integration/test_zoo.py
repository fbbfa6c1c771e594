"""A sample of `make zoo`: small models of families that differ in head, attention or layers give
the loss of transformers and PEFT alone, or are refused before any work."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def zoo() -> ModuleType:
    specification = importlib.util.spec_from_file_location("zoo", ROOT / "benchmarks" / "zoo.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["zoo"] = module
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("family", "batches"),
    [
        ("gemma3n_text", "padded"),  # a cap of 30, of little effect here
        ("granite", "packed"),  # a scale
        ("phi", "packed"),  # a bias
        ("falcon_h1", "padded"),  # a scale, and layers that PEFT refuses
        ("qwen3_moe", "packed"),  # experts in one parameter
        ("gptj", "padded"),  # attention that cannot be exchanged
        ("gemma3", "padded"),  # a vision tower
        ("gpt2", "packed"),  # Conv1D in place of linear layers
        ("modernbert-decoder", "refused"),  # layers between hidden states and output embedding
    ],
)
def test_model_family_has_the_loss_of_transformers_and_peft(
    zoo: ModuleType, family: str, batches: str
) -> None:
    outcome = zoo.try_family(family, in_process=True)
    assert outcome.batches == batches, outcome
    assert outcome.passed, outcome


def test_zoo_comparison_detects_a_wrong_loss(
    zoo: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slm_lora.model import loading
    from slm_lora.ops.output_head import IDENTITY_FORM

    monkeypatch.setattr(loading, "_measured_head", lambda source, model: IDENTITY_FORM)
    for module in ("attach", "io"):
        monkeypatch.setattr(f"slm_lora.adapters.{module}.check_forward", lambda *_: None)
    outcome = zoo.try_family("granite", in_process=True)
    assert not outcome.passed
    assert outcome.base_difference > 1e-3
