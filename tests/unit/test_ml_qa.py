"""The embedded data set: all its rows, and the cleaning of sample docstrings."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from slm_lora import ml_qa
from slm_lora.ml_qa import Manifest, write_jsonl
from slm_lora.ml_qa.blocks import split_blocks
from slm_lora.ml_qa.cleaning import (
    MAX_SENTENCES,
    clean_inline,
    is_self_contained,
    split_sentences,
    usable_sentences,
)
from slm_lora.ml_qa.drafts import join_list
from slm_lora.ml_qa.duplicates import merge_linked, repeated_facts
from slm_lora.ml_qa.english import (
    has_main_verb,
    lower_first,
    noun_phrase,
    third_person,
    with_indefinite,
)
from slm_lora.ml_qa.questions import MAX_CHARACTERS, MIN_CHARACTERS
from slm_lora.ml_qa.sentences import (
    continue_sentences,
    describe_action,
    describe_result,
    describe_thing,
    describe_value,
)

Rows = list[dict[str, str]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest, str]:
    """The file, its manifest and the output of the build, which runs once in a new process."""
    pytest.importorskip("numpydoc")
    pytest.importorskip("sklearn")
    path = tmp_path_factory.mktemp("ml-qa") / "rows.jsonl"
    return path, *_build_in_fresh_process(path, hash_seed="0", before="")


@pytest.fixture(scope="module")
def rows(built: tuple[Path, Manifest, str]) -> Rows:
    with built[0].open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _build_in_fresh_process(path: Path, hash_seed: str, before: str) -> tuple[Manifest, str]:
    script = (
        f"{before}\n"
        "import dataclasses, json, sys, pathlib\n"
        "from slm_lora.ml_qa import write_jsonl\n"
        "manifest = write_jsonl(pathlib.Path(sys.argv[1]))\n"
        "print(json.dumps(dataclasses.asdict(manifest)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", script, str(path)],
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    *noise, last = done.stdout.splitlines()
    return Manifest(**json.loads(last)), "\n".join([*noise, done.stderr])


def _normalised(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


# --- the rows as a whole ------------------------------------------------------------------------


def test_importing_ml_qa_loads_none_of_its_libraries() -> None:
    script = (
        "import sys, slm_lora.ml_qa; "
        "sys.exit(any(name in sys.modules for name in ('sklearn', 'scipy', 'numpydoc', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_ml_qa_has_the_same_bytes_for_any_hash_seed_and_imports(
    built: tuple[Path, Manifest, str], tmp_path: Path
) -> None:
    before = (
        "import scipy.stats, sklearn.experimental.enable_halving_search_cv\n"
        "import sklearn.experimental.enable_iterative_imputer"
    )
    again, _ = _build_in_fresh_process(tmp_path / "again.jsonl", hash_seed="4711", before=before)
    assert again == built[1]
    assert (tmp_path / "again.jsonl").read_bytes() == built[0].read_bytes()


def test_building_ml_qa_prints_nothing(built: tuple[Path, Manifest, str]) -> None:
    assert built[2] == ""


def test_ml_qa_manifest_describes_the_file(built: tuple[Path, Manifest, str], rows: Rows) -> None:
    path, manifest, _ = built
    assert manifest.rows == len(rows)
    assert manifest.categories == Counter(row["category"] for row in rows)
    assert manifest.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(manifest.versions) == {"numpy", "numpydoc", "scikit-learn", "scipy"}


def test_ml_qa_rows_are_many_complete_and_sorted(rows: Rows) -> None:
    assert len(rows) >= 5000
    assert all(list(row) == ["instruction", "response", "category", "group"] for row in rows)
    assert all(value.strip() == value != "" for row in rows for value in row.values())
    order = [(row["group"], row["category"], row["instruction"]) for row in rows]
    assert order == sorted(order)


def test_ml_qa_questions_are_unique(rows: Rows) -> None:
    counts = Counter(_normalised(row["instruction"]) for row in rows)
    assert [question for question, count in counts.items() if count > 1] == []


def test_ml_qa_answers_are_unique(rows: Rows) -> None:
    counts = Counter(_normalised(row["response"]) for row in rows)
    assert [answer for answer, count in counts.items() if count > 1] == []


def test_ml_qa_rows_of_a_group_are_distinct(rows: Rows) -> None:
    pairs = Counter((row["group"], row["instruction"], row["response"]) for row in rows)
    assert max(pairs.values()) == 1


def test_no_question_form_dominates_ml_qa(rows: Rows) -> None:
    categories = Counter(row["category"] for row in rows)
    assert len(categories) >= 10
    assert max(categories.values()) <= 0.30 * len(rows)


def test_no_group_dominates_ml_qa(rows: Rows) -> None:
    groups = Counter(row["group"] for row in rows)
    assert len(groups) >= 1000
    assert max(groups.values()) <= 0.02 * len(rows)


def test_ml_qa_rows_of_an_object_and_its_methods_share_a_group(rows: Rows) -> None:
    groups = {
        row["group"] for row in rows if re.search(r"`(?:\w+\.)*PCA(?:\.\w+)?`", row["instruction"])
    }
    assert len(groups) == 1


@pytest.mark.parametrize(
    "markup",
    [
        r":[a-z]+:`", r"``", r"(?<!\.)\.\.(?!\.)", r">>>", r"versionadded|versionchanged",
        r"https?://|www\.", r"\]_", r"`_", r"\\", r"\x00", r"::", r"User Guide", r"  ", r"\|\|",
        r"\*\*[A-Za-z]+\*\*", r"[=~-]{4,}",
    ],
)  # fmt: skip
def test_ml_qa_texts_have_no_markup(rows: Rows, markup: str) -> None:
    # Python's ** and the type names of the libraries may occur in code.
    texts = [re.sub(r"`[^`]*`", "`x`", row["response"]) for row in rows]
    assert [text for text in texts if re.search(markup, text)] == []


def test_ml_qa_answers_are_whole_sentences_of_bounded_length(rows: Rows) -> None:
    for row in rows:
        answer = row["response"]
        assert MIN_CHARACTERS <= len(answer) <= MAX_CHARACTERS, row
        assert re.match(r"[A-Z0-9`'\"]", answer), row
        assert answer.endswith((".", "!", '."', ".'")), row
        assert answer.count("`") % 2 == 0, row
        assert row["instruction"].endswith(("?", ".")), row


def test_ml_qa_file_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"instruction": "Q?", "response": "Ä.", "category": "c", "group": "g"}
    monkeypatch.setattr(ml_qa, "build_rows", lambda: [row])
    manifest = write_jsonl(tmp_path / "rows.jsonl")
    assert manifest.rows == 1
    text = (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    assert text == json.dumps(row, ensure_ascii=False) + "\n"
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


# --- blocks and cleaning ------------------------------------------------------------------------


def _lines(text: str) -> list[str]:
    return text.strip("\n").splitlines()


def test_directives_are_removed_and_formulas_leave_a_mark() -> None:
    text = """
