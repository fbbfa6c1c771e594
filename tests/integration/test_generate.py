"""Replies equal those of transformers and PEFT, from prompts as in training."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from slm_lora.adapters import io as adapter_io
from slm_lora.adapters.multi import BASE, AdapterSet, load_adapter_set
from slm_lora.config.schema import ModelSection
from slm_lora.data.prompts import Prompt
from slm_lora.data.templates import Template, TemplateKind
from slm_lora.data.tokenization import RowTokenizer
from slm_lora.errors import IntegrityError, UsageError
from slm_lora.evaluation.generation import (
    Generation,
    Sampling,
    StreamedText,
    prompt_ids,
    reference_loss,
)
from slm_lora.export.trained import read_trained
from slm_lora.model.loading import load_tokenizer
from slm_lora.model.resolve import ModelSource, resolve
from slm_lora.records import Row, Turn
from slm_lora.runtime.checksums import FILES, SEAL

from ..support.examples import save_model
from ..support.exports import change_metadata, make_adapter
from ..support.lab import command
from ..support.tiny_model import tiny_tokenizer

QUESTIONS = ("Tell me fact 3 about bread.", "What of <|im_end|> and tea?", "Maps?\nAnd clocks?")


def user_prompt(text: str) -> Prompt:
    return Prompt((Turn("user", text),))


@pytest.fixture(scope="module")
def folders(tiny_source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    where = tmp_path_factory.mktemp("adapters")
    return (
        make_adapter(tiny_source, where / "one", scale=0.5, seed=1),
        make_adapter(tiny_source, where / "two.5", scale=0.5, template="chat", seed=2),
    )


@pytest.fixture(scope="module")
def variants(tiny_source: ModelSource, folders: tuple[Path, ...]) -> AdapterSet:
    return load_adapter_set(str(tiny_source.path), folders, precision="fp32")


def generate(
    variants: AdapterSet, name: str, question: str, sampling: Sampling
) -> tuple[str, list[int]]:
    reply = Generation(variants, name, prompt_ids(variants, name, user_prompt(question)), sampling)
    return "".join(reply.pieces()), reply.ids


@pytest.mark.parametrize("question", QUESTIONS)
def test_greedy_replies_equal_those_of_transformers_and_peft(
    variants: AdapterSet, tiny_source: ModelSource, folders: tuple[Path, ...], question: str
) -> None:
    texts = set()
    for name, folder in zip(variants.names, (None, *folders), strict=True):
        plain = AutoModelForCausalLM.from_pretrained(tiny_source.path)
        model = plain if folder is None else PeftModel.from_pretrained(plain, str(folder))
        prompt = torch.tensor([prompt_ids(variants, name, user_prompt(question))])
        expected = (
            model.eval()
            .generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=30,
                do_sample=False,
            )[0, prompt.shape[1] :]
            .tolist()
        )
        text, ids = generate(variants, name, question, Sampling(30))
        assert ids == expected
        decoded = variants.tokenizer.decode(expected, skip_special_tokens=True)
        assert text == decoded.rstrip("�")  # a character cut at the end is not shown
        texts.add(text)
    assert len(texts) == 3, "base and adapters give different replies"


def test_interleaved_replies_equal_sequential_ones(variants: AdapterSet) -> None:
    expected = {
        name: generate(variants, name, QUESTIONS[0], Sampling(20, 0.9)) for name in variants.names
    }
    replies = {
        name: Generation(
            variants, name, prompt_ids(variants, name, user_prompt(QUESTIONS[0])), Sampling(20, 0.9)
        )
        for name in variants.names
    }
    texts = dict.fromkeys(replies, "")
    while any(not reply.finished for reply in replies.values()):
        for name, reply in replies.items():
            if not reply.finished:
                texts[name] += reply.advance()
    assert {name: (texts[name], reply.ids) for name, reply in replies.items()} == expected


def test_sampling_follows_seed_top_k_and_top_p(variants: AdapterSet) -> None:
    first = generate(variants, BASE, QUESTIONS[0], Sampling(20, 1.0, seed=1))
    assert first == generate(variants, BASE, QUESTIONS[0], Sampling(20, 1.0, seed=1))
    assert first != generate(variants, BASE, QUESTIONS[0], Sampling(20, 1.0, seed=2))
    greedy = generate(variants, BASE, QUESTIONS[0], Sampling(20))
    for narrow in (Sampling(20, 1.0, top_k=1), Sampling(20, 1.0, top_p=1e-6)):
        assert generate(variants, BASE, QUESTIONS[0], narrow) == greedy


def chosen_tokens(
    variants: AdapterSet, count: int, sampling: Sampling, logits_of: list[list[float]]
) -> list[int]:
    """Tokens of a reply whose logits are given, step by step."""
    reply = Generation(variants, BASE, [5, 6], sampling)
    for step in range(count):
        reply.ids.append(reply._choose(torch.tensor([logits_of[step]])))
    return reply.ids


def by_formula(
    prompt: list[int], ids: list[int], logits: list[float], sampling: Sampling
) -> list[float]:
    """Chances of the next token, in plain Python: penalties, temperature, min p, top k, top p."""
    scores = list(logits)
    for token in {*prompt, *ids}:
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token in set(ids):
        scores[token] -= sampling.frequency_penalty * ids.count(token) + sampling.presence_penalty
    scores = [value / sampling.temperature for value in scores]
    highest = max(scores)
    chances = [math.exp(value - highest) for value in scores]
    # What rounding may put on either side of a limit shows nothing.
    assume(
        all(abs(chance / max(chances) - sampling.min_p) > 1e-4 or chance == 1 for chance in chances)
    )
    assume(all(b - a > 1e-4 for a, b in itertools.pairwise(sorted(scores))))
    kept = {i for i, chance in enumerate(chances) if chance >= sampling.min_p * max(chances)}
    if sampling.top_k:
        order = sorted(kept, key=lambda i: -chances[i])
        kept = set(order[: sampling.top_k])
    total, sum_so_far, nucleus = sum(chances[i] for i in kept), 0.0, set()
    for i in sorted(kept, key=lambda i: -chances[i]):
        if sum_so_far >= sampling.top_p:
            break
        nucleus.add(i)
        sum_so_far += chances[i] / total
        assume(abs(sum_so_far - sampling.top_p) > 1e-4 or sampling.top_p == 1)
    total = sum(chances[i] for i in nucleus)
    return [chances[i] / total if i in nucleus else 0.0 for i in range(len(chances))]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(data=st.data())
def test_sampling_probabilities_equal_the_formulas(
    variants: AdapterSet, data: st.DataObject
) -> None:
    number = st.floats(-2, 2)
    sampling = Sampling(
        temperature=data.draw(st.floats(0.2, 3)),
        top_p=data.draw(st.sampled_from([1.0, 0.9, 0.5, 0.2])),
        top_k=data.draw(st.sampled_from([0, 1, 3, 8])),
        min_p=data.draw(st.sampled_from([0.0, 0.05, 0.3, 1.0])),
        repetition_penalty=data.draw(st.floats(0.5, 2)),
        frequency_penalty=data.draw(number),
        presence_penalty=data.draw(number),
    )
    steps = data.draw(st.permutations(range(12)))
    logits = [step - 6 + data.draw(st.floats(-0.4, 0.4)) for step in steps]
    ids = data.draw(st.lists(st.integers(0, 11), max_size=9))
    expected = by_formula([5, 6], ids, logits, sampling)
    drawn_from: list[torch.Tensor] = []
    reply = Generation(variants, BASE, [5, 6], sampling)
    reply.ids = list(ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch, "multinomial", lambda chances, *_, **__: drawn_from.append(chances) or 0
        )  # type: ignore[func-returns-value]
        reply._choose(torch.tensor([logits]))
    assert drawn_from[0].tolist() == pytest.approx(expected, abs=2e-5)


def test_penalties_apply_to_greedy_replies(variants: AdapterSet) -> None:
    # Token 3 leads by half a nat.
    logits = [[0.0] * 3 + [2.0, 1.5] + [0.0] * 7] * 6
    assert chosen_tokens(variants, 6, Sampling(), logits) == [3] * 6
    assert chosen_tokens(variants, 6, Sampling(frequency_penalty=0.3), logits) == [3, 3, 4, 3, 4, 3]
    assert chosen_tokens(variants, 6, Sampling(presence_penalty=0.6), logits) == [3, 4, 3, 3, 3, 3]
    # The prompt's tokens count for neither.
    prompted = [[0.0] * 5 + [2.0, 1.9] + [0.0] * 5]
    assert chosen_tokens(
        variants, 1, Sampling(frequency_penalty=2, presence_penalty=2), prompted
    ) == [5]
    assert chosen_tokens(variants, 1, Sampling(temperature=1e-30), prompted) == [5]


def test_stop_tokens_min_tokens_and_ignore_eos_end_replies_as_set(variants: AdapterSet) -> None:
    text, ids = generate(variants, BASE, QUESTIONS[0], Sampling(40, 1.0, seed=3))
    stop_at = ids[4]
    first = ids.index(stop_at)
    cut = generate(
        variants, BASE, QUESTIONS[0], Sampling(40, 1.0, seed=3, stop_token_ids=(stop_at,))
    )
    assert cut[1] == ids[: first + 1] and text.startswith(cut[0])
    sampling = Sampling(40, 1.0, seed=3, stop_token_ids=(stop_at,), min_tokens=12)
    assert stop_at not in generate(variants, BASE, QUESTIONS[0], sampling)[1][:12]
    # Whatever would end a reply at once does not.
    all_but_one = tuple(set(range(len(variants.tokenizer))) - {7})
    end = Sampling(40, 1.0, seed=3, stop_token_ids=all_but_one)
    assert len(generate(variants, BASE, QUESTIONS[0], end)[1]) == 1
    sampling = Sampling(40, 1.0, seed=3, stop_token_ids=all_but_one, min_tokens=9)
    assert generate(variants, BASE, QUESTIONS[0], sampling)[1][:9] == [7] * 9
    # The model's own end, made the likeliest token there is.
    (own,) = variants.stop_ids
    biased = [0.0] * len(variants.tokenizer)
    biased[own] = 9.0
    reply = Generation(variants, BASE, [5], Sampling(4, ignore_eos=True))
    reply._next_logits = lambda: torch.tensor([biased])  # type: ignore[method-assign]
    list(reply.pieces())
    assert reply.ids == [own] * 4 and reply.finished == "length"


def test_stop_texts_are_ignored_before_min_tokens(variants: AdapterSet) -> None:
    text, _ = generate(variants, BASE, QUESTIONS[0], Sampling(30))
    stop = text[3:5]
    early = generate(variants, BASE, QUESTIONS[0], Sampling(30, stop=(stop,)))[0]
    assert early == text[: text.index(stop)]
    late, ids = generate(variants, BASE, QUESTIONS[0], Sampling(30, stop=(stop,), min_tokens=10))
    assert late.startswith(early + stop) and len(ids) >= 10


@pytest.mark.parametrize("kind", ["instruction_response", "chat", "plain"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_prompt_is_the_beginning_of_the_training_text(
    tiny_source: ModelSource, kind: TemplateKind, question: str
) -> None:
    tokenize = RowTokenizer(load_tokenizer(tiny_source), Template(kind))
    row = Row((Turn("user", question), Turn("assistant", "Bread is old.")))
    example = tokenize.encode([row], {row.row_id: ""})[0][0]
    prompt = tokenize.prompt([Turn("user", question)])
    assert example.ids[: len(prompt)].tolist() == prompt
    assert example.response[: len(prompt)].sum() == 0 and example.response[len(prompt)]


def test_prompt_with_context_is_the_beginning_of_the_training_text(
    tiny_source: ModelSource,
) -> None:
    row = Row((Turn("user", "Why?"), Turn("assistant", "So.")), context="A note.")
    for kind in ("instruction_response", "chat"):
        tokenize = RowTokenizer(load_tokenizer(tiny_source), Template(kind, include_context=True))  # type: ignore[arg-type]
        example = tokenize.encode([row], {row.row_id: ""})[0][0]
        prompt = tokenize.prompt([Turn("user", "Why?")], "A note.")
        assert "A note." in load_tokenizer(tiny_source).decode(prompt)
        assert example.ids[: len(prompt)].tolist() == prompt


def test_multi_turn_prompts_need_a_chat_template(tiny_source: ModelSource) -> None:
    turns = [
        Turn("system", "Be short."),
        Turn("user", "Tea?"),
        Turn("assistant", "Yes."),
        Turn("user", "Why?"),
    ]
    tokenizer = load_tokenizer(tiny_source)
    chat = RowTokenizer(tokenizer, Template("chat"))
    assert chat.is_multi_turn
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert chat.prompt(turns) == list(expected)
    single = RowTokenizer(tokenizer, Template("instruction_response"))
    with pytest.raises(UsageError, match="one instruction at a time"):
        single.prompt(turns)
    with pytest.raises(UsageError, match="last turn"):
        chat.prompt(turns[:3])


def test_reference_loss_equals_that_of_transformers(
    variants: AdapterSet, tiny_source: ModelSource, folders: tuple[Path, ...]
) -> None:
    prompt = Prompt((Turn("user", "Tea?"),), reference="Tea is made of leaves.")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_source.path), str(folders[0])
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_source.path)
    question_ids = tokenizer("Instruction:\nTea?\nResponse:\n")["input_ids"]
    text_ids = tokenizer(f"Instruction:\nTea?\nResponse:\n{prompt.reference}")["input_ids"]
    ids = torch.tensor([[*text_ids, tokenizer.eos_token_id]])
    with torch.no_grad():
        scores = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    expected = -scores[len(question_ids) - 1 :].mean().item()
    assert reference_loss(variants, "one", "one", prompt) == pytest.approx(expected, abs=1e-5)
    base_loss = reference_loss(variants, BASE, "one", prompt)
    assert base_loss is not None and abs(base_loss - expected) > 1e-3
    assert reference_loss(variants, BASE, "one", user_prompt("Tea?")) is None


def test_prompt_as_long_as_the_context_is_refused(variants: AdapterSet) -> None:
    with pytest.raises(UsageError, match="shorten"):
        Generation(variants, BASE, [5] * 512, Sampling())
    reply = Generation(variants, BASE, [5] * 509, Sampling(100))
    list(reply.pieces())
    assert len(reply.ids) <= 3


def test_changed_chat_template_of_an_adapter_is_refused(
    tiny_source: ModelSource, folders: tuple[Path, ...], tmp_path: Path
) -> None:
    changed = shutil.copytree(folders[0], tmp_path / "changed")
    (changed / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    with pytest.raises(IntegrityError, match="changed"):
        load_adapter_set(str(tiny_source.path), [changed], precision="fp32")
    # Adapters of before there were seals do not say the SHA-256 of their files.
    about = json.loads((changed / adapter_io.ABOUT).read_text())
    unsealed = {key: value for key, value in about.items() if key not in (FILES, SEAL)}
    (changed / adapter_io.ABOUT).write_text(json.dumps(unsealed))
    with pytest.raises(IntegrityError, match="not the template that the adapter was trained"):
        load_adapter_set(str(tiny_source.path), [changed], precision="fp32")
    foreign = shutil.copytree(folders[0], tmp_path / "foreign")
    (foreign / adapter_io.ABOUT).unlink()
    adapters = load_adapter_set(str(tiny_source.path), [foreign], precision="fp32")
    assert "not trained here" in adapters.notes[0]
    assert (
        adapters.row_tokenizers["foreign"].prompt([Turn("user", "Tea?")])
        == adapters.tokenizer("Instruction:\nTea?\nResponse:\n")["input_ids"]
    )
    (foreign / "chat_template.jinja").unlink()
    adapters = load_adapter_set(str(tiny_source.path), [foreign], precision="fp32")
    assert "has no record of its training prompts" in adapters.notes[0]


def test_adapter_template_with_a_date_prompts_with_the_date_of_training(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Saved templates have the date of training; those of earlier versions read the clock."""
    base = shutil.copytree(tiny_folder, tmp_path / "dated")
    own = (base / "chat_template.jinja").read_text()
    dated = "{{ strftime_now('%d %b %Y') + '\\n' }}" + own
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["chat_template"] = dated.replace("{% for", "{#\r\n#}{% for")
    dated = dated.replace("{% for", "{#\n#}{% for")
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    (base / "chat_template.jinja").unlink()
    (note,) = load_adapter_set(str(base), [], precision="fp32").notes
    assert note.startswith(
        "base: its chat template contains today's date; it is fixed to 26 Jul 2024"
    )
    adapter = make_adapter(resolve(ModelSection(name=str(base))), tmp_path / "one", template="chat")
    shipped = adapter / "chat_template.jinja"
    holder = AutoTokenizer.from_pretrained(base)
    holder.chat_template = shipped.read_text()
    expected = holder.apply_chat_template(
        [{"role": "user", "content": "Tea?"}], add_generation_prompt=True, return_dict=False
    )
    assert holder.decode(expected).startswith("26 Jul 2024\n<|im_start|>user\nTea?")
    adapters = load_adapter_set(str(base), [adapter], precision="fp32")
    assert adapters.row_tokenizers["one"].prompt([Turn("user", "Tea?")]) == expected
    assert adapters.notes == ()
    shipped.write_text(dated)
    change_metadata(adapter)
    adapters = load_adapter_set(str(base), [adapter], precision="fp32")
    assert adapters.row_tokenizers["one"].prompt([Turn("user", "Tea?")]) == expected
    (note,) = adapters.notes
    assert note == (
        "one: its chat_template.jinja writes today's date; training, prompts here, merge and "
        "export use 26 Jul 2024"
    )
    assert read_trained(adapter).chat_template == holder.chat_template  # what is handed on further
    shipped.write_text(dated.replace("%d", "%A"))
    change_metadata(adapter)
    with pytest.raises(IntegrityError, match="not the template that the adapter was trained"):
        load_adapter_set(str(base), [adapter], precision="fp32")
    (adapter / adapter_io.ABOUT).unlink()
    shipped.write_bytes(b"\xff")
    with pytest.raises(IntegrityError, match=r"chat_template\.jinja: not UTF-8"):
        load_adapter_set(str(base), [adapter], precision="fp32")
    shipped.write_text(dated)
    adapters = load_adapter_set(str(base), [adapter], precision="fp32")
    assert adapters.notes[0].endswith(", with the date 26 Jul 2024; not trained here")


