"""The records of running cells, and what `slm-lora watch` serves from planted folders."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slm_lora.cli import app as command_line
from slm_lora.cli import run_guarded
from slm_lora.records import Step
from slm_lora.runs import progress
from slm_lora.runs.progress import (
    ProgressRecord,
    cell_progress,
    is_running,
    planned_experiment,
    read_plan,
    read_progress,
    thin,
)
from slm_lora.runs.replies import RowReply, replies_file, write_replies

from ..support.processes import wait_until

pytest.importorskip("starlette", reason="needs the extra serve")
from starlette.testclient import TestClient

from slm_lora.serve import experiments
from slm_lora.serve.guard import LOOPBACK, Guard
from slm_lora.serve.watch import make_watch_app

COMMITTED = Path(__file__).parents[2] / "results" / "quickstart"
HASH = "0123456789abcdef"


def made_steps(count: int, total: int = 40) -> list[Step]:
    """Steps of 100 tokens and half a second, after a first one of 10 seconds."""
    return [
        Step(n, total, n / total, 4.0 - 0.05 * n, 1e-3, 1.0, 8, 100, 90, 10.0 + 0.5 * (n - 1))
        for n in range(1, count + 1)
    ]


def write_record(results: Path, **changes: Any) -> None:
    """The record of a cell, as another process would have left it."""
    values = {
        "host": "elsewhere", "pid": 4, "process_started": 7, "updated": time.time(),
        "cell": "r2", "hash": HASH, "phase": "training", "step": 3, "total_steps": 9,
        "loss": 2.5, "tokens_per_s": 100.0, "seconds_left": 60.0, "curve": [[1, 3.0], [3, 2.5]],
    }  # fmt: skip
    values |= changes
    path = results / "progress" / f"{values['cell']}-{HASH[:8]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def client(root: Path, token: str | None = None) -> TestClient:
    guarded = Guard(make_watch_app(root), hosts=LOOPBACK, token=token)
    return TestClient(guarded, base_url="http://127.0.0.1", follow_redirects=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The runs and report of a committed experiment, without replies."""
    without = shutil.ignore_patterns("replies", "outputs.json")
    shutil.copytree(COMMITTED, tmp_path / "results" / "quickstart", ignore=without)
    return tmp_path / "results"


def test_record_has_rate_time_left_and_curve_of_the_steps(tmp_path: Path) -> None:
    with cell_progress(tmp_path, "r2", HASH, pytest.fail) as cell:
        cell.training(made_steps(11))
        (record,) = read_progress(tmp_path)
        assert (record.cell, record.hash, record.phase) == ("r2", HASH, "training")
        assert (record.step, record.total_steps, record.loss) == (11, 40, pytest.approx(3.45))
        # The first step, ten seconds long, does not count.
        assert record.tokens_per_s == pytest.approx(200)
        assert record.seconds_left == pytest.approx(29 * 0.5)
        assert record.curve[0] == (1, pytest.approx(3.95)) and len(record.curve) == 11
        assert is_running(record, time.time())
        cell.training(made_steps(12))
        assert read_progress(tmp_path)[0].step == 11, "written again before the interval ended"
        cell.scoring()
        assert [(r.phase, r.step) for r in read_progress(tmp_path)] == [("scoring", 12)]
        assert [path.name for path in (tmp_path / "progress").iterdir()] == ["r2-01234567.json"]
    assert not list(tmp_path.iterdir())


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    with (
        planned_experiment(tmp_path, "", 3, pytest.fail, writes=False),
        cell_progress(tmp_path, "r2", HASH, pytest.fail, writes=False) as cell,
    ):
        cell.training(made_steps(3))
        assert not list(tmp_path.iterdir())


def test_losses_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    history = made_steps(3)
    history[2] = dataclasses.replace(history[2], loss=float("nan"))
    with cell_progress(tmp_path, "r2", HASH, pytest.fail) as cell:
        cell.training(history)
        (record,) = read_progress(tmp_path)
    assert record.loss is None and [step for step, _ in record.curve] == [1, 2]