Speed of the wheel.

.. versionadded:: 3.1
   Wheels turn.

It is measured thus:

.. math::

   a = b

More words.
"""
    assert [block.kind for block in split_blocks(_lines(text))] == ["text", "text", "lost", "text"]


def test_lists_keep_their_continued_items() -> None:
    text = """
Kinds of wheel:

- round: a wheel that
  turns;
- square: a wheel that does not.
"""
    blocks = split_blocks(_lines(text))
    assert blocks[1].kind == "items"
    assert blocks[1].parts[0] == "round: a wheel that turns;"


@pytest.mark.parametrize(
    ("marked", "plain"),
    [
        ("A :class:`~garage.Wheel` of ``steel``.", "A `Wheel` of `steel`."),
        ("Call :meth:`Wheel.turn <garage.Wheel.turn>`.", "Call `Wheel.turn`."),
        ("A :term:`tyre <tyres>` is *very* **round**.", "A tyre is very round."),
        ("Turns well [1]_ and long [Smith2001]_.", "Turns well and long."),
        ("Uses `pumps <https://pumps.example>`_.", "Uses pumps."),
        ("Of size :math:`n - 1`.", "Of size `n - 1`."),
        ("Has air (see :func:`pump`) inside.", "Has air inside."),
        ("Takes `x[0]` and x[1] as they are.", "Takes `x[0]` and x[1] as they are."),
    ],
)
def test_inline_markup_becomes_plain_text(marked: str, plain: str) -> None:
    assert clean_inline(marked) == plain


@pytest.mark.parametrize(
    "marked",
    ["As shown in [3]_.", r"Of size :math:`\frac{1}{2}`.", "From https://wheels.example.", "A `b."],
)
def test_text_that_depends_on_removed_markup_is_refused(marked: str) -> None:
    assert not is_self_contained(clean_inline(marked))


def test_dots_inside_sentences_end_no_sentence() -> None:
    text = "Wheels, e.g. Steel ones, turn (cf. Rims). They cost 3.5 coins. `a.b. C` is code."
    assert split_sentences(text) == [
        "Wheels, e.g. Steel ones, turn (cf. Rims).",
        "They cost 3.5 coins.",
        "`a.b. C` is code.",
    ]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        # Text after a removed formula, example or reference is dropped.
        ("A wheel.\n\n.. math::\n\n   a\n\nIt turns.", ["A wheel."]),
        ("A wheel.\n\n>>> turn()\n1\n\nIt turns.", ["A wheel."]),
        ("A wheel. It is drawn below. It turns.", ["A wheel."]),
        # A cross-reference is skipped: later text does not depend on it.
        ("A wheel. See the User Guide for more. It turns.", ["A wheel.", "It turns."]),
        # A short list is kept; the announcement of a removed list is not.
        ("The rims:\n\n- steel\n- wood", ["The rims: steel; wood."]),
        ("Allowed values are:\n\n- one. Two.\n- three", []),
        ("The rim to use:\n\n- one. Two.\n- three", ["The rim to use."]),
        # A paragraph that ends in a list is incomplete.
        ("The speed is\n\n.. math:: a", []),
        ("The speed of turning", ["The speed of turning."]),
        ("", []),
    ],
)
def test_usable_sentences_leave_out_dependent_text(text: str, kept: list[str]) -> None:
    assert usable_sentences(_lines(text)) == kept


def test_ml_qa_answers_stop_at_the_sentence_limit() -> None:
    assert len(usable_sentences(["It turns. " * 9])) == MAX_SENTENCES


# --- fragments become sentences -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("fragment", "sentence"),
    [
        ("Number of wheels on the car.", "`w` is the number of wheels on the car."),
        ("The wheels to turn.", "`w` holds the wheels to turn."),
        ("Array of wheel speeds.", "`w` is an array of wheel speeds."),
        ("Axis or axes to turn.", "`w` is the axis or axes to turn."),
        ("Whether to turn.", "`w` specifies whether to turn."),
        ("Controls the turning.", "`w` controls the turning."),
        ("Specify the speed.", "`w` specifies the speed."),
        ("If True, the wheel is turned.", "If `w` is True, the wheel is turned."),
        ("If int, it is the speed.", "If `w` is an int, it is the speed."),
        ("This parameter is the speed.", "`w` is the speed."),
        ("Must be positive.", "`w` must be positive."),
        ("Only used if it turns.", "`w` is only used if it turns."),
        ("Gaussian noise on the speed.", "`w` is the Gaussian noise on the speed."),
        ("Rim width; must be positive.", "`w` is the rim width; it must be positive."),
    ],
)
def test_value_description_gets_a_subject(fragment: str, sentence: str) -> None:
    assert describe_value("w", fragment) == sentence


@pytest.mark.parametrize(
    "fragment",
    [
        "Wheel.",
        "Spin the wheel.",
        "Stop when it is fast.",
        "If None, the speed of the wheel.",
        "There are two ways to turn.",
        "The rate shrinks the speed of turning.",
        "a wheel that turns.",
    ],
)
def test_ambiguous_value_description_is_refused(fragment: str) -> None:
    assert describe_value("w", fragment) is None


def test_description_of_several_values_is_plural() -> None:
    assert describe_value("a, b", "The wheels.") == "`a` and `b` are the wheels."


def test_action_description_is_in_the_third_person() -> None:
    assert describe_action("`f`", "Compute the speed.") == "`f` computes the speed."
    assert describe_action("`f`", "Randomly permute a row.") == "`f` randomly permutes a row."
    fit = describe_action("`f`", "Fit the wheel and return the speed.")
    assert fit == "`f` fits the wheel and returns the speed."
    assert describe_action("`f`", "Speed of a wheel.") is None
    assert describe_action("`f`", "Turn wheels and optionally plot speeds.") is None


def test_results_and_classes_are_described_in_a_sentence() -> None:
    assert describe_result("`f`", "Speed of a wheel.") == "`f` returns the speed of a wheel."
    assert describe_result("`f`", "If it turns, the speed is returned.") is None
    assert describe_thing("`C`", "Old wheel.") == "`C` is an old wheel."
    assert describe_thing("`C`", "Wheel clustering.") == "`C` implements wheel clustering."
    assert describe_thing("`C`", "Wheels of all kinds.") is None


def test_later_sentences_get_a_subject_or_end_the_answer() -> None:
    later = [
        "Must be round.",
        "Default is 3.",
        "Used when fast.",
        "It turns.",
        "Round.",
        "It rolls.",
    ]
    assert continue_sentences(later) == [
        "It must be round.",
        "The default is 3.",
        "It is used when fast.",
        "It turns.",
    ]
    assert continue_sentences(["Returns a wheel."]) == []
    assert continue_sentences(["Returns a wheel."], of_action=True) == ["It returns a wheel."]


def test_grammar_helpers_inflect_words_and_join_lists() -> None:
    assert [third_person(verb) for verb in ("apply", "fix", "do", "play")] == [
        "applies",
        "fixes",
        "does",
        "plays",
    ]
    assert with_indefinite("SVM") == "an SVM"
    assert with_indefinite("unique wheel") == "a unique wheel"
    assert with_indefinite("unit") == "a unit"
    assert with_indefinite("ndarray") == "an ndarray"
    assert lower_first("Wheel of") == "wheel of"
    assert lower_first("Bayesian wheel") == "Bayesian wheel"
    assert lower_first("PCA wheel") == "PCA wheel"
    assert lower_first("Partial Least Wheels") == "Partial Least Wheels"
    assert noun_phrase("Weights of the wheels.") == ("the weights of the wheels.", True)
    assert has_main_verb("The wheel is round.")
    assert not has_main_verb("The wheel that is round.")
    assert join_list(["a"]) == "a"
    assert join_list(["a", "b", "c"], "or") == "a, b or c"


# --- repetition ---------------------------------------------------------------------------------


def test_repeated_facts_are_found_exactly() -> None:
    facts = [
        "number of wheels that turn on the road at the very same time",
        "colour of the car",
        "number of wheels that turn on the road at the same time",
        "colour of the car",
        "shape of the horn",
    ]
    assert repeated_facts(facts) == {2: 0, 3: 1}


def test_linked_names_map_to_the_first_of_them() -> None:
    groups = merge_linked(["a", "b", "c", "d"], [("c", "b"), ("a", "c")])
    assert groups == {"a": "a", "b": "a", "c": "a", "d": "d"}
