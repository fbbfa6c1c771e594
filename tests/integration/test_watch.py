"""`slm-lora watch` in a browser while a tiny experiment runs; the run itself is unchanged."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from slm_lora.runs import progress

from ..support.lab import Lab
from ..support.processes import wait_until

pytest.importorskip("uvicorn", reason="needs the extra serve")

from slm_lora.serve import server
from slm_lora.serve.guard import LOOPBACK, Guard
from slm_lora.serve.watch import make_watch_app

SLOW_RUN = """
import sys, time
from slm_lora.cli import main
from slm_lora.experiment.tracking import Trackers
from slm_lora.runs import progress
progress.WRITE_INTERVAL_S = 0.2
Trackers.step = lambda self, step: time.sleep(0.25)
main()
"""


@pytest.fixture
def url(lab: Lab) -> str:
    """A server of the lab's results on a free port, in a thread."""
    root = lab.results.parent
    root.mkdir()
    listener = server.listen("127.0.0.1", 0)
    guarded = Guard(make_watch_app(root), hosts=LOOPBACK, token=None)
    threading.Thread(target=server.serve, args=(guarded, listener), daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def opened(address: str, errors: list[str], requests: list[str]) -> Iterator[Any]:
    """A page of a phone's width in headless Chromium."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    browser_path = Path("/usr/bin/chromium")
    if not browser_path.exists():
        pytest.skip("needs Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=browser_path,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.set_default_timeout(60_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        yield page
        browser.close()


def test_page_follows_a_run_without_a_reload(lab: Lab, url: str) -> None:
    errors: list[str] = []
    requests: list[str] = []
    with opened(url, errors, requests) as page:
        page.get_by_text("No experiments in this folder yet").wait_for()
        words = ["experiment", lab.recipe, "training.num_train_epochs=4", *lab.folders]
        run = subprocess.Popen(
            [sys.executable, "-c", SLOW_RUN, *map(str, words)], stderr=subprocess.PIPE, text=True
        )
        with contextlib.ExitStack() as stack:
            stack.callback(run.wait)
            stack.callback(run.kill)
            # The index, open since before the experiment.
            box = page.locator("[data-experiment=tiny]")
            box.get_by_text("0 of 3 cells finished").wait_for()
            box.get_by_text("running", exact=True).wait_for()
            box.get_by_role("link", name="tiny").click()
            page.evaluate("window.notReloaded = true")
            step = page.locator(".live dd").first
            shown: list[int] = []

            def another_step() -> bool:
                texts = step.all_inner_texts()
                number = int(texts[0].split(" / ")[0]) if texts and " / " in texts[0] else 0
                if number > (shown[-1] if shown else 0):
                    shown.append(number)
                page.wait_for_timeout(100)
                return len(shown) >= 3

            wait_until(another_step)
            assert page.locator(".live svg polyline").count() == 1
            page.locator("tr[data-cell=r2-40]").wait_for()
            assert run.wait(120) == 0, run.stderr.read() if run.stderr else ""
            page.locator("#report summary").wait_for()
            page.get_by_text("3 cells finished").wait_for()
        assert page.evaluate("window.notReloaded") is True
        assert page.locator(".live").count() == 0
        assert page.locator("tbody tr svg polyline").count() == 3
        metrics = lab.metrics()
        for entry in metrics["runs"]:
            row = page.locator(f"tr[data-cell='{entry['cell']}']").inner_text()
            assert f"{entry['evaluation']['all']['loss']:.4f}" in row
        for title, text in metrics["card"]["facts"].items():
            assert title in page.locator(".card").inner_text()
            assert text in page.locator(".card").inner_text()
        page.locator("#report summary").click()
        frame = page.frame_locator("#report iframe")
        frame.get_by_text("How does the held-out loss").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert not (lab.results / "progress").exists()
    assert errors == []
    assert all(request.startswith((url, "data:")) for request in requests)


EVIL = "<img src=x onerror=document.title='XSS'>"


def test_names_and_texts_from_disk_are_shown_as_text(lab: Lab, url: str) -> None:
    name = f"{EVIL} %2e%2e#?".replace("/", "|")
    folder = lab.results.parent / name
    run = folder / "runs" / "r2-0"
    run.mkdir(parents=True)
    evaluation = {"headline": "all", "all": {"loss": 1.5, "perplexity": 4.5}}
    (run / "run.json").write_text(json.dumps({"cell": EVIL, "evaluation": evaluation}))
    (folder / "metrics.json").write_text(json.dumps({"card": {"facts": {EVIL: EVIL}}}))
    answers = [{"variant": EVIL, "greedy": EVIL, "sampled": "", "loss": None}]
    prompts = [{"prompt": EVIL, "reference": EVIL, "answers": answers}]
    (folder / "outputs.json").write_text(json.dumps({"prompts": prompts}))
    script = "<script>parent.document.title='XSS'</script>"
    (folder / "report.html").write_text(f"<p>report</p>{EVIL}{script}")
    with progress.planned_experiment(folder, EVIL, 2, print), opened(url, [], []) as page:
        page.get_by_role("link", name=EVIL).click()
        page.get_by_role("heading", name=name).wait_for()
        page.locator("#report summary").click()
        page.frame_locator("#report iframe").get_by_text("report").wait_for()
        assert page.locator("img").count() == 0 and page.locator("script").count() == 1
        assert page.title() == f"{name} – slm-lora watch"
        # Heading, description, two of the card, cell, prompt, reference, variant, answer.
        assert page.locator("main").inner_text().count(EVIL) == 9
        page.goto(f"{url}/experiment/{quote(name, safe='')}/report")
        page.get_by_text("report").wait_for()
        assert page.title() != "XSS"


def test_raw_paths_reach_no_other_file(lab: Lab, url: str) -> None:
    (lab.results / "runs").mkdir(parents=True)
    secret = lab.folder / "report.html"
    secret.write_text("TOP SECRET")
    (lab.folder / "runs").mkdir()
    for path in (
        "/experiment/../report", "/experiment/%2e%2e/report", "/experiment/..%2f/report",
        "/experiment/tiny%2f..%2f../report", "/experiment/%252e%252e/report", "//report",
        "/experiment/tiny/../../report.html", "/static/..%2f..%2fcli%2fserving.py",
    ):  # fmt: skip
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
        connection.request("GET", path)
        answer = connection.getresponse()
        assert answer.status == 404 and b"SECRET" not in answer.read(), path


def test_records_of_progress_change_no_bit(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("training.num_train_epochs=1",)
    records: list[str] = []
    real = progress.ProgressRecord.model_dump_json

    def dump(self: progress.ProgressRecord, **options: Any) -> str:
        records.append(f"{self.cell} {self.phase} {self.step}")
        return real(self, **options)

    def states() -> dict[str, Any]:
        untimed: dict[str, Any] = {}
        for run in lab.metrics()["runs"]:
            lines = lab.results / "runs" / run["folder"] / "steps.jsonl"
            steps = lines.read_text().splitlines() if lines.exists() else []
            ignored = ("seconds", "peak_memory_bytes")
            history = [
                {key: value for key, value in json.loads(step).items() if key not in ignored}
                for step in steps
            ]
            losses = run["evaluation"]["all"]["loss"]
            untimed[run["folder"]] = (history, losses, run.get("adapter", {}).get("sha256"))
        return untimed

    monkeypatch.setattr(progress.ProgressRecord, "model_dump_json", dump)
    monkeypatch.setattr(progress, "WRITE_INTERVAL_S", 0.0)
    assert lab.run(*words) == 0
    assert "base scoring 0" in records and "r2-40 training 3" in records
    assert "r4-80 scoring 9" in records
    written = states()
    lab.results.rename(lab.folder / "with-progress")
    lab.adapters.rename(lab.folder / "adapters-with-progress")

    def fails(self: progress.ProgressRecord, **options: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(progress.ProgressRecord, "model_dump_json", fails)
    assert lab.run(*words) == 0
    assert states() == written
