"""The described experiment's path on TinyLlama's true architecture and tokenizer.

Parameters are counted on the whole architecture, without weights. What computes has two of its 22
equal layers, in their true sizes, and random weights, so losses mean nothing; the whole way from
the recipe to a loaded adapter is real. Needs `shared/tinyllama` beside the repository.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slm_lora.adapters import attach
from slm_lora.adapters import io as adapter_io
from slm_lora.adapters.attach import trainable_state
from slm_lora.config.load import load_recipe
from slm_lora.config.schema import AdapterSection, ModelSection
from slm_lora.data.dataset import prepare_data
from slm_lora.data.sources import read_rows
from slm_lora.experiment.resolve_jobs import make_jobs
from slm_lora.model.base import Base
from slm_lora.model.loading import choose_precision, load_base
from slm_lora.model.resolve import ModelSource, resolve
from slm_lora.training.loop import train

from ..support.rows import make_rows, write_jsonl
from ..support.tensors import assert_equal_bits

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY.parent / "shared" / "tinyllama"
RECIPE = REPOSITORY / "recipes" / "tinyllama-dolly.yaml"

pytestmark = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"no {SHARED}: TinyLlama's path is NOT tested"
)


def test_tinyllama_recipe_has_the_described_settings() -> None:
    recipe, cells = load_recipe(RECIPE)
    assert recipe.model.name == "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    assert recipe.data.name == "databricks/databricks-dolly-15k"
    assert [(c.config.data.size, c.config.adapter.r, c.config.adapter.alpha) for c in cells] == [
        (1500, 8, 16), (1500, 16, 32), (3000, 16, 32),
    ]  # fmt: skip
    for cell in cells:
        adapter, training = cell.config.adapter, cell.config.training
        assert adapter.target_modules == ("q_proj", "v_proj")
        assert (adapter.lora_dropout, adapter.bias) == (0.05, "none")
        assert (training.num_train_epochs, training.learning_rate) == (3, 2e-4)
        assert (training.effective_batch_size, training.precision) == (16, "fp16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The architecture with two layers and random weights."""
    small = tmp_path_factory.mktemp("models") / "two-layers"
    shutil.copytree(SHARED, small, copy_function=shutil.copyfile)
    small.chmod(0o755)
    config = json.loads((SHARED / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    model = small.parent / "tinyllama-random"
    script = REPOSITORY / "benchmarks" / "random_weights.py"
    subprocess.run([sys.executable, script, small, model], check=True)
    return model


@pytest.mark.parametrize(("r", "trainable"), [(8, 1_126_400), (16, 2_252_800)])
def test_tinyllama_adapters_have_the_described_parameter_counts(r: int, trainable: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(SHARED))
    source = ModelSource("tinyllama", None, SHARED, "")
    # (The base of several processes computes nothing while an adapter is attached.)
    base = Base(source, model, torch.device("meta"), "bf16", packed=False, sharded=True)
    counted = attach.count_parameters(
        attach.attach(base, AdapterSection(r=r, target_modules=("q_proj", "v_proj")), 0)
    )
    assert counted.trainable == trainable
    assert counted.total == 1_100_048_384 + trainable


def test_tinyllama_adapter_of_two_steps_is_saved_and_loaded(folder: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", make_rows(120))
    # What this machine computes fast: in emulated bf16 two steps take many minutes.
    precision = choose_precision("auto", torch.device("cpu"))
    _, cells = load_recipe(
        RECIPE,
        [
            f"model.name={folder}", f"data.name={rows}", f"training.precision={precision}",
            "data.test_rows=10", "data.validation_rows=5", "training.max_steps=2",
            "training.effective_batch_size=4",
            "grid.cells=[{data.size: 20, adapter.r: 8}]",
        ],
    )  # fmt: skip
    job = make_jobs(cells)[0]
    torch.set_num_threads(2)
    base = load_base(job.source, device=torch.device("cpu"), precision=precision)
    assert base.packed, base.fallback_reason
    first = job.data.train[0]
    assert first.ids[0] == 1, "BOS first"
    assert first.ids[-1] == 2 and first.response[-1], "EOS last, and a label"

    peft_model = attach.attach(base, job.config.adapter, 0)
    assert attach.count_parameters(peft_model).trainable == 1_126_400 * 2 // 22
    result = train(base, peft_model, job.data.train, job.config.training, 0)
    assert len(result.history) == 2
    trained = trainable_state(peft_model)
    assert any(value.abs().max() > 0 for name, value in trained.items() if "lora_B" in name)
    adapter_io.save(base, peft_model, tmp_path / "adapter", {"base": {
        "name": job.source.name, "sha256": job.source.sha256}}, None)  # fmt: skip
    attach.detach(peft_model)
    loaded = dict(adapter_io.load(base, tmp_path / "adapter").named_parameters())
    assert_equal_bits({name: loaded[name].cpu() for name in trained}, trained)
    torch.set_num_threads(1)


def test_dolly_splits_have_the_described_sizes() -> None:
    dolly = SHARED.parent / "data" / "databricks-dolly-15k.jsonl"
    if not dolly.is_file():
        pytest.skip(f"no {dolly}: the described sizes are NOT tested")
    from transformers import AutoTokenizer

    _, cells = load_recipe(RECIPE, [f"data.name={dolly}"])
    rows = read_rows(cells[0].config.data)
    tokenizer = AutoTokenizer.from_pretrained(SHARED)
    small = prepare_data(rows, cells[0].config.data, 0, tokenizer)
    large = prepare_data(rows, cells[2].config.data, 0, tokenizer)
    assert (len(small.train), len(large.train)) == (1350, 2700)
    assert (len(small.test), len(small.validation)) == (1000, 300)
    assert [e.row_id for e in small.test] == [e.row_id for e in large.test]
    assert {e.row_id for e in small.train} < {e.row_id for e in large.train}


def test_tinyllama_folder_without_weights_is_refused() -> None:
    from slm_lora.errors import UsageError

    with pytest.raises(UsageError, match="no weights"):
        resolve(ModelSection(name=str(SHARED)))
