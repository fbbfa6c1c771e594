"""What is trained besides LoRA: all weights, PiSSA's beginning, LoRA+'s two rates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from slm_lora.data.batches import pack
from slm_lora.model import adapter, adapter_folder
from slm_lora.model.base import DTYPES, Base
from slm_lora.model.forward import batch_nll
from slm_lora.recipe.schema import AdapterSection, TrainingSection
from slm_lora.training.loop import train

from .test_forward import LENGTHS, make_examples

LoadTiny = Callable[..., Base]
FULL = AdapterSection(kind="full")


def full_gradients(base: Base, seed: int, double: bool = False) -> torch.Tensor:
    """Gradients of all weights of the summed NLL."""
    trained = adapter.attach(base, FULL, seed=0)
    trained.train()
    if double:
        trained.double()
    batch_nll(base, pack(make_examples(LENGTHS, seed), "all")).backward()
    return torch.cat([p.grad.double().flatten() for p in trained.parameters()])


def test_full_gradients_are_those_of_fp64(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DTYPES, "fp64", torch.float64)
    seeds = range(4)
    references = [full_gradients(load_tiny("fp64", plain=True), s, double=True) for s in seeds]

    def error(precision: str, plain: bool) -> float:
        found = [full_gradients(load_tiny(precision, plain=plain), seed) for seed in seeds]
        pairs = zip(found, references, strict=True)
        return sum(((one - other).norm() / other.norm()).item() for one, other in pairs) / 4

    assert error("fp32", plain=False) < 1e-5
    # One rounding moves all that lies below it: single draws differ by a fifth either way.
    assert error("bf16", plain=False) < 1.15 * error("bf16", plain=True)


def test_full_training_is_saved_as_a_model_of_its_own(load_tiny: LoadTiny, tmp_path: Path) -> None:
    base = load_tiny("bf16")
    before = {name: p.detach().clone() for name, p in base.causal.named_parameters()}
    trained = adapter.attach(base, FULL, seed=0)
    counted = adapter.count_parameters(trained)
    assert counted.trainable == counted.total == sum(p.numel() for p in before.values())
    section = TrainingSection(max_steps=3, effective_batch_size=2, learning_rate=1e-3)
    result = train(base, trained, make_examples(LENGTHS), section, seed=0)
    assert all(p.dtype == torch.float32 for p in trained.parameters())
    assert result.history[-1].loss < result.history[0].loss
    adapter_folder.save(base, trained, tmp_path / "model", {"base": {}}, None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert again.dtype == torch.bfloat16
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, trained.get_parameter(name))
        assert not torch.equal(parameter, before[name]), f"{name} did not train"


def test_pissa_is_saved_as_what_fits_the_original_base(load_tiny: LoadTiny, tmp_path: Path) -> None:
    base = load_tiny("fp32")
    adapted = adapter.attach(base, AdapterSection(kind="pissa", r=4, lora_dropout=0), seed=0)
    batch = pack(make_examples(LENGTHS), "all")
    untouched = batch_nll(load_tiny("fp32"), batch).item()
    # It begins where the base is, though the base's own weights are others.
    assert batch_nll(base, batch).item() == pytest.approx(untouched, rel=1e-5)
    section = TrainingSection(max_steps=4, effective_batch_size=2, learning_rate=1e-2)
    train(base, adapted, make_examples(LENGTHS), section, seed=0)
    trained = batch_nll(base, batch).item()
    assert abs(trained - untouched) > 0.01 * untouched
    adapter_folder.save(base, adapted, tmp_path / "adapter", {"base": {}}, None)

    fresh = load_tiny("fp32")
    loaded = PeftModel.from_pretrained(fresh.causal, tmp_path / "adapter")
    config = loaded.peft_config["default"]
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (8, 16, True)
    assert batch_nll(fresh, batch).item() == pytest.approx(trained, rel=1e-5)


def test_loraplus_moves_b_so_many_times_faster(load_tiny: LoadTiny) -> None:
    def moved(ratio: float | None) -> float:
        """Largest change of a B in AdamW's first step, which is its learning rate."""
        base = load_tiny("fp32")
        adapted = adapter.attach(base, AdapterSection(r=4, lora_dropout=0), seed=0)
        section = TrainingSection(max_steps=1, learning_rate=1e-4, loraplus_lr_ratio=ratio)
        train(base, adapted, make_examples(LENGTHS), section, seed=0)
        found = max(p.abs().max().item() for n, p in adapted.named_parameters() if "lora_B" in n)
        adapter.detach(adapted)
        return found

    assert moved(None) == pytest.approx(1e-4, rel=1e-3)
    assert moved(16) == pytest.approx(16e-4, rel=1e-3)