def test_a_folder_that_cannot_be_written_gives_one_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "WRITE_INTERVAL_S", 0.0)
    # A file where the folder should be: permissions do not stop root.
    (tmp_path / "progress").write_text("")
    notes: list[str] = []
    with (
        planned_experiment(tmp_path, "", 3, notes.append),
        cell_progress(tmp_path, "r2", HASH, notes.append) as cell,
    ):
        assert len(notes) == 1
        for count in (1, 2, 3):
            cell.training(made_steps(count))
        cell.scoring()
    assert len(notes) == 2 and all("slm-lora watch will not show this run" in n for n in notes)
    assert (tmp_path / "progress").is_file()


def test_a_full_disk_while_a_cell_runs_gives_one_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []

    def full(self: Path, *_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    with cell_progress(tmp_path, "r2", HASH, notes.append) as cell:
        cell.training(made_steps(1))
        monkeypatch.setattr(Path, "write_text", full)
        cell.scoring()
        cell.scoring()
    assert len(notes) == 1 and "No space left" in notes[0]


def test_a_reader_never_sees_half_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "WRITE_INTERVAL_S", 0.0)
    real = Path.write_text
    seen: list[int] = []

    def half(self: Path, text: str, **rest: Any) -> int:
        real(self, text[: len(text) // 2], **rest)
        seen.extend(record.step for record in read_progress(tmp_path))
        return real(self, text, **rest)

    with cell_progress(tmp_path, "r2", HASH, pytest.fail) as cell:
        cell.training(made_steps(1))
        monkeypatch.setattr(Path, "write_text", half)
        cell.training(made_steps(2))
        cell.training(made_steps(3))
    assert seen == [1, 2]


def test_plan_stays_after_a_stop_and_goes_with_the_end_or_an_error(tmp_path: Path) -> None:
    results = tmp_path / "tiny"
    with planned_experiment(results, "Which rank?", 6, pytest.fail):
        plan = read_plan(results)
        assert plan is not None and (plan.description, plan.cells) == ("Which rank?", 6)
        assert is_running(plan, time.time())
    assert not list(results.iterdir())
    with pytest.raises(ValueError, match="refused"), planned_experiment(results, "", 6, print):
        raise ValueError("refused")
    assert not results.exists()
    with pytest.raises(KeyboardInterrupt), planned_experiment(results, "", 6, print):
        raise KeyboardInterrupt
    assert read_plan(results) is not None


WRITER = """
import sys, time
from pathlib import Path
from slm_lora.runs.progress import cell_progress
with cell_progress(Path(sys.argv[1]), "r2", "0123456789abcdef", print) as cell:
    cell.scoring()
    time.sleep(300)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_record_of_a_killed_process_is_not_running(tmp_path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "tiny")])
    try:
        wait_until(lambda: read_progress(tmp_path / "tiny"))
        (record,) = read_progress(tmp_path / "tiny")
        assert is_running(record, time.time() + 10_000), "a long step is no end"
        (cell,) = experiments.details("tiny", tmp_path / "tiny")["cells"]
        assert cell["state"] == "scoring"
        writer.kill()
        # Not yet waited for, the process is a zombie.
        wait_until(lambda: not is_running(record, time.time()))
    finally:
        writer.kill()
        writer.wait()
    (cell,) = experiments.details("tiny", tmp_path / "tiny")["cells"]
    assert cell["state"] == "not running"
    assert experiments.summaries(tmp_path)[0]["active"] is False


def test_a_process_id_used_again_is_another_process() -> None:
    own = ProgressRecord(
        host=socket.gethostname(), pid=os.getpid(), process_started=1, updated=time.time(),
        cell="r2", hash=HASH, phase="training",
    )  # fmt: skip
    assert not is_running(own, time.time())


@pytest.mark.parametrize(
    ("age", "seconds_left", "expected"),
    [(80, 60.0, True), (100, 60.0, False), (100, 6 * 25.0, True), (130, 6 * 25.0, False)],
)
def test_record_of_another_machine_counts_by_its_age(
    tmp_path: Path, age: float, seconds_left: float, expected: bool
) -> None:
    now = time.time()
    write_record(tmp_path, updated=now - age, seconds_left=seconds_left)  # six steps left
    assert is_running(read_progress(tmp_path)[0], now) is expected


@given(
    st.lists(st.floats(-10, 10), min_size=1, max_size=500), st.integers(min_value=1, max_value=50)
)
def test_thinned_curve_keeps_the_last_step_and_the_range(losses: list[float], limit: int) -> None:
    points = [(float(step), loss) for step, loss in enumerate(losses, 1)]
    thinned = thin(points, limit)
    assert 1 <= len(thinned) <= limit and thinned[-1][0] == len(losses)
    assert all(min(losses) - 1e-9 <= loss <= max(losses) + 1e-9 for _, loss in thinned)
    if len(points) <= limit:
        assert thinned == points


def test_json_of_a_finished_experiment_equals_its_files(root: Path) -> None:
    web = client(root)
    (entry,) = web.get("/api/experiments").json()["experiments"]
    assert (entry["name"], entry["finished"], entry["total"]) == ("quickstart", 6, 6)
    assert (entry["running"], entry["active"], entry["unfinished"]) == (0, False, False)
    tuning_runs = [*(COMMITTED / "tuning").glob("*/r*")]
    assert entry["report"] and entry["tuning"] == len(tuning_runs) > 0
    details = web.get("/api/experiments/quickstart").json()
    metrics = json.loads((COMMITTED / "metrics.json").read_text())
    assert dict(details["card"]) == metrics["card"]["facts"]
    cells = {cell["folder"]: cell for cell in details["cells"]}
    for run in metrics["runs"]:
        cell = cells.pop(run["folder"])
        assert cell["held_out_loss"] == run["evaluation"]["all"]["loss"]
        if cell["cell"] == "base":
            assert cell["curve"] == [] and cell["step"] is None
            continue
        steps = (COMMITTED / "runs" / run["folder"] / "steps.jsonl").read_text().splitlines()
        history = [json.loads(line) for line in steps]
        assert cell["curve"] == [[step["step"], step["loss"]] for step in history]
        assert (cell["state"], cell["step"]) == ("finished", len(history))
    assert not cells
    stopped = [cell for cell in details["tuning_cells"] if cell["state"] == "stopped"]
    assert stopped and all(cell["reason"] for cell in stopped)


def test_json_of_running_cells_and_of_one_that_is_recorded_meanwhile(root: Path) -> None:
    folder = root / "quickstart"
    write_record(folder)
    write_record(folder / "tuning", cell="r9", updated=1.0)
    run = next((COMMITTED / "runs").glob("r4-seed0-*")).name
    with planned_experiment(folder, "Which rank?", 8, pytest.fail) as set_planned_runs:
        web = client(root)
        # Before values are tuned, no run is known to be one of the plan.
        assert web.get("/api/experiments").json()["experiments"][0]["finished"] == 0
        set_planned_runs([run, *(f"new-{number}" for number in range(7))])
        details = web.get("/api/experiments/quickstart").json()
    assert (details["finished"], details["running"], details["total"]) == (1, 1, 8)
    assert (details["description"], details["active"]) == ("Which rank?", True)
    assert details["cells"][0]["curve"] == [[1, 3.0], [3, 2.5]]
    assert (details["cells"][0]["cell"], details["cells"][0]["state"]) == ("r2", "training")
    silent = details["tuning_cells"][0]
    assert (silent["cell"], silent["state"]) == ("r9", "not running")
    assert silent["seconds_left"] is None
    # A record that a killed process left of a cell that has finished since.
    source = folder / "progress" / f"r2-{HASH[:8]}.json"
    record = json.loads(source.read_text()) | {"cell": "r4-seed0", "hash": run[-8:] + "0"}
    source.write_text(json.dumps(record))
    details = client(root).get("/api/experiments/quickstart").json()
    assert [cell["state"] for cell in details["cells"]] == ["finished"] * 7


def test_changed_files_are_read_again(root: Path) -> None:
    path = root / "quickstart" / "outputs.json"
    web = client(root)
    assert web.get("/api/experiments/quickstart").json()["replies"] == []
    answers = [{"variant": "base", "greedy": "Tea.", "sampled": "", "loss": 1.5}]
    path.write_text(json.dumps({"prompts": [{"prompt": "?", "reference": "", "answers": answers}]}))
    (entry,) = web.get("/api/experiments/quickstart").json()["replies"]
    assert entry["answers"] == [{"variant": "base", "text": "Tea.", "loss": 1.5}]
    path.write_text("{")
    assert web.get("/api/experiments/quickstart").json()["replies"] == []


def test_replies_of_runs_to_a_test_row_are_side_by_side(root: Path) -> None:
    folder = root / "quickstart"
    base, tuned = (next((folder / "runs").glob(pattern)) for pattern in ("base-*", "r4-seed0-*"))
    for run, text in ((tuned, "The indices."), (base, "<b>An array.</b>")):
        replies = [
            RowReply("row-1", text, 3, "stop", {}),
            RowReply("row-2", run.name, 3, "stop", {}),
        ]
        write_replies(replies_file(run), "0", {}, [], replies)
    entries = client(root).get("/api/experiments/quickstart").json()["replies"]
    assert [entry["prompt"] for entry in entries] == ["Test row row-1", "Test row row-2"]
    assert [(answer["variant"], answer["text"]) for answer in entries[0]["answers"]] == [
        ("base", "<b>An array.</b>"), ("r4-seed0", "The indices."),
    ]  # fmt: skip
    replies_file(base).write_text("{}\nbroken\n")
    entries = client(root).get("/api/experiments/quickstart").json()["replies"]
    assert [answer["variant"] for answer in entries[0]["answers"]] == ["r4-seed0"]


BROKEN: Sequence[Any] = (b"", b"{", b"[]", b"\xff\xfe", b"null", b'{"cell": 3}', b"[" * 100_000)


@pytest.mark.parametrize("content", BROKEN)
def test_broken_files_leave_their_values_out(root: Path, content: bytes) -> None:
    folder = root / "quickstart"
    write_record(folder)
    with planned_experiment(folder, "", 8, pytest.fail):
        for path in folder.rglob("*.json*"):
            path.write_bytes(content)
        details = client(root).get("/api/experiments/quickstart")
    assert details.status_code == 200
    assert details.json()["cells"] == [] and details.json()["card"] == []


VERSIONS = itertools.count(10**9)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["cell", "evaluation", "headline", "all", "loss", "training", "prompts",
                         "answers", "card", "facts", "steps", "prompt", "reference"]),
        inner, max_size=5,
    ),
    max_leaves=12,
)  # fmt: skip


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(json_values)
def test_any_json_is_served_without_an_error(tmp_path: Path, value: Any) -> None:
    folder = tmp_path / "planted"
    (folder / "runs" / "r2-0").mkdir(parents=True, exist_ok=True)
    for name in ("runs/r2-0/run.json", "outputs.json", "metrics.json"):
        (folder / name).write_text(json.dumps(value))
        # Another version of the file, even if it is as long and within one tick of the clock.
        version = next(VERSIONS)
        os.utime(folder / name, ns=(version, version))
    for path in ("/api/experiments", "/api/experiments/planted"):
        assert client(tmp_path).get(path).status_code == 200


def test_folders_that_are_no_experiments_and_odd_names(tmp_path: Path) -> None:
    for name in ("a b", "ü #?&", "<script>alert(1)</script>".replace("/", "|"), ".hidden"):
        (tmp_path / name / "runs").mkdir(parents=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / os.fsdecode(b"\xff") / "runs").mkdir(parents=True)
    web = client(tmp_path)
    names = {entry["name"] for entry in web.get("/api/experiments").json()["experiments"]}
    assert names == {"a b", "ü #?&", "<script>alert(1)<|script>"}
    for name in names:
        assert web.get(f"/api/experiments/{quote(name, safe='')}").json()["name"] == name
        page = web.get(f"/experiment/{quote(name, safe='')}")
        assert page.status_code == 200 and "alert" not in page.text


@pytest.mark.parametrize(
    "name",
    ["..", "%2e%2e", "..%2f..%2fetc", "%2e%2e%2fsecret", "/etc", "secret%00", ".", "%252e%252e",
     "quickstart%2f..%2f..%2fsecret", "quickstart/../../secret", "....//secret"],
)  # fmt: skip
def test_paths_outside_the_folder_are_not_found(root: Path, name: str) -> None:
    secret = root.parent / "secret"
    (secret / "runs").mkdir(parents=True)
    (secret / "report.html").write_text("TOP SECRET")
    web = client(root)
    for path in ("/experiment/{}/report", "/api/experiments/{}", "/experiment/{}", "/static/{}"):
        answer = web.get(path.format(name))
        assert answer.status_code == 404 or "secret" not in answer.text.lower(), path
        assert "TOP SECRET" not in answer.text
    (root / "quickstart" / "report.html").unlink()
    (root / "quickstart" / "report.html").symlink_to(secret / "report.html")
    assert web.get("/experiment/quickstart/report").status_code == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_other_methods_are_refused(root: Path, method: str) -> None:
    web = client(root)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    for path in ("/", "/api/experiments", "/api/experiments/quickstart", "/experiment/quickstart"):
        assert web.request(method, path).status_code == 405
        assert web.head(path).status_code == 200
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_host_origin_and_token_are_checked(root: Path) -> None:
    web = client(root)
    assert web.get("/", headers={"Host": "evil.example"}).status_code == 403
    assert web.get("/", headers={"Origin": "http://evil.example"}).status_code == 403
    guarded = client(root, token="sesame")
    assert guarded.get("/api/experiments").status_code == 401
    assert guarded.get("/static/watch.js").status_code == 401
    bearer = {"Authorization": "Bearer sesame"}
    assert guarded.get("/api/experiments", headers=bearer).status_code == 200
    assert guarded.get("/?token=sesame").status_code == 303


def test_pages_allow_their_own_script_only_and_name_no_other_host(root: Path) -> None:
    web = client(root)
    for path in ("/", "/experiment/quickstart", "/static/watch.js", "/static/watch.css"):
        answer = web.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert "://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
        assert answer.headers["x-content-type-options"] == "nosniff"
    report = web.get("/experiment/quickstart/report")
    assert report.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
    assert report.text == (COMMITTED / "report.html").read_text()
    script = web.get("/static/watch.js").text
    assert "innerHTML" not in script and "insertAdjacentHTML" not in script


def test_command_names_a_wrong_folder(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, message in (
        (root / "gone", "gone: no such folder"),
        (root / "quickstart", "quickstart: one experiment; name the folder that holds it"),
    ):
        words = ["watch", str(folder), "--port", "0"]
        assert run_guarded(lambda words=words: command_line(words, standalone_mode=False)) == 2
        assert message in capsys.readouterr().err


def test_command_names_a_missing_extra(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "slm_lora.serve.server", raising=False)
    assert run_guarded(lambda: command_line(["watch", str(root)], standalone_mode=False)) == 2
    assert capsys.readouterr().err.startswith("watch: uvicorn is not installed; run pip install")


def test_second_command_leaves_the_plan_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = subprocess.Popen(["sleep", "60"])
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: first.pid)
            with (
                pytest.raises(KeyboardInterrupt),
                planned_experiment(tmp_path, "a", 3, pytest.fail),
            ):
                raise KeyboardInterrupt
        kept = read_plan(tmp_path)
        assert kept is not None and kept.pid == first.pid
        with (
            pytest.raises(OSError, match="lock"),
            planned_experiment(tmp_path, "b", 5, pytest.fail),
        ):
            raise OSError("refused by the lock")
        assert read_plan(tmp_path) == kept
    finally:
        first.kill()
        first.wait()
    # A dead process's record is replaced, and removed at the end.
    with planned_experiment(tmp_path, "b", 5, pytest.fail):
        plan = read_plan(tmp_path)
        assert plan is not None and plan.cells == 5
    assert read_plan(tmp_path) is None
