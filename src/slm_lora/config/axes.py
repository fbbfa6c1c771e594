"""Sections that turn one configuration into many: the grid, and the keys tuned for each setting."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PlainSerializer, WrapValidator, field_validator, model_validator

from slm_lora.config.types import Float, Int, Section

AUTO: Literal["auto"] = "auto"
LEARNING_RATE = "training.learning_rate"

if TYPE_CHECKING:
    FirstValues = tuple[float, ...] | Literal["auto"]
else:  # not a union, whose errors name its branches
    FirstValues = Annotated[
        tuple[Float, ...],
        WrapValidator(lambda value, validate: value if value == AUTO else validate(value)),
        PlainSerializer(lambda value: value if value == AUTO else list(value)),
    ]


class GridSection(Section):
    """The cells of the experiment: listed, or as the product of axes."""

    cells: tuple[dict[str, Any], ...] = Field(
        (), description="Cells as mappings of dotted keys, e.g. `{data.size: 1500, adapter.r: 8}`."
    )
    axes: tuple[dict[str, tuple[Any, ...]], ...] = Field(
        (),
        description="Axes of the product; keys within one axis vary together.",
    )

    @model_validator(mode="after")
    def _well_formed(self) -> GridSection:
        if self.cells and self.axes:
            raise ValueError("give cells or axes, not both")
        for axis in self.axes:
            if not axis or not all(axis.values()):
                raise ValueError("an axis has no values")
            if len({len(values) for values in axis.values()}) != 1:
                raise ValueError(f"keys of one axis need equally many values: {sorted(axis)}")
        keys = [key for axis in self.axes for key in axis]
        if twice := sorted({key for key in keys if keys.count(key) > 1}):
            raise ValueError(f"keys in two axes, where one would hide the other: {twice}")
        return self

    def count(self) -> int:
        """Number of cells before seeds; 1 without a grid."""
        if self.cells:
            return len(self.cells)
        return math.prod(len(next(iter(axis.values()))) for axis in self.axes)

    def settings(self) -> list[dict[str, Any]]:
        """Dotted keys of each cell, in the order written; one empty mapping without a grid."""
        if self.cells:
            return [dict(cell) for cell in self.cells]
        points_per_axis = [
            [dict(zip(axis, values, strict=True)) for values in zip(*axis.values(), strict=True)]
            for axis in self.axes
        ]
        return [
            {key: value for part in parts for key, value in part.items()}
            for parts in itertools.product(*points_per_axis)
        ]


class TuningSection(Section):
    """Keys whose value is chosen for each setting, by its loss on the validation set."""

    key: tuple[str, ...] = Field(
        (LEARNING_RATE,),
        description="A numeric key, or a list of keys, that the grid does not vary.",
    )
    values: tuple[FirstValues, ...] = Field(
        ("auto",),
        description="Values to try first, at least two, all above 0; with several keys a list of "
        "lists, in the order of the keys, of which all combinations are tried. `auto`, for the "
        "learning rate: three values, a factor 4 apart, around that of "
        "`training.learning_rate: auto` for the setting.",
    )
    refine: Int = Field(
        2,
        ge=0,
        le=10,
        description="Halvings of the distance (in the logarithm) to the neighbours of the lowest.",
    )
    extend: Int = Field(
        2,
        ge=0,
        le=10,
        description="Times that another value is tried beyond an end where the lowest lies.",
    )
    seeds: tuple[Int, ...] = Field(
        (1000,),
        description="Seeds of tuning runs, none of which is in `seeds`; each draws training rows "
        "of its own.",
    )
    race: bool = Field(
        True,
        description="Stop runs that can hardly become the lowest: see docs/tuning.md. False: all "
        "run to the end.",
    )
    common_value: Float | None = Field(
        None,
        gt=0,
        description="A value of the first key that every setting is also tried at, to the end: the "
        "report splits differences into this key's part and the setting's. Unset: the best of the "
        "values that all settings finished.",
    )

    @field_validator("key", mode="before")
    @classmethod
    def _wrap_single_key(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("values", mode="before")
    @classmethod
    def _wrap_single_list(cls, value: object) -> object:
        if value == AUTO or (
            isinstance(value, list | tuple)
            and not any(isinstance(v, list | tuple) or v == AUTO for v in value)
        ):
            return (value,)
        return value

    @model_validator(mode="after")
    def _well_formed(self) -> TuningSection:
        if len(self.values) != len(self.key):
            raise ValueError(
                f"as many lists of values as keys are needed; keys: {len(self.key)}, lists: "
                f"{len(self.values)}"
            )
        for key, values in zip(self.key, self.values, strict=True):
            if values == AUTO:
                if key != LEARNING_RATE:
                    raise ValueError(f"{key} needs values: auto is for {LEARNING_RATE} only")
                continue
            if len(set(values)) < 2:
                raise ValueError(f"{key} needs at least two different values")
            if min(values) <= 0:
                raise ValueError(f"values of {key} must be above 0")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds must be different, and at least one")
        return self

    @property
    def first_values(self) -> tuple[tuple[float, ...], ...]:
        """``values`` as numbers, a tuple per key.

        Raises:
            ValueError: some are ``auto``, which `with_rates` replaces.
        """
        if AUTO in self.values:
            raise ValueError("tuning.values is auto, and not resolved yet")
        return tuple(values for values in self.values if values != AUTO)

    def with_rates(self, rates: Sequence[float]) -> TuningSection:
        """The section with learning rates in place of ``auto``."""
        values = tuple(tuple(rates) if values == AUTO else values for values in self.values)
        return self.model_copy(update={"values": values})
