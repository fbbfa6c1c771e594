"""A tiny Llama with a tokenizer of its own, made here: real architecture, random weights."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from slm_lora.config.schema import ModelSection
from slm_lora.model.base import Base
from slm_lora.model.loading import load_base
from slm_lora.model.resolve import ModelSource, resolve

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

TOPICS = (
    "rivers", "bread", "sailing", "glass", "bridges", "bees", "maps", "clocks", "tea", "violins",
    "paper", "salt",
)  # fmt: skip


def make_rows(count: int) -> list[dict[str, str]]:
    """Small distinct instruction rows, in our own words."""
    rows = []
    for number in range(count):
        topic = TOPICS[number % len(TOPICS)]
        rows.append(
            {
                "instruction": f"Tell me fact {number} about {topic}.",
                "context": f"A note on {topic}, number {number}." if number % 3 == 0 else "",
                "response": f"Fact {number}: {topic} " + "matter a great deal. " * (number % 4 + 1),
                "category": "open_qa" if number % 2 else "closed_qa",
            }
        )
    return rows


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices are slower on two threads, and sums have one order."""
    torch.set_num_threads(1)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with SmolLM2's special tokens and a chat template of the same kind."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator([" ".join(row.values()) for row in make_rows(60)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(autouse=True)
def nobody_asks_the_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test in which a name is looked up: libraries ask hubs, and swallow the failure."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def look_up(host: str, *rest: Any, **more: Any) -> Any:
        if host not in ("localhost", "127.0.0.1", "::1", None):
            asked.append(host)
            raise socket.gaierror(f"{host}: no network in tests")
        return real(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    yield
    assert not asked, f"asked the network for {asked}"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as users have them: config, safetensors, fast tokenizer, chat template."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = tiny_tokenizer()
    torch.manual_seed(7)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.3,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_source(tiny_folder: Path) -> ModelSource:
    """The tiny model, resolved as a recipe would."""
    return resolve(ModelSection(name=str(tiny_folder)))


@pytest.fixture
def load_tiny(tiny_source: ModelSource) -> Callable[..., Base]:
    """Load the tiny model: `load_tiny(precision="fp32", plain=False)`."""

    def load(precision: str = "fp32", plain: bool = False) -> Base:
        return load_base(
            tiny_source,
            device=torch.device("cpu"),
            precision=precision,  # type: ignore[arg-type]
            plain=plain,
        )

    return load


@pytest.fixture
def dolly_file(tmp_path: Path) -> Path:
    """120 small rows in Dolly's format."""
    return write_jsonl(tmp_path / "rows.jsonl", make_rows(120))
