"""Collation without padding, micro-batches by tokens, and the order of an epoch."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_lora.data.collate import (
    IGNORE_INDEX,
    collate,
    epoch_order,
    label_count,
    make_micro_batches,
    steps_per_epoch,
)
from slm_lora.records import Example, LossOn


def example(name: str, ids: list[int], response: list[int]) -> Example:
    return Example(
        row_id=name,
        group_id=name,
        category="",
        ids=np.array(ids, dtype=np.int32),
        response=np.array(response, dtype=np.bool_),
        bytes_all=0,
        bytes_response=0,
    )


def of_length(name: str, length: int) -> Example:
    return example(name, list(range(length)), [0] * length)


SHORT = example("short", [5, 6, 7], [0, 0, 1])
LONG = example("long", [11, 12, 13, 14, 15], [0, 1, 1, 0, 1])
ALONE = example("alone", [9], [1])

# --- collation ---------------------------------------------------------------------------------


def test_documents_are_concatenated_with_their_own_positions() -> None:
    batch = collate([SHORT, ALONE, LONG], "all")
    assert batch.ids.tolist() == [5, 6, 7, 9, 11, 12, 13, 14, 15]
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]
    assert batch.document.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert batch.lengths == (3, 1, 5)
    for array in (batch.ids, batch.positions, batch.document, batch.labels):
        assert array.dtype == np.int64


def test_a_label_is_the_next_token_of_the_same_document() -> None:
    batch = collate([SHORT, ALONE, LONG], "all")
    none = IGNORE_INDEX
    assert batch.labels.tolist() == [6, 7, none, none, 12, 13, 14, 15, none]
    assert batch.response.tolist() == [False, True, False, False, True, True, False, True, False]


def test_response_labels_leave_out_the_prompt() -> None:
    batch = collate([SHORT, ALONE, LONG], "response")
    none = IGNORE_INDEX
    assert batch.labels.tolist() == [none, 7, none, none, 12, 13, none, 15, none]
    all_labels = collate([SHORT, ALONE, LONG], "all")
    assert batch.ids.tolist() == all_labels.ids.tolist()
    assert batch.response.tolist() == all_labels.response.tolist()


@pytest.mark.parametrize("loss_on", ["all", "response"])
@pytest.mark.parametrize("packed", [[SHORT], [ALONE], [LONG, SHORT], [ALONE, LONG, SHORT, LONG]])
def test_label_counts_before_packing_equal_those_after(
    packed: list[Example], loss_on: LossOn
) -> None:
    labels = collate(packed, loss_on).labels
    assert sum(label_count(item, loss_on) for item in packed) == np.count_nonzero(
        labels != IGNORE_INDEX
    )


def test_label_count_leaves_out_first_token_and_prompt() -> None:
    assert [label_count(item, "all") for item in (SHORT, LONG, ALONE)] == [2, 4, 0]
    # The first token is never a label.
    assert [label_count(item, "response") for item in (SHORT, LONG, ALONE)] == [1, 3, 0]


# --- micro-batches -----------------------------------------------------------------------------


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 80))
def test_micro_batches_hold_every_example_once_within_the_budget(
    lengths: list[int], budget: int
) -> None:
    examples = [of_length(f"row {n}", length) for n, length in enumerate(lengths)]
    batches = make_micro_batches(examples, budget)
    assert sorted(item.row_id for batch in batches for item in batch) == sorted(
        item.row_id for item in examples
    )
    for batch in batches:
        assert batch
        assert sum(item.length for item in batch) <= budget or len(batch) == 1
    laid_out = [item.length for batch in batches for item in batch]
    assert laid_out == sorted(laid_out, reverse=True)
    count, largest = least_division(tuple(laid_out), budget)
    assert len(batches) == count
    assert largest == max((sum(e.length for e in b) for b in batches), default=0)


def least_division(lengths: tuple[int, ...], budget: int) -> tuple[int, int]:
    """Return the minimum number of contiguous batches, and the minimum size of the largest of
    them, by trying all divisions."""

    @functools.cache
    def division_of(n: int) -> tuple[int, int]:
        if n == 0:
            return 0, 0
        last = ((start, sum(lengths[start:n])) for start in range(n))
        return min(
            (division_of(start)[0] + 1, max(division_of(start)[1], size))
            for start, size in last
            if size <= budget or start == n - 1
        )

    return division_of(len(lengths))


def test_a_row_longer_than_the_budget_has_its_own_micro_batch() -> None:
    lengths = {"a": 3, "huge": 100, "b": 4, "large": 11}
    batches = make_micro_batches([of_length(n, length) for n, length in lengths.items()], 10)
    assert [[item.row_id for item in batch] for batch in batches] == [
        ["huge"],
        ["large"],
        ["b", "a"],
    ]


def test_micro_batches_do_not_depend_on_the_order_of_the_examples() -> None:
    examples = [of_length(f"row {n}", 1 + n % 3) for n in range(20)]
    once = make_micro_batches(examples, 7)
    again = make_micro_batches(examples[::-1], 7)
    assert [[e.row_id for e in batch] for batch in once] == [
        [e.row_id for e in batch] for batch in again
    ]


def test_no_examples_make_no_micro_batch() -> None:
    assert make_micro_batches([], 10) == []


# --- epochs ------------------------------------------------------------------------------------

MANY = [of_length(f"row {n}", 2) for n in range(60)]


def order(examples: list[Example], seed: int, epoch: int) -> list[str]:
    return [item.row_id for item in epoch_order(examples, seed, epoch)]


def test_epoch_order_is_a_permutation() -> None:
    order_of_epoch = epoch_order(MANY, seed=3, epoch=2)
    assert sorted(map(id, order_of_epoch)) == sorted(map(id, MANY))


def test_epoch_orders_differ_by_epoch_and_seed() -> None:
    orders = [order(MANY, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(order_of_epoch) for order_of_epoch in orders}) == 9
    assert [item.row_id for item in MANY] not in orders


def test_epoch_order_does_not_depend_on_the_order_of_the_examples() -> None:
    assert order(MANY, 1, 1) == order(MANY[::-1], 1, 1)


def test_the_order_of_an_epoch_is_independent_of_earlier_calls() -> None:
    """The order does not depend on earlier epochs or calls."""
    later = order(MANY, 1, 7)
    order(MANY, 1, 0)
    assert order(MANY, 1, 7) == later


def test_fewer_examples_keep_their_relative_order() -> None:
    kept = {item.row_id for item in MANY[:30]}
    assert order(MANY[:30], 4, 0) == [name for name in order(MANY, 4, 0) if name in kept]


@pytest.mark.parametrize(
    ("rows", "batch", "steps"), [(1350, 16, 85), (16, 16, 1), (17, 16, 2), (1, 16, 1), (32, 1, 32)]
)
def test_steps_per_epoch_include_the_last_partial_step(rows: int, batch: int, steps: int) -> None:
    assert steps_per_epoch(rows, batch) == steps
