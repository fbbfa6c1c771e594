"""The card's line on one learning rate for all settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from slm_lora.report.names import SettingNames
from slm_lora.report.tuning import Tuned, split_text
from slm_lora.report.write import read_analysis
from slm_lora.runs.folder import list_runs
from slm_lora.stats.splits import Split

RESULTS = Path(__file__).parents[2] / "results" / "quickstart"


@pytest.fixture(scope="module")
def parts() -> tuple[Split, Tuned, SettingNames]:
    analysis = read_analysis(list_runs(RESULTS), RESULTS, None, frozenset())
    assert analysis.tuned is not None
    (part,) = analysis.tuned.splits
    return part, analysis.tuned, analysis.names


def text(
    parts: tuple[Split, Tuned, SettingNames], value: float, low: float, high: float, p: float
) -> str:
    part, phase, names = parts
    own = replace(part.at_own, value=value, low=low, high=high, p_equivalence=p)
    return split_text(replace(part, at_own=own), phase, names)


def test_difference_that_may_be_left_is_not_called_gone(
    parts: tuple[Split, Tuned, SettingNames],
) -> None:
    said = text(parts, -0.04, -0.09, 0.01, 0.4)
    assert "no clear difference is left (-0.0400, -0.0900 to +0.0100)" in said
    assert "due to" not in said


def test_equivalent_settings_differed_by_the_rate(
    parts: tuple[Split, Tuned, SettingNames],
) -> None:
    said = text(parts, -0.002, -0.006, 0.002, 0.01)
    assert "they are equivalent (-0.0020, -0.0060 to +0.0020): it was due to the learning" in said


def test_part_that_is_left_is_a_share(parts: tuple[Split, Tuned, SettingNames]) -> None:
    common = parts[0].at_common.value
    assert common < 0
    own = common / 4
    assert "is left: 75 % were due to the learning" in text(parts, own, own - 0.01, own + 0.01, 0.5)
    assert "the order turns round" in text(parts, 0.04, 0.02, 0.06, 0.5)
