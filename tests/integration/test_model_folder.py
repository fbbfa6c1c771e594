"""Model folders: files of the base, and configurations that transformers 4 reads correctly."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from slm_lora.adapters import attach
from slm_lora.adapters import io as adapter_io
from slm_lora.config.schema import AdapterSection, ModelSection
from slm_lora.export.merge import merge
from slm_lora.export.trained import read_trained
from slm_lora.model.loading import load_base
from slm_lora.model.model_folder import (
    TOKENIZER_FILES,
    add_transformers4_format,
    transformers4_tokenizer_config,
)
from slm_lora.model.resolve import hash_config, resolve

from ..support.exports import make_adapter
from ..support.tiny_model import CHAT_TEMPLATE, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("verify_in_process")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
OLDER_TOKENIZER: dict[str, Any] = {
    "add_prefix_space": False,
    "added_tokens_decoder": {
        str(number): {
            "content": token, "lstrip": False, "normalized": False, "rstrip": False,
            "single_word": False, "special": True,
        }
        for number, token in enumerate(SPECIAL)
    },
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "bos_token": "<|im_start|>",
    "chat_template": CHAT_TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "model_max_length": 512,
    "pad_token": "<|im_end|>",
    "tokenizer_class": "GPT2Tokenizer",
    "unk_token": "<|endoftext|>",
}  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def change_json(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**read_json(path), **keys}))


@pytest.fixture
def older(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny model in the files of transformers 4, as for most models on the hub."""
    folder = tmp_path / "models" / "older"
    shutil.copytree(tiny_folder, folder)
    config = read_json(folder / "config.json")
    del config["rope_parameters"], config["dtype"]
    config |= {"rope_theta": 500000.0, "rope_scaling": None, "torch_dtype": "float32"}
    config |= {"transformers_version": "4.46.0", "_name_or_path": "/home/somebody/model"}
    (folder / "config.json").write_text(json.dumps(config, indent=4))
    (folder / "tokenizer_config.json").write_text(json.dumps(OLDER_TOKENIZER, indent=1))
    raw = read_json(folder / "tokenizer.json")["model"]
    (folder / "vocab.json").write_text(json.dumps(raw["vocab"]))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in raw["merges"]))
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    # An inconsistent configuration, which transformers 5 refuses to write.
    (folder / "generation_config.json").write_text(
        '{"do_sample": false, "temperature": 0.6, "eos_token_id": [2, 0]}'
    )
    (folder / "chat_template.jinja").unlink()
    return folder


def merged(base: Path, tmp_path: Path) -> Path:
    source = resolve(ModelSection(name=str(base)))
    folder = make_adapter(source, tmp_path / "adapter")
    merge(read_trained(folder), tmp_path / "merged", "bf16", base)
    return tmp_path / "merged"


def trained_whole(base: Path, tmp_path: Path) -> Path:
    source = resolve(ModelSection(name=str(base)))
    loaded = load_base(source, device=torch.device("cpu"), precision="bf16")
    trained = attach.attach(loaded, AdapterSection(kind="full"), seed=0)
    for parameter in trained.parameters():
        parameter.data *= 1.01
    about = {
        "base": {"name": source.name, "revision": None, "sha256": source.sha256},
        "template": {"kind": "plain"},
    }
    adapter_io.save(loaded, trained, tmp_path / "whole", about, "{{ messages[0].content }}")
    return tmp_path / "whole"


Make = Callable[[Path, Path], Path]
MERGED_AND_FULL = pytest.mark.parametrize("make", [merged, trained_whole])


@MERGED_AND_FULL
def test_model_folder_keeps_files_of_the_base_but_template_and_dtype(
    older: Path, tmp_path: Path, make: Make
) -> None:
    folder = make(older, tmp_path)
    template = (folder / "chat_template.jinja").read_text()
    copied = [path.name for path in older.iterdir() if path.name in TOKENIZER_FILES]
    assert len(copied) == 5
    for name in {*copied, "generation_config.json"} - {"tokenizer_config.json"}:
        assert (folder / name).read_bytes() == (older / name).read_bytes(), name
    # The same template in every file that may contain one.
    assert template != CHAT_TEMPLATE
    tokenizer = {**OLDER_TOKENIZER, "chat_template": template}
    assert read_json(folder / "tokenizer_config.json") == tokenizer
    config = {**read_json(older / "config.json"), "torch_dtype": "bfloat16"}
    del config["_name_or_path"]
    assert read_json(folder / "config.json") == config
    assert AutoConfig.from_pretrained(folder).rope_parameters["rope_theta"] == 500000.0


@MERGED_AND_FULL
def test_trained_template_replaces_named_templates(older: Path, tmp_path: Path, make: Make) -> None:
    names = [{"name": name, "template": CHAT_TEMPLATE} for name in ("default", "tool_use")]
    change_json(older / "tokenizer_config.json", chat_template=names)
    (older / "additional_chat_templates").mkdir()
    (older / "additional_chat_templates" / "rag.jinja").write_text(CHAT_TEMPLATE)
    folder = make(older, tmp_path)
    template = (folder / "chat_template.jinja").read_text()
    assert read_json(folder / "tokenizer_config.json")["chat_template"] == template
    assert AutoTokenizer.from_pretrained(folder).chat_template == template
    assert not (folder / "additional_chat_templates").exists()


