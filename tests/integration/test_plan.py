"""Plans: the slice of a model, memory estimates, warnings about memory and device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slm_lora.adapters import attach
from slm_lora.config.load import load_recipe
from slm_lora.errors import UsageError
from slm_lora.experiment import resolve_jobs
from slm_lora.experiment.job import Job
from slm_lora.experiment.paths import ExperimentPaths
from slm_lora.experiment.resolve_jobs import JobResolver, make_jobs
from slm_lora.experiment.tuning import TuningPhase
from slm_lora.model.loading import load_base
from slm_lora.planning.plan import PlannedCell, plan
from slm_lora.planning.probe import measure
from slm_lora.runtime import hardware

from ..support.lab import Lab, command


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Lab:
    return Lab(tmp_path_factory.mktemp("plan"), tiny_folder)


def job_of(lab: Lab, *overrides: str) -> Job:
    _, cells = load_recipe(lab.recipe, ["grid.cells=[]", "data.size=80", *overrides])
    return make_jobs(cells)[0]


def planned(lab: Lab, *overrides: str) -> PlannedCell:
    nowhere = lab.folder / "nowhere"
    return plan([job_of(lab, *overrides)], ExperimentPaths("tiny", nowhere, nowhere)).cells[-1]


@pytest.mark.parametrize("targets", ["[q_proj,v_proj]", "all-linear"])
def test_probe_predicts_the_adapter_size(lab: Lab, targets: str) -> None:
    job = job_of(lab, f"adapter.target_modules={targets}")
    base = load_base(job.source, device=job.device, precision=job.precision)
    whole_parameters = attach.count_parameters(attach.attach(base, job.config.adapter, 0)).trainable
    probe = measure(job, compiled=False)
    assert probe.adapter_parameters == whole_parameters
    assert probe.training_s_per_token > 0 and probe.scoring_s_per_token > 0


def test_saved_bytes_per_token_fall_with_checkpointing_and_grow_with_targets(lab: Lab) -> None:
    def saved(*overrides: str) -> float:
        return measure(job_of(lab, *overrides), compiled=False).saved_bytes_per_token

    two_modules = saved()
    # A tiny model's layers save much besides their inputs, so checkpointing helps little.
    assert saved("training.activation_checkpointing=true") < 0.5 * two_modules
    assert two_modules < saved("adapter.target_modules=all-linear")


def test_planned_memory_grows_with_micro_batch_and_full_fine_tuning(lab: Lab) -> None:
    small, large = (
        planned(lab, f"training.micro_batch_tokens={tokens}").training_bytes for tokens in (64, 400)
    )
    full = planned(lab, "adapter.kind=full").training_bytes
    assert small < large
    # Gradients and moments of every weight.
    assert full > small


def test_plan_estimates_base_and_cells_from_one_probe(lab: Lab) -> None:
    jobs = [job_of(lab, f"adapter.r={r}") for r in (2, 4)]
    estimate = plan(jobs, ExperimentPaths("tiny", lab.folder / "none", lab.folder / "none"))
    assert [cell.name for cell in estimate.cells] == ["base", "r2", "r4"]
    base, first, second = estimate.cells
    assert base.training_seconds == 0 and base.scoring_seconds == first.scoring_seconds
    # The slice is shared; twice the rank is twice the adapter, at 16 bytes per parameter.
    assert first.training_seconds == second.training_seconds
    assert first.training_bytes < second.training_bytes
    assert not estimate.warning()
    assert estimate.cells[1].steps == 18 and replace(
        estimate, free_bytes=10**6
    ).warning().startswith("base, r2, r4 will not fit: ")


def test_plan_and_run_warn_when_memory_is_short(
    lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "available_bytes", lambda device: 5_000_000)
    assert command("experiment", lab.recipe, "--plan", "--results", lab.folder / "r") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "warning: base, r2-40, r4-40, r4-80 will not fit: " in output
    assert "training.micro_batch_tokens" in output
    assert lab.run("grid.cells=[{data.size: 40}]") == 0
    output = " ".join(capsys.readouterr().err.split())
    assert "warning: 40 will not fit: weights and optimizer of 40 alone take" in output


def test_available_memory_exceeds_resident_memory() -> None:
    assert 10**7 < hardware.resident_bytes() < hardware.available_bytes("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_plan_warns_and_run_refuses_when_the_device_is_missing(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    one_cell = ("grid.cells=[{data.size: 40}]", "--plan", "--results", lab.folder / "r")
    overrides = ("training.device=cuda", "training.precision=fp16")
    assert command("experiment", lab.recipe, *overrides, *one_cell) == 0
    output = capsys.readouterr()
    warning = "warning: training.device = cuda and training.precision = fp16: not on this machine"
    assert warning in " ".join(output.out.split()) and warning in output.err
    assert command("experiment", lab.recipe, *one_cell) == 0
    assert "not on this machine" not in "".join(capsys.readouterr())
    # An error without --plan.
    assert lab.run("grid.cells=[{data.size: 40}]", *overrides) == 2


# --- automatic learning rates ------------------------------------------------------------------
# Of the tiny Llama (width 48) at batch 8: 5e-5 × 10 × (2000/48)^0.781 × √(8/16) = 0.0065 × √(32/α).

RULE = {2: 0.018, 4: 0.013}  # rank with alpha 2r


def test_the_rule_becomes_the_number_of_the_run(lab: Lab) -> None:
    job = job_of(lab, "training.learning_rate=auto", "adapter.r=4")
    named = job_of(lab, f"training.learning_rate={RULE[4]}", "adapter.r=4")
    assert job.config.training.learning_rate == RULE[4]
    assert job.resolved == named.resolved
    assert job.identity == named.identity
    assert job.suggested_rate is not None and named.suggested_rate is None


def test_a_grid_compares_the_rule_with_a_rate(lab: Lab) -> None:
    grid = "grid.axes=[{training.learning_rate: [auto, 1e-3]}]"
    _, cells = load_recipe(lab.recipe, ["grid.cells=[]", grid, "data.size=40", "adapter.r=2"])
    jobs = make_jobs(cells)
    assert [job.settings["training.learning_rate"] for job in jobs] == [RULE[2], 1e-3]
    assert [job.name for job in jobs] == [cell.name for cell in cells] == ["lrauto", "lr0.001"]


def test_the_plan_prints_the_rule(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("experiment", lab.recipe, "training.learning_rate=auto", "--plan") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "auto" in line]
    assert len(lines) == 2, "one for each rank, not for each cell"
    assert lines[0].startswith("training.learning_rate = auto: 0.018 = 5e-05 × (2000/width 48)")
    assert command("experiment", lab.recipe, "--plan") == 0
    assert "auto" not in capsys.readouterr().out


def test_a_model_without_a_width_needs_a_number(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolve_jobs, "text_config", lambda source: {"hidden_sizes": [48, 96]})
    with pytest.raises(UsageError, match=r"auto: config\.json of tiny-llama gives no hidden_size"):
        job_of(lab, "training.learning_rate=auto")
    assert job_of(lab, "training.learning_rate=1e-3").suggested_rate is None


def test_tuning_begins_around_the_rule(lab: Lab) -> None:
    overrides = ["tuning.race=false", "grid.cells=[]"]
    recipe, cells = load_recipe(
        lab.recipe, [*overrides, "data.size=40", "grid.axes=[{adapter.r: [2, 64]}]"]
    )
    nowhere = lab.folder / "none"
    phase = TuningPhase(
        recipe, cells, JobResolver(), ExperimentPaths(recipe.name, nowhere, nowhere)
    )
    rates: dict[int, list[float]] = {}
    for job in phase.next_jobs():
        rates.setdefault(job.config.adapter.r, []).append(job.config.training.peak_rate)
    # 0.018 and 0.0032: the values 0.016 and 0.004 are next to them.
    assert rates == {2: [0.064, 0.016, 0.004], 64: [0.016, 0.004, 0.001]}
