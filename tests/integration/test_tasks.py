"""Standard tasks: per document the results of lm-evaluation-harness's own model, in the report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm_lora.adapters.multi import BASE, load_adapter_set
from slm_lora.config.tasks import TasksSection
from slm_lora.evaluation import harness_tasks
from slm_lora.experiment import tasks as tasks_module
from slm_lora.model.resolve import ModelSource
from slm_lora.runs.folder import read_run
from slm_lora.runs.scored_run import read_scored_run
from slm_lora.runs.tasks import DocumentResult, read_task, task_file

from ..support.exports import make_adapter
from ..support.lab import Lab, command
from ..support.rows import write_jsonl
from ..support.tasks import DOCUMENTS, write_tasks

pytest.importorskip("lm_eval", reason="needs lm-eval (make test-all)")

RANKS = ("grid.cells=[]", "grid.axes=[{adapter.r: [2, 4]}]", "data.size=40")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def tasks(files: tuple[Path, Path]) -> str:
    return f"tasks.names=[{files[0]}, {files[1]}]"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tasks: str) -> Lab:
    made = Lab(tmp_path_factory.mktemp("standard") / "lab", tiny_folder)
    assert made.run(*RANKS, tasks) == 0
    return made


def results(lab: Lab, cell: str, task: str) -> list[DocumentResult]:
    (path,) = (lab.results / "tasks" / task).glob(f"{cell}-*.jsonl")
    there = read_task(path)
    assert there is not None
    return there[1]


def assert_equal_samples(
    ours: list[DocumentResult], theirs: list[dict[str, Any]], documents: int = DOCUMENTS
) -> None:
    """Every document's responses and values are those of lm-eval's samples."""
    by_document: dict[int, dict[str, dict[str, Any]]] = {}
    for sample in theirs:
        by_document.setdefault(sample["doc_id"], {})[sample["filter"]] = sample
    assert len(ours) == len(by_document) == documents
    for own in ours:
        samples = by_document[own.document]
        first = next(iter(samples.values()))
        assert own.hash == first["doc_hash"]
        for response, (expected,) in zip(own.responses, first["resps"], strict=True):
            if isinstance(response, str):
                assert response == expected
            else:
                assert response[0] == pytest.approx(float(expected[0]), abs=1e-4)
                assert str(response[1]) == str(expected[1])
        for name, value in own.values.items():
            metric, _, filter_name = name.partition(".")
            assert value == (samples[filter_name or "none"][metric], 1.0)


@pytest.mark.parametrize("cell", ["base", "r2", "r4"])
def test_documents_equal_those_of_the_model_of_lm_eval(
    lab: Lab,
    cell: str,
    files: tuple[Path, Path],
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    adapter = {} if cell == "base" else {"peft": str(lab.adapters / f"tiny-{cell}")}
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(tiny_folder), "dtype": "float32", **adapter},
        tasks=["our_choices", "our_letters"],
        task_manager=TaskManager(include_path=str(files[0].parent), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    assert theirs is not None
    for task in ("our_choices", "our_letters"):
        assert_equal_samples(results(lab, cell, task), theirs["samples"][task])
    run = next(run for run in lab.metrics()["runs"] if run["cell"] == cell)
    intervals = run["intervals"]
    assert intervals["our_choices.acc_norm"]["value"] == pytest.approx(
        theirs["results"]["our_choices"]["acc_norm,none"]
    )
    assert intervals["our_letters.exact_match.letter"]["value"] == pytest.approx(
        theirs["results"]["our_letters"]["exact_match,letter"]
    )
    texts = {own.responses[0] for own in results(lab, cell, "our_letters")}
    assert len(texts) > 20
    assert 0 < intervals["our_letters.exact_match.letter"]["value"] < 1


@pytest.mark.slow
def test_documents_equal_those_of_the_command_lm_eval(
    lab: Lab, files: tuple[Path, Path], tiny_folder: Path, tmp_path: Path
) -> None:
    words = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"),
        "--model_args",
        f"pretrained={tiny_folder},peft={lab.adapters / 'tiny-r4'},dtype=float32",
        *("--tasks", "our_choices,our_letters", "--include_path", str(files[0].parent)),
        *("--batch_size", "1", "--log_samples", "--output_path", str(tmp_path)),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    subprocess.run(words, check=True, capture_output=True, env={**os.environ, **offline})
    for task in ("our_choices", "our_letters"):
        (path,) = tmp_path.rglob(f"samples_{task}_*.jsonl")
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        assert_equal_samples(results(lab, "r4", task), [json.loads(line) for line in lines])


@pytest.mark.parametrize("variant", [BASE, "one"])
def test_requests_of_any_length_equal_those_of_hflm(
    tiny_source: ModelSource, tmp_path: Path, variant: str
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from slm_lora.evaluation.harness_model import HarnessModel

    folder = make_adapter(tiny_source, tmp_path / "one", scale=0.5)
    variants = load_adapter_set(str(tiny_source.path), [folder], precision="fp32")
    peft = None if variant == BASE else str(folder)
    theirs = HFLM(pretrained=str(tiny_source.path), peft=peft, dtype="float32", device="cpu")
    ours = HarnessModel(variants, variant, micro_batch_tokens=700)
    assert (ours.max_length, ours.prefix_token_id) == (theirs.max_length, theirs.prefix_token_id)
    long = "Rivers and maps, bread and tea; nothing is as old as salt. " * 60
    pairs = [
        ("", "Glass"),
        ("Tea ", "and bread"),  # the space becomes part of the continuation
        ("<|im_end|>Bees", " like<|im_start|> clocks"),
        (long, " violins are made of paper"),
        (long[:1500], long[:900]),
        *((f"Fact {number}:", f" {number} bridges") for number in range(12)),
    ]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    expected = theirs.loglikelihood(requests, disable_tqdm=True)
    for own, (likelihood, greedy) in zip(ours.loglikelihood(requests), expected, strict=True):
        assert own == (pytest.approx(likelihood, rel=1e-5, abs=1e-4), greedy)
    # What a model says itself is greedy.
    settings = {"until": [" qq"], "max_gen_toks": 3}
    contexts = ["Tea and", "A note on bees", long, "Fact 3:"]
    requests = [Instance("generate_until", {}, (text, settings), 0) for text in contexts]
    texts = ours.generate_until(requests)
    assert texts == theirs.generate_until(requests, disable_tqdm=True)
    texts_of = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in (long, "Tea", "")]
    assert ours.loglikelihood_rolling(texts_of) == pytest.approx(
        theirs.loglikelihood_rolling(texts_of, disable_tqdm=True), rel=1e-5
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"until": ["e", "a"], "max_gen_toks": 20},
        {"until": "\n", "max_new_tokens": 7, "do_sample": False, "temperature": 0.7},
        {"until": [], "max_gen_toks": 9, "repetition_penalty": 1.3},
        {},
    ],
)
def test_generated_texts_equal_those_of_hflm(
    tiny_source: ModelSource, settings: dict[str, Any]
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from slm_lora.evaluation.harness_model import HarnessModel

    variants = load_adapter_set(str(tiny_source.path), [], precision="fp32")
    theirs = HFLM(pretrained=str(tiny_source.path), dtype="float32", device="cpu")
    contexts = [f"Tell me fact {number} about bread." for number in range(6)]
    requests = [Instance("generate_until", {}, (text, settings), 0) for text in contexts]
    texts = HarnessModel(variants, BASE, 512).generate_until(requests)
    assert texts == theirs.generate_until(requests, disable_tqdm=True)
    assert len(set(texts)) > 1


def test_group_has_the_documents_of_its_members(
    lab: Lab, tmp_path: Path, tiny_source: ModelSource
) -> None:
    from slm_lora.evaluation.harness_model import HarnessModel

    write_tasks(tmp_path)
    group = tmp_path / "both.yaml"
    group.write_text("group: both\ntask: [our_choices, our_letters]\n", encoding="utf-8")
    section = TasksSection(names=(str(group),), limit=9)
    (task,) = harness_tasks.load_tasks(section)
    assert (task.name, task.documents, task.requests) == ("both", 18, 9 * 4 + 9)
    assert list(task.metrics) == ["acc", "acc_norm", "exact_match.letter", "exact_match.whole"]
    variants = load_adapter_set(str(tiny_source.path), [], precision="fp32")
    evaluated = harness_tasks.evaluate_task(task, HarnessModel(variants, BASE, 512), section)
    assert [own.task for own in evaluated] == ["our_choices"] * 9 + ["our_letters"] * 9
    alone = [*results(lab, "base", "our_choices")[:9], *results(lab, "base", "our_letters")[:9]]
    assert [own.values for own in evaluated] == [own.values for own in alone]
    assert [own.hash for own in evaluated] == [own.hash for own in alone]


def test_digest_is_of_documents_and_not_of_their_place(tmp_path: Path) -> None:
    def digest(folder: str, limit: int | None = None) -> str:
        choices, _ = write_tasks(tmp_path / folder)
        section = TasksSection(names=(str(choices),), limit=limit)
        return harness_tasks.load_tasks(section)[0].digest

    first = digest("one")
    assert digest("other") == first
    assert digest("other", limit=209) != first
    written = tmp_path / "other" / "choices.jsonl"
    text = written.read_text(encoding="utf-8")
    assert '"answer": 3' in text
    written.write_text(text.replace('"answer": 3', '"answer": 2', 1), encoding="utf-8")
    section = TasksSection(names=(str(tmp_path / "other" / "choices.yaml"),))
    assert harness_tasks.load_tasks(section)[0].digest != first


def test_bits_per_byte_is_a_ratio_of_sums(tmp_path: Path, tiny_source: ModelSource) -> None:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from slm_lora.evaluation.harness_model import HarnessModel

    choices, _ = write_tasks(tmp_path)
    text = choices.read_text(encoding="utf-8").split("output_type")[0]
    (tmp_path / "texts.yaml").write_text(
        text.replace("our_choices", "9 texts (ours)")
        + "output_type: loglikelihood_rolling\n"
        + 'doc_to_text: ""\ndoc_to_target: "{{story}} {{question}}"\n'
        + "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
        encoding="utf-8",
    )
    section = TasksSection(names=(str(tmp_path / "texts.yaml"),), limit=9)
    (task,) = harness_tasks.load_tasks(section)
    assert task.name == "_9_texts__ours_"
    assert task.left_out == ("word_perplexity",)
    assert not task.metrics["bits_per_byte"].record.higher_is_better
    variants = load_adapter_set(str(tiny_source.path), [], precision="fp32")
    evaluated = harness_tasks.evaluate_task(task, HarnessModel(variants, BASE, 512), section)
    theirs = HFLM(pretrained=str(tiny_source.path), dtype="float32", device="cpu")
    output = evaluate(theirs, {"tasks": dict(task.leaves)}, limit=9, bootstrap_iters=0)
    pairs = [own.values["bits_per_byte"] for own in evaluated]
    bits, size = map(sum, zip(*pairs, strict=True))
    expected = output["results"]["9 texts (ours)"]["bits_per_byte,none"]
    assert bits / size == pytest.approx(expected, rel=1e-6)


def test_tasks_of_lm_eval_with_examples_and_filters(
    tmp_path: Path, tiny_source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    """arc_easy and gsm8k, on rows of ours in the form of their data sets."""
    import datasets
    import lm_eval.tasks
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    from slm_lora.evaluation.harness_model import HarnessModel

    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    science = [
        {
            "question": f"Which thing number {number} floats?",
            "choices": {"text": ["a stone", "a cork", f"{number} nails"], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[number % 3],
        }
        for number in range(24)
    ]
    sums = [
        {"question": f"What is {number} plus 3?", "answer": f"Add 3.\n#### {number + 3}"}
        for number in range(24)
    ]
    builtin = Path(lm_eval.tasks.__file__).parent
    names = []
    for name, path, rows in (
        ("arc_easy", "arc/arc_easy.yaml", science),
        ("gsm8k", "gsm8k/gsm8k.yaml", sums),
    ):
        files = {
            split: str(write_jsonl(tmp_path / f"{name}-{split}.jsonl", own))
            for split, own in (("train", rows[12:]), ("validation", rows[6:]), ("test", rows[:12]))
        }
        config = {
            "include": str(builtin / path),
            "task": f"own_{name}",
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
        }
        if name == "gsm8k":
            config["generation_kwargs"] = {"until": ["Question:", "a"], "max_gen_toks": 24}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(config), encoding="utf-8")
        names.append(str(tmp_path / f"{name}.yaml"))
    section = TasksSection(names=tuple(names), num_fewshot=2)
    arc, gsm = harness_tasks.load_tasks(section)
    assert list(arc.metrics) == ["acc", "acc_norm"]
    assert list(gsm.metrics) == ["exact_match.strict-match", "exact_match.flexible-extract"]
    variants = load_adapter_set(str(tiny_source.path), [], precision="fp32")
    model = HarnessModel(variants, BASE, 512)
    theirs = simple_evaluate(
        model=HFLM(pretrained=str(tiny_source.path), dtype="float32", device="cpu"),
        tasks=names,
        num_fewshot=2,
        bootstrap_iters=0,
    )
    assert theirs is not None
    for task in (arc, gsm):
        ours = harness_tasks.evaluate_task(task, model, section)
        samples = theirs["samples"][f"{task.name}"]
        assert_equal_samples(ours, samples, documents=12)
        assert "Question: " in samples[0]["arguments"][0][0].split("\n\n")[1], "has examples"


def test_run_without_results_is_named(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = (lab.results / "tasks" / "our_choices").glob("r2-*")
    whole = path.read_bytes()
    path.unlink()
    try:
        assert command("report", lab.results) == 0
        report = (lab.results / "report.md").read_text()
        (line,) = [line for line in report.splitlines() if line.startswith("our_choices.acc is")]
        assert line.endswith("section `tasks` again to have it.")
        assert "r2-" in line
    finally:
        path.write_bytes(whole)
        assert command("report", lab.results) == 0


def test_tasks_are_compared_by_document(lab: Lab) -> None:
    metrics = lab.metrics()
    assert "our_choices.acc" in metrics["card"]["facts"]["Tasks"]
    pairs = metrics["other_metrics"]["our_choices.acc"]
    (pair,) = (pair for pair in pairs if pair["key"] == "base" and "r4" in pair["pairs"][0][1])
    base, tuned = (
        np.array([own.values["acc"][0] for own in results(lab, cell, "our_choices")])
        for cell in ("base", "r4")
    )
    difference = tuned - base
    assert pair["value"] == pytest.approx(difference.mean())
    error = difference.std(ddof=1) / np.sqrt(DOCUMENTS)
    assert pair["high"] - pair["low"] == pytest.approx(2 * 1.9714 * error, rel=2e-3)
    assert pair["groups"] == DOCUMENTS
    report = (lab.results / "report.md").read_text()
    assert "### our_letters.exact_match.letter" in report
    assert "Over the documents of our_choices; higher is better." in report


def test_verdict_on_a_task(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = ("verdict", lab.results, "--setting", "r=4", "--require")
    assert command(*verdict, "our_choices.acc > 0.1") == 0
    assert command(*verdict, "gain:our_choices.acc > 0.5") == 10
    assert command(*verdict, "our_choices.f1 > 0.1") == 2
    output = capsys.readouterr()
    assert "met        our_choices.acc > 0.1" in output.out
    assert "our_letters.exact_match.whole" in output.err
    assert command(*verdict, "gain:our_choices.acc > 0.001") == 11
    assert "documents of our_choices" in capsys.readouterr().out


def test_finished_tasks_are_kept_and_others_evaluated(
    lab: Lab, tasks: str, files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in lab.results.glob("tasks/*/*")}
    assert len(before) == 6
    assert lab.run(*RANKS, tasks, "ship={our_choices.acc: '> 0.1'}") == 0
    output = capsys.readouterr().err
    assert output.count("tasks evaluated earlier") == 3
    assert "trained" not in output
    assert before == {path: path.read_bytes() for path in before}
    assert command("verdict", lab.results) == 0
    # Without the section they stay in the report.
    assert lab.run(*RANKS) == 0
    assert "our_choices.acc" in lab.metrics()["other_metrics"]


def test_other_questions_are_evaluated_again(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = Lab(tmp_path / "lab", tiny_folder)
    choices, _ = write_tasks(tmp_path / "tasks")
    cells = ("grid.cells=[{adapter.r: 2}]", "data.size=40", f"tasks.names=[{choices.parent}]")
    assert lab.run(*cells, "tasks.limit=12") == 0
    assert len(results(lab, "base", "our_letters")) == 12
    text = choices.read_text(encoding="utf-8")
    choices.write_text(text.replace("Answer:", "Reply:"), encoding="utf-8")
    capsys.readouterr()
    assert lab.run(*cells, "tasks.limit=12") == 0
    output = capsys.readouterr().err
    assert output.count("our_choices  acc ") == 2
    assert "our_letters  exact" not in output
    capsys.readouterr()
    assert lab.run(*cells, "tasks.limit=12", "tasks.num_fewshot=2") == 0
    assert capsys.readouterr().err.count("our_letters  exact") == 2


def test_interrupted_tasks_go_on(
    tmp_path: Path,
    tiny_folder: Path,
    tasks: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lab = Lab(tmp_path / "lab", tiny_folder)
    own = ("grid.cells=[{adapter.r: 2}]", "data.size=40", tasks, "tasks.limit=20")
    evaluate: Callable[..., list[DocumentResult]] = tasks_module.evaluate_task
    calls = []

    def stopped(*arguments: Any) -> list[DocumentResult]:
        calls.append(arguments)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments)

    monkeypatch.setattr(tasks_module, "evaluate_task", stopped)
    assert lab.run(*own) not in (0, 1)
    assert len(list(lab.results.glob("tasks/*/*"))) == 2
    capsys.readouterr()
    assert lab.run(*own) == 0
    assert len(calls) == 5
    output = capsys.readouterr().err
    assert "base  tasks evaluated earlier" in output
    assert "r2  our_choices  acc" in output
    assert lab.metrics()["other_metrics"]["our_letters.exact_match.whole"]


@pytest.mark.parametrize(
    ("template", "begin", "end"),
    [
        (
            "chat",
            "<|im_start|>system\nName the animal.<|im_end|>\n<|im_start|>user\nStory ",
            "Answer:<|im_end|>\n<|im_start|>assistant",
        ),
        (
            "instruction_response",
            "Instruction:\nName the animal.\n\nStory ",
            "Answer:\nResponse:",
        ),
    ],
)
def test_questions_in_the_training_template(
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    begin: str,
    end: str,
) -> None:
    from slm_lora.evaluation import harness_model

    asked: list[str] = []
    encode = harness_model.HarnessModel.tok_encode

    def record(model: Any, text: str, *rest: Any, **more: Any) -> list[int]:
        asked.append(text)
        return encode(model, text, *rest, **more)

    monkeypatch.setattr(harness_model.HarnessModel, "tok_encode", record)
    choices, _ = write_tasks(tmp_path / "tasks")
    text = choices.read_text(encoding="utf-8")
    choices.write_text(f"{text}description: Name the animal.\n", encoding="utf-8")
    lab = Lab(tmp_path / "lab", tiny_folder)
    own = ("grid.cells=[{adapter.r: 2}]", "data.size=40", f"tasks.names=[{choices}]")
    template = f"data.template={template}"
    assert lab.run(*own, "tasks.limit=3", "tasks.training_template=true", template) == 0
    assert len(asked) > 20
    assert all(text.startswith(begin) and end in text for text in asked)


@pytest.mark.parametrize(
    ("names", "code", "message"),
    [
        ("[{folder}/absent.yaml]", 2, "absent.yaml: no such file"),
        ("[{folder}/broken.yaml]", 2, "broken.yaml: is no task file"),
        ("[{folder}/nameless.yaml]", 2, "has no key `task` or `group`"),
        ("[{folder}]", 2, "broken.yaml: is no task file"),
        ("[{folder}/empty/]", 2, "no task file"),
        ("[{folder}/rows.yaml]", 3, "rows.yaml: cannot be loaded"),
        ("[{folder}/field.yaml]", 3, "cannot be loaded"),
        ("[{folder}/group.yaml]", 2, "group.yaml: no such task: gone"),
        ("[{folder}/code.yaml]", 2, "runs code that a model writes"),
        ("[{folder}/corpus.yaml]", 2, "none of its metrics is a mean over documents (f1)"),
        ("[{folder}/metric.yaml]", 2, "lm-eval has no metric 'accuracy'"),
        ("[{folder}/beams.yaml]", 2, "generation setting 'num_beams' is not supported"),
        ("[{choices}, {folder}/same.yaml]", 2, "two tasks have the name our_choices"),
        ("[]", 2, "needs at least one task"),
        ("[a, a]", 2, "names a task twice"),
    ],
)
def test_bad_task_is_refused_before_training(
    tmp_path: Path,
    tiny_folder: Path,
    files: tuple[Path, Path],
    names: str,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "bad"
    (folder / "empty").mkdir(parents=True)
    choices, letters = (path.read_text(encoding="utf-8") for path in files)
    rows = str(files[0].with_suffix(".jsonl"))
    for name, text in {
        "broken": "task: [a",
        "nameless": "output_type: multiple_choice",
        "rows": choices.replace(rows, str(folder / "gone.jsonl")),
        "field": choices.replace("{{choices}}", "{{options}}"),
        "code": choices + "unsafe_code: true\n",
        "corpus": choices.replace("metric: acc,", "metric: f1,").replace(
            "metric: acc_norm, aggregation: mean", "metric: f1, aggregation: f1"
        ),
        "metric": choices.replace("metric: acc,", "metric: accuracy,"),
        "beams": letters.replace("do_sample: false", "num_beams: 3"),
        "same": choices,
        "group": "group: g\ntask: [our_choices, gone]\n",
    }.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    lab = Lab(tmp_path / "lab", tiny_folder)
    assert lab.run(*RANKS, f"tasks.names={names.format(folder=folder, choices=files[0])}") == code
    assert message in capsys.readouterr().err
    assert not list(lab.results.glob("runs/*"))


def test_unknown_name_has_near_matches(
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lm_eval.tasks import TaskManager

    def some() -> TaskManager:
        import lm_eval.tasks

        folder = Path(lm_eval.tasks.__file__).parent / "arc"
        return TaskManager(include_path=str(folder), include_defaults=False)

    monkeypatch.setattr(harness_tasks, "_registry", some)  # all tasks take a quarter of a minute
    lab = Lab(tmp_path / "lab", tiny_folder)
    assert lab.run(*RANKS, "tasks.names=[arc_esay]") == 2
    output = capsys.readouterr().err
    assert "tasks.names: arc_esay: lm-eval" in output
    assert "near it: arc_easy" in output


def test_without_lm_eval_the_section_is_refused(
    tmp_path: Path,
    tiny_folder: Path,
    tasks: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(harness_tasks.importlib.util, "find_spec", lambda name: None)
    lab = Lab(tmp_path / "lab", tiny_folder)
    assert lab.run(*RANKS, tasks) == 2
    assert "pip install 'slm-lora[tasks]'" in capsys.readouterr().err
    assert lab.run(*RANKS, tasks, "keep_adapters=false") == 2
    assert "needs the adapters" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["cut", "value", "run", "task"])
def test_changed_file_is_refused(lab: Lab, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    (path,) = (lab.results / "tasks" / "our_choices").glob("r4-*")
    whole = path.read_text(encoding="utf-8")
    lines = whole.split("\n")
    header = json.loads(lines[0])
    changed = {
        "cut": "\n".join(lines[:-2]),
        "value": whole.replace('"acc": [0.0,', '"acc": [1.0,', 1),
        "run": "\n".join([json.dumps(header | {"run": "0" * 64}), *lines[1:]]),
        "task": "\n".join([json.dumps(header | {"task": "other"}), *lines[1:]]),
    }[change]
    assert changed != whole
    path.write_text(changed, encoding="utf-8")
    try:
        assert lab.run(*RANKS) == 4
        assert f"{path}:" in capsys.readouterr().err
    finally:
        path.write_text(whole, encoding="utf-8")


def test_documents_are_rows_of_the_run(lab: Lab) -> None:
    for folder in (lab.results / "runs").iterdir():
        run = read_run(folder)
        there = read_task(task_file(folder, "our_choices"))
        assert there is not None
        assert there[0].run == run.record.hash
        scored = read_scored_run(run)
        assert len(scored.documents["our_choices"]) == DOCUMENTS
        assert len(scored.scores) == 20
