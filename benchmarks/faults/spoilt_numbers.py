"""NaN and infinity in loss, gradient, weights, validation and scoring: exit 5, step or row named,
nothing that is not finite saved."""

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
    done = 0

    def backward(self: step.StepRunner, *arguments: Any) -> Any:
        nonlocal done
        done += 1
        loss = function(self, *arguments)
        if done == 2:
            gradient = self.parameters[0].grad
            assert gradient is not None
            gradient[0, 0] = math.nan
        return loss

    step.StepRunner._backward = backward  # type: ignore[method-assign, assignment]


def _spoil_weights() -> None:
    function = torch.optim.AdamW.step
    done = 0

    def update(self: torch.optim.AdamW, *arguments: Any) -> Any:
        nonlocal done
        done += 1
        result = function(self, *arguments)
        if done == 2:
            with torch.no_grad():
                self.param_groups[0]["params"][0][0, 0] = math.inf
        return result

    torch.optim.AdamW.step = update  # type: ignore[method-assign, assignment]


def _spoil_scores(call: int) -> Hook:
    def spoiled(found: Any) -> Any:
        found.nll_all[0] = math.nan
        return found

    return lambda: _spoil(scoring, "score_documents", call, spoiled)


def _spoil(module: Any, name: str, call: int, change: Callable[[Any], Any]) -> None:
    function, done = getattr(module, name), 0

    def spoiled(*arguments: Any) -> Any:
        nonlocal done
        done += 1
        found = function(*arguments)
        return change(found) if done == call else found

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
    """Spoil one number, and look at what is said and what is saved."""
    hook, wanted = NUMBERS[name]
    folder = lab.folder / name.replace(" ", "-")
    code = run(lab, folder, hook)
    said = log_of(lab, folder)
    saved = sorted(folder.rglob("*.safetensors"))
    finite = all(_finite(path) for path in saved)
    named = wanted.search(said) is not None
    found = {"name": name, "code": code, "named": named, "saved": len(saved), "all_finite": finite}
    found["held"] = code == 5 and named and finite
    if not found["held"]:
        found["said"] = said[-2000:]
    clean(lab, folder)
    return found


def _finite(path: Path) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in load_file(path).values())
