"""The report's pages: text from data stays literal in Markdown and HTML, and nothing is fetched."""

from __future__ import annotations

import pytest

from slm_lora.report.blocks import Fact, Picture, Section, plain
from slm_lora.report.card import Card
from slm_lora.report.html import as_html
from slm_lora.report.markdown import as_markdown

CARD = Card(None, None, (), (), None, 0.01, (Fact("Recommended", "r=8 <b> *x*", "settings"),))
PICTURE = Picture("settings", '<svg viewBox="0 0 1 1"></svg>', "a caption")


@pytest.mark.parametrize(
    "name",
    ["a|b", "![x](http://host/p.png)", "<b>bold</b>", "_x_ *y* `z`", "two\nlines", "closed_qa"],
)
def test_plain_keeps_any_name_literal_in_html(name: str) -> None:
    table = f"| Category | Rows |\n| :-- | --: |\n| {plain(name)} | 3 |"
    page = as_html("t", "", None, None, [Section("By category", table)])
    assert page.count("<td") == 2
    for tag in ("<img", "<b>", "<em>", "<code>", "<a "):
        assert tag not in page.split("<section>")[1]
    escaped = " ".join(name.split()).replace("<", "&lt;").replace(">", "&gt;")
    assert f"<td>{escaped}</td>" in page.replace(' style="text-align:left"', "")


def test_plain_leaves_underscores_inside_words() -> None:
    assert plain("closed_qa") == "closed_qa"


def test_markdown_and_html_hold_every_section() -> None:
    sections = [Section("One", "text"), Section("Two", "| a |\n| :-- |\n| 1 |")]
    markdown = as_markdown("name", "", None, None, sections)
    assert markdown.startswith("# name\n\n## One\n\ntext\n\n## Two\n\n| a |")
    page = as_html("name <1>", "", None, None, sections)
    assert "<title>name &lt;1&gt;</title>" in page
    assert page.count("<section>") == 2 and "<table>" in page


def test_card_is_literal_and_links_to_its_evidence() -> None:
    sections = [Section("Settings", "table", anchor="settings")]
    markdown = as_markdown("name", "Why?", CARD, PICTURE, sections, "figures")
    assert "- **[Recommended](#settings):** r=8 \\<b\\> \\*x\\*" in markdown
    assert '<a id="settings"></a>' in markdown
    assert "![a caption](figures/settings.svg)" in markdown
    page = as_html("name", "Why?", CARD, PICTURE, sections)
    assert '<a href="#settings">Recommended</a>' in page and 'id="settings"' in page
    assert "r=8 &lt;b&gt; *x*" in page


def test_folded_sections_hold_their_children() -> None:
    inner = Section("Inner <x>", "in", level=3, folded=True)
    sections = [Section("Outer", "out", folded=True, children=(inner,))]
    markdown = as_markdown("name", "", None, None, sections)
    assert markdown.count("<details>") == markdown.count("</details>") == 2
    assert "<summary><b>Inner &lt;x&gt;</b></summary>" in markdown
    page = as_html("name", "", None, None, sections)
    assert page.count("<details>") == page.count("</details>") == 2
    assert page.index("Outer") < page.index("Inner &lt;x&gt;") < page.rindex("</details>")
