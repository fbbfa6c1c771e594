"""What a plan tells, against what there is: the slice of a model, sizes, and what will not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from slm_lora.adapters import attach
from slm_lora.config.load import load_recipe
from slm_lora.experiment.job import Job
from slm_lora.experiment.paths import ExperimentPaths
from slm_lora.experiment.resolve_jobs import make_jobs
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
def test_the_slice_tells_the_adapter_of_the_whole(lab: Lab, targets: str) -> None:
    job = job_of(lab, f"adapter.target_modules={targets}")
    base = load_base(job.source, device=job.device, precision=job.precision)
    whole = attach.count_parameters(attach.attach(base, job.config.adapter, 0)).trainable
    found = measure(job, compiled=False)
    assert found.adapter == whole
    assert found.training > 0 and found.scoring > 0


def test_what_layers_keep(lab: Lab) -> None:
    few = measure(job_of(lab), compiled=False).kept
    more = measure(job_of(lab, "adapter.target_modules=all-linear"), compiled=False).kept
    again = measure(job_of(lab, "training.activation_checkpointing=true"), compiled=False).kept
    # (A tiny model's layers keep relatively much beside what they were given.)
    assert again < 0.5 * few < few < more


def test_memory_goes_with_what_is_computed_at_once(lab: Lab) -> None:
    small, large = (
        planned(lab, f"training.micro_batch_tokens={tokens}").training_bytes for tokens in (64, 400)
    )
    full = planned(lab, "adapter.kind=full").training_bytes
    assert small < large
    # (Twelve bytes more for each of the weights than where they are frozen.)
    assert full > small


def test_a_finished_base_and_unfinished_cells(lab: Lab) -> None:
    jobs = [job_of(lab, f"adapter.r={r}") for r in (2, 4)]
    found = plan(jobs, ExperimentPaths("tiny", lab.folder / "none", lab.folder / "none"))
    assert [cell.name for cell in found.cells] == ["base", "r2", "r4"]
    base, first, second = found.cells
    assert base.training_seconds == 0 and base.scoring_seconds == first.scoring_seconds
    # One slice for both; twice the rank holds twice the adapter, 16 bytes a weight.
    assert first.training_seconds == second.training_seconds
    assert first.training_bytes < second.training_bytes
    assert not found.warning()
    assert found.cells[1].steps == 18 and replace(found, free_bytes=10**6).warning().startswith(
        "base, r2, r4 will not fit: "
    )


def test_too_large_is_said_before_the_run(
    lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "available_bytes", lambda device: 5_000_000)
    assert command("experiment", lab.recipe, "--plan", "--results", lab.folder / "r") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "warning: base, r2-40, r4-40, r4-80 will not fit: " in shown
    assert "training.micro_batch_tokens" in shown
    assert lab.run("grid.cells=[{data.size: 40}]") == 0
    shown = " ".join(capsys.readouterr().err.split())
    assert "warning: 40 will not fit: weights and optimizer of 40 alone take" in shown


def test_what_the_machine_has() -> None:
    assert 10**7 < hardware.resident_bytes() < hardware.available_bytes("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_plan_for_a_device_that_is_not_here_says_so(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ("grid.cells=[{data.size: 40}]", "--plan", "--results", lab.folder / "r")
    asked = ("training.device=cuda", "training.precision=fp16")
    assert command("experiment", lab.recipe, *asked, *one) == 0
    said = capsys.readouterr()
    warning = "warning: training.device = cuda and training.precision = fp16: not on this machine"
    assert warning in " ".join(said.out.split()) and warning in said.err
    assert command("experiment", lab.recipe, *one) == 0
    assert "not on this machine" not in "".join(capsys.readouterr())
    # Without --plan it is refused.
    assert lab.run("grid.cells=[{data.size: 40}]", *asked) == 2
