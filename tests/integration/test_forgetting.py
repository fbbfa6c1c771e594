"""Drift and forgetting of an experiment's runs, planted and against independent computations."""

from __future__ import annotations

import importlib.util
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from slm_lora.adapters.multi import BASE, load_adapter_set
from slm_lora.evaluation.forgetting import Variant, divergences, general_prompts, reply_example
from slm_lora.experiment import forgetting as forgetting_module
from slm_lora.runs.forgetting import BaseReply, RowChange, read_forgetting
from slm_lora.runtime.signals import StopRequested

from ..support.further_sets import also, german
from ..support.lab import Lab, command
from ..support.rows import write_jsonl

CELLS = "grid.cells=[{training.learning_rate: 1e-30}, {training.learning_rate: 1e-3}]"
KEYS = ("data.size=40", "adapter.r=4")
DRIFT = ("forgetting.prompts=30", "forgetting.max_new_tokens=12")
STILL, NORMAL = "lr1e-30", "lr0.001"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Lab:
    folder = tmp_path_factory.mktemp("forgetting")
    made = Lab(folder / "lab", tiny_folder)
    assert made.run(CELLS, *KEYS) == 0
    before = {path: path.read_bytes() for path in made.results.glob("runs/*/*")}
    assert made.run(CELLS, *KEYS, *DRIFT, also(german(folder))) == 0
    # Added to a finished experiment: nothing was trained or scored again.
    assert before == {path: path.read_bytes() for path in made.results.glob("runs/*/*")}
    return made


def lines(lab: Lab, measure: str, cell: str) -> list[RowChange]:
    (path,) = lab.results.glob(f"forgetting/{measure}/{cell}-*.jsonl")
    there = read_forgetting(path, RowChange)
    assert there is not None
    return there[1]


def replies(lab: Lab) -> list[BaseReply]:
    (path,) = lab.results.glob("forgetting/replies/base-*.jsonl")
    there = read_forgetting(path, BaseReply)
    assert there is not None
    return there[1]


def record(lab: Lab, cell: str) -> dict[str, Any]:
    """The measures of the setting that a cell belongs to."""
    (own,) = (
        own
        for own in lab.metrics()["forgetting"]
        if float(own["setting"].removeprefix("lr ")) == float(cell.removeprefix("lr"))
    )
    return own


def test_a_trained_adapter_drifts_and_one_of_learning_rate_zero_does_not(lab: Lab) -> None:
    assert all(line.nats == line.base_nats == 0 for line in lines(lab, "drift", "base"))
    still, normal = record(lab, STILL), record(lab, NORMAL)
    assert abs(still["drift"]["value"]) < 1e-9
    assert abs(still["forgetting:german"]["value"]) < 1e-6
    assert still["forgetting:german"]["less_than_margin"] == "shown"
    assert normal["drift"]["low"] > 0
    assert normal["drift"]["value"] > 1e-4
    assert normal["drift"]["rows"] == 30


def test_an_adapter_of_garbled_rows_drifts_farther(
    tmp_path: Path, tiny_folder: Path, lab: Lab
) -> None:
    garbled = Lab(tmp_path / "lab", tiny_folder)
    rows = [json.loads(line) for line in garbled.rows.read_text().splitlines()]
    draw = random.Random(3)
    for row in rows:
        letters = list(row["response"])
        draw.shuffle(letters)
        row["response"] = "".join(letters)
    write_jsonl(garbled.rows, rows)
    assert garbled.run("grid.cells=[]", *KEYS, "training.learning_rate=0.1", *DRIFT) == 0
    assert replies(garbled) == replies(lab)  # the same base
    (own,) = garbled.metrics()["forgetting"]
    assert own["drift"]["low"] > max(0, record(lab, NORMAL)["drift"]["high"])


def test_drift_equals_transformers_and_peft_in_fp64(lab: Lab, tiny_folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_folder).double().eval()
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    folder = lab.adapters / f"tiny-{NORMAL}"
    tuned = PeftModel.from_pretrained(plain, str(folder)).double().eval()
    measured = {line.row: line for line in lines(lab, "drift", NORMAL)}
    for reply in replies(lab):
        ids = torch.tensor([[*reply.prompt_ids, *reply.ids]])
        with torch.no_grad():
            log_p, log_q = (
                torch.log_softmax(model(ids).logits[0, len(reply.prompt_ids) - 1 : -1], -1)
                for model in (base, tuned)
            )
        expected = float((log_p.exp() * (log_p - log_q)).sum())
        own = measured[reply.row]
        assert own.tokens == len(reply.ids)
        assert own.nats / own.tokens == pytest.approx(expected / own.tokens, abs=1e-6, rel=1e-4)
    total = sum(line.nats for line in measured.values())
    tokens = sum(line.tokens for line in measured.values())
    assert record(lab, NORMAL)["drift"]["value"] == pytest.approx(total / tokens)


