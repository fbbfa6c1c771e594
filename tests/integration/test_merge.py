"""Merged models equal base+adapter in plain transformers, or are not written."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from slm_lora.adapters import attach
from slm_lora.adapters import io as adapter_io
from slm_lora.config.schema import AdapterSection
from slm_lora.errors import IntegrityError, UsageError
from slm_lora.export import merge as merging
from slm_lora.export.llama_cpp import export
from slm_lora.export.merge import merge
from slm_lora.export.trained import read_trained
from slm_lora.export.verify import BOUNDS, PROMPTS, Verification, check_bounds
from slm_lora.model.base import Base
from slm_lora.model.resolve import ModelSource, hash_weights
from slm_lora.runtime.progress import Reporter

from ..support.exports import change_metadata, make_adapter

LoadTiny = Callable[..., Base]
IDS = torch.randint(0, 400, (3, 17), generator=torch.Generator().manual_seed(5))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model.eval()(input_ids=IDS).logits
    return values


@pytest.fixture(scope="module")
def adapter(tiny_source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter that no test changes."""
    return make_adapter(tiny_source, tmp_path_factory.mktemp("adapters") / "adapter")


@pytest.fixture(scope="module")
def merged(
    adapter: Path, tiny_source: ModelSource, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Verification]:
    """It, merged in fp32 and verified in a new process."""
    folder = tmp_path_factory.mktemp("merged") / "merged"
    return folder, merge(read_trained(adapter), folder, "fp32", tiny_source.path)


def check_merged(
    folder: Path, verification: Verification, adapter: Path, source: ModelSource
) -> None:
    assert verification.prompts == verification.agree == len(set(PROMPTS)) == 80
    assert verification.worst_difference <= 1e-5 * verification.max_logit
    base = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)
    base_logits = logits(base)
    expected = logits(PeftModel.from_pretrained(base, adapter))
    merged = logits(AutoModelForCausalLM.from_pretrained(folder))
    assert (merged - expected).abs().max() <= 1e-5 * expected.abs().max()
    # Negative control: the adapter has a visible effect.
    assert (merged - base_logits).abs().max() > 0.05 * base_logits.abs().max()


def test_merged_model_equals_base_with_adapter(
    merged: tuple[Path, Verification], adapter: Path, tiny_source: ModelSource
) -> None:
    check_merged(*merged, adapter, tiny_source)


@pytest.mark.usefixtures("verify_in_process")
@pytest.mark.parametrize("kind", ["rslora", "dora", "pissa"])
def test_merged_model_equals_base_with_adapter_of_other_methods(
    kind: str, tiny_source: ModelSource, tmp_path: Path
) -> None:
    folder = make_adapter(tiny_source, tmp_path / "adapter", kind)
    verification = merge(read_trained(folder), tmp_path / "merged", "fp32", tiny_source.path)
    check_merged(tmp_path / "merged", verification, folder, tiny_source)


def test_merged_folder_has_all_files_and_no_path_of_this_machine(
    merged: tuple[Path, Verification], adapter: Path, tiny_source: ModelSource
) -> None:
    folder, _ = merged
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json", "chat_template.jinja", "slm_lora.json",
    }  # fmt: skip
    template = (adapter / "chat_template.jinja").read_bytes()
    assert (folder / "chat_template.jinja").read_bytes() == template
    prompt = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "Why?"}], tokenize=False
    )
    assert prompt == "Instruction:\nWhy?\nResponse:\n"
    metadata = json.loads((folder / "slm_lora.json").read_text())
    assert metadata["base"] == json.loads((adapter / "slm_lora.json").read_text())["base"]
    assert metadata["merged"]["dtype"] == "fp32"
    assert str(folder.parent.parent) not in "".join(p.read_text() for p in folder.glob("*.json"))
    # The base is unchanged.
    assert hash_weights(tiny_source.path) == tiny_source.sha256
    assert read_trained(folder).is_full_model


@pytest.mark.usefixtures("verify_in_process")
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_merge_is_the_fp32_merge_rounded_once(
    dtype: Any,
    merged: tuple[Path, Verification],
    adapter: Path,
    tiny_source: ModelSource,
    tmp_path: Path,
) -> None:
    merge(read_trained(adapter), tmp_path / "half", dtype, tiny_source.path)
    exact = load_file(merged[0] / "model.safetensors")
    half = load_file(tmp_path / "half" / "model.safetensors")
    dtype_ = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    assert exact.keys() == half.keys()
    for name, tensor in exact.items():
        assert torch.equal(half[name], tensor.to(dtype_)), name


