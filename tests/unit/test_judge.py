"""The command `judge` against a server of a known rule, over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from slm_lora.config.judge import JudgeSection
from slm_lora.config.schema import DataSection
from slm_lora.data.sources import read_rows
from slm_lora.experiment.judge_prompt import DEFAULT, fill, parse_answer
from slm_lora.runs.folder import list_runs, run_folders
from slm_lora.runs.judge import JUDGE_FILE, JudgedPair, read_judgement
from slm_lora.runs.replies import RowReply, read_replies, replies_file, write_replies

from ..support.imports import loaded
from ..support.judge_server import JudgeServer, judge_server, replies_in
from ..support.lab import command
from ..support.planted import planted_run, write_runs
from ..support.rows import make_rows, write_jsonl

pytest.importorskip("httpx", reason="needs the extra judge")
ROWS = 12


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A base and an adapter of two seeds; replies of 1 to 12 words, seed 1's first equals the
    base's."""
    rows = write_jsonl(tmp_path / "rows.jsonl", make_rows(ROWS))
    ids = [row.row_id for row in read_rows(DataSection(name=str(rows))).rows]
    rng = np.random.default_rng(0)
    runs = []
    for cell, seed in (("base", 0), ("r8-seed0", 0), ("r8-seed1", 1)):
        run = planted_run(cell, 2 + rng.normal(0, 0.1, ROWS), seed=seed, data__name=str(rows))
        scores = tuple(
            replace(score, row_id=row) for score, row in zip(run.scores, ids, strict=True)
        )
        runs.append(replace(run, scores=scores))
    folder = write_runs(runs, tmp_path / "planted")
    first = ""
    for number, path in enumerate(run_folders(folder / "runs")):
        lengths = rng.integers(1, 13, ROWS)
        texts = [" ".join(f"w{number}{place}" for place in range(length)) for length in lengths]
        first = first or texts[0]
        texts[0] = first if number != 1 else texts[0]
        replies = [RowReply(row, text, 5, "stop", {}) for row, text in zip(ids, texts, strict=True)]
        run_hash = json.loads((path / "run.json").read_text())["hash"]
        write_replies(replies_file(path), run_hash, {}, [], replies)
    return folder


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setattr("slm_lora.experiment.judge_client.FIRST_WAIT_S", 0.01)
    with judge_server(longer) as server:
        yield server


def longer(first: str, second: str) -> str:
    winner = "A" if len(first) > len(second) else "B" if len(first) < len(second) else "tie"
    return json.dumps({"winner": winner})


def words(results: Path, judge: JudgeServer, *more: str) -> list[object]:
    return ["judge", results, f"url={judge.url}", "model=rule", *more]


def texts_of(results: Path) -> dict[str, dict[str, str]]:
    found = {}
    for run in list_runs(results):
        there = read_replies(replies_file(run.folder))
        assert there is not None
        found[run.cell] = {reply.row: reply.reply for reply in there[1]}
    return found


def win_rates(results: Path) -> list[float]:
    """Of the metric, by run, as metrics.json has it."""
    from slm_lora.runs.metrics import METRICS
    from slm_lora.runs.scored_run import read_scored_runs
    from slm_lora.stats.settings import Setting

    runs = read_scored_runs(list_runs(results))
    return [Setting((run,)).estimate(METRICS["win_rate"]).value for run in runs]


def judged_pairs(results: Path) -> tuple[JudgedPair, ...]:
    judgement = read_judgement(results / JUDGE_FILE)
    assert judgement is not None
    return judgement.pairs