def test_forgetting_equals_transformers_and_peft_in_fp64(lab: Lab, tiny_folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder).double().eval()
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    folder = lab.adapters / f"tiny-{NORMAL}"
    tuned = PeftModel.from_pretrained(plain, str(folder)).double().eval()
    rows = [json.loads(line) for line in (lab.folder.parent / "german.jsonl").open()]
    measured = lines(lab, "german", NORMAL)
    assert len(measured) == 30
    expected = []
    for row in rows:
        text = f"Instruction:\n{row['instruction']}\nResponse:\n{row['output']}"
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            losses = [float(model(ids, labels=ids).loss) for model in (base, tuned)]
        expected.append((ids.shape[1] - 1, *losses))
    for own in measured:
        close = [
            (tokens, before, after)
            for tokens, before, after in expected
            if tokens == own.tokens and abs(before - own.base_nats / tokens) < 2e-5
        ]
        assert any(abs(after - own.nats / tokens) < 2e-5 for tokens, _, after in close)


def test_batches_do_not_change_drift(lab: Lab, tiny_folder: Path) -> None:
    folder = lab.adapters / f"tiny-{NORMAL}"
    variants = load_adapter_set(str(tiny_folder), [folder], precision="fp32")
    reference, tuned = Variant(variants, BASE), Variant(variants, folder.name)
    examples = [reply_example(own.row, own.prompt_ids, own.ids) for own in replies(lab)]

    def drift(budget: int) -> list[float]:
        sums = divergences(reference, tuned, examples, budget, lambda tokens: None)
        return [sums[own.row_id] / int(own.response.sum()) for own in examples]

    alone = drift(1)
    assert max(alone) > 1e-4
    for budget in (64, 300, 100_000):
        assert np.allclose(drift(budget), alone, rtol=0, atol=1e-6)


def test_report_shows_both_beside_the_gain(lab: Lab) -> None:
    report = (lab.results / "report.md").read_text()
    assert "**[Forgetting](#forgetting):** german " in report
    assert "**[Drift](#forgetting):** " in report
    assert "](figures/gain-drift.svg)" in report
    assert "](figures/gain-forgetting-german.svg)" in report
    assert "Drift, nats per token ↓" in report
    page = (lab.results / "report.html").read_text()
    assert "gain over the base" in page
    assert {"drift", "forgetting:german"} <= lab.metrics()["other_metrics"].keys()
    # Without the section they stay in the report.
    assert lab.run(CELLS, *KEYS) == 0
    assert (lab.results / "report.md").read_text() == report


