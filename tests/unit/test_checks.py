"""What `slm-lora data check` finds, on rows whose facts are counted by hand."""

from __future__ import annotations

import random

import pytest

from slm_lora.data.checks import facts
from slm_lora.data.splits import group_rows
from slm_lora.records import Row, Turn


def row(instruction: str, response: str, **fields: str) -> Row:
    return Row((Turn("user", instruction), Turn("assistant", response)), **fields)


ROWS = [
    row("Name a river.", "Rhine", category="geography"),
    row("name a river", "Danube", category="geography"),
    row("Name a river.", "Elbe", category="geography"),
    row("What does the text say of Bonn?", "Little.", context="Bonn lies on the Rhine."),
    row("List all cities.", "Bonn.", context="Bonn lies on the Rhine.", category="summary"),
    *(row(f"Question {word}?", word) for word in ("one", "two", "three", "four", "five")),
]


def test_relations_are_counted_one_by_one_and_together() -> None:
    found = {each.relation: each for each in facts(ROWS, [10] * len(ROWS)).related}
    assert set(found) == {"instruction", "context", "near", None}
    assert (found["instruction"].groups, found["instruction"].rows) == (1, 3)
    assert (found["context"].groups, found["context"].rows) == (1, 2)
    assert (found[None].groups, found[None].rows) == (2, 5)


def test_the_leak_is_that_of_random_splits() -> None:
    rows = [row(f"question {i // 3}", f"{i}") for i in range(60)]
    leak = facts(rows, [1] * 60).related[-1].leak
    group, rng, shares = group_rows(rows), random.Random(0), []
    for _ in range(3000):
        held = {r.row_id for r in rows if rng.random() < 0.1}
        train = {group[r.row_id] for r in rows if r.row_id not in held}
        shares.append((sum(group[r] in train for r in held), len(held)))
    simulated = sum(leaked for leaked, _ in shares) / sum(many for _, many in shares)
    assert leak == pytest.approx(0.99)
    assert simulated == pytest.approx(leak, abs=0.005)


def test_conflicts_are_equal_prompts_with_different_answers() -> None:
    # "name a river" is written otherwise, so it is another prompt.
    assert facts(ROWS, [10] * len(ROWS)).conflicts == (1, 2)
    assert facts(ROWS[3:], [10] * 7).conflicts == (0, 0)


def test_lengths_fall_into_bins_and_limits_have_a_cost() -> None:
    found = facts(ROWS[:4], [1, 2, 100, 300])
    assert found.lengths == (
        (1, 1), (2, 1), (4, 0), (8, 0), (16, 0), (32, 0), (64, 0), (128, 1), (256, 0), (512, 1),
    )  # fmt: skip
    assert [each.limit for each in found.costs] == [128, 256]
    assert found.costs[0].rows == 1 / 4
    assert found.costs[0].tokens == pytest.approx(172 / 403)


def test_categories_come_most_frequent_first() -> None:
    assert facts(ROWS, [1] * len(ROWS)).categories == (("geography", 3), ("summary", 1))
