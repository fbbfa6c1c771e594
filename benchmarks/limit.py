"""The machine's limit: the matrix products of a step on the model's own weights, nothing else.

Every product has its own weights and freshly written results, as in a real step, so caches are
as cold as they are there. A LoRA step multiplies every weight twice a token (forward, and the
gradient of the inputs: 4·N FLOP), scoring once (2·N), full fine-tuning three times (6·N).
"""

from __future__ import annotations

import statistics
import time

import torch
from contender import tell, work
from transformers import AutoModelForCausalLM

TOKENS, TOKENS_ON_GPU, REPEATS = 2048, 16_384, 5
HEAD_TOKENS, HEAD_TOKENS_ON_GPU = 512, 4096
"""Tokens of the output layer at once: its results are 50 MB then, or 400."""


def main() -> None:
    given = work()
    many = TOKENS_ON_GPU if given.on_gpu else TOKENS
    head_tokens = HEAD_TOKENS_ON_GPU if given.on_gpu else HEAD_TOKENS
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=given.dtype).to(given.device)  # type: ignore[arg-type]

    def noise(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, dtype=given.dtype, device=given.device)

    head = model.get_output_embeddings().weight.detach()
    weights = [
        module.weight.detach()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module.weight is not head
    ]
    weights = [weight for weight in weights if weight.data_ptr() != head.data_ptr()]
    inputs = {
        width: noise(many, width)
        for width in {size for weight in [*weights, head] for size in weight.shape[-1:]}
    }
    outputs = {width: noise(many, width) for width in {weight.shape[0] for weight in weights}}
    head_output = noise(head_tokens, head.shape[0])

    def forward() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        for start in range(0, many, head_tokens):
            inputs[head.shape[1]][start : start + head_tokens] @ head.t()

    def input_gradients() -> None:
        for weight in weights:
            outputs[weight.shape[0]] @ weight
        for _ in range(0, many, head_tokens):
            head_output @ head

    def weight_gradients() -> None:
        for weight in weights:
            outputs[weight.shape[0]].t() @ inputs[weight.shape[1]]
        for start in range(0, many, head_tokens):
            head_output.t() @ inputs[head.shape[1]][start : start + head_tokens]

    count = sum(weight.numel() for weight in [*weights, head])
    times: dict[str, list[float]] = {}
    with torch.no_grad():
        for number in range(REPEATS + 1):
            for part in (forward, input_gradients, weight_gradients):
                began = time.perf_counter()
                part()
                if given.on_gpu:
                    torch.cuda.synchronize()
                if number:  # the first time creates the library's kernels
                    times.setdefault(part.__name__, []).append(time.perf_counter() - began)
    seconds = {name: statistics.median(each) for name, each in times.items()}
    lora = seconds["forward"] + seconds["input_gradients"]
    tell(
        given.device,
        weights=count,
        gflop_per_s=4 * count * many / lora / 1e9,
        training_tokens_per_s=many / lora,
        scoring_tokens_per_s=many / seconds["forward"],
        full_training_tokens_per_s=many / sum(seconds.values()),
    )


main()
