"""What the recommended setting lost against its base: two lines of the card."""

from __future__ import annotations

import math

from slm_lora.report.blocks import Fact
from slm_lora.stats.forgetting import Change, changes
from slm_lora.stats.inference import LEAST_GROUPS
from slm_lora.stats.settings import Setting

_STATES = {"shown": "shown", "not shown": "not shown", "violated": "VIOLATED"}


def forgetting_facts(recommended: Setting) -> list[Fact]:
    """Forgetting on further sets, and drift; each only where it was measured."""
    own = changes(recommended)
    sets = [change for change in own if not change.is_drift]
    facts = []
    if sets:
        text = "; ".join(
            f"{change.name} {change_text(change)} nats per token, {state_text(change)}"
            for change in sets
        )
        facts.append(Fact("Forgetting", f"{text}.", "forgetting"))
    facts += [
        Fact(
            "Drift",
            f"{change_text(change)} nats per token from the base (KL divergence, over the base's "
            f"replies to {change.rows} general prompts).",
            "forgetting",
        )
        for change in own
        if change.is_drift
    ]
    return facts


def change_text(change: Change) -> str:
    """``+0.0123 (+0.0050 to +0.0196)``; drift, which has no sign, without."""
    sign = "" if change.is_drift else "+"
    value = f"{change.value:{sign}.4f}"
    if not math.isfinite(change.low + change.high):
        return f"{value} (no interval)"
    return f"{value} ({change.low:{sign}.4f} to {change.high:{sign}.4f})"


def state_text(change: Change) -> str:
    """``less than 0.05: shown``."""
    few = f" ({change.groups} groups of rows)" if change.groups < LEAST_GROUPS else ""
    return f"less than {change.margin:g}: {_STATES[change.state]}{few}"