def test_nothing_is_sent_without_the_switch(
    results: Path, judge: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(results.rglob("*"))
    price = "price={input: 1000000, output: 0}"
    assert command(*words(results, judge, price)) == 0
    out = capsys.readouterr().out
    assert judge.requests == [] and sorted(results.rglob("*")) == before
    # Two seeds, two orders; seed 1 has one reply like the base's.
    assert f"{2 * 2 * ROWS - 2} requests to {judge.url} (model rule)" in out
    assert "--send" in out and "cost" in out


def test_longer_replies_win_as_counted_by_hand(
    results: Path, judge: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*words(results, judge), "--send") == 0
    texts = texts_of(results)
    expected = [0.5]
    for cell in ("r8-seed0", "r8-seed1"):
        signs = [np.sign(len(texts[cell][row]) - len(texts["base"][row])) for row in texts["base"]]
        expected.append(float(np.mean([(1 + sign) / 2 for sign in signs])))
    assert win_rates(results) == pytest.approx(expected, abs=1e-12)
    assert len(judge.bodies) == 2 * 2 * ROWS - 2
    assert set(judge.requests) == {"/v1/chat/completions"}
    assert "0 of 24 pairs flip" in capsys.readouterr().out
    metrics = json.loads((results / "metrics.json").read_text())
    assert "win_rate" in json.dumps(metrics)
    assert "replies win" in metrics["card"]["facts"]["Judge"]
    assert "Win rate" in (results / "report.md").read_text()
    mean = float(np.mean(expected[1:]))
    assert command("verdict", results, "--require", "win_rate < 0.5") in (0, 10, 11)
    assert f"{mean:.4f}" in capsys.readouterr().out


def test_both_orders_are_sent(results: Path, judge: JudgeServer) -> None:
    assert command(*words(results, judge), "--send") == 0
    asked = [replies_in(body) for body in judge.bodies]
    assert sorted(asked) == sorted((second, first) for first, second in asked)


def test_always_the_first_is_position_bias_alone(
    results: Path, judge: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    judge.rule = lambda first, second: "A"
    assert command(*words(results, judge), "--send") == 0
    assert win_rates(results) == [0.5, 0.5, 0.5]
    out = capsys.readouterr().out
    assert "the first reply wins 1.000 of decided answers (1.000 to 1.000" in out
    assert "23 of 24 pairs flip" in out


def test_ties_are_half_and_have_no_position_bias(
    results: Path, judge: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    judge.rule = lambda first, second: '```json\n{"winner": "tie"}\n```'
    assert command(*words(results, judge), "--send") == 0
    assert win_rates(results) == [0.5, 0.5, 0.5]
    out = capsys.readouterr().out
    assert "Position bias" not in out and "0 of 24 pairs flip" in out


def test_unreadable_answers_are_asked_once_more_then_counted(
    results: Path, judge: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    base = texts_of(results)["base"]
    rows = list(base)
    judge.rule = lambda first, second: (
        "A is better" if base[rows[3]] in (first, second) else longer(first, second)
    )
    assert command(*words(results, judge), "--send") == 0
    # Row 3: both orders of both seeds, twice.
    assert len(judge.bodies) == 2 * 2 * ROWS - 2 + 4
    assert "unreadable answers: 4." in capsys.readouterr().out
    judgement = read_judgement(results / JUDGE_FILE)
    assert judgement is not None and judgement.rows == frozenset(rows) - {rows[3]}
    assert len(win_rates(results)) == 3


def test_overload_is_waited_for(results: Path, judge: JudgeServer) -> None:
    judge.statuses = [429, 500, 503]
    assert command(*words(results, judge, "max_concurrent=1"), "--send") == 0
    assert len(judge.bodies) == 2 * 2 * ROWS - 2
    assert len(judge.requests) == len(judge.bodies) + 3


def test_down_in_the_middle_continues_with_the_rest(
    results: Path, judge: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    judge.down_after = 10
    assert command(*words(results, judge), "--send") == 6
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "status 503" in error and "the same command continues" in error
    assert not (results / JUDGE_FILE).exists()
    kept = (results / "judge.partial.jsonl").read_text().splitlines()
    assert len(kept) == 10  # those that the server answered, whatever was under way
    judge.down_after, judge.bodies = None, []
    assert command(*words(results, judge), "--send") == 0
    assert len(judge.bodies) == 2 * 2 * ROWS - 2 - len(kept)
    assert not (results / "judge.partial.jsonl").exists()
    judge.bodies = []
    assert command(*words(results, judge), "--send") == 0
    assert judge.bodies == []


def test_a_torn_last_line_is_asked_again(results: Path, judge: JudgeServer) -> None:
    judge.down_after = 5
    assert command(*words(results, judge), "--send") == 6
    partial = results / "judge.partial.jsonl"
    partial.write_bytes(partial.read_bytes()[:-4])
    judge.down_after, judge.bodies = None, []
    assert command(*words(results, judge), "--send") == 0
    assert len(judge.bodies) == 2 * 2 * ROWS - 2 - 4


def test_no_server_is_one_line(
    results: Path, judge: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("judge", results, "url=http://127.0.0.1:9/v1", "model=x", "--send") == 6
    assert "no answer" in capsys.readouterr().err.strip().splitlines()[-1]


def test_key_comes_from_the_environment_and_is_written_nowhere(
    results: Path,
    judge: JudgeServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    named = words(results, judge, "api_key_env=JUDGE_TEST_KEY")
    monkeypatch.delenv("JUDGE_TEST_KEY", raising=False)
    assert command(*named, "--send") == 2 and judge.requests == []
    assert "JUDGE_TEST_KEY is not set" in capsys.readouterr().err
    monkeypatch.setenv("JUDGE_TEST_KEY", "sk-very-secret")
    judge.statuses = [401]
    judge.rule = lambda first, second: "sk-very-secret"
    assert command(*named, "max_concurrent=1", "--send") == 2
    assert command(*named, "--send") == 0
    assert set(judge.authorizations) == {"Bearer sk-very-secret"}
    output = capsys.readouterr()
    written = [path.read_bytes() for path in results.rglob("*") if path.is_file()]
    assert "secret" not in output.out + output.err
    assert not any(b"secret" in content for content in written)


def test_redirects_are_not_followed(
    results: Path, judge: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with judge_server(longer) as other:
        judge.location = f"{other.url}/chat/completions"
        assert command(*words(results, judge), "--send") == 6
        assert other.requests == []
    assert "redirects" in capsys.readouterr().err


def test_other_replies_than_those_judged_are_named(
    results: Path, judge: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*words(results, judge), "--send") == 0
    path = replies_file(run_folders(results / "runs")[1])
    there = read_replies(path)
    assert there is not None
    changed = [replace(reply, reply=f"{reply.reply} more") for reply in there[1]]
    write_replies(path, there[0].run, {}, [], changed)
    assert command("report", results) == 4
    assert "compared other replies" in capsys.readouterr().err
    judge.bodies = []
    assert command(*words(results, judge), "--send") == 0
    assert len(judge.bodies) == 2 * ROWS  # of the changed run only


def test_changed_answers_are_refused(results: Path, judge: JudgeServer) -> None:
    assert command(*words(results, judge), "--send") == 0
    path = results / JUDGE_FILE
    path.write_text(path.read_text().replace('"base_first": "A"', '"base_first": "B"', 1))
    assert command("report", results) == 4


def test_section_of_the_recipe_is_the_default(
    results: Path, judge: JudgeServer, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = results.parent / "recipe.yaml"
    section = {"url": judge.url, "model": "of-recipe", "rows": 3}
    rows = str(results.parent / "rows.jsonl")
    moved = results.parent / "moved.jsonl"
    recipe.write_text(json.dumps({"name": "x", "data": {"name": rows}, "judge": section}))
    named = ["judge", results, "--recipe", recipe]
    assert command(*named, "model=other") == 0
    assert "(model other)" in capsys.readouterr().out
    Path(rows).rename(moved)
    assert command("judge", results, f"url={judge.url}", "model=x") == 3
    assert "--recipe RECIPE names the file" in capsys.readouterr().err
    assert command("judge", results, f"data.name={moved}", f"url={judge.url}", "model=x") == 2
    assert command(*named, f"data.name={moved}", "--send") == 0
    assert {body["model"] for body in judge.bodies} == {"of-recipe"}
    assert len(judged_pairs(results)) == 6


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=", "judge.model"),
        ("rows=0", "judge.rows"),
        ("colour=red", "judge.colour"),
        ("both_orders=false", "judge.both_orders"),
        ("url=ftp://x", "judge.url"),
        ("url=http://user:word@host/v1", "judge.url"),
        ("prompt=/no/such/file", "judge.prompt"),
        ("price={input: 1}", "judge.price"),
        ("model", "KEY=VALUE"),
    ],
)
def test_bad_keys(
    results: Path,
    judge: JudgeServer,
    capsys: pytest.CaptureFixture[str],
    override: str,
    message: str,
) -> None:
    assert command(*words(results, judge, override), "--send") == 2
    assert message in capsys.readouterr().err and judge.requests == []


def test_rows_that_are_gone(results: Path, judge: JudgeServer) -> None:
    write_jsonl(results.parent / "rows.jsonl", make_rows(ROWS - 2))
    assert command(*words(results, judge)) == 3


def test_own_prompt(results: Path, judge: JudgeServer, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Shorter? {{reply_a}} or {{ reply_b }}")
    assert command(*words(results, judge, f"prompt={prompt}", "rows=1"), "--send") == 0
    assert judge.bodies[0]["messages"][0]["content"].startswith("Shorter? <reply_a-")
    prompt.write_text("{{reply_a}} {{reply_c}}")
    assert command(*words(results, judge, f"prompt={prompt}")) == 2


def test_a_reply_cannot_end_its_tag_or_fill_a_placeholder() -> None:
    texts = {"prompt": "p", "reference": "r", "reply_a": "{{reply_b}}", "reply_b": "</reply_b>"}
    content = fill(DEFAULT, texts)
    assert content.count("{{reply_b}}") == 1
    other = fill(DEFAULT, {**texts, "reply_b": content})
    mark = other.split("<reply_b-")[1][:8]
    assert other.count(f"</reply_b-{mark}>") == 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("A", "A"),
        (" b\n", "B"),
        ("Tie", "tie"),
        ('{"winner": "B"}', "B"),
        ('<think>A or B?</think>\n{"winner": "A"}', "A"),
        ("A is better", None),
        ("", None),
        ("AB", None),
        ('{"winner": "C"}', None),
        ('{"winner": ["A"]}', None),
        ('{"winner": "A", "loser": "A"}', None),
        ('{"winner": "A"} {"winner": "B"}', None),
        (None, None),
        (7, None),
    ],
)
def test_answers_are_read_strictly(text: object, answer: str | None) -> None:
    assert parse_answer(text) == answer


@pytest.mark.parametrize(
    ("base_first", "adapter_first", "score", "flips"),
    [
        ("A", "A", 0.5, True),
        ("B", "B", 0.5, True),
        ("A", "B", 0.0, False),
        ("B", "A", 1.0, False),
        ("tie", "A", 0.75, False),
        ("A", "tie", 0.25, False),
        ("tie", "tie", 0.5, False),
        (None, "A", None, False),
    ],
)
def test_score_of_a_pair(base_first: Any, adapter_first: Any, score: Any, flips: bool) -> None:
    pair = JudgedPair("run", "row", base_first, adapter_first, ("x", "y"))
    assert (pair.score, pair.flips) == (score, flips)


def test_a_key_is_no_name_of_a_variable() -> None:
    with pytest.raises(ValidationError, match="name of an environment variable"):
        JudgeSection(url="http://x/v1", model="m", api_key_env="sk-abc")


def test_judge_imports_no_heavy_library(results: Path) -> None:
    arguments = ("judge", results, "url=http://127.0.0.1:9/v1", "model=any")
    assert loaded(*arguments) == "loaded []"
