"""The recipe of docs/start.md runs as printed, and links and targets of all pages exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from slm_lora.config.load import load_recipe

from ..support.lab import command

PAGE = Path(__file__).parents[2] / "docs" / "start.md"


def printed(kind: str) -> str:
    block = re.search(rf"```{kind}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    return block[1]


def test_recipe_printed_in_start_md_runs_on_rows_like_those_printed(
    tmp_path: Path,
    tiny_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Path("mine.yaml")
    recipe.write_text(printed("yaml"), encoding="utf-8")
    shown = [json.loads(line) for line in printed("json").splitlines()]
    rows = [
        {key: f"{text} ({number} and {number * 7} are others.)" for key, text in row.items()}
        for number in range(40)
        for row in shown
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read, cells = load_recipe(recipe)
    assert read.name == "mine" and len(cells) == 9
    # As printed it takes the embedded model: a tiny one stands in for it.
    model = f"model.name={tiny_folder}"
    assert command("data", "check", "mine.yaml", model) == 0
    assert command("data", "show", "mine.yaml", model) == 0
    short = ("seeds=[0]", "training.max_steps=1", "grid.axes=[{adapter.r: [4, 8]}]")
    assert command("experiment", "mine.yaml", model, *short) == 0
    assert "report     results/mine/report.html" in capsys.readouterr().out


ROOT = PAGE.parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "results" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_make_targets_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.split("#")[0] for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)]
    assert [link for link in links if not (page.parent / link).exists()] == []
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    assert set(re.findall(r"^(?:make|`make) ([a-z-]+)", text, re.MULTILINE)) <= targets
