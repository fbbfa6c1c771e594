"""The machine's limit: only the matrix products of a step, with the model's weights.

Every product has its own weights and a new result, so caches are as cold as in a real step. A LoRA
step multiplies every weight twice per token (forward, and gradient of the inputs: 4·N FLOP),
scoring once (2·N), full fine-tuning three times (6·N).
"""

from __future__ import annotations

import statistics
import time

import torch
from contender import parse_work, report
from transformers import AutoModelForCausalLM

TOKENS, TOKENS_ON_GPU, REPEATS = 2048, 16_384, 5
HEAD_TOKENS, HEAD_TOKENS_ON_GPU = 512, 4096
"""Tokens per product of the output head: results of 50 MB, or 400 on a GPU."""


def main() -> None:
    args = parse_work()
    tokens = TOKENS_ON_GPU if args.on_gpu else TOKENS
    head_tokens = HEAD_TOKENS_ON_GPU if args.on_gpu else HEAD_TOKENS
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).to(args.device)  # type: ignore[arg-type]

    def random(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, dtype=args.dtype, device=args.device)

    head = model.get_output_embeddings().weight.detach()
    weights = [
        module.weight.detach()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module.weight is not head
    ]
    weights = [weight for weight in weights if weight.data_ptr() != head.data_ptr()]
    inputs = {
        width: random(tokens, width)
        for width in {size for weight in [*weights, head] for size in weight.shape[-1:]}
    }
    outputs = {width: random(tokens, width) for width in {weight.shape[0] for weight in weights}}
    head_output = random(head_tokens, head.shape[0])

    def forward() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        for start in range(0, tokens, head_tokens):
            inputs[head.shape[1]][start : start + head_tokens] @ head.t()

    def input_gradients() -> None:
        for weight in weights:
            outputs[weight.shape[0]] @ weight
        for _ in range(0, tokens, head_tokens):
            head_output @ head

    def weight_gradients() -> None:
        for weight in weights:
            outputs[weight.shape[0]].t() @ inputs[weight.shape[1]]
        for start in range(0, tokens, head_tokens):
            head_output.t() @ inputs[head.shape[1]][start : start + head_tokens]

    parameters = sum(weight.numel() for weight in [*weights, head])
    times: dict[str, list[float]] = {}
    with torch.no_grad():
        for repeat in range(REPEATS + 1):
            for part in (forward, input_gradients, weight_gradients):
                start = time.perf_counter()
                part()
                if args.on_gpu:
                    torch.cuda.synchronize()
                if repeat:  # the first repeat creates the library's kernels
                    times.setdefault(part.__name__, []).append(time.perf_counter() - start)
    seconds = {name: statistics.median(durations) for name, durations in times.items()}
    lora = seconds["forward"] + seconds["input_gradients"]
    report(
        args.device,
        weights=parameters,
        gflop_per_s=4 * parameters * tokens / lora / 1e9,
        training_tokens_per_s=tokens / lora,
        scoring_tokens_per_s=tokens / seconds["forward"],
        full_training_tokens_per_s=tokens / sum(seconds.values()),
    )


main()
