"""Adapters by PEFT alone: computed as by PEFT, or refused with kind and alternative."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from slm_lora.adapters import attach
from slm_lora.adapters import io as adapter_io
from slm_lora.config.schema import ModelSection
from slm_lora.errors import SlmLoraError, UsageError
from slm_lora.model.base import Base
from slm_lora.model.forward import document_logits
from slm_lora.model.loading import load_base
from slm_lora.model.resolve import resolve

IDS = torch.randint(0, 400, (17,), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def untied(tiny_folder: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.config.tie_word_embeddings = False
    torch.manual_seed(1)
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.3)
    model.save_pretrained(tmp_path / "untied")
    return tmp_path / "untied"


def foreign(
    base: Path,
    folder: Path,
    save_embeddings: bool | str = "auto",
    extra_tokens: int = 0,
    config: Any = None,
    **settings: Any,
) -> Path:
    """An adapter by PEFT alone, none of whose numbers are zero."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if extra_tokens:
        model.resize_token_embeddings(model.config.vocab_size + extra_tokens, mean_resizing=False)
    if config is None:
        settings = {"target_modules": ["q_proj"], **settings}
        config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings)
    peft_model = get_peft_model(model, config)
    torch.manual_seed(3)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    peft_model.save_pretrained(folder, save_embedding_layers=save_embeddings)
    return folder


def load(folder: Path) -> Base:
    source = resolve(ModelSection(name=str(folder)))
    return load_base(source, device=torch.device("cpu"), precision="fp32")


def refusal(base: Path, folder: Path) -> str:
    with pytest.raises(SlmLoraError) as refused:
        adapter_io.load(load(base), folder)
    message = str(refused.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj", "embed_tokens"]},  # with PEFT's copy of the base's
        {"target_modules": ["q_proj", "embed_tokens"], "save_embeddings": False},
        {"trainable_token_indices": [7, 40, 41, 300]},
        {"save_embeddings": True},  # copies beside an adapter on layers
        {"init_lora_weights": "gaussian", "rank_pattern": {"q_proj": 2}, "use_rslora": True},
    ],
)
def test_foreign_adapter_logits_equal_those_of_peft(
    settings: dict[str, Any], untied: Path, tmp_path: Path
) -> None:
    folder = foreign(untied, tmp_path / "adapter", **settings)
    base = load(untied)
    adapter_io.load(base, folder)
    with torch.no_grad():
        ours = document_logits(base, [IDS])
        model = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.float32)
        bare = model(IDS.unsqueeze(0)).logits[0]
        peft_model = PeftModel.from_pretrained(model, str(folder)).eval()
        theirs = peft_model(IDS.unsqueeze(0)).logits[0]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert (ours - bare).abs().max() > 1e-2 * theirs.abs().max()


@pytest.mark.parametrize("ties", [False, True])
def test_detaching_a_foreign_adapter_restores_the_base(
    ties: bool, untied: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """`evaluate` scores the base beside an adapter, which may hold whole modules in its place."""
    path = tiny_folder if ties else untied
    embeddings = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    head_and_embeddings = {"modules_to_save": ["lm_head", "embed_tokens"]}
    folder = foreign(path, tmp_path / "adapter", **(embeddings if ties else head_and_embeddings))
    base = load(path)

    def named() -> list[tuple[str, int, bool]]:
        parameters = base.model.named_parameters(remove_duplicate=False)
        return [
            (name, parameter.data_ptr(), parameter.requires_grad) for name, parameter in parameters
        ]

    with torch.no_grad():
        before, named_before = document_logits(base, [IDS]), named()
        peft_model = adapter_io.load(base, folder)
        assert not torch.equal(document_logits(base, [IDS]), before)
        attach.detach(peft_model)
        assert torch.equal(document_logits(base, [IDS]), before)
    assert named() == named_before


def test_adapters_peft_cannot_load_together_are_refused(untied: Path, tmp_path: Path) -> None:
    names = {
        "one": foreign(untied, tmp_path / "one", modules_to_save=["embed_tokens"]),
        "two": foreign(untied, tmp_path / "two", target_modules=["q_proj", "embed_tokens"]),
    }
    base = load(untied)
    with torch.no_grad():
        before = document_logits(base, [IDS])
        with pytest.raises(
            UsageError, match=r"two: PEFT does not load it beside .*one .*at a time"
        ):
            adapter_io.load_several(base, names)
        assert torch.equal(document_logits(base, [IDS]), before)


MERGE = r"merge it with PEFT \(merge_and_unload\), and name the merged folder in model.name"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_modules": ["lm_head"]}, f"an adapter on lm_head: .*{MERGE}"),
        (
            {"target_modules": ["lm_head"], "save_embeddings": False},
            f"an adapter on lm_head: .*{MERGE}",
        ),
        (
            {"alora_invocation_tokens": [5, 9]},
            r"activated LoRA \(alora_invocation_tokens\).* use it with PEFT itself",
        ),
        ({"layer_replication": [(0, 2), (0, 2)]}, f"layer_replication: .*{MERGE}"),
        ({"init_lora_weights": "pissa"}, f"init_lora_weights = pissa: .*{MERGE}"),
        ({"init_lora_weights": "olora"}, f"init_lora_weights = olora: .*{MERGE}"),
        (
            {"extra_tokens": 3, "save_embeddings": True},
            r"vocabulary was changed: its lm_head and embed_tokens have 437 rows, untied has 434; "
            rf"give the base that many \(resize_token_embeddings\), {MERGE}",
        ),
        (
            {"config": IA3Config(task_type="CAUSAL_LM")},
            f"of kind 'IA3'; loaded are LORA; .*{MERGE}",
        ),
        (
            {"config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)},
            r"of kind 'PROMPT_TUNING'; loaded are LORA; .* it cannot be merged",
        ),
    ],
)
def test_unsupported_foreign_adapters_are_refused_with_the_alternative(
    settings: dict[str, Any], message: str, untied: Path, tmp_path: Path
) -> None:
    rows = load(untied).model.config.vocab_size
    message = message.replace("437", str(rows + 3)).replace("434", str(rows))
    folder = foreign(untied, tmp_path / "adapter", **settings)
    with pytest.raises(SlmLoraError, match=message):
        adapter_io.load(load(untied), folder)


