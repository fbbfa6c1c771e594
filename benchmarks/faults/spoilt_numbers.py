"""NaN and infinity in loss, gradient, weights, validation and scoring: exit 5, a message with the
step or row, and no saved file with non-finite values."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lab import Hook, Lab, clean, log_of, run
from safetensors.torch import load_file

from slm_lora.evaluation import scoring
from slm_lora.training import step

SECOND_STEP = re.compile(r"step 2 of 5: .*; rows [0-9a-f]{8}, ")
ROW = re.compile(r"row [0-9a-f]{8}: loss (nan|inf)")


def _spoil_loss(value: float) -> Hook:
    return lambda: _spoil(step, "batch_nll", 5, lambda nll: nll * value)


def _spoil_gradient() -> None:
    function = step.StepRunner._backward
    calls = 0

    def backward(self: step.StepRunner, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        loss = function(self, *arguments)
        if calls == 2:
            gradient = self.parameters[0].grad
            assert gradient is not None
            gradient[0, 0] = math.nan
        return loss

    step.StepRunner._backward = backward  # type: ignore[method-assign, assignment]


def _spoil_weights() -> None:
    function = torch.optim.AdamW.step
    calls = 0

    def update(self: torch.optim.AdamW, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        result = function(self, *arguments)
        if calls == 2:
            with torch.no_grad():
                self.param_groups[0]["params"][0][0, 0] = math.inf
        return result

    torch.optim.AdamW.step = update  # type: ignore[method-assign, assignment]


def _spoil_scores(call: int) -> Hook:
    def spoiled(scores: Any) -> Any:
        scores.nll_all[0] = math.nan
        return scores

    return lambda: _spoil(scoring, "score_documents", call, spoiled)


def _spoil(module: Any, name: str, call: int, change: Callable[[Any], Any]) -> None:
    function, calls = getattr(module, name), 0

    def spoiled(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        result = function(*arguments)
        return change(result) if calls == call else result

    setattr(module, name, spoiled)


NUMBERS: dict[str, tuple[Hook, re.Pattern[str]]] = {
    "loss is NaN": (_spoil_loss(math.nan), SECOND_STEP),
    "loss is infinite": (_spoil_loss(math.inf), SECOND_STEP),
    "gradient is NaN": (_spoil_gradient, SECOND_STEP),
    "weight is infinite": (_spoil_weights, SECOND_STEP),
    "base scores NaN": (_spoil_scores(1), ROW),
    "validation is NaN": (
        _spoil_scores(10),
        re.compile(rf"validation after step \d: {ROW.pattern}"),
    ),
    "adapter scores NaN": (_spoil_scores(20), ROW),
}


def verdict(lab: Lab, name: str) -> dict[str, Any]:
    """Inject one number; check exit code, message and saved files."""
    hook, message = NUMBERS[name]
    folder = lab.folder / name.replace(" ", "-")
    code = run(lab, folder, hook)
    log = log_of(lab, folder)
    saved = sorted(folder.rglob("*.safetensors"))
    finite = all(_finite(path) for path in saved)
    named = message.search(log) is not None
    result = {"name": name, "code": code, "named": named, "saved": len(saved), "all_finite": finite}
    result["held"] = code == 5 and named and finite
    if not result["held"]:
        result["said"] = log[-2000:]
    clean(lab, folder)
    return result


def _finite(path: Path) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in load_file(path).values())
