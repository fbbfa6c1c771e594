"""A training that was stopped and taken up again ends with the same bits."""

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

SECTION = TrainingSection(num_train_epochs=4, learning_rate=1e-2, eval_steps=2, keep_best=True)


def sitting(
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
    if checkpointer is not None and (found := generations(checkpointer.folder)):
        stop_before = int(found[-1].name.removeprefix("step-"))
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
def test_resumed_equals_straight(
    load_tiny: Callable[..., Base], tmp_path: Path, stops: list[int]
) -> None:
    straight, wanted = sitting(load_tiny(), None)
    checkpointer = Checkpointer(tmp_path / "point", "abc", every_seconds=0)
    for stop in stops:
        assert sitting(load_tiny(), checkpointer, stop)[0] is None
    resumed, found = sitting(load_tiny(), checkpointer)
    assert straight is not None and resumed is not None
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert [s.loss for s in straight.history] == [s.loss for s in resumed.history]
    assert straight.kept_step == resumed.kept_step == 4


@pytest.mark.skipif(sys.platform != "linux", reason="the mark can only be reset on Linux")
def test_the_peak_is_that_of_every_sitting(load_tiny: Callable[..., Base], tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path / "point", "abc", every_seconds=0)
    hardware.reset_peak_memory("cpu")
    before = hardware.resident_bytes()
    large = torch.ones(100_000_000)  # 400 MB that only the first sitting holds
    assert sitting(load_tiny(), checkpointer, 3)[0] is None
    del large
    hardware.reset_peak_memory("cpu")
    resumed, _ = sitting(load_tiny(), checkpointer)
    assert resumed is not None
    assert hardware.peak_memory_bytes("cpu") < before + 300_000_000
    assert resumed.peak_memory_bytes > before + 350_000_000
    peaks = [step.peak_memory_bytes for step in resumed.history]
    assert peaks == sorted(peaks)


@pytest.mark.parametrize("stop_at", [1, 3, 4])
def test_steps_ahead_change_nothing(
    load_tiny: Callable[..., Base], tmp_path: Path, stop_at: int
) -> None:
    """Numbers looked at a step later, as on a GPU: validated, stopped and resumed all the same."""

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

    wanted, weights = run(0, tmp_path / "straight")
    with pytest.raises(StopRequested):
        run(1, tmp_path / "stopped", stops=True)
    saved = int(generations(tmp_path / "stopped")[-1].name.removeprefix("step-"))
    assert stop_at <= saved <= stop_at + 1
    found, found_weights = run(1, tmp_path / "stopped")
    assert found == wanted
    assert all(torch.equal(weights[name], found_weights[name]) for name in weights)


def test_another_runs_checkpoint_is_not_taken_up(
    load_tiny: Callable[..., Base], tmp_path: Path
) -> None:
    sitting(load_tiny(), Checkpointer(tmp_path / "point", "abc", every_seconds=0), 5)
    (tmp_path / "point").rename(tmp_path / "moved")
    other = Checkpointer(tmp_path / "moved", "xyz", every_seconds=1e9)
    parameters: dict[str, torch.nn.Parameter] = {}
    assert other.load(parameters, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])) is None


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
def test_a_broken_checkpoint_is_passed_over_by_name(
    load_tiny: Callable[..., Base],
    tmp_path: Path,
    file: str,
    damage: Callable[[bytes], bytes],
    both: bool,
) -> None:
    said: list[str] = []
    _, wanted = sitting(load_tiny(), None)
    checkpointer = Checkpointer(tmp_path / "point", "abc", every_seconds=0, say=said.append)
    sitting(load_tiny(), checkpointer, 5)
    older, newer = generations(checkpointer.folder)
    for generation in (older, newer) if both else (newer,):
        path = generation / file
        path.write_bytes(damage(path.read_bytes()))
    said.clear()
    losses = iter([2.0, 1.0, 1.5, 1.2] if both else [1.0, 1.5, 1.2])
    base = load_tiny()
    peft_model = attach.attach(
        base, AdapterSection(r=4, lora_dropout=0.1, target_modules=("q_proj", "v_proj")), 3
    )
    train(
        base, peft_model, make_examples(TRAINING_LENGTHS), SECTION, 3,
        validate=lambda: next(losses), checkpointer=checkpointer,
    )  # fmt: skip
    found = trainable_state(peft_model)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert newer.name in said[0] and "passed over" in said[0]
    assert ("from the beginning" in said[-1]) == both
    if not both:
        assert said[1:] == [f"  going on from {older.name} of point"]