@MERGED_AND_FULL
def test_transformers_5_folders_get_the_keys_of_transformers_4(
    tiny_folder: Path, tmp_path: Path, make: Make
) -> None:
    folder = make(tiny_folder, tmp_path)
    config, before = (read_json(path / "config.json") for path in (folder, tiny_folder))
    assert "rope_theta" not in before
    assert config == {**before, "dtype": "bfloat16", "rope_theta": 10000.0, "rope_scaling": None}
    tokenizer = read_json(folder / "tokenizer_config.json")
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert tokenizer["additional_special_tokens"] == ["<|im_start|>"]
    assert "extra_special_tokens" not in tokenizer
    ours, theirs = map(AutoTokenizer.from_pretrained, (folder, tiny_folder))
    text = "<|im_start|>user\n37 rivers, über <|endoftext|><|im_end|>"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert sorted(ours.all_special_ids) == sorted(theirs.all_special_ids)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_template_is_kept_only_if_rows_were_rendered_with_it(
    kind: str, several: bool, older: Path, tmp_path: Path
) -> None:
    """The folder has the base's own template if the rows were rendered with it, else none."""
    if several:
        names = {"default": CHAT_TEMPLATE, "tool_use": "{{ 'tools' }}"}
        listed = [{"name": name, "template": template} for name, template in names.items()]
        change_json(older / "tokenizer_config.json", chat_template=listed)
    source = resolve(ModelSection(name=str(older)))
    base = load_base(source, device=torch.device("cpu"), precision="fp32")
    trained = attach.attach(base, AdapterSection(kind="full"), seed=0)
    adapter_io.save(base, trained, tmp_path / "whole", {"template": {"kind": kind}}, None)
    own = CHAT_TEMPLATE if kind == "chat" else None
    assert read_json(tmp_path / "whole" / "tokenizer_config.json").get("chat_template") == own
    assert AutoTokenizer.from_pretrained(tmp_path / "whole").chat_template == own


def test_untied_weights_are_saved_with_tie_word_embeddings_false(
    older: Path, tmp_path: Path
) -> None:
    weights = load_file(older / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 1.01
    save_file(weights, older / "model.safetensors", {"format": "pt"})
    folder = trained_whole(older, tmp_path)
    # transformers 5 detects different embeddings; 4 would use the input embedding for both.
    assert read_json(folder / "config.json")["tie_word_embeddings"] is False
    saved = load_file(folder / "model.safetensors")
    assert not torch.equal(saved["lm_head.weight"], saved["model.embed_tokens.weight"])


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
BY_LAYERS = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
}


