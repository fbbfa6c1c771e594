"""GGUF: files are read back, and llama.cpp generates the same tokens as transformers."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from slm_lora.config.schema import ModelSection
from slm_lora.errors import UsageError
from slm_lora.export import verify
from slm_lora.export.gguf import check_adapter
from slm_lora.export.gguf_tokenizer import LLAMA3_PATTERN, describe_tokenizer
from slm_lora.export.llama_cpp import export
from slm_lora.export.merge import merge
from slm_lora.export.trained import read_trained
from slm_lora.model.bundled import EMBEDDED, is_fetched
from slm_lora.model.resolve import ModelSource, resolve

from ..support.exports import make_adapter
from ..support.lab import command
from ..support.llama_cpp_client import PROMPTS, LlamaCpp, greedy
from ..support.tiny_model import tiny_tokenizer

TINYLLAMA = Path(__file__).parents[3] / "shared" / "tinyllama"


def values(reader: GGUFReader) -> dict[str, Any]:
    return {name: field.contents() for name, field in reader.fields.items()}


def tensors(reader: GGUFReader) -> dict[str, Any]:
    return {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}


@pytest.fixture(scope="module")
def adapter(tiny_source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tiny_source, tmp_path_factory.mktemp("adapters") / "toy")


@pytest.fixture(scope="module")
def exported(
    adapter: Path, tiny_source: ModelSource, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("gguf") / "out"
    export(read_trained(adapter), out, "adapter", "f32", tiny_source.path)
    return out


def test_exported_model_has_metadata_and_vocabulary_of_the_base(
    exported: Path, adapter: Path
) -> None:
    fields = values(GGUFReader(exported / "tiny-llama-f32.gguf"))
    tokenizer = tiny_tokenizer()
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "tiny-llama",
        "general.file_type": 0,
        "llama.vocab_size": len(tokenizer),
        "llama.context_length": 512,
        "llama.embedding_length": 48,
        "llama.block_count": 2,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 6,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 8,
        "llama.attention.value_length": 8,
        "llama.rope.dimension_count": 8,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": (adapter / "chat_template.jinja").read_text(),
    }
    assert {key: fields.get(key) for key in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    count = len(tokenizer)
    assert fields["tokenizer.ggml.tokens"] == tokenizer.convert_ids_to_tokens(list(range(count)))
    assert fields["tokenizer.ggml.token_type"] == [3, 3, 3] + [1] * (count - 3)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


def test_exported_q_and_k_rows_are_interleaved(exported: Path, tiny_source: ModelSource) -> None:
    written = tensors(GGUFReader(exported / "tiny-llama-f32.gguf"))
    weights = load_file(tiny_source.path / "model.safetensors")
    # Tied embeddings are written once.
    assert "output.weight" not in written
    assert len(written) == len(weights) - ("lm_head.weight" in weights)
    assert np.array_equal(written["token_embd.weight"], weights["model.embed_tokens.weight"])
    layer = "model.layers.1.self_attn."
    assert np.array_equal(written["blk.1.attn_v.weight"], weights[f"{layer}v_proj.weight"])
    q, permuted = weights[f"{layer}q_proj.weight"].numpy(), written["blk.1.attn_q.weight"]
    for head in range(6):
        for i in range(4):
            assert np.array_equal(permuted[8 * head + 2 * i], q[8 * head + i])
            assert np.array_equal(permuted[8 * head + 2 * i + 1], q[8 * head + i + 4])


def test_exported_adapter_has_tensors_and_metadata_of_the_adapter(
    exported: Path, adapter: Path
) -> None:
    reader = GGUFReader(exported / "toy-lora.gguf")
    fields, written = values(reader), tensors(reader)
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert fields["adapter.lora.alpha"] == 8.0
    weights = load_file(adapter / "adapter_model.safetensors")
    assert len(written) == len(weights)
    prefix = "base_model.model.model.layers.0."
    expected = weights[f"{prefix}mlp.down_proj.lora_B.weight"]
    assert np.array_equal(written["blk.0.ffn_down.weight.lora_b"], expected)
    a, b = (weights[f"{prefix}self_attn.k_proj.lora_{side}.weight"].numpy() for side in "AB")
    assert np.array_equal(written["blk.0.attn_k.weight.lora_a"], a)
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    assert np.array_equal(
        written["blk.0.attn_k.weight.lora_b"], b[[8 * head + i for head in (0, 1) for i in order]]
    )


@pytest.mark.parametrize(("kind", "bound"), [("f16", 1e-3), ("q8_0", 5e-3)])
def test_f16_and_q8_0_exports_are_the_rounded_weights(
    kind: Any, bound: float, exported: Path, adapter: Path, tiny_source: ModelSource, tmp_path: Path
) -> None:
    export(read_trained(adapter), tmp_path / "out", "adapter", kind, tiny_source.path)
    exact = tensors(GGUFReader(exported / "tiny-llama-f32.gguf"))
    reader = GGUFReader(tmp_path / "out" / f"tiny-llama-{kind}.gguf")
    rounded = tensors(reader)
    assert rounded.keys() == exact.keys()
    for name, weights in exact.items():
        error = np.abs(rounded[name] - weights).max() / np.abs(weights).max()
        assert error <= bound * (weights.ndim > 1), name
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    assert types["output_norm.weight"] == "F32"
    # Rows of 48 do not divide into blocks of 32, rows of 96 do.
    assert types["blk.0.attn_q.weight"] == "F16"
    assert types["blk.0.ffn_down.weight"] == kind.upper()


def test_exported_rslora_adapter_keeps_its_scale(tiny_source: ModelSource, tmp_path: Path) -> None:
    folder = make_adapter(tiny_source, tmp_path / "adapter", "rslora", r=8)
    export(read_trained(folder), tmp_path / "out", "adapter", "f32", tiny_source.path)
    fields = values(GGUFReader(tmp_path / "out" / "adapter-lora.gguf"))
    # llama.cpp multiplies by alpha/r.
    assert fields["adapter.lora.alpha"] / 8 == pytest.approx(16 / math.sqrt(8))


def test_modelfile_names_model_adapter_template_and_stop(exported: Path) -> None:
    assert (exported / "Modelfile").read_text().splitlines() == [
        "FROM ./tiny-llama-f32.gguf",
        "ADAPTER ./toy-lora.gguf",
        'TEMPLATE """{{ range .Messages }}{{ if eq .Role "user" }}{{ "Instruction:\\n" }}'
        '{{ .Content }}{{ "\\nResponse:\\n" }}{{ else if eq .Role "assistant" }}{{ .Content }}'
        '{{ "<|im_end|>" }}{{ end }}{{ end }}"""',
        'PARAMETER stop "<|im_end|>"',
    ]


