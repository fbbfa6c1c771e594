"""Metrics of replies, against other implementations and by hand."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_lora.config.replies import RepliesSection
from slm_lora.errors import UsageError
from slm_lora.evaluation.reply_metrics import exact_match, number, reply_metrics, token_f1
from slm_lora.evaluation.reply_metrics import valid_json as is_json

WORDS = st.lists(st.sampled_from(["cat", "sat", "mat", "dog", "on", "3", "yes"]), max_size=8).map(
    " ".join
)


def metric(name: str, reply: str, reference: str, **section: object) -> float | None:
    return reply_metrics(RepliesSection(**section))[name]("", reply, reference)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reply", "reference", "expected"),
    [
        ("Paris.", "paris", 1),
        ("  In  Paris ", "in Paris!", 1),
        ("The Paris", "Paris", 0),  # articles count
        ("ﬁne", "FINE", 1),
        ("", "Paris", 0),
    ],
)
def test_exact_match(reply: str, reference: str, expected: float) -> None:
    assert exact_match("", reply, reference) == expected


def test_f1_of_a_published_form() -> None:
    # Two of three words of the reply are in the reference of four: P = 2/3, R = 2/4.
    assert token_f1("", "the cat ran", "The cat sat down.") == pytest.approx(4 / 7)


@given(reply=WORDS, reference=WORDS)
def test_f1_is_symmetric_and_one_for_the_same_words(reply: str, reference: str) -> None:
    assert token_f1("", reply, reference) == token_f1("", reference, reply)
    assert 0 <= token_f1("", reply, reference) <= 1
    assert token_f1("", reply, reply) == 1


@settings(deadline=None)  # the first call imports the library
@given(reply=WORDS, reference=WORDS.filter(bool))
def test_rouge_l_is_that_of_the_longest_common_subsequence(reply: str, reference: str) -> None:
    pytest.importorskip("rouge_score")
    a, b = reply.split(), reference.split()
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, left in enumerate(a):
        for j, right in enumerate(b):
            same = table[i][j] + 1
            table[i + 1][j + 1] = same if left == right else max(table[i][j + 1], table[i + 1][j])
    common = table[-1][-1]
    expected = 2 * common / (len(a) + len(b)) if common else 0.0
    assert metric("rouge_l", reply, reference, metrics=("rouge_l",)) == pytest.approx(expected)


def test_chrf_of_equal_and_of_disjoint_texts() -> None:
    pytest.importorskip("sacrebleu")
    assert metric("chrf", "abcdef", "abcdef", metrics=("chrf",)) == pytest.approx(1)
    assert metric("chrf", "xyz", "abcdef", metrics=("chrf",)) == 0


@pytest.mark.parametrize(
    ("reply", "reference", "expected"),
    [
        ("So 3 + 4 = 7.", "7", 1),
        ("1,234.50", "1234.5", 1),
        ("-2e3", "It is -2000.", 1),
        ("3 or 4", "3", 0),  # the last one
        ("none", "3", 0),
        ("3", "none", None),
    ],
)
def test_last_numbers_are_compared(reply: str, reference: str, expected: float | None) -> None:
    assert number("", reply, reference) == expected


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_what_json_writes_is_json(value: object) -> None:
    assert is_json("", f" {json.dumps(value)}\n", "") == 1


@pytest.mark.parametrize(
    "reply", ["", "{", "{'a': 1}", "NaN", '```json\n{"a": 1}\n```', "[" * 99999]
)
def test_what_is_no_json(reply: str) -> None:
    assert is_json("", reply, "") == 0


def test_json_of_a_schema(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema")
    path = tmp_path / "schema.json"
    path.write_text('{"type": "object", "required": ["name"]}')
    values = [
        metric("json_schema", reply, "", json_schema=str(path), metrics=())
        for reply in ('{"name": 1}', '{"nam": 1}', '["name"]', "{")
    ]
    assert values == [1, 0, 0, 0]
    path.write_text('{"type": 3}')
    with pytest.raises(UsageError, match="no JSON schema"):
        metric("json_schema", "", "", json_schema=str(path))


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("Yes.", 1), ("the answer is yes", 1), ("no", 0), ("yes or no", 0), ("yesterday", 0), ("", 0)],
)
def test_label_is_named_alone(reply: str, expected: float) -> None:
    assert metric("label", reply, "yes", labels=("Yes", "No")) == expected


def test_label_within_a_label_does_not_count() -> None:
    labels = ("good", "not good")
    assert metric("label", "It is not good.", "not good", labels=labels) == 1
    assert metric("label", "It is not good.", "good", labels=labels) == 0
    assert metric("label", "good", "neutral", labels=labels) is None


def test_pattern_is_searched() -> None:
    assert metric("pattern", "id: A-12", "", pattern=r"[A-Z]-\d+") == 1
    assert metric("pattern", "id: a12", "", pattern=r"[A-Z]-\d+") == 0
    with pytest.raises(ValueError, match="no regular expression"):
        RepliesSection(pattern="(")


def test_function_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_metrics_of_a_test.py").write_text(
        "def shout(prompt, reply, reference):\n    return reply.isupper()\n"
        "def broken(prompt, reply, reference):\n    return 'much'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    functions = {"loud": "own_metrics_of_a_test:shout", "bad": "own_metrics_of_a_test:broken"}
    metrics = reply_metrics(RepliesSection(functions=functions))
    assert metrics["loud"]("", "TEA", "") == 1
    assert metrics["loud"]("", "tea", "") == 0
    with pytest.raises(ValueError, match="could not convert"):
        metrics["bad"]("", "", "")
    for target in ("own_metrics_of_a_test:none", "no_such_module_of_a_test:f"):
        with pytest.raises(UsageError, match="cannot be loaded"):
            reply_metrics(RepliesSection(functions={"x": target}))


@pytest.mark.parametrize("name", ["all", "exact_match", "label", "Loud", "a b", ""])
def test_name_of_a_function_is_new(name: str) -> None:
    with pytest.raises(ValueError, match="must be a new name"):
        RepliesSection(functions={name: "module:function"})


@given(st.text(string.printable, max_size=30), st.text(string.printable, max_size=30))
def test_metrics_without_reference_rows_take_any_text(reply: str, reference: str) -> None:
    metrics = reply_metrics(RepliesSection(metrics=("exact_match", "token_f1", "number")))
    for value in (function("", reply, reference) for function in metrics.values()):
        assert value is None or 0 <= value <= 1
