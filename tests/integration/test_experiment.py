"""The command, end to end on a tiny model: files, losses, restarts, recomputation by others."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from slm_lora.adapters import io as adapter_io
from slm_lora.model.base import Base
from slm_lora.records import Row, Turn

from ..support.lab import Lab, command
from ..support.rows import make_rows, write_jsonl


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("lab"), tiny_folder)
    assert lab.run() == 0
    return lab


def test_experiment_writes_tables_report_figures_and_adapters(lab: Lab) -> None:
    table = (lab.results / "experiment_table.md").read_text()
    assert "| Model | Dataset Size | r | Epochs | Eval Loss | Perplexity |" in table
    assert [line.split("|")[2:4] for line in table.splitlines() if line.startswith("| LoRA")] == [
        [" 40 ", " 2 "], [" 40 ", " 4 "], [" 80 ", " 4 "],
    ]  # fmt: skip
    report = (lab.results / "report.md").read_text()
    for title in ("**[Recommended](#settings):**", "Effect of rank", "Effect of dataset size"):
        assert title in report
    assert "How does the held-out loss of tiny-llama on rows.jsonl depend on the rank" in report
    for figure in re.findall(r"\]\((figures/[^)]+)\)", report):
        drawing = (lab.results / figure).read_text()
        assert drawing.startswith("<?xml") and drawing.rstrip().endswith("</svg>")
    assert "](figures/settings.svg)" in report
    assert {p.name for p in lab.adapters.iterdir()} == {
        "tiny-r2-40", "tiny-r4-40", "tiny-r4-80",
    }  # fmt: skip
    assert not list((lab.results).rglob("*.tmp")) and not list(lab.folder.rglob(".*"))
    assert not (lab.results / "checkpoints").exists() or not list(
        (lab.results / "checkpoints").iterdir()
    )


def test_perplexity_is_exp_of_the_loss_of_the_same_scores(lab: Lab) -> None:
    for run in lab.metrics()["runs"]:
        scores = pq.read_table(lab.results / "runs" / run["folder"] / "scores.parquet").to_pydict()
        for kind in ("all", "response"):
            evaluation = run["evaluation"][kind]
            loss = math.fsum(scores[f"nll_{kind}"]) / sum(scores[f"tokens_{kind}"])
            assert evaluation["loss"] == pytest.approx(loss, rel=1e-12)
            assert evaluation["perplexity"] == math.exp(evaluation["loss"])
        assert scores["row_id"] == sorted(scores["row_id"])
        assert len(scores["row_id"]) == 20
    schema = pq.read_schema(lab.results / "runs" / run["folder"] / "scores.parquet")
    assert schema.names == [
        "row_id", "group_id", "category", "split", "nll_all", "tokens_all", "bytes_all",
        "nll_response", "tokens_response", "bytes_response",
    ]  # fmt: skip
    assert str(schema.field("nll_all").type) == "double"


def test_training_rows_are_nine_tenths_and_all_cells_share_the_test_rows(lab: Lab) -> None:
    runs = lab.metrics()["runs"]
    assert [r["data"]["sets"]["train"]["rows"] for r in runs[1:]] == [36, 36, 72]
    assert len({r["data"]["held_out_sha256"] for r in runs}) == 1
    assert [r["cell"] for r in runs] == ["base", "r2-40", "r4-40", "r4-80"]


def test_results_and_adapters_name_no_path_of_this_machine(lab: Lab) -> None:
    paths = [*lab.results.rglob("*.json"), *lab.results.rglob("*.md"),
             *lab.adapters.rglob("*.json")]  # fmt: skip
    assert len(paths) > 10
    for path in paths:
        text = path.read_text()
        assert str(lab.folder) not in text and "/tmp" not in text and "/root" not in text


def test_a_finished_experiment_is_not_run_again(lab: Lab) -> None:
    before = {p: p.stat().st_mtime_ns for p in (lab.results / "runs").rglob("*")}
    assert lab.run() == 0
    assert before == {p: p.stat().st_mtime_ns for p in (lab.results / "runs").rglob("*")}


def test_interrupted_experiment_resumes_with_the_same_losses(
    lab: Lab, tmp_path: Path, tiny_folder: Path
) -> None:
    interrupted = Lab(tmp_path, tiny_folder)
    script = (
        "import sys, slm_lora.experiment.cell as r\n"
        "old = r.train\n"
        "seen = []\n"
        "def train(*a, **k):\n"
        "    seen.append(1)\n"
        "    if len(seen) == 2: raise KeyboardInterrupt\n"
        "    return old(*a, **k)\n"
        "r.train = train\n"
        "import torch; torch.set_num_threads(1)\n"
        "from slm_lora.cli import main\n"
        "sys.argv = ['slm-lora', 'experiment', *sys.argv[1:]]\n"
        "main()\n"
    )
    where = ["--results", str(interrupted.results.parent), "--adapters", str(interrupted.adapters)]
    stopped = subprocess.run(
        [sys.executable, "-c", script, str(interrupted.recipe), *where],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert stopped.returncode == 75, stopped.stderr
    assert "the same command continues" in stopped.stderr
    finished = sorted(p.name for p in (interrupted.results / "runs").iterdir())
    assert [name.rsplit("-", 1)[0] for name in finished] == ["base", "r2-40"]
    assert interrupted.run() == 0
    actual, expected = (
        [(run["hash"], run["evaluation"]["all"]["loss"]) for run in experiment.metrics()["runs"]]
        for experiment in (interrupted, lab)
    )
    assert actual == expected


def test_cell_with_a_missing_adapter_is_trained_again(lab: Lab) -> None:
    weights = lab.adapters / "tiny-r2-40" / adapter_io.WEIGHTS
    before = weights.read_bytes()
    run = next((lab.results / "runs").glob("r2-40-*"))
    weights.unlink()
    assert lab.run() == 0
    assert weights.read_bytes() == before, "other bits than before"
    assert next((lab.results / "runs").glob("r2-40-*")) == run


def test_logs_hold_no_text_of_rows(
    tmp_path: Path, tiny_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small = Lab(tmp_path, tiny_folder)
    rows = make_rows(150)
    for row in rows:
        row["response"] += "zebracanary"
    write_jsonl(small.rows, rows)
    assert small.run("grid.cells=[{data.size: 40}]") == 0
    bad = [
        json.dumps({**rows[0], "response": ["zebracanary"]}), '{"instruction": "zebracanary',
        json.dumps({"instruction": "zebracanary", "response": ""}), '["zebracanary"]',
        json.dumps({"zebracanary": "zebracanary"}), '"zebracanary"',
        '{"instruction": "zebracanary", "instruction": "zebracanary", "response": "x"}',
    ]  # fmt: skip
    with small.rows.open("a") as file:
        file.write("\n".join(bad) + "\n")
    assert small.run("grid.cells=[{data.size: 40}]") == 3
    assert small.run("grid.cells=[{data.size: 40}]", "data.on_bad_row=skip") == 0
    output = "".join(capfd.readouterr())
    assert "7 malformed rows" in output and "zebracanary" not in output


def test_finished_cell_without_kept_adapter_is_not_trained_again(lab: Lab, tmp_path: Path) -> None:
    out = ("--results", tmp_path / "results", "--adapters", tmp_path / "adapter")
    words = ("grid.cells=[{data.size: 40, adapter.r: 2}]", "keep_adapters=false")
    assert command("experiment", lab.recipe, *words, *out) == 0
    assert not list(tmp_path.rglob("*.safetensors"))
    run = next((tmp_path / "results" / "tiny" / "runs").glob("r2-40-*"))
    assert run.name == next((lab.results / "runs").glob("r2-40-*")).name, "another run"
    written = (run / "run.json").stat().st_mtime_ns
    assert command("experiment", lab.recipe, *words, *out) == 0
    assert (run / "run.json").stat().st_mtime_ns == written, "trained again"


def test_report_lists_rows_of_extreme_and_median_change_and_shows_outputs(
    lab: Lab, tmp_path: Path, tiny_folder: Path
) -> None:
    results = shutil.copytree(lab.results, tmp_path / "tiny")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"instruction": "Why <tea>?", "response": "It wakes."}\n')
    adapters = ("--adapter", lab.adapters / "tiny-r2-40", "--base", tiny_folder)
    out = ("--out", results / "outputs.json", "--max-new-tokens", "6")
    assert command("compare-outputs", prompts, *adapters, *out) == 0
    assert command("report", results) == 0
    report, page = ((results / f"report.{end}").read_text() for end in ("md", "html"))
    assert "<b>Replies side by side</b>" in report and "<b>1. Why &lt;tea&gt;?</b>" in report
    assert "<h3>1. Why &lt;tea&gt;?</h3>" in page and "tiny-r2-40, sampled" in page
    table = report[report.index("<b>Rows</b>") :].split("</details>")[0]
    picked = [line.split("|") for line in table.splitlines() if "`" in line]
    changes = [float(cells[7]) for cells in picked]
    best = min(
        (c for c in lab.metrics()["contrasts"] if c["key"] == "base"), key=lambda c: c["value"]
    )
    scores = [
        pq.read_table(results / "runs" / folder / "scores.parquet").to_pydict()
        for folder in best["pairs"][0]
    ]
    all_changes = sorted(
        after / tokens - before / tokens
        for before, after, tokens in zip(
            scores[0]["nll_all"], scores[1]["nll_all"], scores[0]["tokens_all"], strict=True
        )
    )
    expected = [*all_changes[:2], all_changes[len(all_changes) // 2], *all_changes[-2:]]
    assert changes[:5] == pytest.approx(expected, abs=1e-4)
    assert len({cells[2] for cells in picked}) == len(picked) == 8
    (results / "outputs.json").write_text("{}")
    assert command("report", results) == 4


def test_rows_are_quoted_only_in_report_with_rows(
    lab: Lab, tmp_path: Path, tiny_folder: Path
) -> None:
    results = shutil.copytree(lab.results, tmp_path / "tiny")
    words = (f"model.name={tiny_folder}", f"data.name={lab.rows}")
    assert command("report", results, "--with-rows", lab.recipe, *words) == 0
    files = {path.name: path.read_text() for path in results.glob("*.*")}
    with_rows = files.pop("report-with-rows.html")
    quoted = [
        response
        for line in lab.rows.read_text().splitlines()
        if html.escape(response := json.loads(line)["response"]) in with_rows
    ]
    assert len(quoted) >= 8
    assert with_rows.count("<h3>Largest fall: ") == 2
    assert not any(text in file for file in files.values() for text in quoted)
    # With answers: of the base, and of the adapter that it is about.
    options = ("--with-rows", lab.recipe, *words, "--answers", "--adapters", lab.adapters)
    assert command("report", results, *options) == 0
    with_answers = (results / "report-with-rows.html").read_text()
    assert with_answers.count("answer of base") == with_answers.count("answer of tiny-r4-80") == 8
    assert "answer of" not in with_rows
    assert command("report", results, "--answers") == 2
    # Another data set's rows are not passed off as those that were scored.
    (tmp_path / "other.jsonl").write_text('{"instruction": "a", "response": "b"}\n' * 3)
    other_rows = (words[0], f"data.name={tmp_path / 'other.jsonl'}")
    assert command("report", results, "--with-rows", lab.recipe, *other_rows) == 2
    assert command("report", results, "data.size=3") == 2


def test_a_single_test_row_has_no_interval(tmp_path: Path, tiny_folder: Path) -> None:
    small = Lab(tmp_path, tiny_folder)
    assert small.run("data.test_rows=1", "data.validation_rows=1") == 0
    run = small.metrics()["runs"][1]
    assert run["intervals"]["all"]["low"] is None
    assert run["evaluation"]["all"]["rows"] == 1


@pytest.mark.parametrize("kind", ["rslora", "dora", "pissa", "full"])
def test_saved_adapters_of_other_methods_score_as_in_training(
    lab: Lab, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--results", tmp_path / "results", "--adapters", tmp_path / "adapter")
    overrides = (f"adapter.kind={kind}", "grid.cells=[{data.size: 40}]")
    assert command("train", lab.recipe, *overrides, *out) == 0
    record = json.loads(next(tmp_path.rglob("run.json")).read_text())
    capsys.readouterr()
    adapter = ("--adapter", tmp_path / "adapter/tiny-40")
    assert command("evaluate", lab.recipe, *overrides, *adapter) == 0
    assert f"loss {record['evaluation']['all']['loss']:.5f}" in capsys.readouterr().out
    untrained = next(run for run in lab.metrics()["runs"] if "adapter" not in run)
    assert record["evaluation"]["all"]["loss"] < untrained["evaluation"]["all"]["loss"] - 0.1


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_saved_default_template_has_the_date_of_training(
    lab: Lab, tiny_folder: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    own = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') + '\\n' }}" + own)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 'tools' }}")
    words = (f"adapter.kind={kind}", f"model.name={base}", "data.template=chat")
    out = ("--results", tmp_path / "results", "--adapters", tmp_path / "adapter")
    short = ("grid.cells=[{data.size: 40}]", "training.max_steps=2")
    assert command("train", lab.recipe, *words, *short, *out) == 0
    output = capsys.readouterr()
    assert (output.out + output.err).count("26 Jul 2024 is used instead, in training and in") == 1
    folder = tmp_path / "adapter" / "tiny-40"
    tokenizer = AutoTokenizer.from_pretrained(folder if kind == "full" else base)
    if kind == "lora":
        assert set(tokenizer.chat_template) == {"default", "tool_use"}
        tokenizer.chat_template = (folder / "chat_template.jinja").read_text()
    assert isinstance(tokenizer.chat_template, str)
    chat = [{"role": "user", "content": "Why?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "26 Jul 2024\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    where = ("--base", folder) if kind == "full" else ("--base", base, "--adapter", folder)
    assert command("generate", "Why?", "--max-new-tokens", 2, *where) == 0
    assert command("evaluate", lab.recipe, *words, "--adapter", folder) == 0
    scored = printed_losses(capsys.readouterr().out)[0]
    record = json.loads(next((tmp_path / "results").rglob("run.json")).read_text())
    assert scored[0] == round(record["evaluation"]["all"]["loss"], 5)
    assert scored[2] == pytest.approx(scored[0] - scored[1], abs=2e-5) and scored[2] < 0


@pytest.mark.parametrize("kind", ["full", "pissa"])
def test_cell_after_a_base_altering_method_has_unchanged_weights(
    lab: Lab, tmp_path: Path, kind: str
) -> None:
    out = ("--results", tmp_path / "results", "--adapters", tmp_path / "adapter")
    cells = f"[{{adapter.kind: {kind}, data.size: 40}}, {{data.size: 40, adapter.r: 2}}]"
    assert command("experiment", lab.recipe, f"grid.cells={cells}", *out) == 0
    after, alone = (
        (folder / "tiny-r2-40" / adapter_io.WEIGHTS).read_bytes()
        for folder in (tmp_path / "adapter", lab.adapters)
    )
    assert after == alone


def test_report_makes_the_same_files_again(lab: Lab) -> None:
    names = ("experiment_table.md", "metrics.json", "report.md", "report.html")
    before = {name: (lab.results / name).read_text() for name in names}
    for name in names:
        (lab.results / name).unlink()
    assert command("report", lab.results) == 0
    assert before == {name: (lab.results / name).read_text() for name in names}


def test_report_page_is_well_formed_and_fetches_nothing(lab: Lab) -> None:
    page = (lab.results / "report.html").read_text()
    assert page.count("<svg") == page.count("</svg>") >= 4
    assert "<script" not in page
    # Names of XML and licences are no addresses that a browser would follow by itself.
    assert not re.search(r"(src|href)=[\"'](?!#)", page)
    assert not re.search(r"url\((?!#)", page)
    figures = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    assert len(figures) >= 4
    assert all(re.search(r"<figcaption>\w", figure) for figure in figures)


def test_compare_gives_the_difference_of_the_experiment(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = lab.results / "runs"
    contrast = next(c for c in lab.metrics()["contrasts"] if c["key"] == "adapter.r")
    names = contrast["pairs"][0]
    assert command("compare", *(runs / name for name in names), "--json") == 0
    compared = json.loads(capsys.readouterr().out)
    for key in ("pairs", "value", "low", "high", "p", "groups", "margin"):
        assert compared[key] == contrast[key]
    assert command("compare", *(runs / name for name in names)) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert f"r4-40 vs r2-40: {contrast['value']:+.4f} nats" in output


def test_compare_refuses_runs_scored_on_other_rows(
    lab: Lab, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = Lab(tmp_path, tiny_folder)
    assert small.run("data.test_rows=10", "grid.cells=[{data.size: 40}]") == 0
    first, second = (
        next((experiment.results / "runs").glob("base-*")) for experiment in (lab, small)
    )
    assert command("compare", first, second) == 4
    assert "scored on different rows" in capsys.readouterr().err


def test_evaluate_gives_the_loss_of_the_table(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    reported = lab.metrics()["runs"][1]["evaluation"]["all"]["loss"]
    chosen = (
        "grid.cells=[{data.size: 40, adapter.r: 2}]",
        "--adapter",
        lab.adapters / "tiny-r2-40",
    )
    assert command("evaluate", lab.recipe, *chosen) == 0
    assert f"loss {reported:.5f}" in capsys.readouterr().out


def printed_losses(text: str) -> list[tuple[float, float, float]]:
    """Of every kind of loss: the adapter's, the base's and the difference."""
    matches = re.findall(
        r"(?:whole text|response only) +loss (\S+).*\n  base +loss (\S+).*\n"
        r"  difference +([+-]\S+) nats per token, 95 % ([+-]\S+) to ([+-]\S+);",
        text,
    )
    for *_, value, low, high in matches:
        assert float(low) < float(value) < float(high)
    return [(float(a), float(b), float(c)) for a, b, c, _, _ in matches]


def test_evaluate_shows_the_base_beside_the_adapter(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = (run["evaluation"] for run in lab.metrics()["runs"][:2])
    words = ("grid.cells=[{data.size: 40, adapter.r: 2}]", "--adapter", lab.adapters / "tiny-r2-40")
    capsys.readouterr()
    assert command("evaluate", lab.recipe, *words) == 0
    output = capsys.readouterr()
    expected = [(adapter[kind]["loss"], base[kind]["loss"]) for kind in ("all", "response")]
    assert printed_losses(output.out) == [
        (round(a, 5), round(b, 5), round(a - b, 5)) for a, b in expected
    ]  # fmt: skip
    assert "warning" not in output.out + output.err
    assert command("evaluate", lab.recipe, *words, "--no-base") == 0
    out = capsys.readouterr().out
    assert f"loss {expected[0][0]:.5f}" in out and "difference" not in out
    assert command("evaluate", lab.recipe) == 0
    out = capsys.readouterr().out
    assert f"loss {expected[0][1]:.5f}" in out and "difference" not in out


@pytest.mark.parametrize(
    ("override", "warning"),
    [
        (
            "data.template=chat",
            "was trained in template instruction_response, and is scored in template chat: "
            "data.template=instruction_response scores it as it was",
        ),
        (
            "data.include_context=false",
            "was trained with contexts, and is scored without them: "
            "data.include_context=true scores it as it was",
        ),
        (
            "data.special_tokens_in_responses=special",
            "was trained with data.special_tokens_in_responses=text, and is scored with special",
        ),
        ("data.split_seed=5", "was trained with data.split_seed=0, and is scored with 5: rows"),
        ("data.test_rows=25", "was trained with data.test_rows=20, and is scored with 25: rows"),
        ("data.test_rows=15", ""),
    ],
)
def test_evaluate_warns_when_scored_otherwise_than_trained(
    lab: Lab, override: str, warning: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = lab.adapters / "tiny-r4-40"
    capsys.readouterr()
    assert command("evaluate", lab.recipe, override, "--adapter", folder, "--no-base") == 0
    output = capsys.readouterr()
    warnings = [line for line in (output.out + output.err).splitlines() if "warning: " in line]
    assert len(warnings) == bool(warning)
    assert not warning or f"{folder} {warning}" in warnings[0]


def test_evaluate_warns_when_a_foreign_adapter_has_another_template(
    lab: Lab, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def warnings(*overrides: str) -> str:
        capsys.readouterr()
        words = (*overrides, "--adapter", folder, "--no-base")
        assert command("evaluate", lab.recipe, *words) == 0
        output = capsys.readouterr()
        return output.out + output.err

    folder = shutil.copytree(lab.adapters / "tiny-r4-40", tmp_path / "foreign")
    (folder / adapter_io.ABOUT).unlink()
    assert "template" not in warnings()
    shipped = folder / "chat_template.jinja"
    warning = warnings("data.template=chat")
    assert "has a chat_template.jinja of its own, and is scored in template chat: " in warning
    assert f"data.template={shipped} scores it in its own" in warning
    assert "of its own" not in warnings(f"data.template={shipped}")
    shutil.copy(tiny_folder / "chat_template.jinja", shipped)
    assert "of its own" not in warnings("data.template=chat")
    shipped.unlink()
    assert "does not say which prompts it was trained on; it is scored in" in warnings()


@pytest.mark.parametrize("budget", [1, 100, 100_000])
def test_loss_does_not_depend_on_the_evaluation_batch(
    lab: Lab, budget: int, capsys: pytest.CaptureFixture[str]
) -> None:
    reported = lab.metrics()["runs"][2]["evaluation"]["all"]["loss"]
    scores = lab.folder / f"scores-{budget}.parquet"
    words = (f"evaluation.micro_batch_tokens={budget}", "--adapter", lab.adapters / "tiny-r4-40")
    assert command("evaluate", lab.recipe, *words, "--scores", scores) == 0
    columns = pq.read_table(scores).to_pydict()
    loss = sum(columns["nll_all"]) / sum(columns["tokens_all"])
    assert abs(loss - reported) < 1e-5


def recompute_difference(lab: Lab, model: Path, trained: Path) -> float:
    run = next((lab.results / "runs").glob("r4-80-*"))
    script = Path(__file__).parents[1] / "support" / "recompute_loss.py"
    assert "slm_lora" not in script.read_text().split('"""')[2]
    words = [script, lab.rows, model, trained, run, "fp32"]
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def test_transformers_and_peft_alone_compute_the_same_loss(
    lab: Lab, tiny_folder: Path, tmp_path: Path
) -> None:
    good = lab.adapters / "tiny-r4-80"
    assert abs(recompute_difference(lab, tiny_folder, good)) < 1e-5
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in good.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(good / adapter_io.WEIGHTS)
    name = next(name for name in sorted(tensors) if "lora_B" in name)
    save_file({**tensors, name: torch.zeros_like(tensors[name])}, broken / adapter_io.WEIGHTS)
    assert abs(recompute_difference(lab, tiny_folder, broken)) > 1e-4