@pytest.mark.parametrize(
    ("condition", "code"),
    [
        ("drift < 5", 0),
        ("drift < 1e-9", 10),
        ("forgetting < 50", 0),
        ("forgetting:german < 50", 0),
        ("forgetting:french < 1", 2),
        ("gain:drift > 0", 2),
    ],
)
def test_verdict_on_them(
    lab: Lab, condition: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("verdict", lab.results, "--require", condition) == code
    if code == 2:
        assert "forgetting, " in capsys.readouterr().err


def test_finished_measures_are_kept_and_another_margin_measures_nothing(
    lab: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in lab.results.glob("forgetting/*/*")}
    path = lab.folder.parent / "german.jsonl"
    with monkeypatch.context() as patch:
        for name in ("divergences", "token_losses", "sample_from_base", "load_finished"):
            patch.setattr(forgetting_module, name, None)
        assert lab.run(CELLS, *KEYS, *DRIFT, also(path)) == 0
        assert capsys.readouterr().err.count("measured earlier") == 3
        assert before == {path: path.read_bytes() for path in lab.results.glob("forgetting/*/*")}
        assert lab.run(CELLS, *KEYS, *DRIFT, also(path, margin=1e-9)) == 0
    assert record(lab, NORMAL)["forgetting:german"]["margin"] == 1e-9
    assert lab.run(CELLS, *KEYS, *DRIFT, also(path)) == 0
    assert before == {path: path.read_bytes() for path in lab.results.glob("forgetting/*/*")}


def test_interrupted_measurement_goes_on(
    tmp_path: Path, tiny_folder: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Lab(tmp_path / "lab", tiny_folder)
    arguments = (CELLS, *KEYS, *DRIFT, also(lab.folder.parent / "german.jsonl"))
    plain, calls = forgetting_module.divergences, []

    def stop_at_second(*words: Any) -> dict[str, float]:
        calls.append(words)
        if len(calls) == 2:
            raise StopRequested
        return plain(*words)

    with monkeypatch.context() as patch:
        patch.setattr(forgetting_module, "divergences", stop_at_second)
        assert other.run(*arguments) == 75
    made = {path: path.stat().st_mtime_ns for path in other.results.glob("forgetting/*/*")}
    assert len(made) == 5  # the base's three, and two of the first adapter
    assert other.run(*arguments) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in made.items())
    for path in lab.results.glob("forgetting/*/*"):
        own = other.results / path.relative_to(lab.results)
        assert own.read_text().split("\n")[1:] == path.read_text().split("\n")[1:]


def test_report_after_an_interrupted_measurement_with_other_settings(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = Lab(tmp_path / "lab", tiny_folder)
    assert lab.run(CELLS, *KEYS, *DRIFT) == 0
    plain, calls = forgetting_module.divergences, []

    def stop_at_second(*words: Any) -> dict[str, float]:
        calls.append(words)
        if len(calls) == 2:
            raise StopRequested
        return plain(*words)

    with monkeypatch.context() as patch:
        patch.setattr(forgetting_module, "divergences", stop_at_second)
        assert lab.run(CELLS, *KEYS, "forgetting.prompts=9") == 75
    assert command("report", lab.results) == 0
    assert [own["drift"]["rows"] for own in lab.metrics()["forgetting"]] == [9]
    report = (lab.results / "report.md").read_text()
    assert "Drift is not in lr0.001-" in report
    assert "with its section `forgetting` again" in report


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_low_precision_and_other_templates(
    tmp_path: Path, tiny_folder: Path, template: str
) -> None:
    lab = Lab(tmp_path / "lab", tiny_folder)
    words = (CELLS, *KEYS, f"data.template={template}", "training.precision=bf16")
    assert lab.run(*words, *DRIFT) == 0
    assert abs(record(lab, STILL)["drift"]["value"]) < 1e-9
    assert 1e-4 < record(lab, NORMAL)["drift"]["value"] < 0.1


def test_whole_model_is_compared_with_its_base(tmp_path: Path, tiny_folder: Path) -> None:
    lab = Lab(tmp_path / "lab", tiny_folder)
    words = ("grid.cells=[{adapter.kind: full}]", "data.size=40", "data.template=chat")
    headline = "evaluation.headline=response"
    assert lab.run(*words, headline, *DRIFT, also(german(tmp_path), rows=None)) == 0
    (own,) = lab.metrics()["forgetting"]
    assert own["drift"]["value"] > 1e-3
    # The loss of the response, as in the headline: its end mark and its text, tokenised alone.
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    answers = [json.loads(line)["output"] for line in (tmp_path / "german.jsonl").open()]
    expected = sum(len(tokenizer(f"{answer}<|im_end|>")["input_ids"]) for answer in answers)
    assert sum(line.tokens for line in lines(lab, "german", "base")) == expected
    (path,) = lab.results.glob("forgetting/replies/*")
    there = read_forgetting(path, BaseReply)
    assert there is not None
    assert there[0].settings["template"] == "chat"
    assert there[1][0].prompt == general_prompts(1)[0]


@pytest.mark.parametrize("measure", ["drift", "german", "replies"])
@pytest.mark.parametrize("change", ["cut", "number", "run"])
def test_changed_file_is_refused(
    lab: Lab, measure: str, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = next(iter(sorted(lab.results.glob(f"forgetting/{measure}/*"))))
    whole = path.read_text()
    first, *rest = whole.split("\n")
    if change == "cut":
        path.write_text("\n".join([first, *rest[1:]]))
    elif change == "number":
        path.write_text("\n".join([first, rest[0].replace("1", "2"), *rest[1:]]))
    else:
        header = json.loads(first) | {"run": "0" * 64}
        path.write_text("\n".join([json.dumps(header), *rest]))
    try:
        code = lab.run(CELLS, *KEYS, *DRIFT, also(lab.folder.parent / "german.jsonl"))
        if change == "run":  # of another run: measured again
            assert code == 0
            assert path.read_text() == whole
        else:
            assert code == 4
            assert f"{path}: broken" in capsys.readouterr().err
    finally:
        path.write_text(whole)


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
def test_base_in_4_bits_is_scored_in_4_bits(tmp_path: Path, tiny_folder: Path, lab: Lab) -> None:
    quantized = Lab(tmp_path / "lab", tiny_folder)
    override = also(lab.folder.parent / "german.jsonl")
    words = ("grid.cells=[]", *KEYS, "model.quantization=nf4", "training.learning_rate=1e-30")
    assert quantized.run(*words, *DRIFT, override) == 0
    before = {line.row: line for line in lines(lab, "german", "base")}
    own = lines(quantized, "german", "base")
    assert {line.row for line in own} == before.keys()
    assert all(abs(line.nats - before[line.row].nats) > 1e-3 for line in own)
    # The adapter is on the same base.
    (measured,) = quantized.metrics()["forgetting"]
    assert abs(measured["drift"]["value"]) < 1e-9
    assert abs(measured["forgetting:german"]["value"]) < 1e-6