@pytest.mark.usefixtures("verify_in_process")
def test_dora_adapter_is_refused_but_exported_merged(
    tiny_source: ModelSource, tmp_path: Path
) -> None:
    folder = make_adapter(tiny_source, tmp_path / "adapter", "dora")
    with pytest.raises(UsageError, match="adapters with DoRA; export the merged model instead"):
        export(read_trained(folder), tmp_path / "out", "adapter", "f32", tiny_source.path)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    # The suggested alternative works.
    files = export(read_trained(folder), tmp_path / "out", "merged", "f32", tiny_source.path)
    assert [path.name for path in files] == ["Modelfile", "adapter-f32.gguf"]


@pytest.mark.usefixtures("verify_in_process")
def test_export_of_a_merged_folder_equals_export_as_merged(
    adapter: Path, tiny_source: ModelSource, tmp_path: Path
) -> None:
    merge(read_trained(adapter), tmp_path / "merged", "fp32", tiny_source.path)
    with pytest.raises(UsageError, match="a full model, not an adapter; use --as merged"):
        export(read_trained(tmp_path / "merged"), tmp_path / "out", "adapter", "f32")
    export(read_trained(tmp_path / "merged"), tmp_path / "out", "merged", "f32")
    export(read_trained(adapter), tmp_path / "direct", "merged", "f32", tiny_source.path)
    from_folder = GGUFReader(tmp_path / "out" / "merged-f32.gguf")
    direct = GGUFReader(tmp_path / "direct" / "toy-f32.gguf")
    for name, weights in tensors(from_folder).items():
        assert np.array_equal(weights, tensors(direct)[name]), name
    fields = values(from_folder), values(direct)
    assert {k for k in fields[0] if fields[0][k] != fields[1][k]} <= {"general.name"}
    assert fields[0]["tokenizer.chat_template"] == (adapter / "chat_template.jinja").read_text()


