"""Names in `ship` are checked before anything is trained."""

from __future__ import annotations

from typing import Any

import pytest

from slm_lora.config.schema import Recipe
from slm_lora.errors import UsageError
from slm_lora.stats.ship_names import check_ship

MEASURING: dict[str, Any] = {
    "replies": {"metrics": ["exact_match"], "labels": ["a", "b"], "functions": {"tone": "m:f"}},
    "forgetting": {"also": {"german": {"name": "g.jsonl"}}},
    "tasks": {"names": ["arc_easy"]},
}


def recipe(*names: str, **sections: Any) -> Recipe:
    return Recipe.model_validate({"name": "x", "ship": dict.fromkeys(names, "> 0")} | sections)


@pytest.mark.parametrize(
    "name",
    [
        "gain", "all", "bits_per_byte", "exact_match", "gain:exact_match", "label", "ended", "tone",
        "drift", "forgetting", "forgetting:german", "arc_easy.acc", "gain:arc_easy.acc",
    ],
)  # fmt: skip
def test_measured_names_have_no_note(name: str) -> None:
    assert check_ship(recipe(name, **MEASURING)) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("exact_match", "a section `replies`"),
        ("gain:token_f1", "a section `replies`"),
        ("drift", "a section `forgetting`"),
        ("forgetting:german", "a section `forgetting`"),
        ("arc_easy.acc", "a section `tasks`"),
        ("win_rate", "`slm-lora judge`, after the experiment"),
    ],
)
def test_a_measurement_that_the_recipe_does_not_make_is_noted(name: str, source: str) -> None:
    assert check_ship(recipe(name)) == [f"ship: {name} is measured by {source}"]


def test_metrics_that_the_section_replies_lacks_are_noted() -> None:
    made = recipe("chrf", "json_schema", **MEASURING)
    assert check_ship(made) == [
        "ship: chrf is measured by `replies.metrics`, which lacks chrf",
        "ship: json_schema is measured by `replies.json_schema`",
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact_mach", "exact_mach: no such measurement; did you mean exact_match?"),
        ("gain:zzzz", "gain:zzzz: no such measurement; known: gain, drift,"),
        ("forgetting:french", "no set 'french' in forgetting.also"),
        ("gain:drift", "drift is a change from the base already"),
    ],
)
def test_names_that_nothing_measures_are_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match="ship: ") as error:
        check_ship(recipe(name, **MEASURING))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
