"""Replies to many prompts: in batches, one by one, and by transformers' batched `generate`.

All run the base with an adapter, greedy, 64 tokens per reply, on the same prompts of ml-qa.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from slm_lora.adapters.multi import AdapterSet, load_adapter_set
from slm_lora.config.schema import DataSection
from slm_lora.data.prompts import prompts_from_rows
from slm_lora.data.sources import read_rows
from slm_lora.evaluation.batched_generation import MAX_BATCH, generate_replies
from slm_lora.evaluation.generation import Generation, Sampling, prompt_ids
from slm_lora.model.cache import left_padded
from slm_lora.runtime import hardware
from slm_lora.runtime.storage import atomic_write_text

TOKENS = 64
SAMPLING = Sampling(TOKENS, min_tokens=TOKENS)
Replies = list[tuple[int, ...]]


def batched(variants: AdapterSet, prompts: list[list[int]]) -> Replies:
    """By `generate_replies`."""
    replies = generate_replies(variants, variants.names[-1], prompts, SAMPLING)
    print(f"{sum(reply.alone for reply in replies)} computed alone because of a tie")
    return [reply.ids for reply in replies]


def one_by_one(variants: AdapterSet, prompts: list[list[int]]) -> Replies:
    """By `Generation`, one after the other."""
    replies = []
    for prompt in prompts:
        generation = Generation(variants, variants.names[-1], prompt, SAMPLING)
        for _ in generation.pieces():
            pass
        replies.append(tuple(generation.ids))
    return replies


def by_transformers(variants: AdapterSet, prompts: list[list[int]]) -> Replies:
    """By `generate`, in batches of the same size, sorted by length."""
    variants.activate(variants.names[-1])
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    replies: dict[int, tuple[int, ...]] = {}
    for start in range(0, len(order), MAX_BATCH):
        batch = order[start : start + MAX_BATCH]
        ids, mask, _ = left_padded([prompts[i] for i in batch], variants.base.device)
        out = variants.base.model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
        )
        for index, row in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
            replies[index] = tuple(row)
    return [replies[index] for index in range(len(prompts))]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--alone", type=int, default=200, help="rows of the one-by-one path")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--out", type=Path, default=Path("results/bench/generate-batched.json"))
    args = parser.parse_args()
    variants = load_adapter_set(None, [args.adapter], precision=args.precision)
    rows = prompts_from_rows(read_rows(DataSection(name="ml-qa")).rows, args.rows)
    prompts = [prompt_ids(variants, variants.names[-1], row) for row in rows]
    contenders: dict[str, Callable[[AdapterSet, list[list[int]]], Replies]] = {
        "batched": batched,
        "transformers_batched": by_transformers,
        "one_by_one": one_by_one,
    }
    seconds, replies = {}, {}
    with torch.inference_mode():
        for name, contender in contenders.items():
            contender(variants, prompts[:2])  # warm-up
            own = prompts[: args.alone] if name == "one_by_one" else prompts
            start = time.perf_counter()
            replies[name] = contender(variants, own)
            seconds[name] = time.perf_counter() - start
            print(f"{name}: {len(own)} replies in {seconds[name]:.1f} s", flush=True)
    rates = {name: TOKENS * len(replies[name]) / seconds[name] for name in contenders}
    record = {
        "tokens_per_s": rates,
        "ratio_to_one_by_one": rates["batched"] / rates["one_by_one"],
        "ratio_to_transformers": rates["batched"] / rates["transformers_batched"],
        "same_replies": {
            name: sum(a == b for a, b in zip(replies["batched"], replies[name], strict=False))
            for name in ("one_by_one", "transformers_batched")
        },
        "replies": {name: len(own) for name, own in replies.items()},
        "tokens_per_reply": TOKENS,
        "prompt_tokens": sum(map(len, prompts)),
        "command": f"python benchmarks/generate_batched.py {shlex.join(sys.argv[1:])}",
        "model": variants.base.source.name,
        "precision": variants.base.precision,
        "machine": hardware.describe(variants.base.device.type),
        "versions": hardware.versions(),
    }
    atomic_write_text(args.out, json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


main()
