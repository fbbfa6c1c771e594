"""Recompute a cell's test loss without slm_lora: transformers, PEFT and arithmetic only.

python tests/support/recompute_loss.py ROWS.jsonl BASE_FOLDER ADAPTER_FOLDER RUN_FOLDER [fp32]

Takes the row ids from the run's scores, finds the rows by their content, scores them one by one
in the described text format, and prints both losses and their difference.
"""

import hashlib
import json
import sys

import pyarrow.parquet
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

rows_file, base, adapter, run, *precision = sys.argv[1:]
dtype = torch.float32 if precision == ["fp32"] else torch.bfloat16
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)
model.eval()
max_length = json.load(open(f"{run}/run.json"))["recipe"]["data"]["max_length"]  # noqa: PTH123, SIM115
scores = pyarrow.parquet.read_table(f"{run}/scores.parquet").to_pydict()
texts = {}
for line in open(rows_file, encoding="utf-8"):  # noqa: PTH123, SIM115
    row = json.loads(line)
    turns = [["user", row["instruction"]], ["assistant", row["response"]]]
    content = json.dumps(
        [row.get("context") or "", turns], ensure_ascii=False, separators=(",", ":")
    )
    text = f"Instruction:\n{row['instruction']}\nResponse:\n{row['response']}"
    texts[hashlib.sha256(content.encode()).hexdigest()] = text
nll = tokens = 0.0
for row_id in scores["row_id"]:
    ids = [*tokenizer(texts[row_id]).input_ids, tokenizer.eos_token_id][:max_length]
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].double()
    nll -= logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].sum().item()
    tokens += len(ids) - 1
ours = sum(scores["nll_all"]) / sum(scores["tokens_all"])
print(f"recomputed {nll / tokens:.6f}  reported {ours:.6f}  difference {nll / tokens - ours:+.2e}")
