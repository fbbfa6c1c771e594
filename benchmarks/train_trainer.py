"""A typical script: transformers' Trainer with PEFT, padded batches."""

from __future__ import annotations

import math
import tempfile

import torch
from contender import LEARNING_RATE, MAX_LENGTH, Clock, lora, parse_work, text
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)  # fmt: skip

MICRO_BATCH, MICRO_BATCH_ON_GPU = 4, 16


def main() -> None:
    args = parse_work()
    clock = Clock(args.device)
    # A divisor of the batch, so that no micro-batch is cut.
    micro_batch = math.gcd(args.batch, MICRO_BATCH_ON_GPU if args.on_gpu else MICRO_BATCH)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype),
        lora(),
    )  # fmt: skip
    rows = [
        tokenizer(text(row, tokenizer.eos_token), truncation=True, max_length=MAX_LENGTH)
        for row in args.read()
    ]
    pad = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    tokens: list[int] = []

    def collate(batch_rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        tokens.append(sum(len(row["input_ids"]) for row in batch_rows))
        batch: dict[str, torch.Tensor] = pad(batch_rows)
        return batch

    class Steps(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            clock.step()

    accumulation_steps = args.batch // micro_batch
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            train_dataset=rows,
            data_collator=collate,
            args=TrainingArguments(
                output_dir=folder, bf16=args.precision == "bf16",
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=accumulation_steps, num_train_epochs=1,
                learning_rate=LEARNING_RATE, use_cpu=not args.on_gpu, report_to="none",
                save_strategy="no", logging_strategy="no", disable_tqdm=True,
            ),
            callbacks=[Steps()],
        )  # fmt: skip
        clock.begin()
        trainer.train()
    starts = range(0, len(tokens), accumulation_steps)
    per_step = [sum(tokens[i : i + accumulation_steps]) for i in starts]
    clock.report_training(per_step, warm_up=1)


main()
