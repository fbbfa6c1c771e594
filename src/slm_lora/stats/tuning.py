"""The search for each setting's own values of tuned keys, by validation losses.

What is tried next follows from the outcomes alone, so an interrupted search goes on as if it had
not been, on any number of machines.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from slm_lora.config.axes import TuningSection

Point = tuple[float, ...]
"""One value of each tuned key, in their order."""
End = Literal["low", "high"]

FLAT = 0.001
"""Nats per token. Where a parabola through the lowest value and its two neighbours promises less
below the lowest, values between them are not tried."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A search so far.

    Attributes:
        tried: points in the order of the search; those without an outcome last.
        missing: points to run next; empty at the end of the search.
        lowest: point of the lowest loss; None before any outcome, and where no run was finite.
        edges: keys, by index, whose lowest value is the last that was tried in a direction.
    """

    tried: tuple[Point, ...]
    missing: tuple[Point, ...]
    lowest: Point | None
    edges: Mapping[int, End]


def progress(
    tuning: TuningSection,
    outcomes: Mapping[Point, float],
    is_valid: Callable[[Point], bool] = lambda point: True,
) -> Progress:
    """Where the search for one setting stands.

    Args:
        tuning: the values to try.
        outcomes: validation loss of every point that was run, infinite where it was stopped.
        is_valid: whether the recipe allows a point.
    """
    search = Search(tuning, outcomes, is_valid)
    search.run()
    finite = [point for point in search.tried if math.isfinite(outcomes.get(point, math.inf))]
    lowest = min(finite, key=lambda point: (outcomes[point], point)) if finite else None
    edges: dict[int, End] = {}
    if lowest is not None and not search.missing:
        for index, own in enumerate(lowest):
            values = search.values(index)
            if len(values) > 1 and own in (values[0], values[-1]):
                edges[index] = "low" if own == values[0] else "high"
    return Progress(tuple(search.tried), tuple(search.missing), lowest, edges)


class Search:
    """The steps of a search, repeated on known outcomes until one is missing."""

    def __init__(
        self,
        tuning: TuningSection,
        outcomes: Mapping[Point, float],
        is_valid: Callable[[Point], bool],
    ) -> None:
        self._tuning, self._outcomes, self._is_valid = tuning, outcomes, is_valid
        self.tried: list[Point] = []
        self.missing: list[Point] = []

    def run(self) -> None:
        """Try points in their order, to the first that has no outcome."""
        if not self._try(first_points(self._tuning)):
            return
        for _ in range(self._tuning.extend):
            beyond = self.beyond(self._lowest())
            if not self._try(beyond):
                return
            if not beyond:
                break
        for _ in range(self._tuning.refine):
            lowest = self._lowest()
            if not self._try(self.between(lowest, functools.partial(self.is_flat, lowest))):
                return

    def _try(self, points: Sequence[Point]) -> bool:
        """Whether all points have outcomes; in a race one is run at a time, larger ones first, so
        that the others have a rival."""
        for point in self.new_points(points):
            self.tried.append(point)
            if point not in self._outcomes:
                self.missing.append(point)
                if self._tuning.race:
                    return False
        return not self.missing

    def new_points(self, points: Sequence[Point]) -> list[Point]:
        """Those that are not tried and that the recipe allows, in the order of their runs."""
        return [
            point
            for point in sorted(set(points), reverse=True)
            if point not in self.tried and self._is_valid(point)
        ]

    def _lowest(self) -> Point:
        """The point of the lowest loss, the smallest where none was finite."""
        return min(self.tried, key=lambda point: (self._outcomes[point], point))

    def values(self, index: int) -> list[float]:
        """All values of a key that were tried, whatever the others."""
        return sorted({point[index] for point in self.tried})

    def beyond(self, lowest: Point) -> list[Point]:
        """The next value beyond every end where the lowest lies, at the distance of the last."""
        points = []
        for index, own in enumerate(lowest):
            values = self.values(index)
            if len(values) > 1 and own in (values[0], values[-1]):
                neighbour = values[1] if own == values[0] else values[-2]
                value = _rounded(own**2 / neighbour, self._whole(index))
                points.append(_replaced(lowest, index, value))
        return points

    def between(self, lowest: Point, is_flat: Callable[[int], bool]) -> list[Point]:
        """The geometric means of the lowest value and its neighbours, for every key; in a race not
        for keys along which it is flat."""
        points = []
        for index, own in enumerate(lowest):
            if self._tuning.race and is_flat(index):
                continue
            for neighbour in self.neighbours(lowest, index):
                value = _rounded(math.sqrt(own * neighbour), self._whole(index))
                if min(own, neighbour) < value < max(own, neighbour):
                    points.append(_replaced(lowest, index, value))
        return points

    def neighbours(self, point: Point, index: int) -> list[float]:
        """The next values of a key that were tried, one or two."""
        values = self.values(index)
        place = values.index(point[index])
        return values[max(0, place - 1) : place] + values[place + 1 : place + 2]

    def across(self, point: Point, index: int) -> list[Point]:
        """A point between those with the neighbours of its value; none without two."""
        neighbours = self.neighbours(point, index)
        if len(neighbours) < 2:
            return []
        before, after = (_replaced(point, index, value) for value in neighbours)
        return [before, point, after]

    def is_flat(self, lowest: Point, index: int) -> bool:
        """Whether values between a point and its two neighbours promise less than `FLAT`."""
        if not (points := self.across(lowest, index)):
            return False
        losses = [self._outcomes.get(point, math.inf) for point in points]
        if not all(map(math.isfinite, losses)):
            return False
        return gain_of_parabola([math.log(point[index]) for point in points], losses) < FLAT

    def _whole(self, index: int) -> bool:
        return all(float(value).is_integer() for value in self._tuning.first_values[index])


def first_points(tuning: TuningSection) -> list[Point]:
    """All combinations of the values to try first, and of the common value of the first key."""
    values = [list(dict.fromkeys(listed)) for listed in tuning.first_values]
    if tuning.common_value is not None and tuning.common_value not in values[0]:
        values[0].append(tuning.common_value)
    return list(itertools.product(*values))


def _replaced(point: Point, index: int, value: float) -> Point:
    return (*point[:index], value, *point[index + 1 :])


def _rounded(value: float, whole: bool) -> float:
    """Two significant digits, as people write learning rates; whole numbers stay whole."""
    return float(round(value)) if whole else float(f"{value:.1e}")


def gain_of_parabola(x: Sequence[float], y: Sequence[float]) -> float:
    """How much lower than the middle one of three points a parabola through them reaches."""
    left = (y[0] - y[1]) / (x[0] - x[1])
    right = (y[2] - y[1]) / (x[2] - x[1])
    curvature = (right - left) / (x[2] - x[0])
    if curvature <= 0:
        return 0.0
    slope = right - curvature * (x[2] - x[1])
    return slope**2 / (4 * curvature)
