"""Non-finite values stop a run or skip a step; division into micro-batches changes no result."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from slm_lora.adapters import attach
from slm_lora.config.schema import AdapterSection, TrainingSection
from slm_lora.errors import NumericError
from slm_lora.evaluation.scoring import held_out_loss, score
from slm_lora.model.base import Base
from slm_lora.records import Step
from slm_lora.training import step
from slm_lora.training.loop import train
from slm_lora.training.step import MAX_SKIPPED, StepRunner

from ..support.examples import TRAINING_LENGTHS, gradients, make_examples
from ..support.tensors import assert_equal_bits, relative_error

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


def train_steps(
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
    """A finite loss with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * math.inf


def infinite(nll: torch.Tensor) -> torch.Tensor:
    overflowing: torch.Tensor = Overflow.apply(nll)  # type: ignore[no-untyped-call]
    return overflowing


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_loss_is_reported_with_step_and_rows(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    spoil(monkeypatch, range(3, 4), lambda nll: nll * value)
    with pytest.raises(NumericError, match=r"step 3 of 6: loss (nan|-?inf), .*; rows 00\d\d, "):
        train_steps(load_tiny(), lambda _: None)


@pytest.mark.parametrize("spoilt", [3, 6])
def test_nan_loss_read_a_step_late_names_its_own_step(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch, spoilt: int
) -> None:
    """As on a GPU: the next step was submitted before the result was read."""
    reported: list[int] = []
    spoil(monkeypatch, range(spoilt, spoilt + 1), lambda nll: nll * math.nan)
    with pytest.raises(NumericError, match=f"step {spoilt} of 6: loss nan"):
        train_steps(load_tiny(), lambda step: reported.append(step.step), ahead=1)
    assert reported == list(range(1, spoilt))


def test_non_finite_gradient_is_reported_with_step_and_rows(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, range(3, 4), infinite)
    with pytest.raises(NumericError, match=r"step 3 of 6: loss \d.*gradient norm (nan|inf); rows"):
        train_steps(load_tiny(), lambda _: None)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_weight_is_reported_with_step_and_rows(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    update = torch.optim.AdamW.step

    def spoilt(self: torch.optim.AdamW, *arguments: Any) -> Any:
        update(self, *arguments)
        with torch.no_grad():
            self.param_groups[0]["params"][-1][0, 0] = value

    monkeypatch.setattr(torch.optim.AdamW, "step", spoilt)
    with pytest.raises(NumericError, match=r"step 1 of 6: largest weight (nan|inf) after.*; rows"):
        train_steps(load_tiny(), lambda _: None)


def test_error_in_validation_names_its_step(load_tiny: LoadTiny) -> None:
    base = load_tiny()
    peft_model = attach.attach(base, AdapterSection(r=2, target_modules=("q_proj", "v_proj")), 0)

    def validate() -> float:
        raise NumericError("row 0001: loss nan")

    section = TrainingSection(num_train_epochs=1, learning_rate=2e-4, eval_steps=2)
    with pytest.raises(NumericError, match="validation after step 2: row 0001"):
        train(base, peft_model, make_examples(TRAINING_LENGTHS), section, 0, validate=validate)


def test_nan_score_is_reported_with_its_row(load_tiny: LoadTiny) -> None:
    base = load_tiny()
    with torch.no_grad():
        base.model.get_output_embeddings().weight[5] = math.nan
    with pytest.raises(NumericError, match=r"row 00\d\d: loss nan under tiny-llama"):
        score(base, make_examples(TRAINING_LENGTHS), "test", 64)


def test_fp16_overflow_skips_the_step_and_keeps_the_weights(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, before = load_tiny("fp16"), {}
    spoil(monkeypatch, range(3, 4), infinite)
    seen: list[Step] = []

    def on_step(done: Step) -> None:
        weights = attach.trainable_state(base.model)
        if done.skipped:
            assert_equal_bits(weights, before)
        before.update(weights)
        seen.append(done)

    history = train_steps(base, on_step)
    skipped = [done for done in history if done.skipped]
    assert history[2] in skipped and len(skipped) < len(history)
    for done in history:
        assert (done.grad_norm is None) == done.skipped
        assert math.isfinite(done.loss) and done.loss > 0


def test_repeated_fp16_overflow_stops_after_max_skipped_steps(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, range(1, 1000), infinite)
    message = rf"step {MAX_SKIPPED + 1} of 40: loss \d.*gradient norm (nan|inf); rows"
    with pytest.raises(NumericError, match=message):
        train_steps(load_tiny("fp16"), lambda _: None, epochs=20)


# --- exactness ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [8, 4, 1])
@pytest.mark.parametrize(("double", "bound"), [(True, 1e-12), (False, 1e-5)])
def test_gradient_does_not_depend_on_the_division_into_micro_batches(
    load_tiny: LoadTiny, rows: int, double: bool, bound: float
) -> None:
    examples = sorted(make_examples(TRAINING_LENGTHS[:16]), key=lambda example: -example.length)
    one_batch = gradients(load_tiny(), examples, double)
    parts = gradients(load_tiny(), examples, double, micro_batch=rows)
    assert relative_error(parts, one_batch) < bound


def test_step_result_does_not_depend_on_the_token_budget(load_tiny: LoadTiny) -> None:
    results = []
    for budget in (10_000, 200, 60, 1):
        base = load_tiny()
        peft_model = attach.attach(
            base, AdapterSection(r=4, lora_dropout=0.0, target_modules=("q_proj", "v_proj")), 3
        )
        parameters = [p for p in peft_model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=0.0)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        runner = StepRunner(base, parameters, optimizer, scaler, "all", 1e9)
        examples = make_examples(TRAINING_LENGTHS[:16])
        results.append(runner.step(examples, budget, "", False, 0, "step").result())
        attach.detach(peft_model)
    for result in results[1:]:
        assert result.loss == pytest.approx(results[0].loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(results[0].grad_norm, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 8, 32])
def test_held_out_loss_does_not_depend_on_rows_per_batch(load_tiny: LoadTiny, rows: int) -> None:
    base, examples = load_tiny(), make_examples([20] * 32)
    one_batch = held_out_loss(score(base, examples, "test", 10_000), "all").loss
    loss = held_out_loss(score(base, examples, "test", 20 * rows), "all").loss
    assert abs(loss - one_batch) < 1e-5
