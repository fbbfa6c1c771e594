"""Conditions on measurements: ``gain > 0.02``, ``response <= 2.1``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_CONDITION = re.compile(
    r"\s*(?P<measurement>[A-Za-z_][\w.-]*(?::[\w.-]+)?)"
    r"\s*(?P<operator>>=|<=|>|<)"
    r"\s*(?P<bound>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*",
    re.ASCII,
)


@dataclass(frozen=True, slots=True)
class Condition:
    """A bound of a measurement.

    Attributes:
        measurement: a metric, ``gain``, ``gain:<metric>``, ``forgetting``, or
            ``forgetting:<set>``.
        operator: one of ``>``, ``>=``, ``<``, ``<=``.
        bound: finite.
    """

    measurement: str
    operator: str
    bound: float

    def __str__(self) -> str:
        return f"{self.measurement} {self.operator} {repr(self.bound).removesuffix('.0')}"

    @property
    def is_lower_bound(self) -> bool:
        """Whether the measurement must lie above."""
        return self.operator.startswith(">")

    def holds(self, value: float) -> bool:
        """Whether a value is on the required side."""
        if value == self.bound:
            return self.operator.endswith("=")
        return (value > self.bound) == self.is_lower_bound


def parse_condition(text: str) -> Condition:
    """A condition from ``<measurement> <operator> <number>``.

    Raises:
        ValueError: the text is not of this form; one line.
    """
    match = _CONDITION.fullmatch(text)
    bound = float(match["bound"]) if match else math.nan
    if match is None or not math.isfinite(bound):
        raise ValueError(
            f"{text!r:.60}: must be a name, one of > >= < <=, and a number, e.g. 'gain > 0.02'"
        )
    return Condition(match["measurement"], match["operator"], bound)


def parse_ship(section: Mapping[str, object]) -> tuple[Condition, ...]:
    """Conditions from a mapping of measurements to ``<operator> <number>``.

    Raises:
        ValueError: a value is not of this form; one line.
    """
    conditions = []
    for name, value in section.items():
        if not isinstance(value, str):
            raise ValueError(f"{name}: {value!r:.30} has no operator; write e.g. '> 0.02', quoted")
        condition = parse_condition(f"{name} {value}")
        if condition.measurement != name:
            raise ValueError(f"{name!r:.60} is not the name of a measurement")
        conditions.append(condition)
    return tuple(conditions)


def ship_record(conditions: Iterable[Condition]) -> dict[str, str]:
    """The mapping that `parse_ship` reads; of one measurement the last."""
    return {each.measurement: str(each).split(" ", 1)[1] for each in conditions}
