"""What is not finite stops a run or skips a step, by name; a step is exact however divided."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from slm_lora.adapters import attach
from slm_lora.config.schema import AdapterSection, TrainingSection
from slm_lora.data.collate import collate
from slm_lora.errors import NumericError
from slm_lora.evaluation.scoring import held_out_loss, score
from slm_lora.model.base import Base
from slm_lora.model.forward import batch_nll
from slm_lora.records import Step
from slm_lora.training import step
from slm_lora.training.loop import train
from slm_lora.training.step import MAX_SKIPPED, StepRunner

from ..support.examples import TRAINING_LENGTHS, make_examples

LoadTiny = Callable[..., Base]


def spoil(
    monkeypatch: pytest.MonkeyPatch, calls: range, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    """Change the loss of some micro-batches (a step is one here)."""
    function, done = step.batch_nll, 0

    def spoiled(*arguments: Any) -> torch.Tensor:
        nonlocal done
        done += 1
        nll = function(*arguments)
        return change(nll) if done in calls else nll

    monkeypatch.setattr(step, "batch_nll", spoiled)


def sitting(
    base: Base, on_step: Callable[[Step], None], epochs: int = 3, ahead: int = 0
) -> tuple[Step, ...]:
    peft_model = attach.attach(
        base, AdapterSection(r=2, lora_dropout=0.0, target_modules=("q_proj", "v_proj")), 0
    )
    section = TrainingSection(num_train_epochs=epochs, learning_rate=1e-2)
    try:
        return train(
            base,
            peft_model,
            make_examples(TRAINING_LENGTHS),
            section,
            0,
            on_step=on_step,
            steps_ahead=ahead,
        ).history
    finally:
        attach.detach(peft_model)


class Overflow(torch.autograd.Function):
    """A loss that is finite, and a gradient that is not."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * math.inf