def test_two_checkpoints_stay_and_the_rest_goes(
    load_tiny: Callable[..., Base], tmp_path: Path
) -> None:
    checkpointer = Checkpointer(tmp_path / "point", "abc", every_seconds=0)
    sitting(load_tiny(), checkpointer, 7)
    assert [path.name for path in generations(checkpointer.folder)] == [
        "step-000005",
        "step-000006",
    ]
    assert read_manifest(checkpointer.folder / "step-000006")["step"] == 6


def test_a_checkpoint_that_does_not_read_back_removes_no_older_one(
    load_tiny: Callable[..., Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointer = Checkpointer(tmp_path / "point", "abc", every_seconds=0)
    sitting(load_tiny(), checkpointer, 4)

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
def test_nothing_that_is_not_finite_is_saved(tmp_path: Path, value: float) -> None:
    checkpointer = Checkpointer(tmp_path / "point", "abc")
    model = torch.nn.Linear(2, 2)
    model.weight.data[1, 1] = value
    with pytest.raises(NumericError, match="step 1: weight/weight is not finite"):
        checkpointer.save(dict(model.named_parameters()), None, [STEP], None, {})
    assert not list(tmp_path.rglob("step-*"))


def test_another_setting_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    model = torch.nn.Linear(2, 2)
    parameters, optimizer = dict(model.named_parameters()), torch.optim.AdamW(model.parameters())
    before = Checkpointer(tmp_path / "point", "abc", setting={"torch": "1", "threads": "2"})
    before.save(parameters, optimizer, [STEP], None, {})
    after = Checkpointer(
        tmp_path / "point", "abc", setting={"torch": "2", "threads": "2"}, say=said.append
    )
    assert after.load(parameters, optimizer) is not None
    assert "other torch 1 → 2: the result may differ" in said[0]


def test_a_stop_in_validation_keeps_the_step(
    load_tiny: Callable[..., Base], tmp_path: Path
) -> None:
    """The step is done, its validation is not: the next sitting begins with that."""
    losses = {2: 2.0, 4: 1.0, 6: 1.5, 8: 1.2}
    counted: list[int] = []

    def once(asked: int | None) -> tuple[TrainingResult | None, dict[str, torch.Tensor]]:
        base = load_tiny()
        peft_model = attach.attach(
            base, AdapterSection(r=4, lora_dropout=0.1, target_modules=("q_proj", "v_proj")), 3
        )
        stop, steps = Stop(), list(counted)

        def validate() -> float:
            stop.requested = len(steps) + 1 == asked
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
    straight, wanted = once(None)
    counted.clear()
    checkpointer = Checkpointer(tmp_path / "stopped", "abc")
    assert once(4)[0] is None
    assert counted == [1, 2, 3]
    assert [path.name for path in generations(checkpointer.folder)] == ["step-000004"]
    state = json.loads((generations(checkpointer.folder)[-1] / "state.json").read_text())
    assert state["history"][-1]["peak_memory_bytes"] > 0
    resumed, found = once(None)
    assert straight is not None and resumed is not None
    assert counted == [1, 2, 3, 4, 5, 6, 7, 8]
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert [s.validation_loss for s in straight.history] == [
        s.validation_loss for s in resumed.history
    ]
    assert once(None)[0] is not None, "what is trained is not trained again"
    assert len(counted) == 8
