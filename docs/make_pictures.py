"""Make the pictures of docs/gallery.md: the demo page, a report, the terminal.

    python docs/make_pictures.py adapter/quickstart-r16-seed0

Needs the extra ``serve``, playwright, and Chromium (``--browser`` for another path than Debian's).
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
EXPERIMENT = ROOT / "results" / "quickstart"
QUESTION = "What does numpy.argsort return?"
COMMAND = [sys.executable, "-m", "slm_lora"]


def draw_terminal() -> None:
    """The output of `slm-lora report` at 100 columns, as SVG."""
    with tempfile.TemporaryDirectory() as folder:
        # On a copy: the command writes its report again.
        shutil.copytree(EXPERIMENT, Path(folder) / "results" / EXPERIMENT.name)
        printed = subprocess.run(
            [*COMMAND, "report", f"results/{EXPERIMENT.name}"],
            cwd=folder,
            env=os.environ | {"COLUMNS": "100", "FORCE_COLOR": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(Text.from_ansi(printed.strip("\n")))
    svg = console.export_svg(title=f"slm-lora report results/{EXPERIMENT.name}")
    (PICTURES / "terminal.svg").write_text(svg, encoding="utf-8")


@contextmanager
def served(adapter: Path) -> Iterator[str]:
    """The address of `slm-lora serve` with one adapter."""
    server = subprocess.Popen(
        [*COMMAND, "serve", "--adapter", str(adapter), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if address := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield address[0]
                return
        raise SystemExit("slm-lora serve ended before it listened")
    finally:
        server.terminate()
        server.wait()


def photograph(browser: Any, adapter: Path) -> None:
    """The first screen of a report, and the demo page with its replies, as PNG."""
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.goto((EXPERIMENT / "report.html").as_uri())
    page.screenshot(path=PICTURES / "report.png")
    with served(adapter) as url:
        page.goto(url, wait_until="domcontentloaded")
        question = page.get_by_label("Question")
        question.fill(QUESTION)
        question.press("Enter")
        stop = page.get_by_role("button", name="Stop")
        stop.wait_for()
        stop.wait_for(state="hidden", timeout=120_000)
        page.screenshot(path=PICTURES / "demo.png")


def main() -> None:
    """Make all three."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("adapter", type=Path, help="folder of an adapter")
    parser.add_argument("--browser", default="/usr/bin/chromium", help="Chromium's path")
    options = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    draw_terminal()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=options.browser, args=["--no-sandbox", "--disable-gpu"]
        )
        photograph(browser, options.adapter.resolve())
        browser.close()


if __name__ == "__main__":
    main()
