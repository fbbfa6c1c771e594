"""The training loop: exact for any micro-batch, repeatable, stopped by non-finite values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from slm_lora.adapters import attach
from slm_lora.adapters.attach import trainable_state
from slm_lora.config.schema import AdapterSection, TrainingSection
from slm_lora.errors import DataError, NumericError
from slm_lora.evaluation.scoring import held_out_loss, score
from slm_lora.model.base import Base
from slm_lora.records import Example
from slm_lora.training import step
from slm_lora.training.loop import TrainingResult, train
from slm_lora.training.schedule import learning_rate, total_steps

from ..support.examples import TRAINING_LENGTHS, make_examples
from ..support.tensors import assert_equal_bits

LoadTiny = Callable[..., Base]


def run(
    base: Base,
    examples: list[Example],
    seed: int = 0,
    dropout: float = 0.0,
    **settings: object,
) -> tuple[TrainingResult, dict[str, torch.Tensor]]:
    section = TrainingSection.model_validate({"learning_rate": 1e-2, **settings})
    peft_model = attach.attach(
        base, AdapterSection(r=4, lora_dropout=dropout, target_modules=("q_proj", "v_proj")), seed
    )
    result = train(base, peft_model, examples, section, seed)
    state = trainable_state(peft_model)
    attach.detach(peft_model)
    return result, state


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_activation_checkpointing_gives_the_same_bits_with_less_memory(
    load_tiny: LoadTiny, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    forward = step.batch_nll

    def kept_bytes(base: Base, on: bool) -> tuple[TrainingResult, dict[str, torch.Tensor], int]:
        kept = 0

        def count_bytes(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        def watched(*arguments: Any) -> torch.Tensor:
            with torch.autograd.graph.saved_tensors_hooks(count_bytes, lambda tensor: tensor):
                return forward(*arguments)

        monkeypatch.setattr(step, "batch_nll", watched)
        section = TrainingSection(activation_checkpointing=on, learning_rate=1e-3)
        section_adapter = AdapterSection(
            kind=kind, lora_dropout=0.2, target_modules=("q_proj", "v_proj")
        )
        peft_model = attach.attach(base, section_adapter, 0)
        result = train(base, peft_model, make_examples(TRAINING_LENGTHS), section, 0)
        return result, trainable_state(peft_model), kept

    plain, weights, all_bytes = kept_bytes(load_tiny(), False)
    recomputed, same_weights, few_bytes = kept_bytes(load_tiny(), True)
    assert [s.loss for s in plain.history] == [s.loss for s in recomputed.history]
    assert_equal_bits(same_weights, weights)
    assert few_bytes < 0.4 * all_bytes


def distance(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_training_does_not_depend_on_the_micro_batch(load_tiny: LoadTiny, dropout: float) -> None:
    examples = make_examples(TRAINING_LENGTHS)
    # SGD-like comparison: AdamW's first steps turn rounding of tiny gradients into full steps,
    # so losses are compared over two epochs and gradient norms with them.
    settings = {"effective_batch_size": 16, "dropout": dropout}
    large_batches, _ = run(load_tiny(), examples, micro_batch_tokens=4096, **settings)
    for budget in (1, 60, 200):
        small_batches, _ = run(load_tiny(), examples, micro_batch_tokens=budget, **settings)
        for expected, actual in zip(large_batches.history, small_batches.history, strict=True):
            assert expected.loss == pytest.approx(actual.loss, rel=1e-4)
            assert expected.label_tokens == actual.label_tokens
        assert large_batches.history[0].loss == pytest.approx(
            small_batches.history[0].loss, rel=1e-6
        )
        assert large_batches.history[0].grad_norm == pytest.approx(
            small_batches.history[0].grad_norm, rel=1e-5
        )


def test_step_loss_is_total_nll_over_label_tokens(load_tiny: LoadTiny) -> None:
    base, examples = load_tiny(), make_examples(TRAINING_LENGTHS[:16])
    reference = held_out_loss(score(base, examples, "test", 64), "all")
    result, _ = run(base, examples, num_train_epochs=1)
    assert result.history[0].loss == pytest.approx(reference.loss, rel=1e-6)
    assert result.history[0].label_tokens == reference.tokens


def test_equal_seeds_give_equal_bits_and_other_seeds_others(load_tiny: LoadTiny) -> None:
    examples = make_examples(TRAINING_LENGTHS)
    first, weights = run(load_tiny(), examples, seed=5, dropout=0.2)
    again, same_weights = run(load_tiny(), examples, seed=5, dropout=0.2)
    assert distance(weights, same_weights) == 0
    assert [s.loss for s in first.history] == [s.loss for s in again.history]
    _, other_weights = run(load_tiny(), examples, seed=6, dropout=0.2)
    assert distance(weights, other_weights) > 0


def test_last_partial_step_of_an_epoch_is_trained(load_tiny: LoadTiny) -> None:
    result, _ = run(load_tiny(), make_examples(TRAINING_LENGTHS), num_train_epochs=2)
    assert [step.examples for step in result.history] == [16, 4, 16, 4]
    assert result.history[-1].epoch == 2
    assert result.tokens == 2 * sum(TRAINING_LENGTHS)


def test_training_learns_and_leaves_the_base_unchanged(load_tiny: LoadTiny) -> None:
    base, examples = load_tiny(), make_examples(TRAINING_LENGTHS)
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    result, _ = run(base, examples, num_train_epochs=15, learning_rate=5e-2)
    # The same four rows are not in every second step: whole epochs are compared.
    epochs = [sum(s.loss * s.label_tokens for s in result.history[i : i + 2]) for i in (0, 28)]
    assert epochs[1] < 0.97 * epochs[0]
    after = dict(base.model.named_parameters())
    assert_equal_bits(after, before)


def test_adapter_weights_are_fp32_on_a_bf16_base(load_tiny: LoadTiny) -> None:
    base = load_tiny("bf16")
    result, state = run(base, make_examples(TRAINING_LENGTHS), num_train_epochs=1)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    assert math.isfinite(result.history[-1].loss)


def test_loss_on_response_counts_response_tokens_only(load_tiny: LoadTiny) -> None:
    examples = make_examples(TRAINING_LENGTHS[:16])
    result, _ = run(load_tiny(), examples, num_train_epochs=1, loss_on="response")
    expected = sum(int(example.response[1:].sum()) for example in examples)
    assert result.history[0].label_tokens == expected


def test_rows_without_any_label_are_refused(load_tiny: LoadTiny) -> None:
    examples = [
        Example(e.row_id, e.group_id, "", e.ids, e.response & False, 1, 0)
        for e in make_examples([8, 9])
    ]
    with pytest.raises(DataError, match="no label tokens left: none of the 2 training rows"):
        run(load_tiny(), examples, loss_on="response")


def test_some_rows_without_labels_are_left_out_and_counted(load_tiny: LoadTiny) -> None:
    good = make_examples(TRAINING_LENGTHS[:4])
    empty = Example("zz", "zz", "", good[0].ids, good[0].response & False, 1, 0)
    result, _ = run(load_tiny(), [*good, empty], num_train_epochs=1, loss_on="response")
    assert result.rows_without_labels == 1
    assert result.history[0].examples == 4


def test_nan_loss_stops_and_names_step_and_rows(load_tiny: LoadTiny) -> None:
    base = load_tiny()
    with torch.no_grad():
        base.model.get_output_embeddings().weight[5] = float("nan")
    with pytest.raises(NumericError, match=r"step 1 of 2: loss nan.*rows 00"):
        run(base, make_examples(TRAINING_LENGTHS[:16]), num_train_epochs=2)


def test_early_stopping_keeps_the_weights_of_the_best_step(load_tiny: LoadTiny) -> None:
    base, examples = load_tiny(), make_examples(TRAINING_LENGTHS)
    section = TrainingSection(
        num_train_epochs=10,
        learning_rate=2e-4,
        eval_steps=1,
        keep_best=True,
        early_stopping_patience=2,
    )
    peft_model = attach.attach(
        base, AdapterSection(r=4, lora_dropout=0.0, target_modules=("q_proj", "v_proj")), 0
    )
    states, losses = [], iter([3.0, 2.0, 2.5, 2.4, 1.0])

    def validate() -> float:
        states.append(trainable_state(peft_model))
        return next(losses)

    result = train(base, peft_model, examples, section, 0, validate=validate)
    assert result.stopped_early
    assert len(result.history) == 4
    assert result.kept_step == 2
    assert distance(trainable_state(peft_model), states[1]) == 0
    assert distance(states[3], states[1]) > 0


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.25])
def test_learning_rate_schedule_equals_that_of_transformers(kind: str, warmup: float) -> None:
    section = TrainingSection.model_validate(
        {"learning_rate": 0.5, "lr_scheduler_type": kind, "warmup_ratio": warmup}
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    name = "constant_with_warmup" if kind == "constant" else kind
    scheduler = get_scheduler(name, optimizer, math.ceil(warmup * 20), 20)
    for number in range(20):
        assert learning_rate(section, number, 20) == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


def test_total_steps_follow_rows_epochs_and_max_steps() -> None:
    # The described run: 1,350 rows, batch 16, three epochs.
    assert total_steps(1350, TrainingSection()) == 3 * 85
    assert total_steps(10, TrainingSection(num_train_epochs=0.5)) == 1
    assert total_steps(1350, TrainingSection(max_steps=7)) == 7
