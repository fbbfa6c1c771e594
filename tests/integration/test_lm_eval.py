"""Our loss and that of lm-evaluation-harness, on the same text of the same adapter.

They agree only under the same rules. lm-eval's rolling likelihood scores every token of a text, the
first one after a prefix token (BOS, or EOS where a tokenizer has none), and no EOS; ours scores no
first token, and an EOS at the end. So the same ids are laid out its way, and scored our way.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from slm_lora.adapters.multi import load_adapter_set
from slm_lora.data.collate import collate
from slm_lora.data.templates import Template
from slm_lora.data.tokenization import RowTokenizer
from slm_lora.model.forward import score_documents
from slm_lora.model.resolve import ModelSource
from slm_lora.records import Row, Turn

from ..support.exports import make_adapter

pytest.importorskip("lm_eval", reason="needs lm-eval (make test-all)")


def test_nll_equals_rolling_likelihood_of_lm_eval(tiny_source: ModelSource, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    folder = make_adapter(tiny_source, tmp_path / "one", scale=0.5, template="plain")
    text = "Fact 3: bread matters a great deal. Tea and salt, rivers and maps."
    tokenizer = AutoTokenizer.from_pretrained(tiny_source.path)
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_source.path), str(folder)
    ).eval()
    harness = HFLM(pretrained=model, tokenizer=tokenizer, max_length=512, batch_size=1)
    instance = Instance("loglikelihood_rolling", {}, (text,), 0)
    theirs = -float(harness.loglikelihood_rolling([instance], disable_tqdm=True)[0])

    variants = load_adapter_set(str(tiny_source.path), [folder], precision="fp32")
    row = Row((Turn("assistant", text),))
    example = RowTokenizer(variants.tokenizer, Template("plain")).encode([row], {row.row_id: ""})[
        0
    ][0]
    assert example.ids[-1] == tokenizer.eos_token_id
    ids = np.array([harness.prefix_token_id, *example.ids[:-1]], np.int32)
    same_rules = replace(example, ids=ids, response=np.ones(len(ids), np.bool_))
    ours = score_documents(variants.base, collate([same_rules], "all"))
    assert ours.tokens_all[0] == len(tokenizer(text)["input_ids"])
    assert float(ours.nll_all[0]) == pytest.approx(theirs, rel=1e-5)
    variants.activate("base")
    without = score_documents(variants.base, collate([same_rules], "all"))
    assert abs(float(without.nll_all[0]) - theirs) > 1, "the adapter is what was scored"
