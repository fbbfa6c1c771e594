"""Replies against transformers' own `generate`: first token and tokens a second, in turn.

Both run the base with an adapter on it, greedy, with a key-value cache, on the same prompts.
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
"""Seconds to the first text, and tokens a second over the whole reply."""


def ours(variants: AdapterSet, ids: list[int]) -> Timing:
    """A `Generation`."""
    began = time.perf_counter()
    reply = Generation(variants, variants.names[-1], ids, Sampling(TOKENS))
    pieces = reply.pieces()
    next(pieces)
    first = time.perf_counter() - began
    for _ in pieces:
        pass
    return first, len(reply.ids) / (time.perf_counter() - began)


def theirs(variants: AdapterSet, ids: list[int]) -> Timing:
    """`generate` with its streamer, which is how servers use it."""
    variants.activate(variants.names[-1])
    streamer = TextIteratorStreamer(variants.tokenizer, skip_prompt=True)
    given = torch.tensor([ids])
    made: list[torch.Tensor] = []

    def run() -> None:
        made.append(
            variants.base.model.generate(  # type: ignore[operator]
                input_ids=given,
                attention_mask=torch.ones_like(given),
                max_new_tokens=TOKENS,
                do_sample=False,
                streamer=streamer,
            )
        )

    began = time.perf_counter()
    thread = threading.Thread(target=run)
    thread.start()
    pieces = iter(streamer)
    while not next(pieces):  # it yields what it cannot show yet, too
        pass
    first = time.perf_counter() - began
    for _ in pieces:
        pass
    thread.join()
    return first, (made[0].shape[1] - len(ids)) / (time.perf_counter() - began)


def main() -> None:
    """Measure, print, write."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--adapter", type=Path, action="append", default=[])
    arguments.add_argument("--prompts", type=Path, default=Path("recipes/prompts.jsonl"))
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--out", type=Path, default=Path("results/bench/generate.json"))
    given = arguments.parse_args()
    variants = load_adapter_set(None, given.adapter)
    asked = [prompt_ids(variants, variants.names[-1], p) for p in read_prompts(given.prompts)]
    found: dict[str, list[Timing]] = {"slm_lora": [], "transformers": []}
    for contender in (ours, theirs):  # not counted: the first run warms up
        contender(variants, asked[0])
    for _ in range(given.rounds):
        for ids in asked:
            found["slm_lora"].append(ours(variants, ids))
            found["transformers"].append(theirs(variants, ids))

    pairs = list(zip(found["slm_lora"], found["transformers"], strict=True))
    record = {
        "first_token_seconds": {k: statistics.median(f for f, _ in v) for k, v in found.items()},
        "tokens_per_s": {k: statistics.median(r for _, r in v) for k, v in found.items()},
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
    atomic_write_text(given.out, json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


main()
