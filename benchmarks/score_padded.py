"""A typical scoring loop: padded batches of 8, fp32, loss from the model."""

from __future__ import annotations

import time

import torch
from contender import MAX_LENGTH, parse_work, report, text
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8


def main() -> None:
    args = parse_work()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model.to(args.device)
    rows = [text(row, tokenizer.eos_token) for row in args.read()]
    nll, total_labels, tokens = 0.0, 0, 0
    seconds = 0.0
    with torch.no_grad():
        for start in range(-BATCH, len(rows), BATCH):
            # The first batch is a warm-up.
            batch = rows[max(start, 0) : max(start, 0) + BATCH]
            start_time = time.time()
            inputs = tokenizer(
                batch, return_tensors="pt", padding=True, truncation=True, max_length=MAX_LENGTH
            ).to(args.device)
            labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
            loss = model(**inputs, labels=labels).loss.item()
            if start >= 0:
                seconds += time.time() - start_time
                n_labels = int((labels[:, 1:] != -100).sum())
                nll, total_labels = nll + loss * n_labels, total_labels + n_labels
                tokens += int(inputs.attention_mask.sum())
    report(args.device, tokens=tokens, seconds=seconds, loss=nll / total_labels)


main()
