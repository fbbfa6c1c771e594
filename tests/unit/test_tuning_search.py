"""The search along tuned keys: pure, resumable, and never far from the lowest of a curve."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_lora.config.axes import TuningSection
from slm_lora.stats.tuning import FLAT, Point, Progress, gain_of_parabola, progress


def section(values: list[float], **keys: object) -> TuningSection:
    return TuningSection.model_validate({"values": values, **keys})


def search(tuning: TuningSection, loss, limit: int = 200):  # type: ignore[no-untyped-def]
    """A whole search on a known function; its end and all outcomes."""
    outcomes: dict[Point, float] = {}
    for _ in range(limit):
        state = progress(tuning, outcomes)
        if not state.missing:
            return state, outcomes
        outcomes |= {point: loss(point) for point in state.missing}
    raise AssertionError("the search does not end")


def bowl(best: float, sharpness: float = 0.1):  # type: ignore[no-untyped-def]
    return lambda point: 2 + sharpness * math.log(point[0] / best) ** 2


def test_search_tries_the_given_values_first_larger_ones_first() -> None:
    tuning = section([2e-4, 1e-3, 5e-3])
    assert progress(tuning, {}).missing == ((5e-3,),)
    assert progress(tuning, {(5e-3,): 2.0}).missing == ((1e-3,),)


def test_search_without_race_hands_out_all_values_at_once() -> None:
    tuning = section([2e-4, 1e-3, 5e-3], race=False)
    assert set(progress(tuning, {}).missing) == {(2e-4,), (1e-3,), (5e-3,)}


def test_search_extends_beyond_the_end_where_the_lowest_lies() -> None:
    _, outcomes = search(section([2e-4, 1e-3, 5e-3], refine=0, extend=2), bowl(0.1))
    # The distance of the last two values, a factor of 5, twice: 0.025 and 0.125 (two digits).
    assert sorted(outcomes) == [(2e-4,), (1e-3,), (5e-3,), (0.025,), (0.13,)]


def test_search_claims_no_best_value_at_the_edge_of_what_was_tried() -> None:
    state, _ = search(section([2e-4, 1e-3, 5e-3], extend=1), bowl(10.0))
    assert state.lowest == (0.025,)
    assert state.edges == {0: "high"}
    state, _ = search(section([2e-4, 1e-3, 5e-3], extend=0), bowl(1e-9))
    assert state.edges == {0: "low"}


def test_search_refines_by_geometric_means_of_the_lowest_and_its_neighbours() -> None:
    state, outcomes = search(section([1e-4, 1e-3, 1e-2], refine=1, extend=0), bowl(1.5e-3))
    # sqrt(1e-4 * 1e-3) = 3.16e-4 and sqrt(1e-3 * 1e-2) = 3.16e-3, in two digits.
    assert set(outcomes) == {(1e-4,), (1e-3,), (1e-2,), (3.2e-4,), (3.2e-3,)}
    assert state.lowest == (1e-3,)


def test_search_leaves_a_flat_curve_unrefined_in_a_race() -> None:
    flat = bowl(1e-3, sharpness=1e-5)
    _, raced = search(section([1e-4, 1e-3, 1e-2], extend=0), flat)
    _, full = search(section([1e-4, 1e-3, 1e-2], extend=0, race=False), flat)
    assert (len(raced), len(full)) == (3, 7)


def test_search_goes_down_where_every_value_diverges() -> None:
    def diverges(point: Point) -> float:
        return math.inf if point[0] > 2e-3 else 2.0 - point[0]

    state, outcomes = search(section([1e-2, 1e-1], extend=2, refine=0), diverges)
    assert sorted(outcomes) == [(1e-4,), (1e-3,), (1e-2,), (1e-1,)]
    assert state.lowest == (1e-3,)
    assert state.edges == {}


def test_search_has_no_lowest_where_nothing_trains() -> None:
    state, _ = search(section([1e-3, 1e-2]), lambda point: math.inf)
    assert state.lowest is None
    assert state.edges == {}


def test_common_value_is_among_the_first() -> None:
    state, outcomes = search(section([1e-3, 5e-3], common_value=2e-4, extend=0), bowl(3e-3))
    assert (2e-4,) in outcomes
    assert state.tried[:3] == ((5e-3,), (1e-3,), (2e-4,))


def test_search_over_two_keys_finds_the_lowest_of_both() -> None:
    tuning = TuningSection.model_validate(
        {
            "key": ["training.learning_rate", "training.num_train_epochs"],
            "values": [[2e-4, 1e-3, 5e-3], [1, 2, 4]],
        }
    )
    state, outcomes = search(
        tuning,
        lambda point: 2 + 0.1 * math.log(point[0] / 3e-3) ** 2 + math.log(point[1] / 3) ** 2,
    )
    assert state.lowest is not None
    assert state.lowest[1] == 3.0  # whole numbers stay whole: sqrt(2 * 4) = 2.83
    assert 2e-3 < state.lowest[0] < 5e-3
    assert all(point[1].is_integer() for point in outcomes)


@settings(max_examples=150, deadline=None)
@given(
    best=st.floats(1e-5, 1e-1),
    sharpness=st.floats(0.01, 1),
    refine=st.integers(0, 3),
    race=st.booleans(),
)
def test_search_ends_within_half_its_last_distance_of_the_best(
    best: float, sharpness: float, refine: int, race: bool
) -> None:
    tuning = section([2e-4, 1e-3, 5e-3], refine=refine, extend=3, race=race)
    loss = bowl(best, sharpness)
    state, outcomes = search(tuning, loss)
    assert state.lowest is not None
    assert outcomes[state.lowest] == min(outcomes.values())
    if state.edges:
        return
    # A parabola in the logarithm: after n halvings the best is within half the last distance,
    # or a race stopped as less than FLAT was to be gained.
    distance = math.log(5) / 2**refine
    # (Two digits round by up to 5 %.)
    bound = max(sharpness * (distance / 2 * 1.1 + 0.05) ** 2, FLAT * race)
    assert outcomes[state.lowest] - 2 <= bound * 1.05 + 1e-9


@settings(max_examples=100, deadline=None)
@given(data=st.data(), race=st.booleans())
def test_search_is_the_same_after_any_interruption(data: st.DataObject, race: bool) -> None:
    """Outcomes known in part lead to the same values in the same order."""
    loss = bowl(data.draw(st.floats(1e-5, 1e-1)))
    tuning = section([2e-4, 1e-3, 5e-3], race=race)
    end, outcomes = search(tuning, loss)
    known = data.draw(st.integers(0, len(end.tried)))
    partial = {point: outcomes[point] for point in end.tried[:known]}
    state = progress(tuning, partial)
    assert end.tried[: len(state.tried)] == state.tried
    assert all(point not in partial for point in state.missing)


def test_search_skips_values_that_the_key_does_not_allow() -> None:
    tuning = section([0.1, 0.5], key="adapter.lora_dropout", refine=0)
    outcomes: dict[Point, float] = {}
    while (state := progress(tuning, outcomes, lambda point: point[0] < 1)).missing:
        outcomes |= {point: 2 - point[0] for point in state.missing}
    assert sorted(outcomes) == [(0.1,), (0.5,)]
    assert isinstance(state, Progress)
    assert state.edges == {0: "high"}


@pytest.mark.parametrize(("middle", "left", "right"), [(2.0, 2.1, 2.3), (2.0, 2.5, 2.01)])
def test_gain_of_a_parabola_is_that_of_its_vertex(middle: float, left: float, right: float) -> None:
    import numpy as np

    x = [-1.0, 0.0, 1.5]
    a, b, c = np.polyfit(x, [left, middle, right], 2)
    assert gain_of_parabola(x, [left, middle, right]) == pytest.approx(
        middle - (c - b * b / (4 * a)), abs=1e-12
    )