def test_merge_on_another_base_is_refused(tiny_source: ModelSource, tmp_path: Path) -> None:
    folder = make_adapter(tiny_source, tmp_path / "adapter")
    other_base = tmp_path / "other"
    model = AutoModelForCausalLM.from_pretrained(tiny_source.path)
    model.model.norm.weight.data *= 1.01
    model.save_pretrained(other_base)
    AutoTokenizer.from_pretrained(tiny_source.path).save_pretrained(other_base)
    with pytest.raises(IntegrityError, match="was trained on tiny-llama with weights"):
        merge(read_trained(folder), tmp_path / "merged", "fp32", other_base)
    with pytest.raises(UsageError, match="not found; give its folder: --base PATH"):
        merge(read_trained(folder), tmp_path / "merged", "fp32")
    assert not (tmp_path / "merged").exists()


def test_merge_of_a_full_model_is_refused(load_tiny: LoadTiny, tmp_path: Path) -> None:
    base = load_tiny("fp32")
    trained = attach.attach(base, AdapterSection(kind="full"), seed=0)
    metadata = {
        "base": {"name": "tiny-llama", "revision": None, "sha256": base.source.sha256},
        "template": {"kind": "plain"},
    }
    adapter_io.save(base, trained, tmp_path / "model", metadata, None)
    with pytest.raises(UsageError, match="a full model, not an adapter; nothing to merge"):
        merge(read_trained(tmp_path / "model"), tmp_path / "merged", "fp32")


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_merge_into_tied_embeddings_is_refused(
    target: str, tiny_source: ModelSource, tmp_path: Path
) -> None:
    folder = make_adapter(tiny_source, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_source.path)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", target])
    get_peft_model(base, config).save_pretrained(folder, save_embedding_layers=False)
    change_metadata(folder)
    with pytest.raises(UsageError, match=r"put embedding of tiny-llama, which are tied"):
        merge(read_trained(folder), tmp_path / "merged", "fp32", tiny_source.path)
    assert not (tmp_path / "merged").exists()


def test_merge_replaces_no_existing_folder(tiny_source: ModelSource, tmp_path: Path) -> None:
    folder = make_adapter(tiny_source, tmp_path / "adapter")
    before = sorted(folder.iterdir())
    with pytest.raises(UsageError, match="exists and is not replaced; choose another name"):
        merge(read_trained(folder), folder, "fp32", tiny_source.path)
    assert sorted(folder.iterdir()) == before


@pytest.mark.usefixtures("verify_in_process")
def test_merge_and_export_print_their_progress(tiny_source: ModelSource, tmp_path: Path) -> None:
    folder = make_adapter(tiny_source, tmp_path / "adapter")
    output = io.StringIO()
    reporter = Reporter(Console(file=output, width=200))
    merge(read_trained(folder), tmp_path / "merged", "fp32", tiny_source.path, reporter)
    assert [line.split()[0] for line in output.getvalue().splitlines()] == [
        "locating", "merging", "verifying"
    ]  # fmt: skip
    export(read_trained(tmp_path / "merged"), tmp_path / "gguf", "merged", "f16", None, reporter)
    assert output.getvalue().splitlines()[3:] == ["  writing merged-f16.gguf"]


@pytest.mark.usefixtures("verify_in_process")
def test_failed_verification_leaves_no_merged_folder(
    tiny_source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_adapter(tiny_source, tmp_path / "adapter")
    write = merging.write_merged

    def write_corrupted(trained: Any, source: Any, target: Path, dtype: Any) -> None:
        write(trained, source, target, dtype)
        weights = load_file(target / "model.safetensors")
        name = next(name for name in weights if "q_proj" in name)
        weights[name] = weights[name] * 1.001
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(merging, "write_merged", write_corrupted)
    with pytest.raises(IntegrityError, match=r"differs from base\+adapter: on 80 of 80 prompts"):
        merge(read_trained(folder), tmp_path / "merged", "fp32", tiny_source.path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.usefixtures("verify_in_process")
def test_merge_of_an_adapter_without_effect_is_refused(
    tiny_source: ModelSource, tmp_path: Path
) -> None:
    folder = make_adapter(tiny_source, tmp_path / "adapter", scale=0.0)
    with pytest.raises(IntegrityError, match="too close to its base"):
        merge(read_trained(folder), tmp_path / "merged", "fp32", tiny_source.path)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("dtype", BOUNDS)
def test_verification_beyond_any_bound_is_refused(dtype: str) -> None:
    passing = Verification(80, 70, 900, 1.0, 1e-6, 2e-5, 3.0, 1.0)
    check_bounds(passing, dtype, "it")
    nan = float("nan")
    for change in (
        {"agree": 63}, {"worst_by_noise": 11.0}, {"worst_by_noise": nan}, {"base_difference": nan},
        {"worst_difference": nan}, {"base_difference": 2e-5},
    ):  # fmt: skip
        with pytest.raises(IntegrityError):
            check_bounds(replace(passing, **change), dtype, "it")  # type: ignore[arg-type]
