"""GGUF files scored by llama.cpp on the rows of a recipe, against PyTorch and other readers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from slm_lora.config.schema import ModelSection
from slm_lora.errors import DataError, UsageError
from slm_lora.evaluation import llama_library
from slm_lora.evaluation.gguf_scoring import check_vocabulary, score_file
from slm_lora.evaluation.scoring import score
from slm_lora.export.llama_cpp import export
from slm_lora.export.trained import read_trained
from slm_lora.model.resolve import ModelSource, resolve
from slm_lora.records import Example

from ..support.exports import make_adapter
from ..support.lab import Lab, command
from ..support.tiny_model import tiny_tokenizer


@pytest.fixture(scope="module")
def files(tiny_source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base in the three types, and the adapter's file."""
    root = tmp_path_factory.mktemp("scored")
    adapter = make_adapter(tiny_source, root / "toy")
    paths = {}
    for kind in ("f32", "f16", "q8_0"):
        trained = read_trained(adapter)
        export(trained, root / kind, "adapter", kind, tiny_source.path)  # type: ignore[arg-type]
        paths[kind] = root / kind / f"tiny-llama-{kind}.gguf"
    paths["adapter"] = root / "f32" / "toy-lora.gguf"
    return paths


def make_examples(vocabulary: int, lengths: tuple[int, ...]) -> list[Example]:
    generator = np.random.default_rng(7)
    rows = []
    for index, length in enumerate(lengths):
        response = np.arange(length) >= length // 2
        response[0] = index == 0  # has no prediction, and must not be counted
        ids = generator.integers(0, vocabulary, length).astype(np.int32)
        rows.append(Example(f"{index:02}", f"g{index}", "c", ids, response, 10 * length, 5))
    return rows


def reference_nll(model: Any, example: Example) -> torch.Tensor:
    ids = torch.tensor(example.ids).long()
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")


@pytest.mark.parametrize(("kind", "tolerance"), [("f32", 1e-3), ("f16", 1e-3), ("q8_0", 1e-2)])
def test_rows_score_as_transformers_scores_the_dequantised_file(
    files: dict[str, Path], tiny_source: ModelSource, kind: str, tolerance: float
) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    tokenizer = AutoTokenizer.from_pretrained(tiny_source.path)
    examples = make_examples(len(tokenizer), (40, 2, 23, 64))
    scores = score_file(files[kind], examples, "test", tokenizer, 1).scores
    model = AutoModelForCausalLM.from_pretrained(
        files[kind].parent, gguf_file=files[kind].name, dtype=torch.float32
    ).eval()
    assert [score.row_id for score in scores] == ["00", "01", "02", "03"]
    differences, tokens = 0.0, 0
    for example, row in zip(examples, scores, strict=True):
        nll = reference_nll(model, example)
        response = torch.tensor(example.response[1:])
        assert (row.tokens_all, row.tokens_response) == (len(nll), int(response.sum()))
        assert (row.group_id, row.bytes_all) == (example.group_id, example.bytes_all)
        assert row.nll_response == pytest.approx(
            float(nll[response].sum()), abs=30 * tolerance * row.tokens_response
        )
        differences += row.nll_all - float(nll.sum())
        tokens += row.tokens_all
    assert abs(differences / tokens) < tolerance


