"""`slm-lora tune` and `slm-lora init` with a tiny model: files, screen, JSON, exit codes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from slm_lora.config.load import load_recipe
from slm_lora.errors import NOT_SHOWN_BETTER, STOPPED_RESUMABLE
from slm_lora.experiment import candidates
from slm_lora.experiment.paths import ExperimentPaths
from slm_lora.experiment.resolve_jobs import JobResolver, make_jobs
from slm_lora.experiment.tuning import TuningPhase
from slm_lora.planning import budget, rows_to_recipe
from slm_lora.planning.budget import Search
from slm_lora.planning.tuning_plan import plan_tuned
from slm_lora.runs.scores import read_scores
from slm_lora.runtime.progress import Reporter

from ..support.lab import command
from ..support.rows import make_rows, write_jsonl


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with rows; searches are short."""
    searches = (Search(0, 0, 2), Search(0, 0, 1))
    for module in (budget, rows_to_recipe):
        monkeypatch.setattr(module, "SEARCHES", searches)
    monkeypatch.setattr(budget, "MAX_EPOCHS", 1)
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", make_rows(160))
    return tmp_path


def run_folders(folder: Path) -> dict[str, int]:
    """Tuning runs and the time of their records."""
    runs = (folder / "results" / "rows" / "tuning" / "runs").glob("r*")
    return {run.name: (run / "run.json").stat().st_mtime_ns for run in runs}


def test_interrupted_tune_goes_on_and_ends_with_adapter_and_exit_code_0(
    here: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("tune", "rows.jsonl", "--model", tiny_folder, "--budget", "20m")
    calls = 0

    def interrupted(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return run_cell(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        run_cell = candidates.run_cell
        patched.setattr(candidates, "run_cell", interrupted)
        assert command(*words) == STOPPED_RESUMABLE
    recipe, first = (here / "rows.yaml").read_bytes(), run_folders(here)
    assert len(first) == 2
    capsys.readouterr()

    assert command(*words) == 0
    screen = capsys.readouterr().out.strip().splitlines()
    assert (here / "rows.yaml").read_bytes() == recipe
    assert first.items() <= run_folders(here).items()  # none was run again
    assert len(screen) <= 24 and max(map(len, screen)) <= 100
    assert screen[0].startswith("Use r=") and "learning rate" in screen[0]
    text = "\n".join(screen)
    assert "below the base" in text and "Not known: " in text and "usual 2e-4" in text

    assert command(*words, "--json") == 0
    out = json.loads(capsys.readouterr().out)
    chosen = {arm["name"]: arm["chosen"] for arm in out["tuning"]}
    assert out["recommended"]["training.learning_rate"] in (
        values["training.learning_rate"] for values in chosen.values()
    )
    assert out["better_than_base"] is True and out["recommended"]["seeds"] == 2
    # The gain from the per-row scores, by the definition of the loss.
    runs = here / "results" / "rows" / "runs"
    losses: dict[str, list[float]] = {"base": [], "own": []}
    name = f"r{out['recommended']['adapter.r']}"
    for folder in runs.iterdir():
        scores = read_scores(folder / "scores.parquet")
        own = "base" if folder.name.startswith("base") else "own"
        if own == "base" or folder.name.startswith(f"{name}-"):
            losses[own].append(sum(s.nll_all for s in scores) / sum(s.tokens_all for s in scores))
    gain = losses["base"][0] - sum(losses["own"]) / 2
    assert math.isclose(out["gain"]["nats"], gain, abs_tol=1e-9)
    assert out["gain"]["low"] < gain < out["gain"]["high"]
    assert (here / out["adapter"] / "adapter_model.safetensors").is_file()
    assert (here / out["report"]).is_file() and out["recipe"] == "rows.yaml"
    assert any(line.endswith(f"chat --adapter {out['adapter']}") for line in screen)


def test_rates_that_change_nothing_give_exit_code_10(
    here: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("rows.jsonl", "--model", tiny_folder, "--budget", "20m")
    assert command("init", *words) == 0
    recipe = here / "rows.yaml"
    text = recipe.read_text()
    recipe.write_text(
        text.replace("[2e-4, 1e-3, 5e-3]", "[1e-12, 2e-12]").replace("value: 2e-4", "value: 1e-12")
    )
    assert command("tune", *words) == NOT_SHOWN_BETTER
    assert "No adapter is shown to be better than the base" in capsys.readouterr().out
    assert command("tune", *words, "--json") == NOT_SHOWN_BETTER
    out = json.loads(capsys.readouterr().out)
    assert out["better_than_base"] is False and out["gain"]["verdict"] != "different"
    # Another request does not run this recipe.
    assert command("tune", *words[:-1], "30m") == 2
    message = capsys.readouterr().err
    assert "rows.yaml: exists, written by 'slm-lora tune rows.jsonl" in message
    assert "--budget 30m'; remove it, choose --name" in message


def test_recipe_of_init_is_within_the_budget_by_the_plan_and_is_never_overwritten(
    here: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("init", "rows.jsonl", "--model", tiny_folder)
    assert command(*words, "--budget", "20m") == 0
    recipe, cells = load_recipe(here / "rows.yaml")
    assert recipe.adapter.target_modules == "all-linear"
    resolver, paths = JobResolver(), ExperimentPaths("rows", here / "none", here / "none")
    phase = TuningPhase(recipe, cells, resolver, paths)
    estimate = plan_tuned(phase, cells, resolver, Reporter(quiet=True))
    assert estimate.seconds.most < 20 * 60
    assert sum(search.runs.most for search in estimate.searches) == Search(0, 0, 2).tuning_runs
    before = (here / "rows.yaml").read_bytes()
    assert command(*words, "--budget", "20m") == 2
    assert "rows.yaml: exists, and is not overwritten" in capsys.readouterr().err
    assert (here / "rows.yaml").read_bytes() == before


def test_budget_that_is_too_small_names_one_that_would_do(
    here: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("tune", "rows.jsonl", "--model", tiny_folder, "--budget", "10s") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("--budget 10s: too little for 160 rows") and "would do" in message
    assert not (here / "rows.yaml").exists()


def test_malformed_rows_are_skipped_and_at_most_three_remarks_are_printed(
    here: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows(160)
    rows[7]["response"] = ""
    rows[9]["response"] = "ask {{name}} <|im_end|>"
    write_jsonl(here / "rows.jsonl", rows)
    assert command("init", "rows.jsonl", "--model", tiny_folder, "--budget", "20m") == 0
    remarks = [line for line in capsys.readouterr().err.splitlines() if "note: " in line]
    assert 1 <= len(remarks) <= 3
    assert "1 malformed row skipped, first rows.jsonl:8" in remarks[0]
    recipe, _ = load_recipe(here / "rows.yaml")
    assert recipe.data.on_bad_row == "skip"


def test_columns_that_no_format_has_are_guessed_and_written_down(
    here: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"What is {n} of {n * 7}?,It is {n * n}." for n in range(60)]
    (here / "faq.csv").write_text("\n".join(["question,answer", *lines]))
    assert command("init", "faq.csv", "--model", tiny_folder, "--budget", "20m") == 0
    assert "'question' as instruction, 'answer' as response is a guess" in capsys.readouterr().err
    recipe, cells = load_recipe(here / "faq.yaml")
    assert recipe.data.columns == {"instruction": "question", "response": "answer"}
    job = make_jobs(cells)[0]
    assert job.rows.format == "dolly" and len(job.rows.rows) == 60
