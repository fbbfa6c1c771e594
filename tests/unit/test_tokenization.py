"""Tokenisation of rows: ids, response mask and byte counts."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from slm_lora.data.checks import text_role_marks
from slm_lora.data.collate import collate
from slm_lora.data.templates import Template, TemplateKind, as_chat_template, choose_template
from slm_lora.data.tokenization import LongRows, RowTokenizer
from slm_lora.errors import DataError, UsageError
from slm_lora.records import Example, Role, Row, Turn

from ..support.tiny_model import tiny_tokenizer

NAMED: list[TemplateKind] = ["instruction_response", "plain", "chat"]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BOS = "<|endoftext|>"


@pytest.fixture(scope="module")
def plain_tokenizer(tiny_folder: Path) -> Any:
    """A tokenizer without BOS, whose padding token is EOS."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder, local_files_only=True)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    return tokenizer


@pytest.fixture(scope="module")
def bos_tokenizer(tiny_folder: Path) -> Any:
    """A tokenizer of the same vocabulary that adds BOS to every text."""
    backend = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    plain = AutoTokenizer.from_pretrained(tiny_folder, local_files_only=True)
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=plain.chat_template,
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


@pytest.fixture(params=["no BOS", "BOS"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue("bos_tokenizer" if request.param == "BOS" else "plain_tokenizer")


def pair(instruction: str, response: str, context: str = "") -> Row:
    turns = (Turn("user", instruction), Turn("assistant", response))
    return Row(turns, context=context, source="rows.jsonl:7")


def chat(*turns: tuple[Role, str]) -> Row:
    return Row(tuple(Turn(role, content) for role, content in turns), source="rows.jsonl:7")


def messages(row: Row) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in row.turns]


def encode(
    tokenizer: Any, template: Template, rows: Sequence[Row], *limits: Any
) -> tuple[list[Example], LongRows]:
    groups = {row.row_id: f"group of {row.row_id}" for row in rows}
    return RowTokenizer(tokenizer, template).encode(rows, groups, *limits)


def encode_row(tokenizer: Any, template: Template | TemplateKind, row: Row) -> Example:
    chosen = template if isinstance(template, Template) else Template(template)
    (example,), _ = encode(tokenizer, chosen, [row])
    return example


def ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenise a text by a direct call of the tokenizer."""
    input_ids: list[int] = tokenizer(text)["input_ids"]
    return input_ids


def decoded(tokenizer: Any, tokens: Any) -> str:
    return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))


def responses(tokenizer: Any, example: Example) -> list[str]:
    """Return the text of each run of response tokens."""
    edges = np.flatnonzero(np.diff(example.response, prepend=False, append=False))
    return [
        decoded(tokenizer, example.ids[start:end])
        for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]


def size(text: str) -> int:
    return len(text.encode())


# --- token ids ---------------------------------------------------------------------------------

ROWS = [
    pair("Tell me a fact about rivers.", "Rivers matter a great deal."),
    pair("  leading\tand trailing \n", " spaces \n\n"),
    pair("Grüße, 漢字?", "🙂🙃 ναι 👩‍👩‍👧."),
    pair("x", "y"),
]


@pytest.mark.parametrize("row", ROWS)
def test_row_text_is_tokenised_once_and_whole(tokenizer: Any, row: Row) -> None:
    question, answer = (turn.content for turn in row.turns)
    eos = tokenizer.eos_token_id
    text = f"Instruction:\n{question}\nResponse:\n{answer}"
    assert encode_row(tokenizer, "instruction_response", row).ids.tolist() == [
        *ids(tokenizer, text),
        eos,
    ]
    text = question + answer
    assert encode_row(tokenizer, "plain", row).ids.tolist() == [*ids(tokenizer, text), eos]
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"
    assert encode_row(tokenizer, "chat", row).ids.tolist() == ids(tokenizer, text)


def test_the_context_is_part_of_the_prompt_if_included(plain_tokenizer: Any) -> None:
    row = pair("How long?", "Long.", context="Rivers are long.")
    eos = plain_tokenizer.eos_token_id
    kind: TemplateKind
    for kind, text in (
        ("instruction_response", "Instruction:\nHow long?\nResponse:\nLong.<|im_end|>"),
        ("chat", "<|im_start|>user\nHow long?<|im_end|>\n<|im_start|>assistant\nLong.<|im_end|>"),
    ):
        assert decoded(plain_tokenizer, encode_row(plain_tokenizer, kind, row).ids) == text
    example = encode_row(plain_tokenizer, Template("instruction_response", True), row)
    text = "Instruction:\nHow long?\nContext:\nRivers are long.\nResponse:\nLong."
    assert example.ids.tolist() == [*ids(plain_tokenizer, text), eos]
    example = encode_row(plain_tokenizer, Template("chat", True), row)
    assert "user\nRivers are long.\n\nHow long?<|im_end|>" in decoded(plain_tokenizer, example.ids)
    example = encode_row(plain_tokenizer, Template("instruction_response", True), pair("Q", "A"))
    assert decoded(plain_tokenizer, example.ids) == "Instruction:\nQ\nResponse:\nA<|im_end|>"


def test_rows_keep_their_order_and_identity(plain_tokenizer: Any) -> None:
    examples, _ = encode(plain_tokenizer, Template("plain"), ROWS)
    assert [example.row_id for example in examples] == [row.row_id for row in ROWS]
    assert [example.group_id for example in examples] == [f"group of {row.row_id}" for row in ROWS]
    labelled = Row(ROWS[0].turns, category="open_qa")
    assert encode_row(plain_tokenizer, "plain", labelled).category == "open_qa"


def test_row_tokenizer_leaves_the_tokenizer_unchanged(plain_tokenizer: Any) -> None:
    before = plain_tokenizer.backend_tokenizer.to_str()
    encode_row(plain_tokenizer, "chat", pair("<|im_end|>", "<|im_start|>"))
    assert plain_tokenizer.backend_tokenizer.to_str() == before
    assert ids(plain_tokenizer, "<|im_end|>") == [plain_tokenizer.eos_token_id]


# --- the first and the last token --------------------------------------------------------------


@pytest.mark.parametrize("kind", NAMED)
def test_eos_is_a_label_although_it_also_pads(tokenizer: Any, kind: TemplateKind) -> None:
    example = encode_row(tokenizer, kind, pair("Tell me.", "No."))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == example.ids[-1]
    assert example.response[-1]
    for loss_on in ("all", "response"):
        labels = collate([example], loss_on).labels
        assert labels[-2] == tokenizer.eos_token_id


@pytest.mark.parametrize("kind", NAMED)
def test_bos_is_first_once_unscored_and_without_bytes(
    bos_tokenizer: Any, kind: TemplateKind
) -> None:
    example = encode_row(bos_tokenizer, kind, pair("Tell me.", "Nein, später."))
    assert example.ids[0] == bos_tokenizer.bos_token_id
    assert example.ids.tolist().count(bos_tokenizer.bos_token_id) == 1
    assert not example.response[0]
    assert bos_tokenizer.bos_token_id not in collate([example], "all").labels
    text = decoded(bos_tokenizer, example.ids)
    for token in SPECIALS:
        text = text.replace(token, "")
    assert example.bytes_all == size(text)
    assert example.bytes_response == size("Nein, später.")


@pytest.mark.parametrize("written", ["{{ bos_token }}", BOS])
def test_no_second_bos_where_a_chat_template_writes_it(
    bos_tokenizer: Any, tmp_path: Path, written: str
) -> None:
    (tmp_path / "mine.jinja").write_text(written + bos_tokenizer.chat_template)
    template = choose_template(str(tmp_path / "mine.jinja"), "chat", False)
    row = pair("Tell me.", "No.")
    example = encode_row(bos_tokenizer, template, row)
    assert example.ids.tolist() == encode_row(bos_tokenizer, "chat", row).ids.tolist()
    assert example.bytes_all == encode_row(bos_tokenizer, "chat", row).bytes_all


def test_a_row_without_text_has_no_tokens(plain_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:7: the row has no tokens"):
        encode_row(plain_tokenizer, "plain", pair("", ""))


def test_a_tokenizer_without_eos_ends_with_the_text(tiny_folder: Path) -> None:
    backend = Tokenizer.from_file(str(tiny_folder / "tokenizer.json"))
    bare = PreTrainedTokenizerFast(tokenizer_object=backend)  # type: ignore[no-untyped-call]
    assert encode_row(bare, "plain", pair("a", "b")).ids.tolist() == ids(bare, "ab")


# --- responses ---------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_the_response_begins_at_the_first_token_that_ends_past_the_prompt(
    tokenizer: Any, row: Row
) -> None:
    question, answer = (turn.content for turn in row.turns)
    kind: TemplateKind
    for kind, prompt in (
        ("instruction_response", f"Instruction:\n{question}\nResponse:\n"),
        ("plain", question),
    ):
        offsets = tokenizer(prompt + answer, return_offsets_mapping=True)["offset_mapping"]
        expected = [end > len(prompt) for _, end in offsets] + [True]
        assert encode_row(tokenizer, kind, row).response.tolist() == expected


def test_a_token_over_the_boundary_belongs_to_the_response(plain_tokenizer: Any) -> None:
    (over,) = ids(plain_tokenizer, " matter")
    example = encode_row(plain_tokenizer, "plain", pair("Rivers mat", "ter a great deal."))
    assert over in example.ids
    assert responses(plain_tokenizer, example) == [" matter a great deal.<|im_end|>"]
    # its bytes before the boundary belong to the prompt
    assert example.bytes_response == size("ter a great deal.")


@pytest.mark.parametrize("include_context", [False, True])
def test_every_assistant_turn_is_a_response_with_its_end(
    tokenizer: Any, include_context: bool
) -> None:
    row = chat(
        ("system", "Be kind."),
        ("user", "One?"),
        ("assistant", "Ένα."),
        ("user", "Two?"),
        ("assistant", "Two \n"),
        ("user", "Three?"),
        ("assistant", "3"),
    )
    example = encode_row(tokenizer, Template("chat", include_context), row)
    # the line end that the template writes after <|im_end|> is not part of the response
    assert responses(tokenizer, example) == ["Ένα.<|im_end|>", "Two \n<|im_end|>", "3<|im_end|>"]
    assert decoded(tokenizer, example.ids).count("<|im_end|>\n<|im_start|>") == 6
    assert decoded(tokenizer, example.ids).endswith("assistant\n3<|im_end|>")
    assert example.bytes_response == size("Ένα.Two \n3")


def test_plain_text_is_all_response(tokenizer: Any) -> None:
    example = encode_row(tokenizer, "plain", chat(("assistant", "Rivers matter.")))
    assert responses(tokenizer, example) == ["Rivers matter.<|im_end|>"]
    assert example.response.tolist().count(False) == (tokenizer.bos_token_id is not None)


def test_a_first_turn_without_a_question_begins_at_its_text(plain_tokenizer: Any) -> None:
    row = chat(("assistant", " Welcome."), ("user", "Hi."), ("assistant", "Hi."))
    example = encode_row(plain_tokenizer, "chat", row)
    assert responses(plain_tokenizer, example) == [" Welcome.<|im_end|>", "Hi.<|im_end|>"]
    default = (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
        "{{ '<|im_start|>system\\nYou are kind.<|im_end|>\\n' }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] | trim + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    example = encode_row(plain_tokenizer, Template("jinja", source=default), row)
    assert responses(plain_tokenizer, example) == ["Welcome.<|im_end|>", "Hi.<|im_end|>"]


def test_the_end_mark_of_a_turn_may_differ_from_eos(plain_tokenizer: Any) -> None:
    source = "{% for m in messages %}{{ m['content'] + '<|im_start|>\\n' }}{% endfor %}"
    row = chat(("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2"))
    example = encode_row(plain_tokenizer, Template("jinja", source=source), row)
    assert responses(plain_tokenizer, example) == ["1<|im_start|>", "2<|im_start|><|im_end|>"]


def test_chat_template_without_end_marks_has_one_eos_at_the_end(plain_tokenizer: Any) -> None:
    """The only EOS is the one at the end of the row."""
    source = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    row = chat(("user", "One?"), ("assistant", "1"), ("user", "Two?"), ("assistant", "2"))
    example = encode_row(plain_tokenizer, Template("jinja", source=source), row)
    assert responses(plain_tokenizer, example) == ["assistant: 1\n", "assistant: 2\n<|im_end|>"]


# --- special tokens in row text ----------------------------------------------------------------


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("token", SPECIALS)
def test_special_tokens_in_row_text_stay_text(
    tokenizer: Any, kind: TemplateKind, token: str
) -> None:
    def specials(row: Row) -> list[int]:
        example = encode_row(tokenizer, Template(kind, include_context=kind != "plain"), row)
        return [id_ for id_ in example.ids.tolist() if id_ in tokenizer.all_special_ids]

    clean = specials(pair("What is it?", "It ends.", "A note."))
    assert clean == specials(pair(f"What {token} is it?", "It ends.", "A note."))
    assert clean == specials(pair("What is it?", f"{token}It ends.{token}", "A note."))
    assert clean == specials(pair("What is it?", "It ends.", f"A note.{token}"))
    assert clean == specials(pair(f"{token}{token}", token, token))


@pytest.mark.parametrize("kind", NAMED)
def test_decoded_row_ids_restore_the_text(plain_tokenizer: Any, kind: TemplateKind) -> None:
    row = pair("<|im_end|>\n<|im_start|>", "a <|im_start|>assistant\n<|endoftext|><|im_end|> b")
    question, answer = (turn.content for turn in row.turns)
    text = {
        "instruction_response": f"Instruction:\n{question}\nResponse:\n{answer}<|im_end|>",
        "plain": f"{question}{answer}<|im_end|>",
        "chat": f"<|im_start|>user\n{question}<|im_end|>\n"
        f"<|im_start|>assistant\n{answer}<|im_end|>",
    }[kind]
    example = encode_row(plain_tokenizer, kind, row)
    assert decoded(plain_tokenizer, example.ids) == text
    assert responses(plain_tokenizer, example) == [f"{answer}<|im_end|>"]
    assert example.bytes_response == size(answer)


def test_a_special_token_that_joins_template_and_text_stays_text(plain_tokenizer: Any) -> None:
    source = "{% for m in messages %}{{ m['content'] + '|>' }}{% endfor %}"
    row = pair("Q", "A<|im_end")
    example = encode_row(plain_tokenizer, Template("jinja", source=source), row)
    assert example.ids.tolist().count(plain_tokenizer.eos_token_id) == 1


def test_private_use_characters_of_markers_are_refused(plain_tokenizer: Any) -> None:
    for row in (pair("\U000f0001", "A"), pair("Q", "\U00100000"), pair("Q", "A", "\U000f8000")):
        with pytest.raises(DataError, match=r"^rows\.jsonl:7: .*private-use.*remove the row"):
            encode_row(plain_tokenizer, "instruction_response", row)
    encode_row(plain_tokenizer, "instruction_response", pair("\ue000", "A"))


def test_a_vocabulary_that_cannot_escape_special_tokens_is_refused() -> None:
    """Some word-level vocabularies contain their special tokens as ordinary words."""
    words = {"<unk>": 0, "</s>": 1, "salt": 2}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>"
    )
    assert encode_row(tokenizer, "plain", pair("salt ", "pepper")).ids.tolist() == [2, 0, 1]
    with pytest.raises(DataError, match=r"rows\.jsonl:7: .*special token.*remove the row"):
        encode_row(tokenizer, "plain", pair("salt ", "</s> salt"))


# --- length ------------------------------------------------------------------------------------

LENGTHS = [pair("a", "b" * n) for n in (5, 40, 3, 60)]


def lengths(tokenizer: Any) -> list[int]:
    return [example.length for example in encode(tokenizer, Template("plain"), LENGTHS)[0]]


def test_truncation_cuts_the_end_of_rows_and_counts_them(tokenizer: Any) -> None:
    full, counted = encode(tokenizer, Template("plain"), LENGTHS)
    assert counted == LongRows(rows=0, tokens_cut=0, longest=full[3].length)
    cut, counted = encode(tokenizer, Template("plain"), LENGTHS, 10, "truncate")
    over = [example.length - 10 for example in full if example.length > 10]
    assert counted == LongRows(rows=2, tokens_cut=sum(over), longest=full[3].length)
    for before, after in zip(full, cut, strict=True):
        assert after.ids.tolist() == before.ids[:10].tolist()
        assert after.response.tolist() == before.response[:10].tolist()
        assert (after.ids[-1] == tokenizer.eos_token_id) == (before.length <= 10)


def test_row_of_exactly_max_length_is_whole(tokenizer: Any) -> None:
    longest = max(lengths(tokenizer))
    assert encode(tokenizer, Template("plain"), LENGTHS, longest)[1].rows == 0
    assert encode(tokenizer, Template("plain"), LENGTHS, longest - 1)[1] == LongRows(1, 1, longest)


def test_long_rows_are_dropped_whole(tokenizer: Any) -> None:
    kept, counted = encode(tokenizer, Template("plain"), LENGTHS, 10, "drop")
    assert [example.row_id for example in kept] == [LENGTHS[0].row_id, LENGTHS[2].row_id]
    assert all(example.ids[-1] == tokenizer.eos_token_id for example in kept)
    assert (counted.rows, counted.longest) == (2, max(lengths(tokenizer)))


def test_long_rows_are_refused_with_place_and_number(plain_tokenizer: Any) -> None:
    with pytest.raises(DataError) as caught:
        encode(plain_tokenizer, Template("plain"), LENGTHS, 10, "refuse")
    length = lengths(plain_tokenizer)[1]
    assert str(caught.value) == (
        f"rows.jsonl:7: {length} tokens, over data.max_length = 10 (2 rows in all); "
        "set data.on_long_row to truncate or drop, or, for plain text, to split"
    )
    encode(plain_tokenizer, Template("plain"), LENGTHS, max(lengths(plain_tokenizer)), "refuse")


# --- long text in pieces -----------------------------------------------------------------------


def text(content: str) -> Row:
    return Row((Turn("assistant", content),), source="rows.jsonl:7")


TEXTS = [
    text("Rivers matter. " * 20),
    text("short"),
    text("漢字 🙂🙃 ναι\n\n" * 9),
    text("x"),
    text("one two three four five six seven"),
]
TEXTS_OF = {row.row_id: row.turns[0].content for row in TEXTS}


@pytest.mark.parametrize("limit", [2, 3, 7, 10, 31, 64, 500])
def test_every_token_of_a_long_text_is_a_label_once(tokenizer: Any, limit: int) -> None:
    """Compare the labels of the pieces with the ids of the whole text."""
    bos = tokenizer.bos_token_id
    full, _ = encode(tokenizer, Template("plain"), TEXTS)
    pieces, counted = encode(tokenizer, Template("plain"), TEXTS, limit, "split")
    assert counted.tokens_cut == 0
    assert counted.rows == sum(example.length > limit for example in full)
    assert max(example.length for example in pieces) <= limit
    of_row: dict[str, list[Example]] = {}
    for example in pieces:
        of_row.setdefault(example.row_id.partition(".")[0], []).append(example)
    assert list(of_row) == [row.row_id for row in TEXTS], "their order is kept"
    for before, parts in zip(full, of_row.values(), strict=True):
        expected = [*ids(tokenizer, TEXTS_OF[before.row_id]), tokenizer.eos_token_id]
        labels = [label for part in parts for label in collate([part], "all").labels[:-1].tolist()]
        assert labels == expected[1:] == before.ids[1:].tolist()
        answer = [n for part in parts for n in collate([part], "response").labels[:-1].tolist()]
        assert answer == labels, "plain text is all response"
        for part, after in itertools.pairwise(parts):
            context = bos if bos is not None else part.ids[-1]
            assert after.ids[0] == context, "what a piece begins with is no label of it"
        assert sum(part.bytes_all for part in parts) == before.bytes_all
        assert sum(part.bytes_response for part in parts) == before.bytes_response
        sizes = [part.length for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert len(parts) == max(1, -(-(before.length - 1) // (limit - 1)))
        assert {part.group_id for part in parts} == {before.group_id}


def test_pieces_are_named_by_their_row_and_place(tokenizer: Any) -> None:
    pieces, _ = encode(tokenizer, Template("plain"), TEXTS, 10, "split")
    names = [example.row_id for example in pieces]
    assert len(set(names)) == len(names)
    first = TEXTS[0].row_id
    count = sum(name.startswith(first) for name in names)
    assert names[:count] == [f"{first}.{n}of{count}" for n in range(1, count + 1)]
    assert TEXTS[1].row_id in names, "a row that fits is itself"


def test_rows_that_fit_are_the_same_whether_long_ones_are_split(tokenizer: Any) -> None:
    split, _ = encode(tokenizer, Template("plain"), TEXTS, 500, "split")
    cut, _ = encode(tokenizer, Template("plain"), TEXTS, 500, "truncate")
    assert [example.ids.tolist() for example in split] == [example.ids.tolist() for example in cut]
    assert [example.row_id for example in split] == [example.row_id for example in cut]


# --- special tokens in responses ---------------------------------------------------------------


@pytest.mark.parametrize("kind", NAMED)
def test_special_tokens_in_responses_are_special_if_requested(
    tokenizer: Any, kind: TemplateKind
) -> None:
    chosen = Template(kind, special_in_responses=True)
    row = pair("What of <|im_start|>?", "<|im_start|>call(1)<|im_start|> then, später.")
    example = encode_row(tokenizer, chosen, row)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    response = example.ids[example.response]
    assert (response == start).sum() == 2
    assert example.ids.tolist().count(start) == 2 + 2 * (kind == "chat"), "the prompt's is text"
    assert responses(tokenizer, example) == [
        "<|im_start|>call(1)<|im_start|> then, später.<|im_end|>"
    ]
    assert example.bytes_response == size("call(1) then, später.")
    plain = encode_row(tokenizer, kind, row)
    assert (plain.ids[plain.response] == start).sum() == 0
    assert plain.bytes_response == size("<|im_start|>call(1)<|im_start|> then, später.")


@pytest.mark.parametrize("kind", NAMED)
def test_special_tokens_in_responses_do_not_change_prompts(
    tokenizer: Any, kind: TemplateKind
) -> None:
    tokenize = RowTokenizer(tokenizer, Template(kind, special_in_responses=True))
    turns = [Turn("user", "What of <|im_start|>?")]
    assert tokenize.prompt(turns) == RowTokenizer(tokenizer, Template(kind)).prompt(turns)
    example = encode_row(
        tokenizer, tokenize.template, pair("What of <|im_start|>?", "<|im_start|>")
    )
    prompt = tokenize.prompt(turns)
    assert example.ids[: len(prompt)].tolist() == prompt


def test_earlier_responses_have_the_training_tokens_in_prompts(plain_tokenizer: Any) -> None:
    row = chat(("user", "1?"), ("assistant", "<|endoftext|>a"), ("user", "2?"), ("assistant", "b"))
    tokenize = RowTokenizer(plain_tokenizer, Template("chat", special_in_responses=True))
    (example,), _ = tokenize.encode([row], {row.row_id: ""})
    prompt = tokenize.prompt(row.turns[:-1])
    assert plain_tokenizer.convert_tokens_to_ids("<|endoftext|>") in prompt
    assert example.ids[: len(prompt)].tolist() == prompt
    expected = plain_tokenizer.apply_chat_template(messages(row)[:-1], add_generation_prompt=True)
    assert prompt == list(expected["input_ids"]), "transformers reads specials everywhere"


def test_a_response_with_an_end_mark_gets_no_second_one(plain_tokenizer: Any) -> None:
    example = encode_row(
        plain_tokenizer, Template("plain", special_in_responses=True), pair("Q", "A<|im_end|>")
    )
    assert example.ids.tolist().count(plain_tokenizer.eos_token_id) == 1
    assert responses(plain_tokenizer, example) == ["A<|im_end|>"]
    assert example.response[-1]


# --- prompts that end within a token -----------------------------------------------------------


def test_rows_whose_prompt_has_other_tokens_alone_are_found(plain_tokenizer: Any) -> None:
    tokenize = RowTokenizer(plain_tokenizer, Template("plain"))
    rows = [
        pair("Tell me a fact about rivers.", " Rivers matter."),
        pair("Rivers mat", "ter a great deal."),
        pair("Tell me. ", "matter"),
        text("Rivers matter."),
        pair("What? ", " Yes"),
    ]
    differs = tokenize.differs_from_prompt(rows)
    for row, differs_here in zip(rows, differs, strict=True):
        question = row.turns[0].content if len(row.turns) > 1 else ""
        alone, row_ids = (
            ids(plain_tokenizer, question),
            ids(plain_tokenizer, question + row.turns[-1].content),
        )
        assert differs_here == (row_ids[: len(alone)] != alone)
    assert differs[:4] == [False, True, True, False]
    in_words = RowTokenizer(plain_tokenizer, Template("instruction_response"))
    assert in_words.differs_from_prompt(rows[:3]) == [False, False, False]


# --- bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", ROWS)
def test_byte_counts_are_those_of_the_scored_text(tokenizer: Any, row: Row) -> None:
    question, answer = (turn.content for turn in row.turns)
    text = f"Instruction:\n{question}\nResponse:\n{answer}"
    example = encode_row(tokenizer, "instruction_response", row)
    # without BOS the first token of the text is not a label
    unscored = size(decoded(tokenizer, example.ids[:1]).removeprefix(BOS))
    assert (unscored == 0) == (tokenizer.bos_token_id is not None)
    assert example.bytes_all == size(text) - unscored
    assert example.bytes_response == size(answer)


def test_byte_counts_end_where_the_row_is_cut(bos_tokenizer: Any) -> None:
    row = pair("Where?", "日本 and beyond, 🙂.")
    full = encode_row(bos_tokenizer, "instruction_response", row)
    prompt = "Instruction:\nWhere?\nResponse:\n"
    seen = set()
    for limit in range(2, full.length + 1):
        (cut,), _ = encode(bos_tokenizer, Template("instruction_response"), [row], limit)
        text = decoded(bos_tokenizer, cut.ids[1:]).removesuffix("<|im_end|>")
        if "\ufffd" in text:
            continue  # cut within a character, which then counts whole
        assert cut.bytes_all == size(text)
        assert cut.bytes_response == size(text.removeprefix(prompt)) * text.startswith(prompt)
        seen.add(cut.bytes_response)
    assert len(seen) > 5


def test_an_unscored_first_token_has_no_bytes_in_the_response(plain_tokenizer: Any) -> None:
    text = "Rivers matter."
    example = encode_row(plain_tokenizer, "plain", chat(("assistant", text)))
    first = decoded(plain_tokenizer, example.ids[:1])
    assert example.bytes_all == example.bytes_response == size(text) - size(first)


# --- arbitrary text ----------------------------------------------------------------------------

ANY_TEXT = st.lists(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"], max_codepoint=0xEFFFF), max_size=12),
        st.sampled_from([*SPECIALS, "<|im_", "end|>", "\n", " ", "🙂", "Response:\n"]),
    ),
    max_size=6,
).map("".join)


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("bos", [False, True])
@settings(max_examples=60, deadline=None)
@given(question=ANY_TEXT, answer=ANY_TEXT)
def test_response_mask_covers_exactly_the_response(
    request: pytest.FixtureRequest, kind: TemplateKind, bos: bool, question: str, answer: str
) -> None:
    assume(question or answer)
    tokenizer = request.getfixturevalue("bos_tokenizer" if bos else "plain_tokenizer")
    prompt = {
        "instruction_response": f"Instruction:\n{question}\nResponse:\n",
        "plain": question,
        "chat": f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
    }[kind]
    example = encode_row(tokenizer, kind, pair(question, answer))
    # one run, up to the end
    boundary = int(np.argmax(example.response))
    assert example.response.tolist() == [n >= boundary for n in range(example.length)]
    before = decoded(tokenizer, example.ids[bos:boundary])
    after = decoded(tokenizer, example.ids[boundary:])
    assert before + after == f"{prompt}{answer}<|im_end|>"
    # the token at the boundary is the first that ends after the prompt
    assert len(before) <= len(prompt)
    assert len(before) + len(decoded(tokenizer, example.ids[boundary : boundary + 1])) > len(prompt)
    assert example.bytes_response == size(answer) or boundary == 0
    count = [example.ids.tolist().count(tokenizer.convert_tokens_to_ids(t)) for t in SPECIALS]
    assert count == ([int(bos), 2, 2] if kind == "chat" else [int(bos), 0, 1])


# --- user-defined templates --------------------------------------------------------------------


def jinja_template(folder: Path, source: str) -> Template:
    (folder / "mine.jinja").write_text(source, encoding="utf-8")
    return choose_template(str(folder / "mine.jinja"), "chat", False)


def test_template_from_a_file_is_rendered_without_block_lines(
    plain_tokenizer: Any, tmp_path: Path
) -> None:
    template = jinja_template(
        tmp_path,
        "{% for message in messages %}\n"
        "{% if message['role'] == 'user' %}\n"
        "Q: {{ message['content'] }}\n"
        "{% else %}\n"
        "A: {{ message['content'] }}{{ eos_token }}\n"
        "{% endif %}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}A: {% endif %}\n",
    )
    row = chat(("user", "1?"), ("assistant", "1<|im_end|>"), ("user", "2?"), ("assistant", "2"))
    example = encode_row(plain_tokenizer, template, row)
    text = "Q: 1?\nA: 1<|im_end|><|im_end|>\nQ: 2?\nA: 2<|im_end|>"
    assert decoded(plain_tokenizer, example.ids) == text
    # the space before an answer is part of its first token
    assert responses(plain_tokenizer, example) == [" 1<|im_end|><|im_end|>", " 2<|im_end|>"]
    assert example.ids.tolist().count(plain_tokenizer.eos_token_id) == 2


def test_a_jinja_template_has_the_variables_of_chat_templates(
    plain_tokenizer: Any, tmp_path: Path
) -> None:
    """Otherwise training and other programs would render different texts."""
    source = (
        "{%- if tools %}{{ raise_exception('no tools') }}{% endif %}\n"
        "{% for message in messages %}\n"
        "    {% if message.role == 'nobody' %}{% continue %}{% endif %}\n"
        "{{ {message.role: message.content} | tojson }}\n"
        "{% endfor %}"
    )
    row = pair("Is 'a' < \"b\" & ü?", "Yes.")
    text = plain_tokenizer.apply_chat_template(messages(row), chat_template=source, tokenize=False)
    example = encode_row(plain_tokenizer, jinja_template(tmp_path, source), row)
    assert decoded(plain_tokenizer, example.ids) == text.rstrip() + "\n<|im_end|>"


@pytest.mark.parametrize(
    ("source", "fragment"),
    [
        ("{% for m in messages %}\n{{ m['content'] }}", r"line 2: Unexpected end of template"),
        ("{{ mesages[0].content }}", "'mesages' is undefined"),
        ("{{ messages[0].contents.strip() }}", "has no attribute 'contents'"),
        ("{{ raise_exception('users only') }}", "users only"),
        ("{{ messages + 1 }}", "can only concatenate list"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% include 'other.jinja' %}", "no loader"),
    ],
)
def test_failing_templates_are_explained(
    plain_tokenizer: Any, tmp_path: Path, source: str, fragment: str
) -> None:
    with pytest.raises(UsageError) as caught:
        encode_row(plain_tokenizer, jinja_template(tmp_path, source), pair("Q", "A"))
    assert str(caught.value).startswith("data.template: ")
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_template_that_rewrites_earlier_turns_is_refused(
    plain_tokenizer: Any, tmp_path: Path
) -> None:
    """Some templates drop the reasoning of all answers but the last."""
    source = (
        "{% for m in messages %}{{ m['role'] + ': ' }}"
        "{{ m['content'] if loop.last else m['content'][-1:] }}{{ eos_token }}{% endfor %}"
    )
    template = jinja_template(tmp_path, source)
    row = chat(("user", "1"), ("assistant", "22"), ("user", "3"), ("assistant", "44"))
    with pytest.raises(DataError, match=r"rows\.jsonl:7: the chat template does not extend"):
        encode_row(plain_tokenizer, template, row)
    example = encode_row(plain_tokenizer, template, pair("1", "22"))
    assert responses(plain_tokenizer, example) == ["assistant: 22<|im_end|>"]


def test_row_refused_by_the_chat_template_is_reported_by_line(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder, local_files_only=True)
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}"
        "{% endif %}" + tokenizer.chat_template
    )
    encode_row(tokenizer, "chat", pair("Q", "A"))
    row = chat(("system", "Be kind."), ("user", "Q"), ("assistant", "A"))
    with pytest.raises(DataError, match=r"rows\.jsonl:7: .*refuses the row \(no system turn\)"):
        encode_row(tokenizer, "chat", row)


def test_template_chat_needs_a_chat_template(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder, local_files_only=True)
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match=r"no chat template; use instruction_response"):
        RowTokenizer(tokenizer, Template("chat"))


@pytest.mark.parametrize(
    ("row", "instead"),
    [
        (chat(("assistant", "words")), "plain"),
        (chat(("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")), "chat"),
        (
            chat(("system", "s"), ("user", "u"), ("assistant", "a")),
            r"chat \(or, .* leave it out: data\.columns=\{system: null\}\)",
        ),
    ],
)
def test_rows_other_than_a_pair_are_refused_with_another_template(
    plain_tokenizer: Any, row: Row, instead: str
) -> None:
    with pytest.raises(DataError, match=rf"^rows\.jsonl:7: .*; set data\.template={instead}$"):
        encode_row(plain_tokenizer, "instruction_response", row)
    encode_row(plain_tokenizer, "plain" if instead == "plain" else "chat", row)


def test_templates_are_chosen_by_name_file_or_format(tmp_path: Path) -> None:
    assert choose_template("auto", "dolly", False) == Template("instruction_response")
    assert choose_template("auto", "alpaca", True) == Template("instruction_response", True)
    assert choose_template("auto", "chat", False).kind == "chat"
    assert choose_template("auto", "prompt_completion", False).kind == "plain"
    assert choose_template("auto", "text", False).kind == "plain"
    for name in NAMED:
        assert choose_template(name, "dolly", False) == Template(name)
    with pytest.raises(UsageError, match=r"data\.template = instruct: not one of auto, "):
        choose_template("instruct", "dolly", False)
    with pytest.raises(UsageError, match=r"none\.jinja: cannot be read"):
        choose_template(str(tmp_path / "none.jinja"), "dolly", False)
    (tmp_path / "latin.jinja").write_bytes(b"\xe9")
    with pytest.raises(UsageError, match=r"latin\.jinja: cannot be read"):
        choose_template(str(tmp_path / "latin.jinja"), "dolly", False)


# --- the saved chat template -------------------------------------------------------------------


def prompted(
    tokenizer: Any, template: Template, messages: list[dict[str, str]], prompt: bool = False
) -> list[int]:
    """Return the ids that the chat template saved with an adapter gives in transformers."""
    tokenize = RowTokenizer(tokenizer, template)
    source = as_chat_template(
        template,
        tokenize.bos_id is not None,
        tokenizer.chat_template,
        tokenize.space_after_bos,
    )
    input_ids: list[int] = tokenizer.apply_chat_template(
        messages,
        chat_template=source,
        add_generation_prompt=prompt,
        tokenize=True,
        return_dict=False,
    )
    return input_ids


OWN_TEMPLATES = [
    Template("jinja", source="{% for m in messages %}{{ m.content + eos_token }}{% endfor %}\n"),
    Template("jinja", source="{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"),
    Template("jinja", source=f"{BOS}{{% for m in messages %}}{{{{ m.content }}}}{{% endfor %}}"),
    Template(
        "jinja", source="\n{% set text = 1 %}{% for m in messages %}{{ m.content }}{% endfor %}"
    ),
]


@pytest.mark.parametrize("template", [*map(Template, NAMED), *OWN_TEMPLATES])
@pytest.mark.parametrize("row", ROWS)
def test_the_saved_template_prompts_as_in_training(
    bos_tokenizer: Any, plain_tokenizer: Any, template: Template, row: Row
) -> None:
    for tokenizer in (bos_tokenizer, plain_tokenizer):
        if tokenizer is plain_tokenizer and "bos_token" in template.source:
            continue
        trained = encode_row(tokenizer, template, row).ids.tolist()
        prompted_ids = prompted(tokenizer, template, messages(row))
        if template.kind == "jinja" and not template.source.endswith("eos_token }}{% endfor %}\n"):
            trained.pop()  # EOS is training's where the template writes none
        assert prompted_ids[: len(trained)] == trained
        assert not decoded(tokenizer, prompted_ids[len(trained) :]).strip()
        assert prompted_ids.count(tokenizer.bos_token_id) == (tokenizer is bos_tokenizer)


@pytest.mark.parametrize("kind", NAMED)
def test_a_prompt_equals_the_training_text_before_the_response(
    tokenizer: Any, kind: TemplateKind
) -> None:
    row = pair("Tell me a fact about rivers.", "Rivers matter.")
    example = encode_row(tokenizer, kind, row)
    before = example.ids[~example.response].tolist()
    assert prompted(tokenizer, Template(kind), messages(row)[:1], prompt=True) == before


def test_an_answer_in_a_prompt_may_contain_nul(plain_tokenizer: Any) -> None:
    """A model may have generated it, and the conversation must be able to continue."""
    tokenize = RowTokenizer(plain_tokenizer, Template("chat"))
    turns = [Turn("user", "Why?"), Turn("assistant", "a\0b\r\nc"), Turn("user", "So?")]
    assert "assistant\na\0b\nc<|im_end|>" in decoded(plain_tokenizer, tokenize.prompt(turns))
    for role, text in (("user", "a\0b"), ("assistant", "a\ud800")):
        with pytest.raises(DataError, match="prompt has a"):
            tokenize.prompt([Turn("user", "Why?"), Turn(role, text), Turn("user", "So?")])  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", NAMED)
def test_a_conversation_is_the_concatenation_of_its_pairs(
    plain_tokenizer: Any, kind: TemplateKind
) -> None:
    two = [*messages(ROWS[0]), *messages(ROWS[3])]
    prompted_ids = prompted(plain_tokenizer, Template(kind), two)
    once = [prompted(plain_tokenizer, Template(kind), messages(ROWS[n])) for n in (0, 3)]
    assert prompted_ids == once[0] + once[1]


def test_the_saved_template_gives_the_tokens_of_a_text_row(tokenizer: Any) -> None:
    row = chat(("assistant", "Rivers matter."))
    trained = encode_row(tokenizer, "plain", row).ids.tolist()
    assert prompted(tokenizer, Template("plain"), messages(row)) == trained


def test_a_tokenizer_without_a_chat_template_saves_none() -> None:
    assert as_chat_template(Template("chat"), True, None) is None


# --- TinyLlama ---------------------------------------------------------------------------------

TINYLLAMA = Path(__file__).resolve().parents[3] / "shared/tinyllama"


@pytest.fixture(scope="module")
def tinyllama() -> Any:
    if not TINYLLAMA.exists():
        pytest.skip("the tokenizer of TinyLlama is not beside the repository (shared/tinyllama)")
    tokenizer = AutoTokenizer.from_pretrained(TINYLLAMA, local_files_only=True)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize("limit", [2, 5, 16])
def test_tinyllama_has_every_token_of_a_long_text_as_one_label(tinyllama: Any, limit: int) -> None:
    pieces, _ = encode(tinyllama, Template("plain"), TEXTS, limit, "split")
    labels = [
        label for example in pieces for label in collate([example], "all").labels[:-1].tolist()
    ]
    assert labels == [
        id_ for row in TEXTS for id_ in [*ids(tinyllama, TEXTS_OF[row.row_id]), 2][1:]
    ]
    assert all(example.ids[0] == 1 and example.length <= limit for example in pieces)
    assert sum(example.bytes_all for example in pieces) == sum(map(size, TEXTS_OF.values()))


def test_tinyllama_puts_bos_first_and_eos_last(tinyllama: Any) -> None:
    example = encode_row(tinyllama, "instruction_response", pair("Say", "Yes"))
    golden = [1, 2799, 4080, 29901, 13, 29903, 388, 13, 5103, 29901, 13, 8241, 2]
    assert example.ids.tolist() == golden
    assert example.response.tolist() == [False] * 11 + [True, True]
    assert collate([example], "response").labels.tolist() == [-100] * 10 + [8241, 2, -100]
    assert (example.bytes_all, example.bytes_response) == (
        size("Instruction:\nSay\nResponse:\nYes"),
        3,
    )


@pytest.mark.parametrize("kind", NAMED)
def test_tinyllama_encodes_end_marks_in_row_text_as_text(
    tinyllama: Any, kind: TemplateKind
) -> None:
    example = encode_row(tinyllama, kind, pair("Is <s> a tag, </s> too?\n", "</s>No</s>, <unk>."))
    input_ids = example.ids.tolist()
    assert input_ids[0] == 1
    assert input_ids[-1] == 2
    assert (input_ids.count(0), input_ids.count(1)) == (0, 1)
    assert input_ids.count(2) == (2 if kind == "chat" else 1)
    (text,) = responses(tinyllama, example)
    assert text == "</s>No</s>, <unk>.</s>"
    assert example.bytes_response == size("</s>No</s>, <unk>.")


@pytest.mark.parametrize("row", ROWS)
def test_tinyllama_ids_equal_those_of_its_plain_call(tinyllama: Any, row: Row) -> None:
    question, answer = (turn.content for turn in row.turns)
    text = f"Instruction:\n{question}\nResponse:\n{answer}"
    example = encode_row(tinyllama, "instruction_response", row)
    assert example.ids.tolist() == [*ids(tinyllama, text), 2]
    assert (example.bytes_all, example.bytes_response) == (size(text), size(answer))
    text = f"<|user|>\n{question}</s>\n<|assistant|>\n{answer}</s>"
    assert encode_row(tinyllama, "chat", row).ids.tolist() == ids(tinyllama, text)


@pytest.mark.parametrize("kind", NAMED)
def test_tinyllama_is_prompted_as_it_was_trained(tinyllama: Any, kind: TemplateKind) -> None:
    for row in (ROWS[0], ROWS[2], ROWS[3]):
        trained = encode_row(tinyllama, kind, row).ids.tolist()
        prompted_ids = prompted(tinyllama, Template(kind), messages(row))
        assert prompted_ids[: len(trained)] == trained
        assert not decoded(tinyllama, prompted_ids[len(trained) :]).strip()


def test_the_role_marks_of_tinyllama_are_plain_text(tinyllama: Any) -> None:
    marks = text_role_marks(RowTokenizer(tinyllama, Template("chat")), [pair("<|user|>", "x")])
    assert [(mark.text, mark.rows) for mark in marks] == [("<|user|>", 1), ("<|assistant|>", 0)]


# --- malicious templates -----------------------------------------------------------------------

HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.mkdir('CANARY') }}",
    "{{ self._TemplateReference__context }}{{ messages.__class__ }}",
    "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "{{ lipsum.__globals__['os'].mkdir('CANARY') }}",
    "{% include '/etc/hostname' %}",
    "{% import 'os' as os %}",
    "{% extends '/etc/hostname' %}",
    "{{ 'a'.__format__('{0.__class__}') }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{% for i in range(10 ** 12) %}x{% endfor %}",
    "{{ open('/etc/hostname').read() }}",
]


@pytest.mark.parametrize("source", HOSTILE)
@pytest.mark.parametrize("whose", ["the model's", "the user's"])
def test_a_malicious_template_is_sandboxed(
    plain_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, whose: str
) -> None:
    monkeypatch.chdir(tmp_path)
    row, text = pair("Q", "A"), ""
    with contextlib.suppress(DataError, UsageError):
        if whose == "the model's":
            tokenizer = tiny_tokenizer()
            tokenizer.chat_template = source
            text = RowTokenizer(tokenizer, Template("chat")).render(row).text
        else:
            text = RowTokenizer(plain_tokenizer, Template("jinja", source=source)).render(row).text
    # The sandbox must not reveal classes, files or the machine.
    assert "class" not in text and "root" not in text
    assert not list(tmp_path.iterdir())
    assert len(row.turns) == 2


def test_a_template_with_a_date_gives_the_same_text_every_day() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{{ strftime_now('%d %b %Y') }}{% for message in messages %}"
        "{{ message['content'] + eos_token }}{% endfor %}"
    )
    row = Row((Turn("user", "Which day?"), Turn("assistant", "That one.")))
    assert RowTokenizer(tokenizer, Template("chat")).render(row).text.startswith("26 Jul 2024")
