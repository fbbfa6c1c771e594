"""TRL with its fastest settings: documents packed to 512 tokens, no activation checkpointing.

On two CPU cores micro-batches of one packed row are faster than of four; a GPU gets a whole step,
up to 32 rows. Three rows hold about 16 examples.
"""

from __future__ import annotations

import tempfile

import torch
from contender import LEARNING_RATE, MAX_LENGTH, Clock, lora, parse_work, text
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

EXAMPLES_PER_ROW = 16 / 3


def main() -> None:
    args = parse_work()
    clock = Clock(args.device)
    step_rows = max(1, round(args.batch / EXAMPLES_PER_ROW))
    accumulation_steps = -(-step_rows // 32) if args.on_gpu else step_rows
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    rows = Dataset.from_list([{"text": text(row, "")} for row in args.read()])
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            processing_class=tokenizer,
            train_dataset=rows,
            peft_config=lora(),
            args=SFTConfig(
                output_dir=folder, max_length=MAX_LENGTH, packing=True,
                bf16=args.precision == "bf16", gradient_checkpointing=False,
                per_device_train_batch_size=step_rows // accumulation_steps,
                gradient_accumulation_steps=accumulation_steps, num_train_epochs=1,
                learning_rate=LEARNING_RATE, use_cpu=not args.on_gpu, report_to="none",
                save_strategy="no", logging_strategy="no", disable_tqdm=True,
            ),
        )  # fmt: skip
        tokens = count_tokens(trainer)

        class Steps(TrainerCallback):
            def on_step_end(self, *_: object, **__: object) -> None:
                clock.step()

        trainer.add_callback(Steps())
        clock.begin()
        trainer.train()
    starts = range(0, len(tokens), accumulation_steps)
    per_step = [sum(tokens[i : i + accumulation_steps]) for i in starts]
    clock.report_training(per_step, warm_up=1)


def count_tokens(trainer: SFTTrainer) -> list[int]:
    """Make the trainer's collator count the tokens of every micro-batch, which has no padding."""
    tokens: list[int] = []
    collate = trainer.data_collator

    def collate_and_count(rows: list[dict[str, object]]) -> dict[str, torch.Tensor]:
        batch = collate(rows)
        tokens.append(batch["input_ids"].numel())
        return batch

    trainer.data_collator = collate_and_count
    return tokens


main()
