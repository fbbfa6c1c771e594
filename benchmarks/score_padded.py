"""The scoring loop that most people write: padded batches of 8, fp32, loss from the model."""

from __future__ import annotations

import time

import torch
from contender import MAX_LENGTH, tell, text, work
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8


def main() -> None:
    given = work()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    model.to(given.device)
    rows = [text(row, tokenizer.eos_token) for row in given.read()]
    nll, labelled, tokens = 0.0, 0, 0
    seconds = 0.0
    with torch.no_grad():
        for start in range(-BATCH, len(rows), BATCH):
            # A first batch is not counted.
            batch = rows[max(start, 0) : max(start, 0) + BATCH]
            began = time.time()
            inputs = tokenizer(
                batch, return_tensors="pt", padding=True, truncation=True, max_length=MAX_LENGTH
            ).to(given.device)
            labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
            loss = model(**inputs, labels=labels).loss.item()
            if start >= 0:
                seconds += time.time() - began
                many = int((labels[:, 1:] != -100).sum())
                nll, labelled = nll + loss * many, labelled + many
                tokens += int(inputs.attention_mask.sum())
    tell(given.device, tokens=tokens, seconds=seconds, loss=nll / labelled)


main()