def test_base_with_named_templates_uses_the_default(tiny_folder: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_folder, tmp_path / "named")
    own = (base / "chat_template.jinja").read_text()
    (base / "chat_template.jinja").unlink()
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["chat_template"] = [
        {"name": "tool_use", "template": "{{ 'tools' }}"},
        {"name": "default", "template": own},
    ]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    source = resolve(ModelSection(name=str(base)))
    adapter = make_adapter(source, tmp_path / "one", template="chat")
    assert (adapter / "chat_template.jinja").read_text() == own
    adapters = load_adapter_set(str(base), [adapter], precision="fp32")
    assert [tokenizer.template.kind for tokenizer in adapters.row_tokenizers.values()] == [
        "chat",
        "chat",
    ]


@pytest.mark.parametrize("special", [False, True])
def test_special_tokens_are_shown_only_if_trained_as_special(special: bool) -> None:
    variants = _text_only()
    ids = variants.tokenizer("a <|im_start|>call<|im_start|> b")["input_ids"]
    decode = StreamedText(variants, [], (), special)  # type: ignore[arg-type]
    shown = "".join(decode.add(token)[0] for token in ids) + decode.rest()
    assert shown == ("a <|im_start|>call<|im_start|> b" if special else "a call b")


@settings(max_examples=200, deadline=None)
@given(
    text=st.text("ab\n", min_size=1, max_size=40),
    stop=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_stop_texts_are_found_across_token_boundaries(text: str, stop: list[str]) -> None:
    variants = _text_only()
    ids = variants.tokenizer(text)["input_ids"]
    decode = StreamedText(variants, [], tuple(stop), special=False)  # type: ignore[arg-type]
    shown, stopped = "", False
    for token in ids:
        new, stopped = decode.add(token)
        shown += new
        if stopped:
            break
    else:
        shown += decode.rest()
    # The first stop text that is complete ends the reply, not one that begins earlier.
    expected, so_far = text, ""
    for token in ids:
        so_far += variants.tokenizer.decode([token])
        if ends := [so_far.find(stop_text) for stop_text in stop if stop_text in so_far]:
            expected = text[: min(ends)]
            break
    assert shown == expected
    assert stopped == (expected != text)


class _text_only:
    tokenizer = tiny_tokenizer()


def test_generate_writes_one_line_per_prompt(
    tiny_source: ModelSource, folders: tuple[Path, ...], tmp_path: Path, variants: AdapterSet
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"instruction": "Tea?"}\n\n{"messages": [{"role": "user", "content": "Salt?"}]}\n'
    )
    out = tmp_path / "out.jsonl"
    words = ("--adapter", folders[0], "--base", tiny_source.path, "--precision", "fp32")
    assert (
        command("generate", "--prompts", prompts, "--out", out, "--max-new-tokens", 9, *words) == 0
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["Tea?", "Salt?"]
    assert lines[0]["response"] == generate(variants, "one", "Tea?", Sampling(9))[0]
    assert lines[0]["tokens"] <= 9 and lines[0]["finish_reason"] in ("stop", "length")


def test_compare_outputs_writes_all_formats(
    tiny_source: ModelSource, folders: tuple[Path, ...], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"instruction": "<b>Tea</b> *now*?", "response": "Yes."}\n')
    outs = [tmp_path / f"side{end}" for end in (".md", ".html", ".json")]
    words = ("--adapter", folders[0], "--adapter", folders[1], "--base", tiny_source.path)
    named = [word for out in outs for word in ("--out", out)]
    assert command("compare-outputs", prompts, *words, *named, "--max-new-tokens", 8) == 0
    markdown, page, record = (out.read_text() for out in outs)
    answers = json.loads(record)["prompts"][0]["answers"]
    assert [answer["variant"] for answer in answers] == ["base", "one", "two.5"]
    assert len({answer["loss"] for answer in answers}) == 3
    assert "<b>Tea" not in page and "&lt;b&gt;Tea" in page
    assert "base: loss of the reference" in page and "one, sampled" in markdown
    assert "base  loss" in capsys.readouterr().out
    assert command("compare-outputs", prompts, *words, "--out", tmp_path / "side.txt") == 2


def test_malformed_prompts_are_reported_by_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line, reason in (
        ("{", "bad JSON"), ("[]", "not a JSON object"), ('{"prompt": " "}', "has none of"),
        ('{"prompt": 3}', "must be text"), ('{"messages": [{"role": "user"}]}', "role and content"),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "role tool"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "must be the user's"),
    ):  # fmt: skip
        path = tmp_path / "prompts.jsonl"
        path.write_text('{"prompt": "Tea?"}\n' + line + "\n")
        assert command("generate", "--prompts", path) == 3
        assert f"{path}:2: " in (error := capsys.readouterr().err) and reason in error


