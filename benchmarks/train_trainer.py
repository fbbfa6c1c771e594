"""The script that most people write: transformers' Trainer with PEFT, padded batches."""

from __future__ import annotations

import math
import tempfile

import torch
from contender import LEARNING_RATE, MAX_LENGTH, Clock, lora, text, work
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
    given = work()
    clock = Clock(given.device)
    # (What divides a step, so that none is cut.)
    micro_batch = math.gcd(given.batch, MICRO_BATCH_ON_GPU if given.on_gpu else MICRO_BATCH)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(given.model, dtype=given.dtype),
        lora(),
    )  # fmt: skip
    rows = [
        tokenizer(text(row, tokenizer.eos_token), truncation=True, max_length=MAX_LENGTH)
        for row in given.read()
    ]
    pad = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    tokens: list[int] = []

    def collate(some: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        tokens.append(sum(len(row["input_ids"]) for row in some))
        batch: dict[str, torch.Tensor] = pad(some)
        return batch

    class Steps(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            clock.step()

    accumulated = given.batch // micro_batch
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            train_dataset=rows,
            data_collator=collate,
            args=TrainingArguments(
                output_dir=folder, bf16=given.precision == "bf16",
                per_device_train_batch_size=micro_batch,
                gradient_accumulation_steps=accumulated, num_train_epochs=1,
                learning_rate=LEARNING_RATE, use_cpu=not given.on_gpu, report_to="none",
                save_strategy="no", logging_strategy="no", disable_tqdm=True,
            ),
            callbacks=[Steps()],
        )  # fmt: skip
        clock.begin()
        trainer.train()
    per_step = [sum(tokens[i : i + accumulated]) for i in range(0, len(tokens), accumulated)]
    clock.tell_training(per_step, warm_up=1)


main()
