"""Sizes for a time budget, and the recipe that is written for them."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_lora.cli.tune import parse_budget, screen
from slm_lora.config.load import parse_recipe
from slm_lora.data.split_sizes import LEAST_GROUPS, GroupedRows
from slm_lora.data.splits import GroupingRule, split_rows, training_rows_for
from slm_lora.errors import UsageError
from slm_lora.planning.budget import (
    BATCH,
    LEAST_STEPS,
    MAX_EPOCHS,
    RANKS,
    SEARCHES,
    Material,
    Sizes,
    Speed,
    fit,
    held_out_rows,
    least_budget,
)
from slm_lora.planning.tuning_recipe import DataChoices, Request, duration, recipe_text
from slm_lora.records import Row, Turn
from slm_lora.stats.search_cost import cost_range
from slm_lora.stats.tuning import progress


def material(rows: int, tokens: float) -> Material:
    return Material(rows, tokens, lambda test, validation: (test, validation))


def cost_counted_run_by_run(sizes: Sizes, tokens: float, speed: Speed) -> float:
    """Seconds of training and scoring of every run, added up one by one."""
    total = 0.0
    training = sizes.training_rows * sizes.epochs * tokens * speed.training
    for _ in range(sizes.search.tuning_runs):
        total += training + sizes.validation_rows * tokens * speed.scoring
    for _ in range(sizes.search.final_runs):
        total += training + sizes.test_rows * tokens * speed.scoring
    return total + (sizes.test_rows + sizes.validation_rows) * tokens * speed.scoring


@given(
    rows=st.integers(10, 200_000),
    tokens=st.floats(5, 2_000),
    rate=st.floats(20, 50_000),
    budget=st.integers(60, 100_000),
)
def test_every_run_of_the_recipe_fits_the_budget(
    rows: int, tokens: float, rate: float, budget: int
) -> None:
    speed = Speed(1 / rate, 0.4 / rate)
    sizes = fit(budget, material(rows, tokens), speed)
    if sizes is None:
        return
    assert cost_counted_run_by_run(sizes, tokens, speed) <= sizes.seconds <= budget
    assert sizes.test_rows + sizes.validation_rows + sizes.training_rows <= rows
    assert 0 < sizes.epochs <= MAX_EPOCHS
    assert sizes.steps >= LEAST_STEPS or sizes.epochs == MAX_EPOCHS
    recipe, cells = parse_recipe(recipe_text(Request(), sizes, DataChoices()), "ml-qa.yaml")
    assert recipe.tuning is not None and not set(recipe.tuning.seeds) & set(recipe.seeds)
    assert len(cells) == sizes.search.final_runs
    assert recipe.data.size == sizes.size
    if sizes.size is not None:
        assert training_rows_for(sizes.size) == sizes.training_rows


@given(rows=st.integers(10, 20_000), tokens=st.floats(5, 600), rate=st.floats(50, 20_000))
def test_named_least_budget_fits_and_a_minute_less_does_not(
    rows: int, tokens: float, rate: float
) -> None:
    speed, own = Speed(1 / rate, 0.4 / rate), material(rows, tokens)
    least = least_budget(own, speed)
    assert fit(least, own, speed) is not None
    assert least <= 60 or fit(least - 61, own, speed) is None


def test_larger_budget_repeats_with_three_seeds_then_uses_all_rows() -> None:
    own, speed = material(1204, 130), Speed(1 / 300, 1 / 700)
    sizes = [fit(60 * minutes, own, speed) for minutes in (20, 60, 600)]
    assert all(size is not None for size in sizes)
    small, middle, large = (size for size in sizes if size is not None)
    assert small.search.seeds == 1 and middle.search.seeds == 3
    assert small.size is not None and large.size is None
    assert (large.test_rows, large.validation_rows) == (200, 120)
    assert large.training_rows == 1204 - 320 and large.epochs == MAX_EPOCHS


def test_no_search_has_more_runs_than_were_counted() -> None:
    """The valley lies anywhere, or the loss falls to an end: extensions and refinements follow."""
    for design in SEARCHES:
        sizes = Sizes(design, 50, 30, 100, 90, 1.0, 60.0)
        recipe, _ = parse_recipe(recipe_text(Request(), sizes, DataChoices()), "x.yaml")
        assert recipe.tuning is not None
        # Without a race no value is passed over for a flat valley.
        tuning = recipe.tuning.model_copy(update={"race": False})
        for valley in (1e-7, 1e-5, 3e-4, 1e-3, 2e-3, 1e-2, 1.0):
            outcomes: dict[tuple[float, ...], float] = {}
            while missing := progress(tuning, outcomes).missing:
                outcomes |= {p: abs(p[0] / valley - 1) + abs(valley / p[0] - 1) for p in missing}
            assert len(outcomes) * len(RANKS) <= design.tuning_runs
        assert cost_range(tuning, {}, lambda point: len(RANKS))[1] == design.tuning_runs


def test_few_rows_give_larger_shares_to_the_held_out_sets() -> None:
    assert held_out_rows(200) == (40, 30)
    assert held_out_rows(1204) == (200, 120)
    assert held_out_rows(3000) == (300, 150)
    assert held_out_rows(8000) == (800, 300)
    assert held_out_rows(3) == (1, 1)


def test_wanted_sizes_become_sizes_that_whole_groups_give() -> None:
    rows = [
        Row(
            (Turn("user", f"question {n}"), Turn("assistant", f"answer {n}")),
            group_hint=f"{n // 4}",
        )
        for n in range(160)
    ]
    rule = GroupingRule()
    grouped = GroupedRows(rows, rule)
    for test, validation in itertools.product((1, 50, 61, 9999), (1, 45, 70)):
        sizes = grouped.sizes_near(test, validation)
        split = split_rows(
            rows, size=None, test_rows=sizes[0], validation_rows=sizes[1], split_seed=0,
            data_seed=0, rule=rule,
        )  # fmt: skip
        assert (len(split.test), len(split.validation)) == sizes
        assert sizes[0] % 4 == sizes[1] % 4 == 0
        assert min(sizes) >= 4 * LEAST_GROUPS and len(split.train) >= 4 * LEAST_GROUPS
    assert grouped.sizes_near(50, 45) == (48, 44)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1H30M", 5400), ("10s", 10)]
)
def test_budgets_are_read(text: str, seconds: int) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "m", "-5m", "1.5h", "0s", "9s", "721h", "30 minutes"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--budget"):
        parse_budget(text)


@given(seconds=st.integers(10, 30 * 86_400))
def test_durations_are_read_back(seconds: int) -> None:
    assert parse_budget(duration(seconds)) == seconds


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        ("data/Rows.jsonl.gz", "rows"), ("ml-qa", "ml-qa"), ("owner/dolly-15k", "dolly-15k"),
        ("/data/my rows", "my-rows"), ("...", "tuned"), ("../größe v2.csv", "gr-e-v2"),
    ],
)  # fmt: skip
def test_experiment_is_named_after_the_rows(rows: str, name: str) -> None:
    assert Request(rows=rows).experiment == name


@given(rows=st.text(min_size=1, max_size=40), model=st.text(min_size=1, max_size=40))
def test_names_survive_in_the_recipe_whatever_their_characters(rows: str, model: str) -> None:
    if any("\ud800" <= c <= "\udfff" for c in rows + model):
        return
    text = recipe_text(
        Request(rows, model), Sizes(SEARCHES[0], 5, 5, None, 9, 1.0, 1.0), DataChoices(rows)
    )
    recipe, _ = parse_recipe(text, "x.yaml")
    assert (recipe.data.name, recipe.model.name) == (rows, model)
    assert text.splitlines()[0] == f"# {Request(rows, model).command}"


def test_recipe_has_the_batch_that_the_steps_were_counted_with() -> None:
    sizes = Sizes(SEARCHES[0], 5, 5, None, 90, 1.5, 1.0)
    recipe, _ = parse_recipe(recipe_text(Request(), sizes, DataChoices()), "x.yaml")
    assert recipe.training.effective_batch_size == BATCH
    assert sizes.steps == 18  # 12 steps an epoch


def test_screen_is_short_and_narrow() -> None:
    files: dict[str, str | None] = {
        "adapter": "adapter/a b",
        "report": "r.html",
        "recipe": "x.yaml",
    }
    sentence = "word " * 40 + "end."
    for width in (80, 100):
        lines = screen([sentence] * 5, ["x " * 30, "y"], files, width)
        assert max(map(len, lines)) <= width
        assert any(line.endswith("slm-lora chat --adapter 'adapter/a b'") for line in lines)
    assert not any("chat" in line for line in screen(["a"], ["b"], files | {"adapter": None}, 80))
