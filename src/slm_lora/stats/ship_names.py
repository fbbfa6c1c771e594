"""Names in the conditions of a recipe, checked before anything is trained."""

from __future__ import annotations

import difflib

from slm_lora.config.forgetting import DRIFT
from slm_lora.config.replies import RepliesSection
from slm_lora.config.schema import Recipe
from slm_lora.errors import UsageError
from slm_lora.runs.metrics import BY_JUDGE, FORGETTING, METRICS, OF_REPLIES
from slm_lora.stats.ship import GAIN


def check_ship(recipe: Recipe) -> list[str]:
    """Notes on conditions (`ship`) whose measurement is not among the sections of the recipe.

    Such a measurement may be there from an earlier command, or be made by a later one.

    Raises:
        UsageError: a name that no section measures.
    """
    return [
        f"ship: {name} is measured by {source}"
        for name in recipe.ship
        if (source := _missing_source(name, recipe))
    ]


def _missing_source(name: str, recipe: Recipe) -> str:
    """The section or command that measures a name, where the recipe lacks it."""
    metric = name.removeprefix(f"{GAIN}:") if name != GAIN else "all"
    replies, forgetting = recipe.replies, recipe.forgetting
    if metric in (DRIFT, FORGETTING) or metric.startswith(f"{FORGETTING}:"):
        if metric != name:
            raise UsageError(f"ship: {name}: {metric} is a change from the base already")
        own = metric.partition(":")[2]
        if forgetting is None:
            return "a section `forgetting`"
        if metric == DRIFT:
            return "" if forgetting.drift else "`forgetting.drift: true`"
        if own and own not in forgetting.also:
            raise UsageError(f"ship: {name}: no set {own!r:.40} in forgetting.also")
        return "" if forgetting.also else "a set in `forgetting.also`"
    if replies and metric in replies.functions:
        return ""
    if "." in metric:
        return "" if recipe.tasks else "a section `tasks`"
    known = METRICS.get(metric)
    if known is None:
        functions = list(replies.functions) if replies else []
        names = [GAIN, DRIFT, FORGETTING, *METRICS, *functions]
        close = difflib.get_close_matches(metric, names, 1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(names)}"
        raise UsageError(f"ship: {name:.60}: no such measurement; {hint}")
    if known.scope == BY_JUDGE:
        return "`slm-lora judge`, after the experiment"
    if known.scope == OF_REPLIES:
        return _missing_reply_metric(metric, replies)
    return ""


def _missing_reply_metric(metric: str, replies: RepliesSection | None) -> str:
    if replies is None:
        return "a section `replies`"
    options = {
        "label": ("labels", replies.labels),
        "pattern": ("pattern", replies.pattern),
        "json_schema": ("json_schema", replies.json_schema),
    }
    if metric in options:
        key, value = options[metric]
        return "" if value else f"`replies.{key}`"
    always = metric in ("ended", "reply_tokens")
    return "" if always or metric in replies.metrics else f"`replies.metrics`, which lacks {metric}"
