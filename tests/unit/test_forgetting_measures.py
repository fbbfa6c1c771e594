"""Drift and forgetting: prompts, divergence, margins, the largest over sets, the figure."""

from __future__ import annotations

from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import t as student

from slm_lora.config.conditions import parse_condition
from slm_lora.config.forgetting import GENERAL_PROMPTS
from slm_lora.errors import IntegrityError
from slm_lora.evaluation.forgetting import general_prompts
from slm_lora.ops import kl_divergence as kl_module
from slm_lora.ops.kl_divergence import kl_divergence
from slm_lora.ops.output_head import HeadForm, OutputHead
from slm_lora.report.figures import GainPoint, gain_against
from slm_lora.report.forgetting import forgetting_section
from slm_lora.report.forgetting_facts import forgetting_facts
from slm_lora.report.names import SettingNames
from slm_lora.runs.forgetting import (
    RowChange,
    forgetting_file,
    read_row_sets,
    write_forgetting,
)
from slm_lora.runs.scored_run import ScoredRun
from slm_lora.stats.forgetting import changes
from slm_lora.stats.settings import Setting
from slm_lora.stats.ship import judge, measure

from ..support.planted import planted_run


def test_general_prompts_are_distinct_lines_of_text() -> None:
    text = files("slm_lora.evaluation").joinpath("general_prompts.txt").read_text(encoding="utf-8")
    prompts = general_prompts(GENERAL_PROMPTS)
    assert text == "".join(f"{prompt}\n" for prompt in prompts)
    assert (
        len({" ".join(prompt.casefold().split()) for prompt in prompts}) == GENERAL_PROMPTS == 200
    )
    assert all(prompt == prompt.strip() and len(prompt) >= 15 for prompt in prompts)
    assert general_prompts(7) == prompts[:7]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize(
    ("bias", "form"), [(False, HeadForm()), (True, HeadForm(scale=0.5)), (True, HeadForm(cap=3.0))]
)
def test_divergence_is_that_of_scipy(
    precision: torch.dtype,
    chunks: bool,
    bias: bool,
    form: HeadForm,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if chunks:
        monkeypatch.setattr(kl_module, "_LOGITS", 3 * 97)
        monkeypatch.setattr(kl_module, "_WEIGHT_ROWS", 10)
    draw = torch.Generator().manual_seed(1)
    hidden = [torch.randn(11, 16, generator=draw).to(precision) for _ in range(2)]
    heads = [
        OutputHead(
            torch.randn(97, 16, generator=draw).to(precision),
            torch.randn(97, generator=draw).to(precision) if bias else None,
            form,
        )
        for _ in range(2)
    ]
    logs = []
    for states, head in zip(hidden, heads, strict=True):
        logits = states.double().numpy() @ head.weight.double().numpy().T
        if head.bias is not None:
            logits += head.bias.double().numpy()
        logits *= form.scale
        if form.cap is not None:
            logits = form.cap * np.tanh(logits / form.cap)
        logs.append(log_softmax(logits, 1))
    expected = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(1)
    actual = kl_divergence(hidden[0], heads[0], hidden[1], heads[1])
    assert actual.dtype == torch.float64
    assert np.allclose(actual.numpy(), expected, rtol=1e-5, atol=1e-7)
    assert kl_divergence(hidden[0], heads[0], hidden[0], heads[0]).abs().max() == 0


def test_a_token_of_probability_zero_counts_as_zero() -> None:
    weight = torch.tensor([[1.0], [2.0], [3.0]])
    masked = OutputHead(weight, torch.tensor([0.0, 0.0, -torch.inf]))
    hidden = torch.tensor([[0.5]])
    p = torch.softmax(torch.tensor([0.5, 1.0]), 0)
    q = torch.softmax(torch.tensor([0.5, 1.0, 1.5]), 0)[:2]
    expected = float((p * (p / q).log()).sum())
    assert kl_divergence(hidden, masked, hidden, OutputHead(weight)).item() == pytest.approx(
        expected
    )


def with_changes(
    run: ScoredRun, folder: Path, margin: float = 0.05, **sets: list[float]
) -> ScoredRun:
    """The run with changes per row, of ten tokens each."""
    for name, values in sets.items():
        lines = [
            RowChange(f"{row:03d}", f"{row:03d}", 10, 10 * (2 + value), 20.0)
            for row, value in enumerate(values)
        ]
        path = forgetting_file(folder / "runs" / run.run.cell, name)
        own = 0.0 if name == "drift" else margin
        write_forgetting(path, run.run.record.hash, {}, "", lines, own)
    own_sets = read_row_sets(folder / "runs" / run.run.cell, run.run.record.hash)
    return replace(run, row_sets=own_sets)


def around(value: float, count: int = 40, spread: float = 0.02) -> list[float]:
    """Values with this mean; their order is that of rows."""
    steps = np.linspace(-1, 1, count)
    return [value + spread * float(step) for step in steps]


LOSSES = np.linspace(1.9, 2.1, 40)


@pytest.mark.parametrize(
    ("value", "count", "state", "text"),
    [
        (0.01, 40, "shown", "less than 0.05: shown"),
        (0.049, 40, "not shown", "less than 0.05: not shown"),
        (0.09, 40, "violated", "less than 0.05: VIOLATED"),
        (-0.20, 40, "shown", "less than 0.05: shown"),
        (0.01, 9, "not shown", "less than 0.05: not shown (9 groups of rows)"),
    ],
)
def test_state_follows_the_upper_end(
    tmp_path: Path, value: float, count: int, state: str, text: str
) -> None:
    run = with_changes(planted_run("r2", LOSSES), tmp_path, german=around(value, count))
    setting = Setting((run,))
    (change,) = changes(setting)
    values = np.array(around(value, count))
    half = student.ppf(0.975, count - 1) * values.std(ddof=1) / count**0.5
    assert change.value == pytest.approx(value)
    assert change.low == pytest.approx(value - half, rel=1e-6)
    assert change.high == pytest.approx(value + half, rel=1e-6)
    assert change.state == state
    assert (change.base_loss, change.loss) == pytest.approx((2.0, 2.0 + value))
    (fact,) = forgetting_facts(setting)
    assert fact.label == "Forgetting"
    assert text in fact.text


def test_interval_covers_seeds(tmp_path: Path) -> None:
    runs = [
        with_changes(
            planted_run(f"r2-seed{seed}", LOSSES, seed=seed), tmp_path, german=around(mean)
        )
        for seed, mean in enumerate((0.00, 0.01, 0.02))
    ]
    (change,) = changes(Setting(tuple(runs)))
    half = student.ppf(0.975, 2) * 0.01 / 3**0.5
    assert change.value == pytest.approx(0.01)
    assert change.high >= 0.01 + half - 1e-9
    assert change.seeds == 3


def test_largest_over_sets_in_a_verdict(tmp_path: Path) -> None:
    base = with_changes(planted_run("base", LOSSES), tmp_path, german=[0.0] * 40, code=[0.0] * 40)
    tuned = with_changes(
        planted_run("r2", LOSSES - 0.1), tmp_path, german=around(0.01), code=around(0.04)
    )
    setting, base_setting = Setting((tuned,)), Setting((base,))
    largest = measure(setting, base_setting, "forgetting")
    german = measure(setting, base_setting, "forgetting:german")
    code = measure(setting, base_setting, "forgetting:code")
    assert largest.sample.value == code.sample.value == pytest.approx(0.04)
    assert largest.interval(0.05) == (code.interval(0.025)[0], code.interval(0.05)[1])
    assert german.interval(0.05)[1] < code.interval(0.025)[0]
    states = [
        judge(setting, base_setting, [parse_condition(text)])[0].state
        for text in ("forgetting < 0.05", "forgetting < 0.03", "forgetting < 0.0405")
    ]
    assert states == ["met", "violated", "undecided"]
    hint = judge(setting, base_setting, [parse_condition("forgetting < 0.0405")])[0].hint()
    assert hint.endswith("rows of code")


def test_no_change_at_all_is_no_share(tmp_path: Path) -> None:
    tuned = with_changes(planted_run("r2", LOSSES), tmp_path, german=[0.0] * 40)
    (judged,) = judge(Setting((tuned,)), None, [parse_condition("forgetting < 0.001")])
    assert (judged.state, judged.low, judged.high) == ("met", 0.0, 0.0)


def test_file_of_another_run_is_refused(tmp_path: Path) -> None:
    run = planted_run("r2", LOSSES)
    with_changes(run, tmp_path, german=[0.0] * 40)
    with pytest.raises(IntegrityError, match="of another run"):
        read_row_sets(tmp_path / "runs" / "r2", "f" * 64)


def test_section_of_partly_measured_settings(tmp_path: Path) -> None:
    settings = [
        Setting((with_changes(planted_run("r2", LOSSES - 0.1, adapter__r=2), tmp_path,
                              drift=around(0.3)),)),
        Setting((with_changes(planted_run("r4", LOSSES - 0.2, adapter__r=4), tmp_path,
                              german=around(0.1)),)),
        Setting((planted_run("r8", LOSSES, adapter__r=8),)),
    ]  # fmt: skip
    bases = [Setting((planted_run("base", LOSSES),))]
    (section,) = forgetting_section(settings, bases, SettingNames(settings))
    assert "| r=2 | +0.1000 (" in section.text
    assert "| german | r=4 | 2.0000 → 2.1000 | +0.1000 (" in section.text
    assert "r=8" not in section.text
    assert [picture.name for picture in section.pictures] == [
        "gain-drift",
        "gain-forgetting-german",
    ]
    assert forgetting_section(settings[2:], bases, SettingNames(settings)) == []


@pytest.mark.parametrize("count", [1, 8, 20])
def test_figure_names_every_setting(count: int) -> None:
    points = [
        GainPoint(f"r={row}", (0.1 * row, 0.1 * row - 0.02, 0.1 * row + 0.02), (1.0, 0.9, 1.1))
        for row in range(1, count + 1)
    ]
    drawn = gain_against("gain-drift", "drift from the base", points, 0.05)
    assert all(f">r={row}<" in drawn.svg for row in range(1, count + 1))
    assert ">base<" in drawn.svg
    assert "Dashed: the margin, 0.05." in drawn.caption
    lone = GainPoint("r=1", (0.1, -np.inf, np.inf), (1.0, -np.inf, np.inf))
    assert ">r=1<" in gain_against("gain-drift", "drift", [lone]).svg