@pytest.mark.parametrize(
    ("kind", "parameters", "expected"),
    [
        ("llama", LLAMA3, {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3"}}),
        ("qwen3", {"rope_type": "default", "rope_theta": 1e6}, {"rope_theta": 1e6}),
        (
            "qwen2",
            {"rope_type": "yarn", "rope_theta": 7e5, "factor": 4.0},
            {"rope_theta": 7e5, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        ),
        (
            "phi",
            {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.4},
            {"rope_theta": 2e4, "partial_rotary_factor": 0.4},
        ),
        (
            "gpt_neox",
            {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5},
            {"rotary_emb_base": 2e4, "rotary_pct": 0.5},
        ),
        (
            "gemma3_text",
            BY_LAYERS,
            {
                "rope_theta": 2e6,
                "rope_local_base_freq": 3e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        (
            "modernbert-decoder",
            {**BY_LAYERS, "full_attention": {"rope_type": "default", "rope_theta": 2e6}},
            {"global_rope_theta": 2e6, "local_rope_theta": 3e4},
        ),
        # Without the key transformers 4 defaults to yarn.
        ("gpt_oss", {"rope_type": "default", "rope_theta": 2e4}, {"rope_theta": 2e4}),
        (
            "qwen3_moe",
            {"rope_type": "default", "rope_theta": 2e4},
            {"rope_theta": 2e4, "num_experts": 128},
        ),
        ("gpt2", None, {}),
    ],
)
def test_rope_parameters_get_the_keys_of_transformers_4(
    kind: str, parameters: dict[str, Any] | None, expected: dict[str, Any], tmp_path: Path
) -> None:
    settings = {} if parameters is None else {"rope_parameters": parameters}
    AutoConfig.for_model(kind, **settings).save_pretrained(tmp_path)
    before, digest = read_json(tmp_path / "config.json"), hash_config(tmp_path)
    read_before = AutoConfig.from_pretrained(tmp_path).to_dict()
    add_transformers4_format(tmp_path)
    after = read_json(tmp_path / "config.json")
    assert before.items() <= after.items()
    added = {key: value for key, value in after.items() if key not in before}
    assert added.keys() == expected.keys() | ({"rope_scaling"} if parameters else set())
    for key, value in expected.items():
        assert value.items() <= added[key].items() if key == "rope_scaling" else added[key] == value
    assert (added.get("rope_scaling") is None) == ("rope_scaling" not in expected)
    read_after = AutoConfig.from_pretrained(tmp_path).to_dict()
    assert {**read_after, **read_before} == read_after
    assert read_after.get("rope_parameters") == read_before.get("rope_parameters")
    # The hash of the configuration, part of run identities, is unchanged.
    assert hash_config(tmp_path) == digest
    change_json(tmp_path / "config.json", rope_theta=11.0)
    assert hash_config(tmp_path) != digest


def test_tokenizer_config_gets_the_keys_of_transformers_4() -> None:
    assert transformers4_tokenizer_config(OLDER_TOKENIZER) == OLDER_TOKENIZER
    named = {"extra_special_tokens": {"image_token": "<image>"}, "tokenizer_class": "Own"}
    assert transformers4_tokenizer_config(named) == named
    assert transformers4_tokenizer_config(
        {
            "tokenizer_class": "TokenizersBackend",
            "extra_special_tokens": ["<a>", "<b>"],
            "additional_special_tokens": ["<b>"],
            "model_specific_special_tokens": {"image_token": "<image>"},
        }
    ) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<b>", "<a>"],
        "extra_special_tokens": {"image_token": "<image>"},
    }


SIZES: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.2,
    "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama3": ("llama", LLAMA3, {}),
    "yarn": ("qwen2", {"rope_type": "yarn", "rope_theta": 7e5, "factor": 4.0}, {}),
    "partial": ("phi", {"rope_theta": 2e4, "partial_rotary_factor": 0.5}, {}),
    "neox": ("gpt_neox", {"rope_theta": 2e4, "partial_rotary_factor": 0.5}, {}),
    "layers": ("gemma3_text", BY_LAYERS, LAYERS),
    "oss": ("gpt_oss", {"rope_theta": 2e4}, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "moe": (
        "qwen3_moe",
        {"rope_theta": 2e4},
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
}


def family(name: str, folder: Path) -> Path:
    """A small model of a family as transformers 5 writes it, with transformers 4's keys added."""
    kind, rope, settings = FAMILIES[name]
    parameters = rope if "full_attention" in rope else {"rope_type": "default", **rope}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, rope_parameters=parameters, **settings)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / name)
    tiny_tokenizer().save_pretrained(folder / name)
    add_transformers4_format(folder / name)
    return folder / name


OLDER_RELEASES = ("transformers==4.57.1", "tokenizers==0.22.1", "huggingface-hub==0.36.0")
READER = """
import json, sys, torch, transformers
assert transformers.__version__.startswith("4."), transformers.__version__
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
found = {}
for folder in sys.argv[2:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "Why 37 bees?"}]
    ids = [[number * 37 % 390 + 5 for number in range(200)]]
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(ids)).logits
    found[folder] = {
        "rope_theta": getattr(AutoConfig.from_pretrained(folder), "rope_theta", None),
        "ids": tokenizer(sys.argv[1])["input_ids"],
        "special": sorted(tokenizer.all_special_ids),
        "prompt": tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True),
        "logits": logits.tolist(),
    }
print(json.dumps(found))
"""


@pytest.mark.slow
def test_transformers_4_computes_the_same_ids_and_logits(
    older: Path,
    tiny_folder: Path,
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    assert pytestconfig.cache is not None
    site = pytestconfig.cache.mkdir("-".join(OLDER_RELEASES).replace("==", "-"))
    if not (site / "transformers" / "__init__.py").is_file():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*command, "--target", str(site), *OLDER_RELEASES], check=True)
    folders = [
        make(base, tmp_path / name)
        for name, base in (("a", older), ("b", tiny_folder))
        for make in (merged, trained_whole)
    ]
    folders += [family(name, tmp_path) for name in FAMILIES]
    text = "<|im_start|>user\n37 rivers, über  \n<|endoftext|> it's<|im_end|>"
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", READER, text, *map(str, folders)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    outputs = json.loads(result.stdout.splitlines()[-1])
    for folder in folders:
        theirs = outputs[str(folder)]
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert theirs["ids"] == tokenizer(text)["input_ids"]
        assert theirs["special"] == sorted(tokenizer.all_special_ids)
        assert theirs["prompt"] == tokenizer.apply_chat_template(
            [{"role": "user", "content": "Why 37 bees?"}],
            tokenize=False,
            add_generation_prompt=True,
        )
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            ids = torch.tensor([[number * 37 % 390 + 5 for number in range(200)]])
            ours = model(input_ids=ids).logits
        difference = (torch.tensor(theirs["logits"]) - ours).abs().max()
        assert difference <= 1e-5 * ours.abs().max()
    thetas = [outputs[str(folder)]["rope_theta"] for folder in folders[:4]]
    assert thetas == [500000.0, 500000.0, 10000.0, 10000.0]
