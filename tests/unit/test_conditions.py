"""Conditions of a verdict: their text, and `ship` in a recipe."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_lora.config.conditions import Condition, parse_condition, parse_ship, ship_record
from slm_lora.config.load import parse_recipe
from slm_lora.errors import UsageError

NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]*(:[A-Za-z0-9_.-]+)?", fullmatch=True)
BOUNDS = st.floats(allow_nan=False, allow_infinity=False)
OPERATORS = st.sampled_from([">", ">=", "<", "<="])
SPACES = st.sampled_from(["", " ", "  "])


@given(NAMES, OPERATORS, BOUNDS, SPACES, SPACES)
def test_condition_is_read_from_its_text(
    name: str, operator: str, bound: float, before: str, after: str
) -> None:
    condition = parse_condition(f"{name}{before}{operator}{after}{bound!r}")
    assert condition == Condition(name, operator, bound)
    assert parse_condition(str(condition)) == condition
    assert parse_ship(ship_record([condition])) == (condition,)


@given(st.text(alphabet=string.printable + "≥é\x00", max_size=30))
def test_any_other_text_is_refused_in_one_line(text: str) -> None:
    try:
        condition = parse_condition(text)
    except ValueError as refused:
        error = refused
    else:
        assert parse_condition(str(condition)) == condition
        return
    assert "must be a name, one of > >= < <=, and a number" in str(error)
    assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize(
    "text",
    [
        "", "gain", "gain >", "> 0.02", "gain 0.02", "gain => 0.02", "gain == 0", "gain = 0",
        "gain > nan", "gain > inf", "gain > 1e999", "gain > 1_000", "gain > 98%", "gain > 0,02",
        "gain > 0 < 1", "gain: > 0", "a:b:c > 0", "gain >> 0", "gain > 0x10", "ga in > 0", "1 > 0",
        "gain ≥ 0", "gain > ٣",
    ],
)  # fmt: skip
def test_misspelt_condition_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a name"):
        parse_condition(text)


@pytest.mark.parametrize(
    ("operator", "below", "at", "above"),
    [
        (">", False, False, True),
        (">=", False, True, True),
        ("<", True, False, False),
        ("<=", True, True, False),
    ],
)
def test_operator_holds_on_its_side(operator: str, below: bool, at: bool, above: bool) -> None:
    condition = Condition("gain", operator, 1.0)
    assert [condition.holds(value) for value in (0.5, 1.0, 1.5)] == [below, at, above]


def test_ship_is_in_the_recipe_and_in_no_cell() -> None:
    text = "name: tiny\nseeds: [1, 2]\nship: {gain: '> 0.02', all: '<= 2.1'}\n"
    recipe, cells = parse_recipe(text, "tiny.yaml")
    _, plain = parse_recipe("name: tiny\nseeds: [1, 2]\n", "tiny.yaml")
    assert parse_ship(recipe.ship) == (Condition("gain", ">", 0.02), Condition("all", "<=", 2.1))
    assert cells == plain  # configurations and options, and so identities and run.json


def test_ship_can_be_overridden() -> None:
    recipe, _ = parse_recipe("name: tiny\n", "tiny.yaml", ["ship.gain='> 0.02'"])
    assert recipe.ship == {"gain": "> 0.02"}


@pytest.mark.parametrize(
    ("ship", "message"),
    [
        ("{gain: 0.02}", "ship: gain: 0.02 has no operator; write e.g. '> 0.02', quoted (line 2)"),
        ("{gain: '> much'}", "ship: 'gain > much': must be a name, one of > >= < <=, and a number"),
        ("{'gain > 1': '> 2'}", "ship: 'gain > 1 > 2': must be a name"),
        ("{' gain': '> 2'}", "ship: ' gain' is not the name of a measurement (line 2)"),
        ("['gain > 1']", "ship = ['gain > 1']: must be a mapping of keys to values (line 2)"),
        ("{1: '> 2'}", "ship.1: a key must be text"),
    ],
)
def test_invalid_ship_is_an_error_with_its_line(ship: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_recipe(f"name: tiny\nship: {ship}\n", "tiny.yaml")
    assert str(error.value).startswith(f"tiny.yaml: {message}")


def test_ship_under_evaluation_is_pointed_to_its_place() -> None:
    with pytest.raises(UsageError, match=r"unknown key 'evaluation.ship'.*did you mean 'ship'\?"):
        parse_recipe("name: tiny\nevaluation: {ship: {gain: '> 1'}}\n", "tiny.yaml")