def test_evaluate_refuses_changed_weights_and_another_base(
    lab: Lab, load_tiny: Callable[..., Base], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in (lab.adapters / "tiny-r4-80").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    assert command("evaluate", lab.recipe, "--adapter", folder) == 0
    tensors = load_file(folder / adapter_io.WEIGHTS)
    gone = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != gone}, folder / adapter_io.WEIGHTS)
    assert command("evaluate", lab.recipe, "--adapter", folder) == 4
    assert "SHA-256 differs" in capsys.readouterr().err
    about = json.loads((folder / adapter_io.ABOUT).read_text())
    (folder / adapter_io.ABOUT).unlink()
    assert command("evaluate", lab.recipe, "--adapter", folder) == 4
    assert gone in capsys.readouterr().err
    (folder / adapter_io.WEIGHTS).write_bytes(
        (lab.adapters / "tiny-r4-80" / adapter_io.WEIGHTS).read_bytes()[:-9]
    )
    assert command("evaluate", lab.recipe, "--adapter", folder) == 4
    for key in ("files", "seal"):
        del about[key]
    about["base"]["sha256"] = "0" * 64
    (folder / adapter_io.ABOUT).write_text(json.dumps(about))
    (folder / adapter_io.WEIGHTS).write_bytes(
        (lab.adapters / "tiny-r4-80" / adapter_io.WEIGHTS).read_bytes()
    )
    capsys.readouterr()
    assert command("evaluate", lab.recipe, "--adapter", folder) == 4
    assert "was trained on tiny-llama with weights 000000000000" in capsys.readouterr().err


