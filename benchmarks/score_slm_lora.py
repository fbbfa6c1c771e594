"""slm-lora's scoring of held-out rows, compiled."""

from __future__ import annotations

import sys
import time

from contender import parse_work, report
from ours import base_and_examples, micro_batch_tokens

from slm_lora.config.schema import EvaluationSection
from slm_lora.evaluation.scoring import held_out_loss, score
from slm_lora.ops import compilation

WARM_UP_ROWS = 40


def main() -> None:
    args = parse_work()
    base, examples = base_and_examples(args)
    max_tokens = micro_batch_tokens(args, EvaluationSection())
    score(base, examples[:WARM_UP_ROWS], "test", max_tokens, compiled=True)
    start = time.time()
    scores = score(base, examples, "test", max_tokens, compiled=True)
    seconds = time.time() - start
    if not base.packed or compilation.failure():
        sys.exit(f"the fast path did not run: {base.fallback_reason or compilation.failure()}")
    report(
        args.device,
        tokens=sum(example.length for example in examples),
        seconds=seconds,
        loss=held_out_loss(scores, "all").loss,
    )


main()
