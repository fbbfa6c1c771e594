"""The least and the most that a search along tuned keys costs, whatever its losses will be."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from slm_lora.config.axes import TuningSection
from slm_lora.stats.tuning import Point, Search, first_points

MOST_STATES = 3_000
"""States of a search that are looked at; beyond them (several keys, many refinements) the range is
given by bounds."""


def cost_range(
    tuning: TuningSection,
    outcomes: Mapping[Point, float],
    cost: Callable[[Point], float],
    is_valid: Callable[[Point], bool] = lambda point: True,
) -> tuple[float, float]:
    """What a search costs from here to its end.

    Args:
        tuning: the values to try.
        outcomes: losses of the points that are known, infinite where one was stopped.
        cost: of a point without outcome.
        is_valid: whether the recipe allows a point.

    Returns:
        Of the cheapest and of the dearest course that losses can give it.
    """
    return _Courses(tuning, outcomes, cost, is_valid).range()


class _TooManyError(Exception):
    pass


class _Courses:
    """All courses of a search: every point without outcome may turn out the lowest."""

    def __init__(
        self,
        tuning: TuningSection,
        outcomes: Mapping[Point, float],
        cost: Callable[[Point], float],
        is_valid: Callable[[Point], bool],
    ) -> None:
        self._tuning, self._outcomes, self._is_valid = tuning, outcomes, is_valid
        self._cost = cost
        self._known: dict[tuple[frozenset[Point], Point, int], tuple[float, float]] = {}

    def range(self) -> tuple[float, float]:
        first = self._search(()).new_points(first_points(self._tuning))
        certain = self._cost_of(first)
        if not first:
            return 0.0, 0.0
        try:
            least, most = self._over(first, self._lowest_of(first), 0)
        except _TooManyError:
            least, most = 0.0, self._bound(first)
        return certain + least, certain + most

    def _bound(self, first: Sequence[Point]) -> float:
        keys = len(self._tuning.key)
        points = keys * self._tuning.extend + 2 * keys * self._tuning.refine
        return points * max(self._cost(point) for point in first)

    def _search(self, tried: Sequence[Point]) -> Search:
        search = Search(self._tuning, self._outcomes, self._is_valid)
        search.tried = list(tried)
        return search

    def _cost_of(self, points: Sequence[Point]) -> float:
        return sum(self._cost(point) for point in points if point not in self._outcomes)

    def _lowest_of(self, points: Sequence[Point]) -> list[Point]:
        """Those that may turn out the lowest: all without outcome, and the lowest of the others."""
        known = [point for point in points if point in self._outcomes]
        best = min(known, key=lambda point: (self._outcomes[point], point), default=None)
        return [point for point in points if point not in self._outcomes or point == best]

    def _over(
        self, tried: Sequence[Point], lowest: Sequence[Point], step: int
    ) -> tuple[float, float]:
        """The range over what may be the lowest."""
        ranges = [self._from(tried, point, step) for point in lowest]
        return min(least for least, _ in ranges), max(most for _, most in ranges)

    def _from(self, tried: Sequence[Point], lowest: Point, step: int) -> tuple[float, float]:
        """The range of what follows step ``step`` (extensions, then refinements)."""
        if step == self._tuning.extend + self._tuning.refine:
            return 0.0, 0.0
        key = frozenset(tried), lowest, step
        if key not in self._known:
            if len(self._known) > MOST_STATES:
                raise _TooManyError
            search = self._search(tried)
            ranges = []
            for points in self._next(search, lowest, step):
                if points:
                    least, most = self._over(
                        [*tried, *points], self._lowest_of([lowest, *points]), step + 1
                    )
                    certain = self._cost_of(points)
                    ranges.append((certain + least, certain + most))
                elif step < self._tuning.extend:  # no end to extend: the refinements
                    ranges.append(self._from(tried, lowest, self._tuning.extend))
                else:  # later refinements would find no more
                    ranges.append((0.0, 0.0))
            self._known[key] = min(r[0] for r in ranges), max(r[1] for r in ranges)
        return self._known[key]

    def _next(self, search: Search, lowest: Point, step: int) -> Iterator[list[Point]]:
        """The points that a step may try."""
        if step < self._tuning.extend:
            yield search.new_points(search.beyond(lowest))
            return
        for flat in itertools.product(*(self._flat(search, lowest, i) for i in range(len(lowest)))):
            yield search.new_points(search.between(lowest, flat.__getitem__))

    def _flat(self, search: Search, lowest: Point, index: int) -> tuple[bool, ...]:
        """Whether it is flat around the lowest along a key; both where that is not known."""
        points = search.across(lowest, index)
        if not self._tuning.race or any(point not in search.tried for point in points[::2]):
            return (False,)
        if all(point in self._outcomes for point in points):
            return (search.is_flat(lowest, index),)
        return (True, False)
