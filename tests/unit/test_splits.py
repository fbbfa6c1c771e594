"""Draw of the sets, groups of related rows, and the values that a refusal proposes."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_lora.data.dedup import similar_groups, similar_pairs
from slm_lora.data.splits import (
    GroupingRule,
    Split,
    count_cross_group_prompts,
    group_rows,
    seeded_order,
    split_rows,
    training_rows_for,
)
from slm_lora.errors import DataError
from slm_lora.records import Row, Turn


def row(instruction: str, response: str = "A.", **fields: str) -> Row:
    return Row((Turn("user", instruction), Turn("assistant", response)), **fields)


def in_groups(sizes: list[int]) -> list[Row]:
    """Make rows in groups of these sizes, by their ``group`` field."""
    return [
        row(f"question {group}.{member}", group_hint=f"group {group}")
        for group, size in enumerate(sizes)
        for member in range(size)
    ]


MIXED = in_groups([1] * 200 + [2] * 60 + [5] * 12 + [40])
"""420 rows in 273 groups."""


def split(rows: list[Row], **changed: Any) -> Split:
    arguments: dict[str, Any] = {
        "size": None,
        "test_rows": 40,
        "validation_rows": 20,
        "split_seed": 0,
        "data_seed": 0,
    }
    return split_rows(rows, **(arguments | changed))


# --- the draw ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 100])
def test_split_does_not_depend_on_the_order_of_rows(size: int | None) -> None:
    shuffled = MIXED.copy()
    random.Random(5).shuffle(shuffled)
    assert split(MIXED, size=size) == split(shuffled, size=size) == split(MIXED[::-1], size=size)


def test_split_sets_have_the_requested_sizes_and_share_no_row() -> None:
    sets = split(MIXED)
    assert (len(sets.test), len(sets.validation), len(sets.train)) == (40, 20, 360)
    assert len({*sets.test, *sets.validation, *sets.train}) == 420


def test_no_group_is_in_two_sets() -> None:
    for seed in range(20):
        sets = split(MIXED, split_seed=seed)
        sides = [
            {sets.groups.group_of[row_id] for row_id in side}
            for side in (sets.test, sets.validation, sets.train)
        ]
        assert sum(map(len, sides)) == len(set.union(*sides)) == 273


def test_training_sets_are_nested() -> None:
    large = split(MIXED, size=300, data_seed=3).train
    assert len(large) == 270
    for size in (2, 50, 150, 299):
        assert split(MIXED, size=size, data_seed=3).train == large[: training_rows_for(size)]
    assert split(MIXED, data_seed=3).train[:270] == large


@pytest.mark.parametrize(("size", "rows"), [(1500, 1350), (3000, 2700), (15, 14), (4, 4), (2, 2)])
def test_a_data_set_of_size_n_trains_on_nine_tenths(size: int, rows: int) -> None:
    assert training_rows_for(size) == rows
    assert len(split(MIXED, size=15).train) == 14


def test_held_out_rows_do_not_depend_on_size_and_data_seed() -> None:
    plain = split(MIXED)
    for size in (None, 20, 200):
        for data_seed in (0, 1, 99):
            sets = split(MIXED, size=size, data_seed=data_seed)
            assert (sets.test, sets.validation) == (plain.test, plain.validation)
    assert split(MIXED, size=200).train != split(MIXED, size=200, data_seed=1).train
    assert set(plain.train) == set(split(MIXED, data_seed=1).train)


def test_the_test_rows_do_not_depend_on_the_validation_rows() -> None:
    assert split(MIXED, validation_rows=1).test == split(MIXED, validation_rows=60).test


def test_another_split_seed_gives_other_held_out_rows() -> None:
    tests = [set(split(MIXED, split_seed=seed).test) for seed in range(3)]
    assert all(len(a & b) < 20 for a, b in [(tests[0], tests[1]), (tests[1], tests[2])])


def test_a_smaller_test_set_of_single_rows_is_part_of_a_larger_one() -> None:
    rows = in_groups([1] * 100)
    assert set(split(rows, test_rows=10).test) < set(split(rows, test_rows=30).test)


def test_every_row_is_equally_likely_to_be_held_out() -> None:
    """Over 400 seeds every row is held out about 40 times."""
    rows = in_groups([1] * 50)
    times = dict.fromkeys((count.row_id for count in rows), 0)
    for seed in range(400):
        for row_id in split(rows, test_rows=5, validation_rows=1, split_seed=seed).test:
            times[row_id] += 1
    assert sum(times.values()) == 2000
    assert 15 <= min(times.values()) <= max(times.values()) <= 65  # beyond 4 σ is no chance


def test_default_sizes_follow_the_number_of_rows() -> None:
    def sizes(count: int) -> tuple[int, int]:
        sets = split(in_groups([1] * count), test_rows=None, validation_rows=None)
        return len(sets.test), len(sets.validation)

    assert sizes(5) == (1, 1)
    assert sizes(400) == (40, 20)
    assert sizes(12_000) == (1000, 300)


def test_seeded_order_is_a_permutation_that_each_part_of_the_key_changes() -> None:
    ids = [f"row {n}" for n in range(50)]
    order = seeded_order(ids, "held out", 0)
    assert sorted(order) == sorted(ids)
    assert order == seeded_order(reversed(ids), "held out", 0)
    assert order[:3] == ["row 15", "row 35", "row 26"]  # the same on every machine, for ever
    assert order not in (seeded_order(ids, "train", 0), seeded_order(ids, "held out", 1))


# --- groups ------------------------------------------------------------------------------------


def groups(rows: list[Row], rule: GroupingRule | None = None) -> set[frozenset[int]]:
    """Return the groups as sets of row indices."""
    group_of = group_rows(rows, rule).group_of
    members: dict[str, set[int]] = {}
    for index, row in enumerate(rows):
        members.setdefault(group_of[row.row_id], set()).add(index)
    return {frozenset(group) for group in members.values()}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("What is salt?", "what is  SALT"),
        ("What is salt?", "What is\n\tsalt ?!"),
        ("Straße", "STRASSE."),
        ("ﬁne １２", "fine 12"),
        ("cafe\u0301", "café"),
        ("???", " ??? "),
    ],
)
def test_instructions_that_differ_in_form_only_are_related(first: str, second: str) -> None:
    assert groups([row(first, "1"), row(second, "2")]) == {frozenset({0, 1})}


@pytest.mark.parametrize(
    ("first", "second"), [("What is salt?", "What is malt?"), ("1.5", "15"), ("???", "!!!")]
)
def test_other_instructions_are_not_related(first: str, second: str) -> None:
    assert len(groups([row(first), row(second)])) == 2


BEES = "Bees live in hives, and some below the ground."
SALT = "Salt dissolves in water, and melts at 801 °C."


def test_rows_are_tied_through_one_another() -> None:
    rows = [
        row("Where do bees live?", context=BEES),
        row("How many legs has one?", context=BEES.upper()),
        row("how many legs has one", "Six.", context=BEES),
        row("Which colour has it?", "White.", context=SALT),
        row("which colour has it", "Grey.", context=SALT.removesuffix(".")),
        row("Does it melt?", context=SALT),
        row("Where do wasps live?", context="Wasps live in nests that they build of paper."),
    ]
    assert groups(rows) == {frozenset({0, 1, 2}), frozenset({3, 4, 5}), frozenset({6})}
    assert len(groups(rows[::-1])) == 3


def test_equal_text_in_different_columns_ties_nothing() -> None:
    rows = [row(BEES), row("other", context=BEES), row("third", group_hint=BEES)]
    assert len(groups(rows, GroupingRule(("group", "prompt", "context", "instruction")))) == 3


def test_no_context_and_no_hint_tie_nothing() -> None:
    assert len(groups([row("one", context=" \n"), row("two", context=""), row("three")])) == 3


def test_chats_are_related_by_their_first_question() -> None:
    def chat(*contents: str) -> Row:
        roles = ("system", "user", "assistant", "user", "assistant")
        return Row(tuple(Turn(r, c) for r, c in zip(roles, contents, strict=False)))  # type: ignore[arg-type]

    chats = [chat("Be kind.", "Hello?", "1"), chat("Be brief.", "hello", "2", "More?", "3")]
    assert len(groups(chats)) == 1
    assert len(groups([chat("Be kind.", "Hello?", "1"), chat("Be kind.", "Bread?", "1")])) == 2


def test_texts_under_one_system_turn_are_not_one_group() -> None:
    rows = [
        Row((Turn("system", "Write a poem."), Turn("assistant", text))) for text in ("a", "b", "c")
    ]
    assert len(groups(rows)) == 3


def test_the_group_id_is_the_smallest_row_id() -> None:
    rows = in_groups([7])
    assert set(group_rows(rows).group_of.values()) == {min(row.row_id for row in rows)}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12)),
        min_size=1,
        max_size=25,
        unique=True,
    ),
    st.randoms(use_true_random=False),
)
def test_groups_are_the_connected_rows(
    links: list[tuple[int, int, int]], shuffle: random.Random
) -> None:
    """Compare with a search over all pairs; 0 means no context and no hint."""
    rows = [
        row(
            f"question {a}",
            f"{a} {b} {c}",
            context=" ".join(f"c{b}x{i}" for i in range(5)) * bool(b),
            group_hint=f"g{c}" * bool(c),
        )
        for a, b, c in links
    ]

    def tied(first: tuple[int, int, int], second: tuple[int, int, int], with_context: bool) -> bool:
        if first[2] or second[2]:  # rows with a group are tied by that alone
            return first[2] == second[2]
        same_prompt = first[0] == second[0] and (first[1] == second[1] or not with_context)
        return same_prompt or first[1] == second[1] != 0

    shuffled = rows.copy()
    shuffle.shuffle(shuffled)
    for rule in (GroupingRule(), GroupingRule(with_context=False)):
        reached: dict[int, set[int]] = {}
        for start in range(len(rows)):
            seen, open_ends = {start}, [start]
            while open_ends:
                current = links[open_ends.pop()]
                for other, link in enumerate(links):
                    if other not in seen and tied(current, link, rule.with_context):
                        seen.add(other)
                        open_ends.append(other)
            reached[start] = seen
        assert groups(rows, rule) == {frozenset(seen) for seen in reached.values()}
        assert group_rows(shuffled, rule).group_of == group_rows(rows, rule).group_of


# --- refusals ----------------------------------------------------------------------------------


def refusal(rows: list[Row], **changed: Any) -> str:
    with pytest.raises(DataError) as caught:
        split(rows, **changed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_too_many_test_rows_are_refused_with_the_largest_that_fits() -> None:
    assert "data.test_rows = 100: " in refusal(in_groups([1] * 100), test_rows=100)
    message = refusal(in_groups([1] * 100), test_rows=100)
    assert message.endswith("data.test_rows = 98 fits")


def test_too_many_validation_rows_are_refused_with_the_largest_that_fits() -> None:
    message = refusal(in_groups([1] * 100), validation_rows=60)
    assert message.startswith("data.validation_rows = 60: cannot be drawn from 60 rows")
    assert message.endswith("data.validation_rows = 59 fits")


def test_rows_that_whole_groups_cannot_reach_are_refused() -> None:
    assert refusal(in_groups([2] * 100), test_rows=41).endswith("data.test_rows = 40 fits")
    assert refusal(in_groups([7] * 20), test_rows=5).endswith("data.test_rows = 7 fits")


def test_data_size_above_the_rows_left_is_refused() -> None:
    message = refusal(in_groups([1] * 100), size=50)
    assert message == (
        "data.size = 50: needs 45 training rows, but 40 of 100 are left after 40 test and "
        "20 validation rows; data.size = 44 fits"
    )
    assert len(split(in_groups([1] * 100), size=44).train) == 40


def test_split_with_one_remaining_row_is_refused() -> None:
    rows = in_groups([1] * 61)
    assert refusal(rows, size=2).endswith("data.size = null fits")
    assert len(split(rows, size=None).train) == 1


def test_too_few_groups_for_three_sets_are_refused() -> None:
    message = refusal(in_groups([50, 50]), test_rows=50)
    assert message.startswith(
        "data.name: the 100 rows are 2 groups of related rows "
        "(data.group_by = [group, prompt, context, near])"
    )
    # ("question 0.1" and "question 1.0" have the same words.)
    assert message.endswith(
        "or a column 'group' that says which are related; "
        "with 'data.group_by=[prompt, context, near]' they are 99 groups"
    )


def split_or_refusal(rows: list[Row], **changed: Any) -> Split | str:
    try:
        return split(rows, **changed)
    except DataError as error:
        return str(error)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=30),
    st.one_of(st.none(), st.integers(2, 120)),
    st.one_of(st.none(), st.integers(1, 120)),
    st.one_of(st.none(), st.integers(1, 120)),
    st.integers(0, 3),
)
def test_size_proposed_by_a_refused_split_fits(
    sizes: list[int],
    size: int | None,
    test_rows: int | None,
    validation_rows: int | None,
    split_seed: int,
) -> None:
    """Each proposal fixes its key, so that at most three lead to a split."""
    rows = in_groups(sizes)
    requested: dict[str, int | None] = {
        "size": size,
        "test_rows": test_rows,
        "validation_rows": validation_rows,
    }
    changed_keys: list[str] = []
    outcome = split_or_refusal(rows, **requested, split_seed=split_seed)
    while isinstance(outcome, str):
        proposal = re.search(r": .*; data\.(\w+) = (\d+|null) fits$", outcome)
        assert (proposal is None) == (len(sizes) < 3)
        if proposal is None:
            return
        key, value = proposal.groups()
        assert outcome.startswith(f"data.{key} = {requested[key] or ''}")
        assert key not in changed_keys
        changed_keys.append(key)
        requested[key] = None if value == "null" else int(value)
        outcome = split_or_refusal(rows, **requested, split_seed=split_seed)
    assert requested["test_rows"] in (None, len(outcome.test))
    assert requested["validation_rows"] in (None, len(outcome.validation))
    assert outcome.train


# --- near-duplicates ---------------------------------------------------------------------------


@settings(max_examples=200)
@given(
    texts=st.lists(st.frozensets(st.sampled_from("abcdefghij"), max_size=8), max_size=12),
    threshold=st.sampled_from([0.3, 0.5, 2 / 3, 0.75, 0.8, 0.9, 1.0]),
)
def test_every_similar_pair_is_found_and_no_other(
    texts: list[frozenset[str]], threshold: float
) -> None:
    expected = {
        frozenset((i, j))
        for i, first in enumerate(texts)
        for j, second in enumerate(texts[:i])
        if first and second and len(first & second) >= threshold * len(first | second) - 1e-9
    }
    pairs = [frozenset(pair) for pair in similar_pairs(texts, threshold)]
    assert set(pairs) == expected
    assert len(pairs) == len(expected), "each once"


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.frozensets(st.sampled_from("abcdefghij"), max_size=8), max_size=12),
    threshold=st.sampled_from([0.3, 0.5, 0.8, 1.0]),
)
def test_similar_texts_are_tied_and_no_other(texts: list[frozenset[str]], threshold: float) -> None:
    """Compare with a search over all pairs, for fewer texts than make a template."""
    reached = {i: {i} for i in range(len(texts))}
    for _ in texts:
        for i, first in enumerate(texts):
            for j, second in enumerate(texts):
                is_similar = (
                    first
                    and second
                    and len(first & second) >= threshold * len(first | second) - 1e-9
                )
                if is_similar:
                    reached[i] |= reached[j]
    similar, templates = similar_groups(texts, threshold, total=1000)
    assert similar == sorted(
        {tuple(sorted(group)): sorted(group) for group in reached.values()}.values()
    )
    assert not templates


def test_near_duplicates_among_thousands_of_texts_are_found_fast() -> None:
    shared = frozenset(f"word{n}" for n in range(40))
    texts = [shared | {f"guest{n}"} for n in range(3000)]
    similar, templates = similar_groups(texts)
    assert len(similar) == 3000
    assert [(len(template.texts), template.words) for template in templates] == [(3000, shared)]


def test_nearly_the_same_prompt_ties_rows() -> None:
    rows = [
        row("Who is the founder of House Tarly in the series of books?"),
        row("Who is the founder of House Florent in the series of books?"),
        row("Who is the author of the series of books?"),
        row("Name five rivers.", context="The Rhine flows through six countries of Europe."),
        row("Name six rivers.", context="The Rhine flows through six countries of Europe!"),
    ]
    assert groups(rows) == {frozenset({0, 1}), frozenset({2}), frozenset({3, 4})}


def test_texts_without_spaces_are_near_by_pairs_of_characters() -> None:
    question = "この本の著者が書いた最も有名な小説の主人公の名前は何ですか"
    rows = [
        row(question),
        row(question + "？"),
        row(question + "ね"),
        row("この本の値段はいくらですか"),
    ]
    assert groups(rows) == {frozenset({0, 1, 2}), frozenset({3})}
    text = "蜜蜂は巣箱に住み、冬の間は外に出ない。"
    on_it = [row("どこに住むか", context=text), row("冬は何をするか", context=text)]
    assert len(groups(on_it)) == 1, "a document, though it has no five words between spaces"
    assert len(groups([row(word, context="無し") for word in ("犬", "猫", "鳥")])) == 3


def test_rows_with_a_group_are_not_compared() -> None:
    questions = ["What does the parameter axis of numpy.sum do in this function?"]
    questions.append(questions[0].replace("sum", "mean"))
    assert groups([row(q) for q in questions]) == {frozenset({0, 1})}
    named = [row(q, group_hint=q) for q in questions]
    assert groups(named) == {frozenset({0}), frozenset({1})}


# --- instruction, opening or template shared by all rows -----------------------------------------

REMARKS = [f"The {thing} was {how}, said guest {n}." for n, (thing, how) in enumerate(
    (thing, how)
    for thing in ("north room", "harbour tour", "old market", "garden path", "winter tea", "bridge")
    for how in ("dreadful and loud", "lovely beyond words", "shut", "far too dear", "rather cold")
)]  # fmt: skip
"""30 texts without near-duplicates."""


def test_one_instruction_with_other_contexts_is_many_prompts() -> None:
    rows = [row("Is the mood good or bad?", "good", context=text) for text in REMARKS]
    assert len(groups(rows)) == 30
    assert len(groups([*rows, row("is the mood good, or bad", "bad", context=REMARKS[0])])) == 30


def test_contexts_outside_the_prompts_do_not_distinguish_rows() -> None:
    rows = [row("Is the mood good or bad?", "good", context=text) for text in REMARKS]
    assert len(groups(rows, GroupingRule(with_context=False))) == 1
    message = refusal(rows, test_rows=4, validation_rows=2, rule=GroupingRule(with_context=False))
    assert "the 30 rows are 1 group of related rows" in message
    assert message.endswith("with data.include_context=true they are 30 groups")


def test_equal_instructions_are_tied_on_request() -> None:
    rows = [row(f"Task {n % 5}.", "good", context=text) for n, text in enumerate(REMARKS)]
    assert len(groups(rows)) == 30
    assert len(groups(rows, GroupingRule(("instruction",)))) == 5
    assert len(groups(rows, GroupingRule(()))) == 30


def test_questions_on_one_document_stay_together() -> None:
    rows = [
        row(f"{ask} number {n}?", context=text)
        for text in REMARKS[:10]
        for n, ask in enumerate(("Who said", "What of", "Where is", "When was"))
    ]
    assert len(groups(rows)) == 10


def test_a_context_of_a_few_words_ties_nothing() -> None:
    for context in ("<noinput>", "N/A", "French", "No input was given"):
        rows = [row(f"What does word {n} mean?", context=context) for n in range(30)]
        assert len(groups(rows)) == 30
        same = [row("Translate.", answer, context=context) for answer in "ab"]
        assert len(groups(same)) == 1


def test_rows_with_a_group_are_tied_by_it_alone() -> None:
    rows = [row(f"Is it good? {n}", context=BEES, group_hint=f"g{n // 2}") for n in range(6)]
    assert groups(rows) == {frozenset({0, 1}), frozenset({2, 3}), frozenset({4, 5})}
    assert len(groups(rows, GroupingRule(("prompt", "context")))) == 1, (
        "the column is not asked for"
    )
    same = [row("Is it good?", str(n), group_hint=f"g{n}") for n in range(4)]
    assert len(groups(same)) == 4
    assert count_cross_group_prompts(same, GroupingRule()) == 4
    assert count_cross_group_prompts([*rows, row("Who?")], GroupingRule()) == 0


def conversation(*questions: str, system: str = "") -> Row:
    turns = [Turn("system", system)] if system else []
    for number, question in enumerate(questions):
        turns += [Turn("user", question), Turn("assistant", f"Reply {number}.")]
    return Row(tuple(turns))


def test_conversations_with_a_common_opening_are_distinguished_by_later_turns() -> None:
    rows = [conversation("Hello!", text, system="Be kind.") for text in REMARKS]
    assert len(groups(rows)) == 30
    deeper = [conversation("Hello!", "An order.", text) for text in REMARKS]
    assert len(groups(deeper)) == 30
    assert len(groups([*rows, *deeper])) == 60
    assert group_rows(deeper).openings == 30
    again = conversation("hello", REMARKS[0], "And now?")
    assert len(groups([*rows, again])) == 31  # it has no system text
    again = conversation("hello", REMARKS[0], "And now?", system="Be kind!")
    assert len(groups([*rows, again])) == 30, "one conversation, cut off and not"


def test_one_question_under_many_system_texts_is_not_one_group() -> None:
    few = [conversation("What does it say?", system=text) for text in REMARKS[:5]]
    assert len(groups(few)) == 1, "the same question, as far as one can know"
    rows = [conversation("What does it say?", system=text) for text in REMARKS]
    assert len(groups(rows)) == 30


def test_one_conversation_cut_off_at_every_turn_is_one_group() -> None:
    rows = [conversation(*REMARKS[:length]) for length in range(1, 16)]
    assert len(groups(rows)) == 1
    others = [conversation(f"Other question {n}?", *REMARKS[:n]) for n in range(15)]
    assert len(groups([*rows, *others])) == 16


LONG = (
    "Below is a remark of a guest. Say whether the guest liked the stay, with one word only, good "
    "or bad, and nothing else at all.\nRemark: I was glad to be gone.\nAnswer: bad\n"
)


@pytest.mark.parametrize("around", [(LONG, "\nAnswer:"), ("", "\n" + LONG), (LONG[:60], LONG[60:])])
def test_a_template_around_every_prompt_is_not_compared(around: tuple[str, str]) -> None:
    before, after = around
    rows = [row(f"{before}{text}{after}", "good") for text in REMARKS]
    assert len(groups(rows)) == 30
    grouped = group_rows(rows)
    assert grouped.near_duplicates == (0, 0)
    assert [rows for rows, _ in grouped.templates] == [30]
    changed = row(f"{before}{REMARKS[0].replace('said', 'says')}{after}")
    assert len(groups([*rows, changed])) == 30, "a near-duplicate within the template"


def test_templates_of_several_tasks_are_detected() -> None:
    tasks = [LONG, LONG[::-1], "Please " + " ".join(f"step{n}" for n in range(30))]
    rows = [row(f"{task} {text}") for task in tasks for text in REMARKS]
    assert len(groups(rows)) == 90
    assert [rows for rows, _ in group_rows(rows).templates] == [30, 30, 30]


def test_documents_inside_of_prompts_stay_together() -> None:
    """A text in at most a tenth of the rows is a document, not a template of the set."""
    documents = [" ".join(f"word{n}x{k}" for k in range(60)) for n in range(12)]
    rows = [
        row(f"{text}\nQuestion: {ask} {n}?")
        for text in documents
        for n, ask in enumerate(("who", "what", "where", "when", "why") * 2)
    ]
    grouped = group_rows(rows)
    assert len(groups(rows)) == 12
    assert grouped.near_duplicates == (120, 12)
    assert not grouped.templates
    assert len(groups(rows, GroupingRule(("prompt",)))) == 120
    assert len(groups(rows, GroupingRule(threshold=1.0))) == 120


def test_refused_split_names_a_relation_to_remove() -> None:
    rows = [row(f"What of {n}?", context=BEES) for n in range(20)]
    message = refusal(rows, test_rows=2, validation_rows=2)
    assert message.endswith("with 'data.group_by=[group, prompt, near]' they are 20 groups")
    message = refusal([row("Write.", str(n)) for n in range(20)], test_rows=2, validation_rows=2)
    assert message.endswith("with 'data.group_by=[]' they are 20 groups")
    assert len(split([row("Write.", str(n)) for n in range(80)], rule=GroupingRule(())).test) == 40