@pytest.fixture(scope="module")
def wide_source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A random Llama whose rows divide into blocks of 256, except those of the query heads."""
    folder = tmp_path_factory.mktemp("wide") / "wide-llama"
    tokenizer = tiny_tokenizer()
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return resolve(ModelSection(name=str(folder)))


@pytest.mark.parametrize(
    ("kind", "most", "error"),
    [("q4_k_m", "Q4_K", 0.09), ("q5_k_m", "Q5_K", 0.05), ("q6_k", "Q6_K", 0.02)],
)
def test_k_quants_are_read_by_llama_cpp_and_transformers(
    wide_source: ModelSource, tmp_path: Path, kind: Any, most: str, error: float
) -> None:
    """Blocks dequantised by gguf's own Python code are near the weights; llama.cpp scores rows as
    transformers does with these dequantised weights."""
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    trained = read_trained(make_adapter(wide_source, tmp_path / "toy"))
    export(trained, tmp_path / kind, "adapter", kind, wide_source.path)
    path = tmp_path / kind / f"wide-llama-{kind}.gguf"
    weights = AutoModelForCausalLM.from_pretrained(wide_source.path, dtype=torch.float32)
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    for layer in range(3):
        tensor = tensors[f"blk.{layer}.ffn_gate.weight"]
        assert tensor.tensor_type.name == most
        original = weights.model.layers[layer].mlp.gate_proj.weight.detach().numpy()
        stored = dequantize(tensor.data, tensor.tensor_type)
        relative = np.linalg.norm(stored - original) / np.linalg.norm(original)
        assert error / 4 < relative < error
    assert tensors["output.weight"].tensor_type.name == "Q6_K"

    tokenizer = AutoTokenizer.from_pretrained(wide_source.path)
    examples = make_examples(len(tokenizer), (40, 64, 90))
    scores = score_file(path, examples, "test", tokenizer, 1).scores
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    expected = [reference_nll(model, example) for example in examples]
    tokens = sum(len(nll) for nll in expected)
    difference = sum(row.nll_all for row in scores) - sum(float(nll.sum()) for nll in expected)
    # llama.cpp rounds the activations to 8 bits.
    assert abs(difference) / tokens < 3e-2


def test_rows_longer_than_one_call_score_as_in_pytorch(
    files: dict[str, Path], tiny_source: ModelSource, load_tiny: Any
) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    tokenizer = AutoTokenizer.from_pretrained(tiny_source.path)
    examples = make_examples(len(tokenizer), (llama_library.TOKENS_PER_CALL + 90,))
    (row,) = score_file(files["f32"], examples, "test", tokenizer, 1).scores
    (expected,) = score(load_tiny(), examples, "test", 4096)
    assert row.tokens_all == expected.tokens_all == llama_library.TOKENS_PER_CALL + 89
    assert row.nll_all / row.tokens_all == pytest.approx(
        expected.nll_all / expected.tokens_all, abs=1e-3
    )


def test_files_without_the_vocabulary_are_refused(
    files: dict[str, Path], tiny_source: ModelSource, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_source.path)
    check_vocabulary(files["f16"], tokenizer)
    with pytest.raises(UsageError, match="has no vocabulary; give the file of a whole model"):
        check_vocabulary(files["adapter"], tokenizer)
    (tmp_path / "text.gguf").write_text("a text, not a model file")
    with pytest.raises(UsageError, match=r"text\.gguf: not a GGUF file"):
        check_vocabulary(tmp_path / "text.gguf", tokenizer)
    with pytest.raises(UsageError, match=r"missing\.gguf: no such file"):
        check_vocabulary(tmp_path / "missing.gguf", tokenizer)
    tokenizer.add_tokens(["<another>"])
    with pytest.raises(UsageError, match="another vocabulary"):
        check_vocabulary(files["f16"], tokenizer)


def test_no_rows_and_no_llama_cpp_are_refused(
    files: dict[str, Path], tiny_source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_source.path)
    with pytest.raises(DataError, match="no rows to score"):
        score_file(files["f16"], [], "test", tokenizer, 1)
    monkeypatch.setitem(sys.modules, "xllamacpp.xllamacpp", None)
    llama_library.load.cache_clear()
    with pytest.raises(UsageError, match=r"needs llama\.cpp: pip install"):
        score_file(files["f16"], make_examples(9, (4,)), "test", tokenizer, 1)
    llama_library.load.cache_clear()


@pytest.mark.usefixtures("verify_in_process")
def test_commands_print_the_difference_to_the_adapter(
    lab: Lab, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    places = ("--results", tmp_path / "results", "--adapters", tmp_path / "adapter")
    assert command("train", lab.recipe, "--cell", "r2-40", *places) == 0
    adapter, out = tmp_path / "adapter" / "tiny-r2-40", tmp_path / "out"
    capsys.readouterr()
    words = ("export", "gguf", adapter, out, "--base", tiny_folder, "--score", lab.recipe)
    assert command(*words, "--json") == 0
    (scored,) = json.loads(capsys.readouterr().out)["files"]
    record = json.loads(next((tmp_path / "results").rglob("run.json")).read_text())
    loss = scored["all"]
    assert loss["reference_loss"] == pytest.approx(record["evaluation"]["all"]["loss"], abs=1e-5)
    assert loss["difference"] == pytest.approx(loss["loss"] - loss["reference_loss"], abs=1e-9)
    assert abs(loss["difference"]) < 1e-3
    assert loss["low"] <= loss["difference"] <= loss["high"]
    assert scored["bytes"] == Path(scored["file"]).stat().st_size

    words = ("evaluate", lab.recipe, "--cell", "r2-40", "--adapter", adapter)
    assert command(*words, "--gguf", scored["file"]) == 0
    output = capsys.readouterr().out
    assert f"loss {loss['loss']:.5f}  {loss['difference']:+.5f} nats per token (95 %" in output
    assert "to tiny-r2-40 in PyTorch fp32" in output


def test_other_types_and_options_out_of_place_are_refused(
    tiny_source: ModelSource, lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make_adapter(tiny_source, tmp_path / "toy")
    words = ("export", "gguf", adapter, tmp_path / "out", "--base", tiny_source.path)
    for options, message in (
        (("--type", "q3_k_l"), "llama-quantize FILE.gguf OUT.gguf Q3_K_L"),
        (("--type", "float"), "choose f32, f16, q8_0, q4_k_m, q5_k_m, q6_k"),
        (("--json",), "--json: needs --score RECIPE"),
        (("--as", "adapter", "--score", lab.recipe), "use --as merged"),
    ):
        assert command(*words, *options) == 2
        assert message in " ".join(capsys.readouterr().err.split())
    pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
    assert command(*words, "--score", lab.recipe) == 2
    assert "has no cell lora, which trained" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