def test_prompts_with_invalid_unicode_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Tea?"}\n{"prompt": "half a \\ud83d"}\n')
    for words in (
        ("--prompts", path), ("half a \ud83d",), ("Tea?", "--stop", "\udcff"), ("\U000f0000",),
    ):  # fmt: skip
        assert command("generate", *words) == 3
        error = capsys.readouterr().err
        assert "lone surrogate" in error or "private-use" in error
        assert error.count("\n") == 1 and "Traceback" not in error
    assert command("chat", "--system", "\udcff") == 3


def test_invalid_input_does_not_end_the_chat(
    tiny_source: ModelSource, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nTea?\n"), encoding="utf-8")
    )
    assert (
        command("chat", "--base", tiny_source.path, "--max-new-tokens", 4, "--temperature", 0) == 0
    )
    output = capsys.readouterr().out
    assert "the question has a lone surrogate" in output
    assert len(output.split("> ")) >= 3, "the chat continues"


def test_chat_commands_are_not_sent_to_the_model(
    tiny_source: ModelSource, folders: tuple[Path, ...]
) -> None:
    lines = b"/help\n/hlep me\n/etc/hosts?\n\xff\xfe\n/new\n/quit\nTea?\n"
    completed = subprocess.run(
        [
            sys.executable, "-m", "slm_lora", "chat", "--adapter", folders[1],
            "--base", tiny_source.path, "--max-new-tokens", "1", "--precision", "fp32",
        ],
        input=lines, capture_output=True, check=False, env={**os.environ, "PYTHONUTF8": "1"},
    )  # fmt: skip
    assert completed.returncode == 0, completed.stderr
    first, *replies = completed.stdout.decode().split("\n> ")
    assert "template chat" in first and len(replies) == 6, replies
    assert replies[0].startswith(
        "/new starts a new conversation, /help shows this, /quit or an empty line ends"
    )
    assert replies[1].startswith("/hlep: unknown command, not sent; /new starts a new conversation")
    assert "command" not in replies[2], "a path is a question"
    assert replies[3].startswith(("not valid utf-8 text", "the question has a lone surrogate"))
    assert replies[4].startswith("new conversation") and not replies[5].strip()


