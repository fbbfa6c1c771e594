"""What `slm-lora data check` finds, on rows whose facts are counted by hand."""

from __future__ import annotations

import random

import pytest

from slm_lora.data.checks import facts, plain_marks
from slm_lora.data.splits import group_rows
from slm_lora.data.templates import Template, TemplateKind
from slm_lora.data.tokens import RowTokenizer
from slm_lora.records import Row, Turn

from ..conftest import CHAT_TEMPLATE, tiny_tokenizer


def row(instruction: str, response: str, **fields: str) -> Row:
    return Row((Turn("user", instruction), Turn("assistant", response)), **fields)


ROWS = [
    row("Name a river.", "Rhine", category="geography"),
    row("name a river", "Danube", category="geography"),
    row("Name a river.", "Elbe", category="geography"),
    row("What does the text say of Bonn?", "Little.", context="Bonn lies on the Rhine."),
    row("List all cities.", "Bonn.", context="Bonn lies on the Rhine.", category="summary"),
    *(row(f"Question {word}?", word) for word in ("one", "two", "three", "four", "five")),
]


def test_relations_are_counted_one_by_one_and_together() -> None:
    found = {each.relation: each for each in facts(ROWS, [10] * len(ROWS)).related}
    assert set(found) == {"instruction", "context", "near", None}
    assert (found["instruction"].groups, found["instruction"].rows) == (1, 3)
    assert (found["context"].groups, found["context"].rows) == (1, 2)
    assert (found[None].groups, found[None].rows) == (2, 5)


def test_the_leak_is_that_of_random_splits() -> None:
    rows = [row(f"question {i // 3}", f"{i}") for i in range(60)]
    leak = facts(rows, [1] * 60).related[-1].leak
    group, rng, shares = group_rows(rows), random.Random(0), []
    for _ in range(3000):
        held = {r.row_id for r in rows if rng.random() < 0.1}
        train = {group[r.row_id] for r in rows if r.row_id not in held}
        shares.append((sum(group[r] in train for r in held), len(held)))
    simulated = sum(leaked for leaked, _ in shares) / sum(many for _, many in shares)
    assert leak == pytest.approx(0.99)
    assert simulated == pytest.approx(leak, abs=0.005)


def test_conflicts_are_equal_prompts_with_different_answers() -> None:
    # "name a river" is written otherwise, so it is another prompt.
    assert facts(ROWS, [10] * len(ROWS)).conflicts == (1, 2)
    assert facts(ROWS[3:], [10] * 7).conflicts == (0, 0)


def test_lengths_fall_into_bins_and_limits_have_a_cost() -> None:
    found = facts(ROWS[:4], [1, 2, 100, 300])
    assert found.lengths == (
        (1, 1), (2, 1), (4, 0), (8, 0), (16, 0), (32, 0), (64, 0), (128, 1), (256, 0), (512, 1),
    )  # fmt: skip
    assert [each.limit for each in found.costs] == [128, 256]
    assert found.costs[0].rows == 1 / 4
    assert found.costs[0].tokens == pytest.approx(172 / 403)


def test_categories_come_most_frequent_first() -> None:
    assert facts(ROWS, [1] * len(ROWS)).categories == (("geography", 3), ("summary", 1))


# --- role marks that rows can spell ------------------------------------------------------------

ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}"
    "{% endfor %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "chat_template", "marks"),
    [
        ("chat", CHAT_TEMPLATE, []),
        ("chat", ZEPHYR, ["<|user|>", "<|assistant|>"]),
        ("chat", LLAMA2, ["[INST]", "[/INST]"]),
        ("plain", CHAT_TEMPLATE, []),
        ("instruction_response", CHAT_TEMPLATE, ["Instruction:", "Response:"]),
    ],
)
def test_role_marks_that_are_no_special_tokens(
    template: TemplateKind, chat_template: str, marks: list[str]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template
    tokenize = RowTokenizer(tokenizer, Template(template))
    assert [mark.text for mark in plain_marks(tokenize, ROWS)] == marks


def test_rows_that_spell_a_role_mark_are_counted() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ZEPHYR
    tokenize = RowTokenizer(tokenizer, Template("chat"))
    spelling = Row((Turn("user", "a<|assistant|>b"), Turn("assistant", "c")), source="rows.jsonl:9")
    user, assistant = plain_marks(tokenize, [*ROWS, spelling, spelling])
    assert (user.rows, user.first) == (0, "")
    assert (assistant.rows, assistant.first) == (2, "rows.jsonl:9")
    own = RowTokenizer(tokenizer, Template("instruction_response"))
    said = Row((Turn("user", "Response: what is it?"), Turn("assistant", "A reply.")))
    forged = Row((Turn("user", "a\nResponse:\nb"), Turn("assistant", "c")))
    assert [mark.rows for mark in plain_marks(own, [said, forged])] == [0, 1]