def test_plan_lists_cells_and_trains_nothing(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("experiment", lab.recipe, "--plan", "--results", tmp_path / "r") == 0
    shown = capsys.readouterr().out
    assert "r4-80" in shown and "nothing was trained" in shown
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["adapter.rr=1"], 2, "override: unknown key 'adapter.rr'; did you mean 'adapter.r'?"),
        (["data.name=gone.jsonl"], 3, "gone.jsonl"),
        (["data.test_rows=500"], 3, "data.test_rows = 109 fits"),
        (["grid.cells=[{data.size: 4000}]"], 3, "fits"),
        (["model.name=./nowhere"], 2, "model.name = ./nowhere: no such folder"),
        (["training.precision=fp16"], 2, "use training.precision=bf16 or fp32"),
        (["adapter.target_modules=[lm_head]"], 2, "has no lm_head"),
        (["data.max_length=4096"], 2, "tiny-llama takes 512 tokens at most"),
        (["evaluation.headline=response", "data.max_length=2"], 3, "no label tokens left"),
        (["adapter.target_modules=[q_prj]"], 2, "has no q_prj; it has down_proj"),
        (["data.max_length=2", "training.loss_on=response"], 3, "no label tokens left"),
        (["data.on_long_row=refuse", "data.max_length=5"], 3, "over data.max_length = 5"),
        (["data.template=missing.jinja"], 2, "missing.jinja: cannot be read"),
    ],
)  # fmt: skip
def test_mistakes_are_reported_in_one_line_with_their_exit_code(
    lab: Lab, tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], code: int,
    message: str,
) -> None:  # fmt: skip
    out = tmp_path / "results"
    folders = ("--results", out, "--adapters", tmp_path / "adapter")
    assert command("experiment", lab.recipe, *words, *folders) == code
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(tmp_path.rglob("adapter_model*"))
    assert not [p for p in out.rglob("*") if p.name.startswith(".")]


