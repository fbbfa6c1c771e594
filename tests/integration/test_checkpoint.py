"""A training that was stopped and resumed ends with the same bits."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from slm_lora.adapters import attach
from slm_lora.adapters.attach import trainable_state
from slm_lora.config.schema import AdapterSection, TrainingSection
from slm_lora.errors import IntegrityError, NumericError, StorageError
from slm_lora.model.base import Base
from slm_lora.records import Step
from slm_lora.runtime import hardware
from slm_lora.runtime.signals import Stop, StopRequested
from slm_lora.training import checkpoint
from slm_lora.training.checkpoint import Checkpointer, generations, read_manifest
from slm_lora.training.loop import TrainingResult, train

from ..support.examples import TRAINING_LENGTHS, make_examples
from ..support.tensors import assert_equal_bits

SECTION = TrainingSection(num_train_epochs=4, learning_rate=1e-2, eval_steps=2, keep_best=True)


def train_until(
    base: Base, checkpointer: Checkpointer | None, stop_after: int | None = None
) -> tuple[TrainingResult | None, dict[str, torch.Tensor]]:
    peft_model = attach.attach(
        base, AdapterSection(r=4, lora_dropout=0.1, target_modules=("q_proj", "v_proj")), 3
    )
    losses = {2: 2.0, 4: 1.0, 6: 1.5, 8: 1.2}
    steps: list[int] = []

    def on_step(step: Step) -> None:
        steps.append(step.step)
        if step.step == stop_after:
            raise KeyboardInterrupt

    def validate() -> float:
        return losses[(steps[-1] if steps else stop_before) + 1]

    stop_before = 0
    if checkpointer is not None and (saved := generations(checkpointer.folder)):
        stop_before = int(saved[-1].name.removeprefix("step-"))
    result = None
    with contextlib.suppress(KeyboardInterrupt):
        result = train(
            base, peft_model, make_examples(TRAINING_LENGTHS), SECTION, 3,
            validate=validate, on_step=on_step, checkpointer=checkpointer,
        )  # fmt: skip
    state = trainable_state(peft_model)
    attach.detach(peft_model)
    return result, state


@pytest.mark.parametrize("stops", [[1], [3], [5, 6], [2, 4, 7]])
def test_resumed_training_has_the_bits_of_an_uninterrupted_one(
    load_tiny: Callable[..., Base], tmp_path: Path, stops: list[int]
) -> None:
    straight, expected = train_until(load_tiny(), None)
    checkpointer = Checkpointer(tmp_path / "point", "abc", every_seconds=0)
    for stop in stops:
        assert train_until(load_tiny(), checkpointer, stop)[0] is None
    resumed, weights = train_until(load_tiny(), checkpointer)
    assert straight is not None and resumed is not None
    assert_equal_bits(weights, expected)
    assert [s.loss for s in straight.history] == [s.loss for s in resumed.history]
    assert straight.kept_step == resumed.kept_step == 4


@pytest.mark.skipif(sys.platform != "linux", reason="the mark can only be reset on Linux")
def test_peak_memory_after_resume_covers_earlier_processes(
    load_tiny: Callable[..., Base], tmp_path: Path
) -> None:
    checkpointer = Checkpointer(tmp_path / "point", "abc", every_seconds=0)
    hardware.reset_peak_memory("cpu")
    before = hardware.resident_bytes()
    large = torch.ones(100_000_000)  # 400 MB, held by the first training only
    assert train_until(load_tiny(), checkpointer, 3)[0] is None
    del large
    hardware.reset_peak_memory("cpu")
    resumed, _ = train_until(load_tiny(), checkpointer)
    assert resumed is not None
    assert hardware.peak_memory_bytes("cpu") < before + 300_000_000
    assert resumed.peak_memory_bytes > before + 350_000_000
    peaks = [step.peak_memory_bytes for step in resumed.history]
    assert peaks == sorted(peaks)


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_reading_results_a_step_late_changes_no_bit(
    load_tiny: Callable[..., Base], tmp_path: Path, stop_at: int
) -> None:
    """Results are read a step late, as on a GPU; validation, stop and resume are the same."""

    def run(ahead: int, folder: Path, stops: bool = False) -> tuple[Any, ...]:
        base, stop = load_tiny(), Stop()
        peft_model = attach.attach(
            base, AdapterSection(r=4, lora_dropout=0.1, target_modules=("q_proj", "v_proj")), 3
        )

        def on_step(step: Step) -> None:
            stop.requested |= stops and step.step == stop_at

        result = train(
            base, peft_model, make_examples(TRAINING_LENGTHS), SECTION, 3,
            validate=lambda: 1.0, on_step=on_step, checkpointer=Checkpointer(folder, "abc"),
            stop=stop, steps_ahead=ahead,
        )  # fmt: skip
        history = [replace(step, seconds=0, peak_memory_bytes=0) for step in result.history]
        return history, trainable_state(peft_model)

    expected, weights = run(0, tmp_path / "straight")
    with pytest.raises(StopRequested):
        run(1, tmp_path / "stopped", stops=True)
    saved = int(generations(tmp_path / "stopped")[-1].name.removeprefix("step-"))
    assert stop_at <= saved <= stop_at + 1
    resumed, resumed_weights = run(1, tmp_path / "stopped")
    assert resumed == expected
    assert_equal_bits(resumed_weights, weights)


def test_checkpoint_of_another_run_is_not_loaded(
    load_tiny: Callable[..., Base], tmp_path: Path
) -> None:
    train_until(load_tiny(), Checkpointer(tmp_path / "point", "abc", every_seconds=0), 5)
    (tmp_path / "point").rename(tmp_path / "moved")
    messages: list[str] = []
    moved = Checkpointer(tmp_path / "moved", "xyz", every_seconds=1e9, say=messages.append)
    parameters: dict[str, torch.nn.Parameter] = {}
    assert moved.load(parameters, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])) is None
    assert len(messages) == 3
    assert all("of another run" in message for message in messages[:2])


def flip_the_middle(data: bytes) -> bytes:
    return (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1 :]
    )


def change_a_loss(data: bytes) -> bytes:
    # Still JSON, and still a loss.
    return data.replace(b'"loss": ', b'"loss": 1', 1)


def rename_the_seal(data: bytes) -> bytes:
    return data.replace(b'"seal"', b'"sead"')


def nothing_left(data: bytes) -> bytes:
    return b""


DAMAGES = [
    ("state.safetensors", flip_the_middle),
    ("state.safetensors", nothing_left),
    ("state.json", flip_the_middle),
    ("state.json", change_a_loss),
    ("manifest.json", flip_the_middle),
    ("manifest.json", rename_the_seal),
    ("manifest.json", nothing_left),
]


@pytest.mark.parametrize(("file", "damage"), DAMAGES)
@pytest.mark.parametrize("both", [False, True])
def test_resume_names_broken_checkpoints_and_uses_the_newest_intact_one(
    load_tiny: Callable[..., Base],
    tmp_path: Path,
    file: str,
    damage: Callable[[bytes], bytes],
    both: bool,
) -> None:
    messages: list[str] = []
    _, expected = train_until(load_tiny(), None)
    checkpointer = Checkpointer(tmp_path / "point", "abc", every_seconds=0, say=messages.append)
    train_until(load_tiny(), checkpointer, 5)
    older, newer = generations(checkpointer.folder)
    for generation in (older, newer) if both else (newer,):
        path = generation / file
        path.write_bytes(damage(path.read_bytes()))
    messages.clear()
    losses = iter([2.0, 1.0, 1.5, 1.2] if both else [1.0, 1.5, 1.2])
    base = load_tiny()
    peft_model = attach.attach(
        base, AdapterSection(r=4, lora_dropout=0.1, target_modules=("q_proj", "v_proj")), 3
    )
    train(
        base, peft_model, make_examples(TRAINING_LENGTHS), SECTION, 3,
        validate=lambda: next(losses), checkpointer=checkpointer,
    )  # fmt: skip
    assert_equal_bits(trainable_state(peft_model), expected)
    assert newer.name in messages[0] and "passed over" in messages[0]
    assert ("from the beginning" in messages[-1]) == both
    if not both:
        assert messages[1:] == [f"  going on from {older.name} of point"]


def test_only_the_two_newest_checkpoints_are_kept(
    load_tiny: Callable[..., Base], tmp_path: Path
) -> None:
    checkpointer = Checkpointer(tmp_path / "point", "abc", every_seconds=0)
    train_until(load_tiny(), checkpointer, 7)
    assert [path.name for path in generations(checkpointer.folder)] == [
        "step-000005",
        "step-000006",
    ]
    assert read_manifest(checkpointer.folder / "step-000006")["step"] == 6


def test_older_checkpoints_stay_when_the_new_one_cannot_be_read_back(
    load_tiny: Callable[..., Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = Checkpointer(tmp_path / "point", "abc", every_seconds=0)
    train_until(load_tiny(), checkpointer, 4)

    def broken(generation: Path) -> dict[str, Any]:
        raise IntegrityError("other bytes")

    monkeypatch.setattr(checkpoint, "read_manifest", broken)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(StorageError, match="does not keep what is written"):
        checkpointer.save(dict(model.named_parameters()), None, [STEP] * 9, None, {})
    monkeypatch.undo()
    for name in ("step-000002", "step-000003"):
        read_manifest(checkpointer.folder / name)


STEP = Step(1, 9, 0.1, 1.0, 0.1, 1.0, 1, 1, 1, 0.1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_checkpoint_with_non_finite_weights_is_not_saved(tmp_path: Path, value: float) -> None:
    checkpointer = Checkpointer(tmp_path / "point", "abc")
    model = torch.nn.Linear(2, 2)
    model.weight.data[1, 1] = value
    with pytest.raises(NumericError, match="step 1: weight/weight is not finite"):
        checkpointer.save(dict(model.named_parameters()), None, [STEP], None, {})
    assert not list(tmp_path.rglob("step-*"))


def test_resume_under_other_versions_is_noted(tmp_path: Path) -> None:
    messages: list[str] = []
    model = torch.nn.Linear(2, 2)
    parameters, optimizer = dict(model.named_parameters()), torch.optim.AdamW(model.parameters())
    before = Checkpointer(tmp_path / "point", "abc", setting={"torch": "1", "threads": "2"})
    before.save(parameters, optimizer, [STEP], None, {})
    after = Checkpointer(
        tmp_path / "point", "abc", setting={"torch": "2", "threads": "2"}, say=messages.append
    )
    assert after.load(parameters, optimizer) is not None
    assert "other torch 1 → 2: the result may differ" in messages[0]


def test_stop_during_validation_keeps_the_finished_step(
    load_tiny: Callable[..., Base], tmp_path: Path
) -> None:
    """The step is saved without its validation, with which the resumed training begins."""
    losses = {2: 2.0, 4: 1.0, 6: 1.5, 8: 1.2}
    counted: list[int] = []

    def train_with_stop(
        stop_step: int | None,
    ) -> tuple[TrainingResult | None, dict[str, torch.Tensor]]:
        base = load_tiny()
        peft_model = attach.attach(
            base, AdapterSection(r=4, lora_dropout=0.1, target_modules=("q_proj", "v_proj")), 3
        )
        stop, steps = Stop(), list(counted)

        def validate() -> float:
            stop.requested = len(steps) + 1 == stop_step
            stop.check()
            return losses[len(steps) + 1]

        result = None
        with contextlib.suppress(StopRequested):
            result = train(
                base, peft_model, make_examples(TRAINING_LENGTHS), SECTION, 3,
                validate=validate, stop=stop,
                on_step=lambda step: steps.append(step.step), checkpointer=checkpointer,
            )  # fmt: skip
        counted[:] = steps
        return result, trainable_state(peft_model)

    checkpointer = Checkpointer(tmp_path / "straight", "abc")
    straight, expected = train_with_stop(None)
    counted.clear()
    checkpointer = Checkpointer(tmp_path / "stopped", "abc")
    assert train_with_stop(4)[0] is None
    assert counted == [1, 2, 3]
    assert [path.name for path in generations(checkpointer.folder)] == ["step-000004"]
    state = json.loads((generations(checkpointer.folder)[-1] / "state.json").read_text())
    assert state["history"][-1]["peak_memory_bytes"] > 0
    resumed, weights = train_with_stop(None)
    assert straight is not None and resumed is not None
    assert counted == [1, 2, 3, 4, 5, 6, 7, 8]
    assert_equal_bits(weights, expected)
    assert [s.validation_loss for s in straight.history] == [
        s.validation_loss for s in resumed.history
    ]
    assert train_with_stop(None)[0] is not None, "a finished training is loaded"
    assert len(counted) == 8
