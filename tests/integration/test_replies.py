"""Replies of an experiment's runs to test rows, and their metrics in the report."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from slm_lora.adapters.multi import load_adapter_set
from slm_lora.data.prompts import prompts_from_rows
from slm_lora.evaluation.generation import Generation, Sampling, prompt_ids
from slm_lora.experiment import replies as replies_module
from slm_lora.runs.folder import read_run
from slm_lora.runs.replies import read_replies, replies_file
from slm_lora.runs.scored_run import read_scored_run

from ..support.judge_server import judge_server
from ..support.lab import Lab, command

RANKS = ("grid.cells=[]", "grid.axes=[{adapter.r: [2, 4]}]", "data.size=40", "seeds=[0, 1]")
REPLIES = (
    "replies.rows=12",
    "replies.max_new_tokens=9",
    "replies.metrics=[exact_match, token_f1, valid_json]",
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Lab:
    made = Lab(tmp_path_factory.mktemp("replies") / "lab", tiny_folder)
    assert made.run(*RANKS, *REPLIES) == 0
    return made


def runs(lab: Lab) -> dict[str, Any]:
    return {path.name[:-9]: read_run(path) for path in (lab.results / "runs").iterdir()}


def test_every_run_has_replies_to_the_same_test_rows(lab: Lab) -> None:
    rows = set()
    for name, run in runs(lab).items():
        there = read_replies(replies_file(run.folder))
        assert there is not None, name
        header, replies = there
        assert header.run == run.record.hash
        assert len(replies) == 12
        rows.add(frozenset(reply.row for reply in replies))
        scored = {score.row_id: score for score in read_scored_run(run).scores}
        for reply in replies:
            assert scored[reply.row].values["token_f1"] == (reply.values["token_f1"], 1.0)
            assert scored[reply.row].values["reply_tokens"] == (float(reply.tokens), 1.0)
    assert len(rows) == 1
    assert {*rows.pop()} < {*scored}


def test_replies_are_those_of_generate(lab: Lab, tiny_folder: Path) -> None:
    run = runs(lab)["r4-seed1"]
    there = read_replies(replies_file(run.folder))
    assert there is not None
    folder = lab.adapters / "tiny-r4-seed1"
    variants = load_adapter_set(str(tiny_folder), [folder], precision="fp32")
    from slm_lora.config.schema import DataSection
    from slm_lora.data.sources import read_rows

    rows = {row.row_id: row for row in read_rows(DataSection(name=str(lab.rows))).rows}
    for reply in there[1]:
        (prompt,) = prompts_from_rows([rows[reply.row]], 1)
        ids = prompt_ids(variants, folder.name, prompt)
        generation = Generation(variants, folder.name, ids, Sampling(9))
        assert "".join(generation.pieces()).strip() == reply.reply
        assert len(generation.ids) == reply.tokens


def test_base_and_whole_model_get_the_prompts_of_the_training(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: dict[str, list[list[int]]] = {}
    plain = replies_module.generate_replies

    def record(variants, name, ids, *rest):  # type: ignore[no-untyped-def]
        prompts[f"{len(prompts)}"] = [list(own) for own in ids]
        return plain(variants, name, ids, *rest)

    monkeypatch.setattr(replies_module, "generate_replies", record)
    lab = Lab(tmp_path / "lab", tiny_folder)
    cells = ("grid.cells=[{adapter.kind: full}, {adapter.r: 2}]", "data.size=40")
    assert lab.run(*cells, "data.template=chat", *REPLIES) == 0
    base, whole, adapter = prompts.values()
    assert base == whole == adapter
    assert len(list((lab.results / "replies").iterdir())) == 3


def test_metrics_are_compared_in_report_and_metrics_json(lab: Lab) -> None:
    metrics = lab.metrics()
    report = (lab.results / "report.md").read_text()
    assert "Token F1" in report
    assert "Valid JSON" in report
    assert "| +0.0000 (the same in all rows) |" in report  # exact match
    facts = metrics["card"]["facts"]
    assert "token F1" in facts["Replies"]
    assert {"token_f1", "exact_match"} <= metrics["other_metrics"].keys()
    run = next(run for run in metrics["runs"] if run["cell"] == "r4-seed0")
    there = read_replies(replies_file(lab.results / "runs" / run["folder"]))
    assert there is not None
    values = [reply.values["token_f1"] for reply in there[1]]
    assert run["intervals"]["token_f1"]["value"] == pytest.approx(sum(values) / len(values))


def test_finished_replies_are_kept_and_other_settings_are_generated(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in (lab.results / "replies").iterdir()}
    assert lab.run(*RANKS, *REPLIES) == 0
    assert capsys.readouterr().err.count("replied earlier") == 5
    assert before == {path: path.read_bytes() for path in (lab.results / "replies").iterdir()}
    # Without the section they stay in the report; nothing is trained again.
    assert lab.run(*RANKS) == 0
    assert "Token F1" in (lab.results / "report.md").read_text()
    assert lab.run(*RANKS, "replies.functions={shout: 'own_shout_metric:f'}") == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_function_of_the_user_that_raises(
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lab = Lab(tmp_path / "lab", tiny_folder)
    (tmp_path / "metric_that_raises.py").write_text(
        "seen = []\n"
        "def f(prompt, reply, reference):\n"
        "    seen.append(prompt)\n"
        "    if len(seen) % 6 == 2:\n"
        "        raise KeyError('no such key')\n"
        "    return len(reply)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    own = (
        *("replies.rows=6", "replies.max_new_tokens=4"),
        "replies.functions={size: 'metric_that_raises:f'}",
    )
    cells = ("grid.cells=[{adapter.r: 2}]", "data.size=40")
    assert lab.run(*cells, *own) == 3
    assert "replies.functions.size: rows.jsonl:" in capsys.readouterr().err
    assert lab.run(*cells, *own, "replies.on_bad_row=skip") == 0
    assert "left out" in capsys.readouterr().err
    (path, *_) = sorted((lab.results / "replies").glob("base-*"))
    there = read_replies(path)
    assert there is not None
    assert sum("size" in reply.values for reply in there[1]) == 5
    assert "size" in (lab.results / "report.md").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("replies.labels=[red, blue]", "replies.labels: no test row's response is one of them"),
        ("replies.rows=0", "replies.rows"),
        ("replies.pattern='('", "no regular expression"),
        ("replies.metrics=[bleu]", "replies.metrics"),
    ],
)
def test_bad_section_is_refused_before_training(
    tmp_path: Path,
    tiny_folder: Path,
    override: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lab = Lab(tmp_path / "lab", tiny_folder)
    assert lab.run(*RANKS, override) == 2
    assert message in capsys.readouterr().err
    assert not lab.results.exists() or not list(lab.results.glob("runs/*"))


def test_removed_adapters_are_refused(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = Lab(tmp_path / "lab", tiny_folder)
    assert lab.run(*RANKS, *REPLIES, "keep_adapters=false") == 2
    assert "needs the adapters" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["cut", "text", "hash"])
def test_changed_file_is_refused(lab: Lab, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = sorted((lab.results / "replies").glob("r4-seed0-*"))[0]
    whole = path.read_text()
    lines = whole.split("\n")
    if change == "cut":
        path.write_text("\n".join(lines[:-2]))
    elif change == "text":
        path.write_text(whole.replace('"token_f1": 0.', '"token_f1": 0.9', 1))
    else:
        header = json.loads(lines[0]) | {"run": "0" * 64}
        path.write_text("\n".join([json.dumps(header), *lines[1:]]))
    try:
        assert lab.run(*RANKS) == 4
        assert f"{path}:" in capsys.readouterr().err
    finally:
        path.write_text(whole)


def test_a_section_judge_sends_nothing_and_is_the_default_of_the_command(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    with judge_server(lambda first, second: "tie") as judge:
        section = (f"judge.url={judge.url}", "judge.model=rule", "judge.rows=3")
        assert lab.run(*RANKS, *REPLIES, *section) == 0
        (line,) = [
            line for line in capsys.readouterr().err.splitlines() if "to be judged: " in line
        ]
        words = shlex.split(line.split("to be judged: ")[1])
        assert words[:2] == ["slm-lora", "judge"]
        assert command(*words[1:]) == 0
        assert judge.requests == []
        assert f"requests to {judge.url} (model rule)" in capsys.readouterr().out
