"""Statistics of `slm-lora data check`, on rows counted by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest

from slm_lora.data.checks import (
    dataset_statistics,
    few_test_rows,
    special_tokens_in_rows,
    text_role_marks,
    undefined_names,
)
from slm_lora.data.placeholders import find_placeholders, placeholders_in
from slm_lora.data.splits import GroupingRule, group_rows
from slm_lora.data.templates import Template, TemplateKind
from slm_lora.data.tokenization import RowTokenizer
from slm_lora.records import Example, Row, Turn

from ..support.tiny_model import CHAT_TEMPLATE, tiny_tokenizer


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
    related = {
        entry.relation: entry for entry in dataset_statistics(ROWS, [10] * len(ROWS)).related
    }
    assert set(related) == {"prompt", "instruction", "context", "near", None}
    assert (related["prompt"].groups, related["prompt"].rows) == (1, 3)
    assert (related["instruction"].groups, related["instruction"].rows) == (1, 3)
    assert (related["context"].groups, related["context"].rows) == (1, 2)
    assert (related[None].groups, related[None].rows) == (2, 5)


def test_leak_equals_that_of_simulated_random_splits() -> None:
    rows = [row(f"question {i // 3}", f"{i}") for i in range(60)]
    leak = dataset_statistics(rows, [1] * 60).related[-1].leak
    group, rng, shares = group_rows(rows).group_of, random.Random(0), []
    for _ in range(3000):
        held = {r.row_id for r in rows if rng.random() < 0.1}
        train = {group[r.row_id] for r in rows if r.row_id not in held}
        shares.append((sum(group[r] in train for r in held), len(held)))
    simulated = sum(leaked for leaked, _ in shares) / sum(held_out for _, held_out in shares)
    assert leak == pytest.approx(0.99)
    assert simulated == pytest.approx(leak, abs=0.005)


def test_conflicts_are_equal_prompts_with_different_answers() -> None:
    # "name a river" is spelt differently, so it is another prompt.
    assert dataset_statistics(ROWS, [10] * len(ROWS)).conflicts == (1, 2)
    assert dataset_statistics(ROWS[3:], [10] * 7).conflicts == (0, 0)


def test_lengths_fall_into_bins_and_limits_have_a_cost() -> None:
    facts = dataset_statistics(ROWS[:4], [1, 2, 100, 300])
    assert facts.lengths == (
        (1, 1), (2, 1), (4, 0), (8, 0), (16, 0), (32, 0), (64, 0), (128, 1), (256, 0), (512, 1),
    )  # fmt: skip
    assert [cost.limit for cost in facts.costs] == [128, 256]
    assert facts.costs[0].rows == 1 / 4
    assert facts.costs[0].tokens == pytest.approx(172 / 403)


def test_categories_come_most_frequent_first() -> None:
    assert dataset_statistics(ROWS, [1] * len(ROWS)).categories == (
        ("geography", 3),
        ("summary", 1),
    )


# --- role marks in row text --------------------------------------------------------------------

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
def test_role_marks_that_are_plain_text_are_found(
    template: TemplateKind, chat_template: str, marks: list[str]
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = chat_template
    tokenize = RowTokenizer(tokenizer, Template(template))
    assert [mark.text for mark in text_role_marks(tokenize, ROWS)] == marks


def test_rows_with_a_role_mark_are_counted() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ZEPHYR
    tokenize = RowTokenizer(tokenizer, Template("chat"))
    spelling = Row((Turn("user", "a<|assistant|>b"), Turn("assistant", "c")), source="rows.jsonl:9")
    user, assistant = text_role_marks(tokenize, [*ROWS, spelling, spelling])
    assert (user.rows, user.first) == (0, "")
    assert (assistant.rows, assistant.first) == (2, "rows.jsonl:9")
    own = RowTokenizer(tokenizer, Template("instruction_response"))
    quoting = Row((Turn("user", "Response: what is it?"), Turn("assistant", "A reply.")))
    forged = Row((Turn("user", "a\nResponse:\nb"), Turn("assistant", "c")))
    assert [mark.rows for mark in text_role_marks(own, [quoting, forged])] == [0, 1]


# --- probable mistakes -------------------------------------------------------------------------


def test_equal_instructions_with_other_contexts_are_counted_but_not_tied() -> None:
    rows = [row("Is it good?", "Yes.", context=f"Text {n} of a guest {n}.") for n in range(4)]
    related = {entry.relation: entry for entry in dataset_statistics(rows, [9] * 4).related}
    assert (related["instruction"].groups, related["instruction"].rows) == (1, 4)
    assert (related[None].groups, related[None].rows, related[None].leak) == (0, 0, 0)
    tied = dataset_statistics(rows, [9] * 4, GroupingRule(with_context=False)).related[-1]
    assert (tied.groups, tied.rows) == (1, 4)


def test_equal_prompts_in_different_groups_are_counted() -> None:
    rows = [row("Who?", f"{n}", group_hint=f"g{n % 2}") for n in range(5)]
    assert dataset_statistics(rows, [9] * 5).cross_group_prompts == 5
    assert dataset_statistics(rows[::2], [9] * 3).cross_group_prompts == 0


def example(number: int, group: int) -> Example:
    ids = np.array([1, 2], dtype=np.int32)
    return Example(f"row{number}", f"group{group}", "", ids, ids > 1, 1, 1)


def test_few_test_rows_give_a_warning() -> None:
    assert few_test_rows([example(n, n) for n in range(30)]) == ""
    assert few_test_rows([example(n, n) for n in range(29)]).startswith("29 test rows: fewer than")
    warning = few_test_rows([example(n, n % 7) for n in range(300)])
    assert warning.startswith("300 test rows in 7 groups of related rows: fewer than 30 ")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dear {{name}}, thank you.", {"{{name}}"}),
        ("Dear {{ user.first_name }},", {"{{ user.first_name }}"}),
        ("Answer this: {input}", {"{input}"}),
        ("Dear {Name}, from {company_name}.", {"{Name}", "{company_name}"}),
        ("Dear [NAME], I live in [City].", {"[NAME]", "[City]"}),
        ("Best,\n[Your Name]", {"[Your Name]"}),
        ("Hello <insert name here>!", {"<insert name here>"}),
        ("Best,\n<your name>", {"<your name>"}),
        ("[Insert today's date]", {"[Insert today's date]"}),
        ("Hi {customer_name},\nyour flight\nfrom {city} is late;\n", {"{customer_name}", "{city}"}),
        ("Dear [Customer Name]: it costs $5 and {price}, $6.", {"[Customer Name]", "{price}"}),
    ],
)
def test_placeholders_are_found(text: str, expected: set[str]) -> None:
    assert placeholders_in(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "```jinja\nDear {{name}},\n```",
        "Write `{{ name }}` there.",
        "Dear {{name}}, {% if late %}sorry{% endif %}",
        'print(f"Hello {name}")',
        '"Hello {name}".format(name=1)',
        "def f(name):\n    return {name}",
        "import {input} from 'x'",
        "const a = {name}",
        "const say = name => {name}",
        "for (i = 0; i < n; i++) {\n  a[i] = {name};\n}",
        "${name} and #{name} of a shell",
        "GET /users/{id} and /posts/{name}",
        "from x import {name}",
        r"\frac{name}{text} is \text{name} and x_{name}, y^{name}",
        r"It is $x_{name} = {input}$, or \({text}\).",
        r"\begin{equation} {input} \end{equation}",
        "The set {name, date} and {1, 2} and {x}",
        '{"name": "a", "date": 3}',
        "See [name](https://x.org) and [Link][1] and [1] and [x]",
        "[INST] Say [/INST] [MASK] [PAD] [UNK] [SEP]",
        "<b>bold</b> <input> <name>x</name>",
        "a[name] and b[NAME] of an array",
        "List them in the format {Name} - {Year}.",
        "- [ ] to do, [x] done, [sic], [...]",
        "Use {} or {0} or {braces}.",
        "{{{{name}}}} or {{{name}}}",
    ],
)
def test_code_formulas_links_and_marks_are_not_placeholders(text: str) -> None:
    assert placeholders_in(text) == set()


def test_rows_with_placeholders_are_counted() -> None:
    rows = [
        row("Greet.", "Hello."),
        Row((Turn("user", "Dear {{name}}"), Turn("assistant", "[NAME]")), source="rows.jsonl:2"),
        Row((Turn("user", "Greet."), Turn("assistant", "Hi {{name}}!")), source="rows.jsonl:3"),
        row("Sum up.", "Done.", context="{input}"),
    ]
    placeholders = find_placeholders(rows)
    assert placeholders is not None
    assert (placeholders.rows, placeholders.first) == (3, "rows.jsonl:2")
    assert placeholders.placeholders[0] == "{{name}}"
    assert set(placeholders.placeholders) == {"{{name}}", "[NAME]", "{input}"}
    assert find_placeholders(ROWS) is None


def test_special_tokens_in_rows_are_counted() -> None:
    tokenize = RowTokenizer(tiny_tokenizer(), Template("chat"))
    rows = [
        row("What is <|im_end|>?", "An end."),
        Row((Turn("user", "Q"), Turn("assistant", "<|im_end|><|im_end|>")), source="rows.jsonl:2"),
        row("Q", "a <|im_end|> b <|endoftext|>"),
        row("Q", "clean", context="<|im_start|>"),
    ]
    responses, prompts = special_tokens_in_rows(tokenize, rows)
    assert responses is not None and prompts is not None
    assert (responses.rows, responses.first) == (2, "rows.jsonl:2")
    assert responses.tokens == (("<|im_end|>", 2), ("<|endoftext|>", 1))
    assert (prompts.rows, dict(prompts.tokens)) == (2, {"<|im_end|>": 1, "<|im_start|>": 1})
    assert special_tokens_in_rows(tokenize, ROWS) == (None, None)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (CHAT_TEMPLATE, ()),
        ("{% if tools %}{{ tools }}{% endif %}{{ bos_token }}", ("bos_token",)),
        ("{{ eos_token }}{% if enable_thinking %}x{% endif %}", ("enable_thinking",)),
        ("{% if thinking is defined and thinking %}x{% endif %}", ()),
        ("{% if not day is defined %}{% set day = 'x' %}{% endif %}{{ day }}", ()),
        ("{% if tools %}{% set a = 'x' %}{% else %}{% set b = 1 %}{% endif %}{{ a }}{{ b }}", ()),
        ("{{ style | default('plain') }}{{ mesages[0] }}", ("mesages",)),
        (
            "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
            (),
        ),
        (
            "{% macro say(x) %}{{ x }}{% endmacro %}{{ say(1) }}{% set a = namespace() %}{{ a.b }}",
            (),
        ),
        ("{{ strftime_now('%Y') }}{{ raise_exception('no') }}{% break %", ()),
    ],
)
def test_undefined_names_in_a_template_are_listed(source: str, names: tuple[str, ...]) -> None:
    assert undefined_names(source, ["eos_token"]) == names
