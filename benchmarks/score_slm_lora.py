"""slm-lora's scoring of held-out rows, compiled."""

from __future__ import annotations

import sys
import time

from contender import tell, work
from ours import base_and_examples, micro_batch_tokens

from slm_lora.config.schema import EvaluationSection
from slm_lora.evaluation.scoring import held_out_loss, score
from slm_lora.ops import compilation

WARM_UP_ROWS = 40


def main() -> None:
    given = work()
    base, examples = base_and_examples(given)
    budget = micro_batch_tokens(given, EvaluationSection())
    score(base, examples[:WARM_UP_ROWS], "test", budget, compiled=True)
    began = time.time()
    scores = score(base, examples, "test", budget, compiled=True)
    seconds = time.time() - began
    if not base.packed or compilation.failure():
        sys.exit(f"the fast path did not run: {base.fallback_reason or compilation.failure()}")
    tell(
        given.device,
        tokens=sum(example.length for example in examples),
        seconds=seconds,
        loss=held_out_loss(scores, "all").loss,
    )


main()
