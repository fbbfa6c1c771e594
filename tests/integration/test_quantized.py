"""Training on a base in 4 bits, and later use of its adapter."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from slm_lora.config.schema import ModelSection
from slm_lora.evaluation.scoring import score
from slm_lora.model import quantization
from slm_lora.model.loading import load_base
from slm_lora.model.resolve import resolve

from ..support.examples import make_examples
from ..support.lab import Lab, command

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(
    not INSTALLED, reason="bitsandbytes is not installed (make test-all)"
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Lab:
    return Lab(tmp_path_factory.mktemp("nf4"), tiny_folder)


@pytest.fixture(scope="module")
def trained(lab: Lab) -> dict[str, Any]:
    words = ("model.quantization=nf4", "training.num_train_epochs=4")
    assert command("train", lab.recipe, *words, "--cell", "r4-40", *lab.folders) == 0
    run: dict[str, Any] = json.loads(next(lab.results.rglob("run.json")).read_text())
    return run


@needs_bitsandbytes
def test_nf4_base_has_4_bit_layers_and_packed_scores_equal_padded(tiny_folder: Path) -> None:
    source = resolve(ModelSection(name=str(tiny_folder)))
    cpu, examples = torch.device("cpu"), make_examples([30, 12, 5])
    nll = {}
    for kind in ("nf4", None):
        for plain in (False, True):
            base = load_base(source, device=cpu, precision="fp32", padded=plain, quantization=kind)
            assert base.packed != plain, base.fallback_reason
            scores = score(base, examples, "test", 100)
            nll[kind, plain] = [row.nll_all for row in scores]
        kinds = {type(m).__name__ for m in base.model.modules()}
        assert ("Linear4bit" in kinds) == (kind == "nf4")
    assert nll["nf4", False] == pytest.approx(nll["nf4", True], rel=1e-4)
    assert nll["nf4", False] != pytest.approx(nll[None, False], rel=1e-3)


@needs_bitsandbytes
def test_training_on_nf4_learns_and_records_the_quantization(
    lab: Lab, trained: dict[str, Any]
) -> None:
    steps = next(lab.results.rglob("steps.jsonl")).read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in steps]
    assert losses[-1] < losses[0] - 0.5
    assert trained["model"]["quantization"] == "nf4"
    about = json.loads((lab.adapters / "tiny-r4-40" / "slm_lora.json").read_text())
    assert about["base"]["quantization"] == "nf4"


@needs_bitsandbytes
def test_saved_adapter_of_nf4_scores_as_in_training(
    lab: Lab, trained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = ("--adapter", lab.adapters / "tiny-r4-40")
    capsys.readouterr()
    assert command("evaluate", lab.recipe, *adapter, "model.quantization=nf4") == 0
    output = capsys.readouterr()
    assert f"loss {trained['evaluation']['all']['loss']:.5f}" in output.out
    assert "warning" not in output.err
    assert command("evaluate", lab.recipe, *adapter) == 0
    assert "was trained on a base in nf4, and is scored on one in full" in capsys.readouterr().err


@needs_bitsandbytes
@pytest.mark.usefixtures("trained")
def test_adapter_of_nf4_is_merged_into_the_unquantised_base(
    lab: Lab, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_folder: Path
) -> None:
    out = tmp_path / "merged"
    base = ("--base", tiny_folder)
    assert command("merge", lab.adapters / "tiny-r4-40", out, *base) == 0
    assert "merged into the unquantised weights" in " ".join(capsys.readouterr().out.split())
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


@needs_bitsandbytes
def test_grid_with_and_without_nf4_compares_each_with_its_own_base(
    tmp_path: Path, tiny_folder: Path
) -> None:
    both = Lab(tmp_path / "both", tiny_folder)
    small = "adapter.r: 2, data.size: 40"
    cells = f"[{{{small}}}, {{{small}, model.quantization: nf4}}]"
    assert both.run(f"grid.cells={cells}") == 0
    metrics = both.metrics()
    table = (both.results / "experiment_table.md").read_text()
    assert "| tiny-llama |" in table and "| tiny-llama (nf4) |" in table
    loss = {
        (run["model"].get("quantization"), "adapter" in run): run["evaluation"]["all"]["loss"]
        for run in metrics["runs"]
    }
    assert len(loss) == 4
    falls = [contrast["value"] for contrast in metrics["contrasts"] if contrast["key"] == "base"]
    expected = [loss[kind, True] - loss[kind, False] for kind in (None, "nf4")]
    assert sorted(falls) == pytest.approx(sorted(expected), abs=1e-9)
    unquantised, quantised = (run["adapter"] for run in metrics["runs"] if "adapter" in run)
    assert unquantised["all_parameters"] == quantised["all_parameters"], "two weights lie in a byte"


@pytest.mark.parametrize("kind", ["full", "pissa"])
def test_methods_that_change_the_base_are_refused_with_nf4(
    lab: Lab, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    words = ("model.quantization=nf4", f"adapter.kind={kind}")
    assert command("experiment", lab.recipe, *words, "--plan") == 2
    assert f"adapter.kind = {kind}: changes weights of the base" in capsys.readouterr().err


def test_missing_bitsandbytes_names_its_extra(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    elsewhere = ("--results", tmp_path, "--adapters", tmp_path, "--cell", "r2-40")
    assert command("train", lab.recipe, "model.quantization=nf4", *elsewhere) == 2
    assert "pip install '.[nf4]'" in capsys.readouterr().err


IMPORT_AND_ATTACH = """
import sys, torch
from slm_lora.adapters import attach
from slm_lora.model.loading import load_base
from slm_lora.model.resolve import resolve
from slm_lora.config.schema import AdapterSection, ModelSection
source, cpu = resolve(ModelSection(name=sys.argv[1])), torch.device("cpu")
base = load_base(source, device=cpu, precision="fp32")
attach.attach(base, AdapterSection(target_modules=("q_proj", "v_proj")), seed=0)
assert "bitsandbytes" in sys.modules
import kernels
assert kernels.fetched == [], kernels.fetched
"""


@needs_bitsandbytes
@pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="only CPUs with AVX512-BF16 are asked"
)
def test_attaching_with_bitsandbytes_fetches_no_kernels(tmp_path: Path, tiny_folder: Path) -> None:
    package = tmp_path / "kernels.py"  # in place of the package that downloads from the hub
    package.write_text(
        "fetched = []\ndef get_kernel(*a, **k):\n    fetched.append(a)\n    raise OSError\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", IMPORT_AND_ATTACH, str(tiny_folder)],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert "kernels" not in ran.stderr