def infinite(nll: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = Overflow.apply(nll)  # type: ignore[no-untyped-call]
    return found


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss(load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    spoil(monkeypatch, range(3, 4), lambda nll: nll * value)
    with pytest.raises(NumericError, match=r"step 3 of 6: loss (nan|-?inf), .*; rows 00\d\d, "):
        sitting(load_tiny(), lambda _: None)


@pytest.mark.parametrize("spoilt", [3, 6])
def test_a_loss_looked_at_later(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch, spoilt: int
) -> None:
    """As on a GPU: the next step was handed over before, and still the right one is named."""
    told: list[int] = []
    spoil(monkeypatch, range(spoilt, spoilt + 1), lambda nll: nll * math.nan)
    with pytest.raises(NumericError, match=f"step {spoilt} of 6: loss nan"):
        sitting(load_tiny(), lambda step: told.append(step.step), ahead=1)
    assert told == list(range(1, spoilt))


def test_a_gradient(load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, range(3, 4), infinite)
    with pytest.raises(NumericError, match=r"step 3 of 6: loss \d.*gradient norm (nan|inf); rows"):
        sitting(load_tiny(), lambda _: None)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight(load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    update = torch.optim.AdamW.step

    def spoilt(self: torch.optim.AdamW, *arguments: Any) -> Any:
        update(self, *arguments)
        with torch.no_grad():
            self.param_groups[0]["params"][-1][0, 0] = value

    monkeypatch.setattr(torch.optim.AdamW, "step", spoilt)
    with pytest.raises(NumericError, match=r"step 1 of 6: largest weight (nan|inf) after.*; rows"):
        sitting(load_tiny(), lambda _: None)


def test_a_validation_names_its_step(load_tiny: LoadTiny) -> None:
    base = load_tiny()
    peft_model = attach.attach(base, AdapterSection(r=2, target_modules=("q_proj", "v_proj")), 0)

    def validate() -> float:
        raise NumericError("row 0001: loss nan")

    section = TrainingSection(num_train_epochs=1, learning_rate=2e-4, eval_steps=2)
    with pytest.raises(NumericError, match="validation after step 2: row 0001"):
        train(base, peft_model, make_examples(TRAINING_LENGTHS), section, 0, validate=validate)


def test_scores_name_their_row(load_tiny: LoadTiny) -> None:
    base = load_tiny()
    with torch.no_grad():
        base.model.get_output_embeddings().weight[5] = math.nan
    with pytest.raises(NumericError, match=r"row 00\d\d: loss nan under tiny-llama"):
        score(base, make_examples(TRAINING_LENGTHS), "test", 64)


def test_an_overflow_of_fp16_skips_the_step_and_is_counted(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, before = load_tiny("fp16"), {}
    spoil(monkeypatch, range(3, 4), infinite)
    seen: list[Step] = []

    def on_step(done: Step) -> None:
        weights = attach.trainable_state(base.model)
        if done.skipped:
            assert all(torch.equal(weights[name], before[name]) for name in weights)
        before.update(weights)
        seen.append(done)

    history = sitting(base, on_step)
    skipped = [done for done in history if done.skipped]
    assert history[2] in skipped and len(skipped) < len(history)
    for done in history:
        assert (done.grad_norm is None) == done.skipped
        assert math.isfinite(done.loss) and done.loss > 0


def test_fp16_does_not_skip_for_ever(load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, range(1, 1000), infinite)
    wanted = rf"step {MAX_SKIPPED + 1} of 40: loss \d.*gradient norm (nan|inf); rows"
    with pytest.raises(NumericError, match=wanted):
        sitting(load_tiny("fp16"), lambda _: None, epochs=20)


# --- exactness ---------------------------------------------------------------------------------


def gradient(base: Base, batches: list[int], double: bool) -> torch.Tensor:
    """Gradient of a step of 16 rows, divided into micro-batches of so many rows."""
    peft_model = attach.attach(
        base, AdapterSection(r=4, lora_dropout=0.0, target_modules=("q_proj", "v_proj")), 3
    )
    peft_model.train()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    if double:
        peft_model.double()
    examples = sorted(make_examples(TRAINING_LENGTHS[:16]), key=lambda example: -example.length)
    labels = sum(example.length - 1 for example in examples)
    for many in batches:
        torch.autograd.backward(batch_nll(base, collate(examples[:many], "all")) / labels)
        examples = examples[many:]
    found = [p.grad.double().flatten() for p in peft_model.parameters() if p.grad is not None]
    attach.detach(peft_model)
    return torch.cat(found)


@pytest.mark.parametrize("rows", [8, 4, 1])
@pytest.mark.parametrize(("double", "bound"), [(True, 1e-12), (False, 1e-5)])
def test_a_step_is_the_same_however_it_is_divided(
    load_tiny: LoadTiny, rows: int, double: bool, bound: float
) -> None:
    """16×1, 8×2, 4×4 and 1×16."""
    whole = gradient(load_tiny(), [16], double)
    parts = gradient(load_tiny(), [rows] * (16 // rows), double)
    assert ((parts - whole).norm() / whole.norm()).item() < bound


def test_the_loop_divides_as_exactly(load_tiny: LoadTiny) -> None:
    norms = []
    for budget in (10_000, 200, 60, 1):
        base = load_tiny()
        peft_model = attach.attach(
            base, AdapterSection(r=4, lora_dropout=0.0, target_modules=("q_proj", "v_proj")), 3
        )
        parameters = [p for p in peft_model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        updater = StepRunner(base, parameters, optimizer, scaler, "all", 1e9)
        examples = make_examples(TRAINING_LENGTHS[:16])
        norms.append(updater.step(examples, budget, "", False, 0, "step").result())
        attach.detach(peft_model)
    for result in norms[1:]:
        assert result.loss == pytest.approx(norms[0].loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(norms[0].grad_norm, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 8, 32])
def test_a_loss_does_not_depend_on_how_many_rows_are_scored_at_once(
    load_tiny: LoadTiny, rows: int
) -> None:
    base, examples = load_tiny(), make_examples([20] * 32)
    whole = held_out_loss(score(base, examples, "test", 10_000), "all").loss
    found = held_out_loss(score(base, examples, "test", 20 * rows), "all").loss
    assert abs(found - whole) < 1e-5