def test_ctrl_c_stops_the_reply_and_the_chat_continues(
    tiny_source: ModelSource, folders: tuple[Path, ...]
) -> None:
    process = subprocess.Popen(
        [
            sys.executable, "-u", "-c", "from slm_lora.cli import main; main()", "chat",
            "--adapter", str(folders[1]), "--base", str(tiny_source.path),
            "--max-new-tokens", "450", "--temperature", "1", "--precision", "fp32",
        ],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdin and process.stdout
    assert "template chat" in process.stdout.readline()
    process.stdin.write("Tea?\n")
    process.stdin.flush()
    for _ in range(8):  # the prompt and the beginning of the reply
        process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    process.stdin.write("Salt?\n\n")
    process.stdin.flush()
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "[stopped]" in out and out.count("\n> ") >= 2


@pytest.mark.parametrize(
    ("kind", "cached"),
    [("LlamaConfig", True), ("MambaConfig", False), ("Mamba2Config", False), ("RwkvConfig", False)],
)
def test_replies_of_recurrent_models_equal_those_of_transformers(
    kind: str, cached: bool, tmp_path: Path
) -> None:
    sizes = {
        "vocab_size": 500, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "state_size": 8, "num_heads": 4,
        "head_dim": 16, "n_groups": 1, "chunk_size": 16, "attention_hidden_size": 32,
    }  # fmt: skip
    torch.manual_seed(0)
    save_model(getattr(transformers, kind)(**sizes), tmp_path, 0.2)
    tiny_tokenizer().save_pretrained(tmp_path)
    opened = load_adapter_set(str(tmp_path), [], device="cpu", precision="fp32")
    assert opened.uses_cache == cached
    assert any("no key-value cache" in note for note in opened.notes) == (not cached)
    prompt = [5, 70, 300, 12, 9]
    reply = Generation(opened, "base", prompt, Sampling(12))
    list(reply.pieces())
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = list(prompt)
    assert reply.ids
    for token in reply.ids:
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        assert token == int(logits.argmax())
        ids.append(token)