def test_unsupported_adapter_settings_are_refused_by_export() -> None:
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
    check_adapter(Path("it"), settings)
    for unsupported in (
        {"bias": "all"},
        {"rank_pattern": {"q_proj": 2}},
        {"modules_to_save": ["lm_head"]},
    ):
        with pytest.raises(UsageError, match="does not support adapters with"):
            check_adapter(Path("it"), {**settings, **unsupported})


def test_other_model_families_are_refused_by_export(
    tiny_source: ModelSource, tmp_path: Path
) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path / "tiny-qwen"
    tokenizer = tiny_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    adapter = make_adapter(resolve(ModelSection(name=str(folder))), tmp_path / "adapter")
    for form in ("merged", "adapter"):
        with pytest.raises(UsageError, match=r"not qwen2; merge it .* llama\.cpp's script"):
            export(read_trained(adapter), tmp_path / "out", form, "f32", folder)  # type: ignore[arg-type]


def byte_level(use_regex: bool = True, add_prefix_space: bool = False) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "name"),
    [
        ([byte_level()], False, "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), byte_level()], False, "smollm"),
        ([split(LLAMA3_PATTERN), byte_level(use_regex=False)], True, "llama-bpe"),
        ([pre_tokenizers.Digits(individual_digits=False), byte_level()], False, None),
        ([byte_level(add_prefix_space=True)], False, None),
        ([split(r"\d"), byte_level()], False, None),
        ([byte_level()], True, None),
        ([byte_level(), pre_tokenizers.Digits(individual_digits=True)], False, None),
    ],
)
def test_pre_tokenizer_name_follows_its_specification(
    steps: list[Any], ignore_merges: bool, name: str | None
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.backend_tokenizer.model.ignore_merges = ignore_merges
    if name is not None:
        assert describe_tokenizer(tokenizer, len(tokenizer), False, "it").pre == name
        return
    with pytest.raises(UsageError, match="unknown pre-tokenizer"):
        describe_tokenizer(tokenizer, len(tokenizer), False, "it")


def test_ids_without_a_token_get_placeholder_tokens() -> None:
    tokenizer = tiny_tokenizer()
    vocab = describe_tokenizer(tokenizer, len(tokenizer) + 3, False, "it")
    assert vocab.types[-3:] == (5, 5, 5)
    assert len(set(vocab.tokens)) == len(tokenizer) + 3
    with pytest.raises(UsageError, match="tokens for an embedding of 7 rows"):
        describe_tokenizer(tokenizer, 7, False, "it")


def test_export_command_prints_its_files_and_replaces_none(
    adapter: Path, tiny_source: ModelSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ("export", "gguf", adapter, out, "--as", "adapter", "--type", "q8_0")
    assert command(*words, "--base", tiny_source.path) == 0
    assert capsys.readouterr().out.split() == [
        str(out / name) for name in ("Modelfile", "tiny-llama-q8_0.gguf", "toy-lora.gguf")
    ]
    assert command(*words, "--base", tiny_source.path) == 2
    assert "exists and is not replaced; choose another name" in capsys.readouterr().err


# ---- llama.cpp itself ----


def check_with_llama_cpp(base: Path, adapter: Path, folder: Path, tokens: int = 40) -> None:
    """Compare greedy ids, text and tokenisation of base, base+adapter and merged model."""
    export(read_trained(adapter), folder / "two", "adapter", "f32", base)
    export(read_trained(adapter), folder / "one", "merged", "f32", base)
    model, lora = (folder / "two" / f"{n}.gguf" for n in (f"{base.name}-f32", "toy-lora"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    alone = [greedy(plain, tokenizer, prompt, tokens) for prompt in PROMPTS]
    peft_model = PeftModel.from_pretrained(plain, adapter)
    adapted = [greedy(peft_model, tokenizer, prompt, tokens) for prompt in PROMPTS]
    # Negative control: an adapter that llama.cpp ignored would be noticed.
    changed = sum(
        base_ids != adapter_ids for base_ids, adapter_ids in zip(alone, adapted, strict=True)
    )
    assert changed >= len(PROMPTS) / 2
    for client, expected in (
        (LlamaCpp(model), alone),
        (LlamaCpp(model, lora), adapted),
        (LlamaCpp(folder / "one" / f"{adapter.name}-f32.gguf"), adapted),
    ):
        for prompt, ids in zip(PROMPTS, expected, strict=True):
            assert client.tokenize(prompt) == tokenizer(prompt)["input_ids"]
            generated, text = client.greedy(prompt, tokens)
            assert generated == ids, prompt
            # Random models generate broken UTF-8, which programs replace differently.
            if "\ufffd" not in (decoded := tokenizer.decode(ids)):
                assert text.strip() == decoded.strip()


@pytest.mark.usefixtures("verify_in_process")
@pytest.mark.parametrize("kind", ["lora", "rslora", "pissa"])
def test_llama_cpp_generates_the_tokens_of_transformers(
    kind: str, tiny_source: ModelSource, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    adapter = make_adapter(tiny_source, tmp_path / "toy", kind)
    check_with_llama_cpp(tiny_source.path, adapter, tmp_path)


@pytest.mark.usefixtures("verify_in_process")
@pytest.mark.parametrize("rope", ["default", "linear", "llama3"])
def test_llama_cpp_generates_the_same_with_sentencepiece_and_scaled_rope(
    rope: str, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    if not TINYLLAMA.is_dir():
        pytest.skip("TinyLlama's tokenizer is not on this machine")
    tokenizer = AutoTokenizer.from_pretrained(TINYLLAMA)
    scaled = {
        "default": {},
        "linear": {"factor": 4.0},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    }
    torch.manual_seed(7)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32000,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            initializer_range=0.3,
            rope_parameters={"rope_type": rope, "rope_theta": 10000.0, **scaled[rope]},
        )
    )
    base = tmp_path / "spm"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    adapter = make_adapter(resolve(ModelSection(name=str(base))), tmp_path / "toy")
    check_with_llama_cpp(base, adapter, tmp_path)

    # What llama.cpp makes of a chat is what was trained: one BOS, one space.
    client = LlamaCpp(tmp_path / "two" / "spm-f32.gguf")
    chat = client.post("/apply-template", {"messages": [{"role": "user", "content": "Why?"}]})
    trained = tokenizer("Instruction:\nWhy?\nResponse:\n")["input_ids"]
    assert client.tokenize(chat["prompt"], special=True) == trained


@pytest.mark.usefixtures("verify_in_process")
def test_llama_cpp_generates_the_same_with_the_embedded_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a real model fewer tokens, and a fifth of the prompts of a merge: each is slow."""
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    embedded = EMBEDDED["smollm2-135m-instruct-q4_1"]
    if not is_fetched(embedded):
        pytest.skip("the embedded model is not fetched")
    source = resolve(ModelSection(name=embedded.name))
    adapter = make_adapter(source, tmp_path / "toy", scale=0.15)
    monkeypatch.setattr(verify, "PROMPTS", verify.PROMPTS[::5])
    monkeypatch.setattr(verify, "MIN_AGREEING", verify.MIN_AGREEING / 5)
    check_with_llama_cpp(source.path, adapter, tmp_path, tokens=12)


@pytest.mark.parametrize(
    ("expression", "date"),
    [
        ("strftime_now('%d %b %Y') ~ ', ' ~ strftime_now('%B')", "26 Jul 2024, July"),
        ("strftime_now('%-d.' ~ '%m.%Y')", "26.07.2024"),
    ],
)
def test_llama_cpp_renders_the_date_of_training(
    expression: str, date: str, tiny_folder: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_folder, tmp_path / "dated")
    template = base / "chat_template.jinja"
    template.write_text(f"{{{{ {expression} ~ '\\n' }}}}" + template.read_text())
    source = resolve(ModelSection(name=str(base)))
    adapter = make_adapter(source, tmp_path / "toy", template="chat")
    export(read_trained(adapter), tmp_path / "out", "adapter", "f32", base)
    client = LlamaCpp(tmp_path / "out" / "dated-f32.gguf")
    chat = client.post("/apply-template", {"messages": [{"role": "user", "content": "Why?"}]})
    expected = f"{date}\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert chat["prompt"] == expected