def test_adapter_on_a_tied_lm_head_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = foreign(tiny_folder, tmp_path / "adapter", target_modules=["lm_head"])
    message = refusal(tiny_folder, folder)
    assert "an adapter on lm_head: " in message
    assert "one matrix, so merging would change both: use it with PEFT itself" in message


def test_adapter_with_embeddings_of_another_base_is_refused(untied: Path, tmp_path: Path) -> None:
    folder = foreign(untied, tmp_path / "adapter", True)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if "embed_tokens" in name)
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    message = refusal(untied, folder)
    assert "contains embed_tokens that differ from those of untied" in message


def test_adapter_with_trained_biases_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=420, hidden_size=48, intermediate_size=96, num_hidden_layers=1,
            num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=512,
        )
    ).save_pretrained(tmp_path / "biased")  # fmt: skip
    folder = foreign(tmp_path / "biased", tmp_path / "adapter", bias="all")
    assert "bias = 'all': 3 biases of the base were trained" in refusal(tmp_path / "biased", folder)
    # Without biases in the base, the setting has no effect.
    adapter_io.load(load(tiny_folder), foreign(tiny_folder, tmp_path / "other", bias="all"))


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"use_something_new": True}, True),
        ({"something_new_config": {"a": 1}}, True),
        ({"use_something_new": False, "something_new_config": None, "new_size": 16}, False),
    ],
)
def test_unknown_peft_config_keys_are_refused_unless_off(
    change: dict[str, Any], refused: bool, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = foreign(tiny_folder, tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if refused:
        assert "is unknown to the installed PEFT; pip install -U peft" in refusal(
            tiny_folder, folder
        )
    else:
        adapter_io.load(load(tiny_folder), folder)


def test_adapter_folder_given_as_model_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = foreign(tiny_folder, tmp_path / "adapter")
    message = rf"an adapter, not a model; .*model.name={tiny_folder}.* --adapter; or merge"
    with pytest.raises(UsageError, match=message):
        resolve(ModelSection(name=str(folder)))
    # transformers would load the adapter's base in the place of what lies beside it.
    shutil.copytree(tiny_folder, tmp_path / "both")
    shutil.copy(folder / "adapter_config.json", tmp_path / "both")
    with pytest.raises(UsageError, match="an adapter, not a model"):
        resolve(ModelSection(name=str(tmp_path / "both")))


Json = dict[str, Any]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
            "bitsandbytes, 4 bits",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, "gptq, 8 bits"),
        ({"quantization_config": {"quant_method": "awq", "w_bit": 4}}, "awq, 4 bits"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
        ({"compression_config": {"format": "pack-quantized"}}, "pack-quantized"),
        ({"text_config": {"quantization_config": {"quant_method": "hqq"}}}, "hqq"),
    ],
)
def test_quantised_base_weights_are_refused_by_kind(
    change: Json, kind: str, tiny_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config: Json = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UsageError, match=rf"quantised \({kind}\); .*model.quantization=nf4"):
        resolve(ModelSection(name=str(folder)))


@pytest.mark.parametrize("change", [{"quantization_config": None}, {"quantization_config": {}}])
def test_empty_quantization_config_is_no_quantisation(
    change: Json, tiny_folder: Path, tmp_path: Path, load_tiny: Callable[..., Base]
) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config: Json = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert resolve(ModelSection(name=str(folder))).sha256 == load_tiny().source.sha256
    (folder / "quantize_config.json").write_text('{"bits": 4}')
    with pytest.raises(UsageError, match=r"quantised \(gptq\)"):
        resolve(ModelSection(name=str(folder)))
