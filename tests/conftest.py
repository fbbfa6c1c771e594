"""Fixtures of all tests: a tiny Llama of random weights with its own tokenizer, and no network."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from slm_lora.config.schema import ModelSection
from slm_lora.export import merge, verify
from slm_lora.model.base import Base
from slm_lora.model.loading import load_base
from slm_lora.model.resolve import ModelSource, resolve

from .support.lab import Lab
from .support.rows import make_rows, write_jsonl
from .support.tiny_model import tiny_tokenizer

# A busy machine is no failure of a test.
settings.register_profile("slow", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("slow")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny matrices are slower on two threads, and sums have one order, in workers too."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def freeze_imported_objects() -> None:
    """Runs collect garbage, and would search a million objects of imported libraries each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_name_lookups(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails a test in which a name is looked up: libraries ask hubs, and swallow the failure."""
    looked_up: list[str] = []
    real = socket.getaddrinfo

    def look_up(host: str, *rest: Any, **more: Any) -> Any:
        if host not in ("localhost", "127.0.0.1", "::1", None):
            looked_up.append(host)
            raise socket.gaierror(f"{host}: no network in tests")
        return real(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    yield
    assert not looked_up, f"names looked up: {looked_up}"


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


@pytest.fixture
def lab(tmp_path: Path, tiny_folder: Path) -> Lab:
    """A recipe, rows and the tiny model, without results."""
    return Lab(tmp_path / "lab", tiny_folder)


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
            padded=plain,
        )

    return load


@pytest.fixture
def verify_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verify merged models by the same comparison, without the imports of a new process."""
    monkeypatch.setattr(merge, "verify", verify.compare_logits)


@pytest.fixture
def dolly_file(tmp_path: Path) -> Path:
    """120 small rows in Dolly's format."""
    return write_jsonl(tmp_path / "rows.jsonl", make_rows(120))
