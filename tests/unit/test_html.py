"""The report's page: names from data are text, in Markdown and in HTML, and nothing is fetched."""

from __future__ import annotations

import pytest

from slm_lora.report.html import Section, as_html, as_markdown, plain


@pytest.mark.parametrize(
    "name",
    ["a|b", "![x](http://host/p.png)", "<b>bold</b>", "_x_ *y* `z`", "two\nlines", "closed_qa"],
)
def test_a_name_is_text_whatever_it_spells(name: str) -> None:
    table = f"| Category | Rows |\n| :-- | --: |\n| {plain(name)} | 3 |"
    page = as_html("t", [Section("By category", table)])
    assert page.count("<td") == 2
    for tag in ("<img", "<b>", "<em>", "<code>", "<a "):
        assert tag not in page.split("<section>")[1]
    escaped = " ".join(name.split()).replace("<", "&lt;").replace(">", "&gt;")
    assert f"<td>{escaped}</td>" in page.replace(' style="text-align:left"', "")


def test_an_underscore_in_a_word_stays_as_it_is() -> None:
    assert plain("closed_qa") == "closed_qa"


def test_both_forms_hold_every_section() -> None:
    sections = [Section("One", "text"), Section("Two", "| a |\n| :-- |\n| 1 |")]
    assert as_markdown("name", sections).startswith("# name\n\n## One\n\ntext\n\n## Two\n\n| a |")
    page = as_html("name <1>", sections)
    assert "<title>name &lt;1&gt;</title>" in page
    assert page.count("<section>") == 2 and "<table>" in page
