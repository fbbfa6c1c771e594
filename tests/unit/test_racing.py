"""The race of tuning runs: stopped at rungs of the first epoch, and only by a clear margin."""

from __future__ import annotations

from typing import Any

import pytest

from slm_lora.stats.racing import ABOVE_BASE, MARGINS, Race, rungs, window_loss


def steps(losses: list[float], tokens: int = 100) -> list[dict[str, Any]]:
    return [{"loss": loss, "label_tokens": tokens} for loss in losses]


def race(value: float, rivals: dict[float, list[dict[str, Any]]], **keys: Any) -> Race:
    return Race(
        **{"value": value, "rivals": rivals, "rungs": (11, 22), "base_loss": 3.0, "epochs": 3.0}
        | keys
    )


@pytest.mark.parametrize(
    ("in_epoch", "total", "expected"),
    [
        (22, 66, (11, 22)),  # three epochs: middle and end of the first
        (22, 22, (6, 11)),  # one epoch: within its first half
        (9, 9, (5,)),  # a rung before four steps is left out
        (3, 9, ()),
    ],
)
def test_rungs_lie_in_the_first_epoch_and_the_first_half(
    in_epoch: int, total: int, expected: tuple[int, ...]
) -> None:
    assert rungs(in_epoch, total) == expected


def test_window_loss_weights_steps_by_label_tokens() -> None:
    window = [*steps([9.0, 9.0]), *steps([1.0], 300), *steps([3.0], 100)]
    assert window_loss(window, 4) == pytest.approx((300 * 1.0 + 100 * 3.0) / 400)


@pytest.mark.parametrize(("place", "done"), [(0, 11), (1, 22)])
@pytest.mark.parametrize(("own", "rival"), [(1e-3, 5e-3), (5e-3, 1e-3)])
def test_run_is_stopped_only_beyond_the_margin_of_its_side(
    place: int, done: int, own: float, rival: float
) -> None:
    margins = MARGINS[place]
    margin = margins.smaller if own < rival else margins.larger
    rivals = {rival: steps([2.5] * 22)}
    assert not race(own, rivals).stop_reason(steps([2.5 + margin - 1e-6] * done))
    reason = race(own, rivals).stop_reason(steps([2.5 + margin + 1e-6] * done))
    assert f"behind {rival:g} after {done} steps" in reason


def test_smaller_rates_are_stopped_by_less_than_larger_ones() -> None:
    assert all(margins.smaller < margins.larger for margins in MARGINS)


def test_run_is_never_stopped_between_rungs() -> None:
    rivals = {5e-3: steps([2.0] * 22)}
    for done in (*range(1, 11), *range(12, 22), *range(23, 66)):
        assert not race(1e-3, rivals).stop_reason(steps([9.0] * done))


def test_run_far_above_the_base_is_stopped_without_any_rival() -> None:
    assert race(1e-1, {}).stop_reason(steps([3.0 + ABOVE_BASE + 0.01] * 11))
    assert not race(1e-1, {}).stop_reason(steps([3.0 + ABOVE_BASE - 0.01] * 11))


def test_long_trainings_are_not_stopped_by_rivals_as_large_rates_overfit_later() -> None:
    rivals = {5e-3: steps([2.0] * 22)}
    assert race(1e-3, rivals).stop_reason(steps([2.9] * 22))
    assert not race(1e-3, rivals, epochs=5.0).stop_reason(steps([2.9] * 22))


def test_rival_stopped_before_a_rung_stops_nobody_there() -> None:
    rivals = {5e-3: steps([2.0] * 11)}
    assert race(1e-3, rivals).stop_reason(steps([2.9] * 11))
    assert not race(1e-3, rivals).stop_reason(steps([2.9] * 22))
