"""Generation compared to transformers' `generate`: time to first token, tokens per second.

Both run the base with an adapter, greedy, with a key-value cache, on the same prompts in turn.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import threading
import time
from pathlib import Path

import torch
from transformers import TextIteratorStreamer

from slm_lora.adapters.multi import AdapterSet, load_adapter_set
from slm_lora.data.prompts import read_prompts
from slm_lora.evaluation.generation import Generation, Sampling, prompt_ids
from slm_lora.runtime import hardware
from slm_lora.runtime.storage import atomic_write_text

TOKENS = 64
Timing = tuple[float, float]
"""Seconds to the first text, and tokens per second over the whole generation."""


def time_slm_lora(variants: AdapterSet, ids: list[int]) -> Timing:
    """Time a `Generation`."""
    start = time.perf_counter()
    reply = Generation(variants, variants.names[-1], ids, Sampling(TOKENS))
    pieces = reply.pieces()
    next(pieces)
    first = time.perf_counter() - start
    for _ in pieces:
        pass
    return first, len(reply.ids) / (time.perf_counter() - start)


def time_transformers(variants: AdapterSet, ids: list[int]) -> Timing:
    """Time `generate` with a streamer, as servers use it."""
    variants.activate(variants.names[-1])
    streamer = TextIteratorStreamer(variants.tokenizer, skip_prompt=True)
    prompt = torch.tensor([ids])
    outputs: list[torch.Tensor] = []

    def run() -> None:
        outputs.append(
            variants.base.model.generate(  # type: ignore[operator]
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=TOKENS,
                do_sample=False,
                streamer=streamer,
            )
        )

    start = time.perf_counter()
    thread = threading.Thread(target=run)
    thread.start()
    pieces = iter(streamer)
    while not next(pieces):  # it also yields empty texts
        pass
    first = time.perf_counter() - start
    for _ in pieces:
        pass
    thread.join()
    return first, (outputs[0].shape[1] - len(ids)) / (time.perf_counter() - start)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", type=Path, action="append", default=[])
    parser.add_argument("--prompts", type=Path, default=Path("recipes/prompts.jsonl"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/bench/generate.json"))
    args = parser.parse_args()
    variants = load_adapter_set(None, args.adapter)
    prompts = [prompt_ids(variants, variants.names[-1], p) for p in read_prompts(args.prompts)]
    timings: dict[str, list[Timing]] = {"slm_lora": [], "transformers": []}
    for contender in (time_slm_lora, time_transformers):  # warm-up
        contender(variants, prompts[0])
    for _ in range(args.rounds):
        for ids in prompts:
            timings["slm_lora"].append(time_slm_lora(variants, ids))
            timings["transformers"].append(time_transformers(variants, ids))

    pairs = list(zip(timings["slm_lora"], timings["transformers"], strict=True))
    record = {
        "first_token_seconds": {k: statistics.median(f for f, _ in v) for k, v in timings.items()},
        "tokens_per_s": {k: statistics.median(r for _, r in v) for k, v in timings.items()},
        "ratio_first_token": statistics.median(a[0] / b[0] for a, b in pairs),
        "ratio_tokens_per_s": statistics.median(a[1] / b[1] for a, b in pairs),
        "command": f"make bench-generate ARGS='{shlex.join(sys.argv[1:])}'",
        "model": variants.base.source.name,
        "adapter": variants.names[-1],
        "precision": variants.base.precision,
        "replies": len(pairs),
        "most_tokens": TOKENS,
        "machine": hardware.describe(variants.base.device.type),
        "versions": hardware.versions(),
    }
    atomic_write_text(args.out, json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


main()