def test_model_folder_without_whole_weights_is_refused(
    lab: Lab, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "hollow"
    folder.mkdir()
    for path in tiny_folder.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    assert lab.run(f"model.name={folder}") == 2
    assert "no weights: no model.safetensors" in capsys.readouterr().err
    cut = (tiny_folder / "model.safetensors").read_bytes()[:-100]
    (folder / "model.safetensors").write_bytes(cut)
    assert lab.run(f"model.name={folder}") == 4
    assert "not a whole safetensors file" in capsys.readouterr().err


def test_data_check_names_every_bad_row(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows(120)
    for index in (3, 7, 20, 50, 51):
        rows[index]["response"] = " "
    path = write_jsonl(tmp_path / "bad.jsonl", rows)
    assert command("data", "check", lab.recipe, f"data.name={path}") == 3
    output = capsys.readouterr()
    assert [line.split(" ")[0] for line in output.out.splitlines()] == [
        f"bad.jsonl:{number}:" for number in (4, 8, 21, 51, 52)
    ]
    assert "set data.on_bad_row=skip" in output.err
    words = (f"data.name={path}", "data.on_bad_row=skip")
    assert command("data", "check", lab.recipe, *words) == 0
    assert "5 malformed rows skipped" in capsys.readouterr().out


def test_data_check_warns_of_probable_mistakes(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[dict[str, str]] = [
        {"prompt": f"Tell me fact {n} of {row['instruction']} ", "completion": row["response"]}
        for n, row in enumerate(make_rows(60))
    ]
    rows[4]["prompt"] = "Dear {{name}}, tell me. "
    rows[7]["completion"] = "It ends <|im_end|> here, and <|im_start|> begins."
    rows[8]["prompt"] = "word " * 300
    path = write_jsonl(tmp_path / "odd.jsonl", rows)
    words = (f"data.name={path}", "data.test_rows=8", "data.validation_rows=4", "data.size=null")
    plain = (*words, "grid.cells=[{adapter.r: 2}]", "training.loss_on=response")
    assert command("data", "check", lab.recipe, *plain) == 0
    warnings = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")
    ]
    assert len(warnings) == 6
    assert warnings[0].startswith("warning: 8 test rows: fewer than 30 give wide ")
    assert "1 of 48 training rows have no label token (loss on response)" in warnings[1]
    assert warnings[2].startswith(
        "warning: 1 rows are longer than data.max_length = 128 and are truncated"
    )
    assert "1 rows contain what looks like an unfilled placeholder" in warnings[3]
    assert "({{name}}), first odd.jsonl:5" in warnings[3]
    assert "rows are tokenised differently in training and in generation" in warnings[4]
    assert "responses: 1 rows contain special tokens (<|im_" in warnings[5]
    assert "data.special_tokens_in_responses=special makes them" in warnings[5]
    special = "data.special_tokens_in_responses=special"
    assert command("data", "check", lab.recipe, *plain, special) == 0
    assert "tokenised as special tokens (data.special_tokens_in" in capsys.readouterr().out


def test_long_rows_in_split_mode_have_every_token_trained_and_scored(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tokens counted by the tokenizer alone; no row of one side is on the other."""
    from transformers import AutoTokenizer

    lab = Lab(tmp_path, tiny_folder)
    texts = [
        {"text": " ".join(f"{word}{n}" for word in ("river", "bread", "glass", "tea") * (9 + n))}
        for n in range(24)
    ]
    path = write_jsonl(tmp_path / "texts.jsonl", texts)
    words = (f"data.name={path}", "data.test_rows=6", "data.validation_rows=2")
    one_cell = (*words, "grid.cells=[{adapter.r: 2}]", "training.num_train_epochs=1")
    assert command("data", "check", lab.recipe, *one_cell) == 0
    assert "data.on_long_row=split uses the whole text" in capsys.readouterr().out
    split = (*one_cell, "data.on_long_row=split", "data.max_length=50")
    assert command("data", "check", lab.recipe, *split) == 0
    checked = capsys.readouterr().out
    assert "warning: 6 test rows" in checked and "are truncated" not in checked
    assert re.search(r"test +\d+ pieces +\d+ tokens; 6 rows over 50 tokens \(split\)", checked)
    assert lab.run(*split) == 0
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    (run,) = (lab.results / "runs").glob("r2-*")
    record = json.loads((run / "run.json").read_text())
    scores = pq.read_table(run / "scores.parquet").to_pylist()
    rows = {entry["row_id"].partition(".")[0] for entry in scores}
    assert len(rows) == 6 and len(scores) > 12
    assert len({entry["group_id"] for entry in scores}) == 6
    counts = {
        Row((Turn("assistant", entry["text"]),)).row_id: len(tokenizer(entry["text"])["input_ids"])
        for entry in texts
    }
    # Of n tokens and an EOS the first is nobody's label.
    assert sum(entry["tokens_all"] for entry in scores) == sum(counts[row] for row in rows)
    sets = record["data"]["sets"]
    labels = sum(part["tokens"] - part["rows"] for part in sets.values())
    assert labels == sum(counts.values())
    assert record["data"]["long_rows"]["test"]["tokens_cut"] == 0
    assert command("experiment", lab.recipe, *split, *lab.folders, "--with-rows") == 0
    assert "river" in (lab.results / "report-with-rows.html").read_text()


def test_only_plain_text_can_be_split(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    assert lab.run("data.on_long_row=split") == 2
    assert "data.template = instruction_response: puts a prompt" in capsys.readouterr().err


def test_data_check_and_show_print_statistics_and_tokens(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("data", "check", lab.recipe) == 0
    checked = capsys.readouterr().out
    assert "120 rows in" in checked
    for part in ("would leak", "prompts with conflicting answers: 0", "related by data.group_by",
                 "labels per training row (all)", "length in tokens", "<|im_end|>]"):  # fmt: skip
        assert part in checked
    notes = [line for line in checked.splitlines() if line.startswith("note:")]
    assert len(notes) == 1 and notes[0].startswith("note: near-duplicate prompts keep 40 rows")
    record = json.loads(next(lab.results.rglob("run.json")).read_text())
    # what was chosen, not that it was to be chosen
    assert record["recipe"]["data"]["include_context"] is True
    assert record["data"]["template"]["include_context"] is True
    assert command("data", "check", lab.recipe, "data.include_context=false") == 0
    without_context = capsys.readouterr().out
    assert "note: contexts are left out of the prompts, in 40 of 120 rows" in without_context
    assert command("data", "show", lab.recipe, "--rows", 1) == 0
    shown = capsys.readouterr().out
    assert "Response" in shown and "<|im_end|>]" in shown
