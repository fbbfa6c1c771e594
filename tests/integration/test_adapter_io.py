"""Adapter folders are verified by checksums and shapes, and no code in them is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slm_lora.adapters import attach
from slm_lora.adapters import io as adapter_io
from slm_lora.config.schema import AdapterSection, ModelSection
from slm_lora.errors import IntegrityError, NumericError, SlmLoraError, UsageError
from slm_lora.model.base import Base
from slm_lora.model.loading import load_base, load_tokenizer
from slm_lora.model.resolve import resolve
from slm_lora.runtime.checksums import FILES, SEAL

from ..support.tiny_model import tiny_tokenizer

LoadTiny = Callable[..., Base]


def saved(base: Base, folder: Path, section: AdapterSection | None = None) -> Path:
    """An adapter of the base, with a B that is not zero."""
    peft_model = attach.attach(
        base, section or AdapterSection(r=2, target_modules=("q_proj", "v_proj")), 0
    )
    torch.manual_seed(3)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    about = {"base": {"name": base.source.name, "sha256": base.source.sha256}}
    adapter_io.save(base, peft_model, folder, about, "{{ messages }}")
    attach.detach(peft_model)
    return folder


def refusal(base: Base, folder: Path) -> str:
    with pytest.raises(IntegrityError) as refused:
        adapter_io.load(base, folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_saved_metadata_has_a_checksum_of_every_file(load_tiny: LoadTiny, tmp_path: Path) -> None:
    base = load_tiny()
    folder = saved(base, tmp_path / "a")
    about = json.loads((folder / adapter_io.ABOUT).read_text())
    assert set(about[FILES]) == {p.name for p in folder.iterdir()} - {adapter_io.ABOUT}
    assert adapter_io.is_sealed(folder)
    attach.detach(adapter_io.load(base, folder))


@pytest.mark.parametrize(
    "name",
    [adapter_io.WEIGHTS, "adapter_config.json", "chat_template.jinja", adapter_io.ABOUT],
)
def test_truncated_flipped_or_missing_adapter_file_is_refused(
    load_tiny: LoadTiny, tmp_path: Path, name: str
) -> None:
    base = load_tiny()
    folder = saved(base, tmp_path / "a")
    path = folder / name
    content = path.read_bytes()
    for tenth in range(10):
        path.write_bytes(content[: len(content) * tenth // 10])
        refusal(base, folder)
    for position in range(0, len(content), max(1, len(content) // 40)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        refusal(base, folder)
    path.unlink()
    if name == adapter_io.ABOUT:  # as others' adapters: the command warns
        assert not adapter_io.is_sealed(folder)
    else:
        assert "missing" in refusal(base, folder)
    path.write_bytes(content)
    attach.detach(adapter_io.load(base, folder))


def other_base(folder: Path, seed: int = 7, **shape: int) -> Base:
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96, "head_dim": 8,
        "num_attention_heads": 6, "num_key_value_heads": 2,
    }  # fmt: skip
    config = LlamaConfig(vocab_size=len(tiny_tokenizer()), **{**sizes, **shape})
    LlamaForCausalLM(config).save_pretrained(folder)
    return load_base(
        resolve(ModelSection(name=str(folder))), device=torch.device("cpu"), precision="fp32"
    )


SHAPES = [{"hidden_size": 60}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}]


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_adapter_of_another_shape_is_refused_with_its_misfits(
    load_tiny: LoadTiny, tmp_path: Path, shape: dict[str, int], sealed: bool
) -> None:
    folder = saved(load_tiny(), tmp_path / "a")
    if not sealed:
        (folder / adapter_io.ABOUT).unlink()
    base = other_base(tmp_path / "other", **shape)
    before = [name for name, _ in base.model.named_parameters()]
    message = refusal(base, folder)
    assert ("was trained on tiny-llama with weights" in message) == sealed
    tensors = [
        f"layers.{layer}.self_attn.{module}_proj.lora_{side}"
        for layer in range(3)
        for module in "qv"
        for side in "AB"
    ]
    assert len([name for name in tensors if name in message]) == 4
    assert [name for name, _ in base.model.named_parameters()] == before


def test_adapter_of_other_weights_is_refused_only_if_sealed(
    load_tiny: LoadTiny, tmp_path: Path
) -> None:
    folder = saved(load_tiny(), tmp_path / "a")
    base = other_base(tmp_path / "other", seed=8)
    message = refusal(base, folder)
    assert "was trained on tiny-llama with weights" in message and "lora_" not in message
    # Without metadata nothing tells the weights apart: the command warns instead.
    (folder / adapter_io.ABOUT).unlink()
    peft_model = adapter_io.load(base, folder)
    assert all(p.any() for name, p in peft_model.named_parameters() if "lora_B" in name)


def test_adapter_with_non_finite_weights_is_not_saved(load_tiny: LoadTiny, tmp_path: Path) -> None:
    base = load_tiny()
    peft_model = attach.attach(base, AdapterSection(r=2, target_modules=("q_proj", "v_proj")), 0)
    list(attach.trainable_state(peft_model))
    next(p for n, p in peft_model.named_parameters() if "lora_B" in n).data[0, 0] = float("inf")
    with pytest.raises(NumericError, match=r"lora_B.* is not finite, so nothing was saved"):
        adapter_io.save(base, peft_model, tmp_path / "a", {}, None)
    assert not list(tmp_path.iterdir())


# --- code and paths outside the folder ---------------------------------------------------------


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


def test_pickled_adapters_are_not_unpickled(
    load_tiny: LoadTiny, tmp_path: Path, canary: Path
) -> None:
    base = load_tiny()
    folder = saved(base, tmp_path / "a")
    (folder / adapter_io.ABOUT).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    attach.detach(adapter_io.load(base, folder))
    (folder / adapter_io.WEIGHTS).unlink()
    with pytest.raises(UsageError, match=r"pickled weights .* are not loaded"):
        adapter_io.load(base, folder)
    shutil.copy(folder / "adapter_model.bin", folder / adapter_io.WEIGHTS)
    refusal(base, folder)
    assert not canary.exists()


def test_pickled_models_are_not_unpickled(tiny_folder: Path, tmp_path: Path, canary: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    with pytest.raises(UsageError, match="pickled weights"):
        resolve(ModelSection(name=str(folder)))
    assert not canary.exists()


def test_code_in_a_model_folder_is_not_run(tiny_folder: Path, tmp_path: Path, canary: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    code = f"import os; os.mkdir({str(canary)!r})\n"
    for module in ("modeling_evil", "configuration_evil", "tokenization_evil"):
        (folder / f"{module}.py").write_text(code)
    config["model_type"] = "evil"
    config["auto_map"] = {
        "AutoConfig": "configuration_evil.EvilConfig",
        "AutoModelForCausalLM": "modeling_evil.EvilForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(config))
    source = resolve(ModelSection(name=str(folder)))
    with pytest.raises(UsageError):
        load_base(source, device=torch.device("cpu"), precision="fp32")
    about = json.loads((folder / "tokenizer_config.json").read_text())
    about["auto_map"] = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    about["tokenizer_class"] = "Evil"
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    with pytest.raises(UsageError):
        load_tokenizer(source)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "a/../../x.safetensors"])
def test_shards_outside_the_model_folder_are_refused(
    tiny_folder: Path, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    (folder / "model.safetensors").rename(tmp_path / "x.safetensors")
    shutil.copy(tmp_path / "x.safetensors", folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match="names a file outside of itself"):
        resolve(ModelSection(name=str(folder)))


def reseal(folder: Path, files: dict[str, str]) -> None:
    from slm_lora.runtime.checksums import content_hash

    about = json.loads((folder / adapter_io.ABOUT).read_text())
    about[FILES] = files
    del about[SEAL]
    (folder / adapter_io.ABOUT).write_text(json.dumps({**about, SEAL: content_hash(about)}))


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "C:\\x", ""])
def test_metadata_naming_files_outside_the_adapter_is_refused(
    load_tiny: LoadTiny, tmp_path: Path, name: str
) -> None:
    base = load_tiny()
    folder = saved(base, tmp_path / "a")
    (tmp_path / "secret").write_text("x")
    reseal(folder, {name: "0" * 64})
    assert "names a file outside of itself" in refusal(base, folder)


def test_links_out_of_the_adapter_folder_are_refused(load_tiny: LoadTiny, tmp_path: Path) -> None:
    base = load_tiny()
    folder = saved(base, tmp_path / "a")
    (folder / adapter_io.WEIGHTS).rename(tmp_path / "elsewhere")
    (folder / adapter_io.WEIGHTS).symlink_to(tmp_path / "elsewhere")
    assert "a link out of its folder" in refusal(base, folder)
    (folder / adapter_io.ABOUT).unlink()
    assert "a link out of its folder" in refusal(base, folder)


def test_adapter_in_the_hub_cache_is_loaded_through_its_links(
    load_tiny: LoadTiny, tmp_path: Path
) -> None:
    base = load_tiny()
    folder = saved(base, tmp_path / "models--x--y" / "snapshots" / "c0ffee")
    blobs = folder.parent.parent / "blobs"
    blobs.mkdir()
    for path in list(folder.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    peft_model = adapter_io.load(base, folder)
    assert all(p.any() for name, p in peft_model.named_parameters() if "lora_B" in name)
    attach.detach(peft_model)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, UsageError),
        ({"peft_type": "PROMPT_TUNING"}, UsageError),
        ({"peft_type": None}, UsageError),
        ({"r": "many"}, SlmLoraError),
        ({"target_modules": 7}, SlmLoraError),
    ],
)
def test_adapter_config_of_another_kind_is_refused_without_running_code(
    load_tiny: LoadTiny, tmp_path: Path, change: dict[str, Any], error: type[Exception],
    canary: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    base = load_tiny()
    folder = saved(base, tmp_path / "a")
    (folder / adapter_io.ABOUT).unlink()
    (tmp_path / "evil.py").write_text(f"import os; os.mkdir({str(canary)!r})\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | change))
    with pytest.raises(error):
        adapter_io.load(base, folder)
    assert not canary.exists()
