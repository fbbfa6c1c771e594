"""A training that was stopped and taken up again ends with the same bits."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from slm_lora.errors import IntegrityError
from slm_lora.model import adapter
from slm_lora.model.adapter import trainable_state
from slm_lora.model.base import Base
from slm_lora.recipe.schema import AdapterSection, TrainingSection
from slm_lora.records import Step
from slm_lora.training.checkpoint import Checkpointer
from slm_lora.training.loop import TrainingResult, train

from .test_forward import make_examples
from .test_training import LENGTHS

SECTION = TrainingSection(num_train_epochs=4, learning_rate=1e-2, eval_steps=2, keep_best=True)


def sitting(
    base: Base, checkpointer: Checkpointer | None, stop_after: int | None = None
) -> tuple[TrainingResult | None, dict[str, torch.Tensor]]:
    adapted = adapter.attach(base, AdapterSection(r=4, lora_dropout=0.1), 3)
    losses = {2: 2.0, 4: 1.0, 6: 1.5, 8: 1.2}
    steps: list[int] = []

    def on_step(step: Step) -> None:
        steps.append(step.step)
        if step.step == stop_after:
            raise KeyboardInterrupt

    def validate() -> float:
        return losses[(steps[-1] if steps else stop_before) + 1]

    stop_before = 0
    if checkpointer is not None and (checkpointer.folder / "checkpoint.json").exists():
        about = json.loads((checkpointer.folder / "checkpoint.json").read_text())
        stop_before = len(about["about"]["history"])
    result = None
    with contextlib.suppress(KeyboardInterrupt):
        result = train(
            base, adapted, make_examples(LENGTHS), SECTION, 3,
            validate=validate, on_step=on_step, checkpointer=checkpointer,
        )  # fmt: skip
    state = trainable_state(adapted)
    adapter.detach(adapted)
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


def test_another_runs_checkpoint_is_not_taken_up(
    load_tiny: Callable[..., Base], tmp_path: Path
) -> None:
    _, wanted = sitting(load_tiny(), None)
    sitting(load_tiny(), Checkpointer(tmp_path / "point", "abc", every_seconds=0), 5)
    (tmp_path / "point").rename(tmp_path / "moved")
    other = Checkpointer(tmp_path / "moved", "xyz", every_seconds=1e9)
    parameters: dict[str, torch.nn.Parameter] = {}
    assert other.load(parameters, torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])) is None
    assert wanted


def flip_the_middle(data: bytes) -> bytes:
    return (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 0xFF]) + data[len(data) // 2 + 1 :]
    )


def change_a_loss(data: bytes) -> bytes:
    # Still JSON, and still a loss.
    return data.replace(b'"loss": ', b'"loss": 1', 1)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("state.safetensors", flip_the_middle),
        ("checkpoint.json", flip_the_middle),
        ("checkpoint.json", change_a_loss),
    ],
)
def test_a_broken_checkpoint_is_found_out(
    load_tiny: Callable[..., Base], tmp_path: Path, file: str, damage: Callable[[bytes], bytes]
) -> None:
    checkpointer = Checkpointer(tmp_path / "point", "abc", every_seconds=0)
    sitting(load_tiny(), checkpointer, 5)
    path = tmp_path / "point" / file
    path.write_bytes(damage(path.read_bytes()))
    base = load_tiny()
    adapted = adapter.attach(base, AdapterSection(r=4, lora_dropout=0.1), 3)
    with pytest.raises(IntegrityError, match="the checkpoint is broken"):
        train(
            base, adapted, make_examples(LENGTHS), SECTION, 3,
            validate=lambda: 1.0, checkpointer=checkpointer,
        )  # fmt: skip
