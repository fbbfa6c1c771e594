"""The proof of a merged model, in a fresh process and by the libraries that others load it with.

``python -m slm_lora.export.proof MERGED BASE ADAPTER`` prints one line of JSON: a `Proof`.
Nothing of this project computes here: base+adapter is plain PEFT's, merged plain transformers'.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slm_lora.errors import IntegrityError

if TYPE_CHECKING:
    import torch

_TOPICS = ("bridges", "bread", "a sailing boat", "the number 37")
_FRAMES = (
    "Instruction:\nWhat is known about {}?\nResponse:\n",
    "Tell me in one sentence why {} should matter.",
    "Question: who was the first to write about {}? Answer:",
    "The old man looked up and said that {}",
    "There are three things to learn about {}:\n1.",
    'def describe():\n    """Say something of {}."""\n    return',
    "Dear friend,\n\nyesterday I read a long letter on {}, and",
    "In 1912, at 7:45 in the morning, {}",
    "{} and other stories",
    "<h1>{}</h1>\n<p>",
    "On {}: a short history, in the words of those who were there.",
    "Most people who know {} would not agree that",
    "Write a poem.\n\n{},\nmy",
    '{{"topic": "{}", "answer": "',
    "How much does {} cost? About €",
    "Übrigens: {} –",
)
PROMPTS = tuple(frame.format(topic) for frame in _FRAMES for topic in _TOPICS)
"""64 short texts. Not draws of tokens: those bring some models where fp32 itself is off by 1e-4
of the largest logit, as measured against fp64 (here: 2e-6)."""


@dataclass(frozen=True, slots=True)
class Proof:
    """Logits of the same prompts, each computed in fp32.

    Attributes:
        prompts: how many.
        tokens: in all of them; every position's logits are compared.
        max_logit: largest magnitude of base+adapter's.
        max_difference: largest between merged and base+adapter.
        base_difference: largest between merged and the base alone.
    """

    prompts: int
    tokens: int
    max_logit: float
    max_difference: float
    base_difference: float

    def sentence(self) -> str:
        """What was measured, for the user."""
        return (
            f"proved on {self.prompts} prompts: logits differ from base+adapter's by at most "
            f"{self.max_difference / self.max_logit:.1e} of the largest, "
            f"from the base's by {self.base_difference / self.max_logit:.1e}"
        )


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a proof must keep to.

    Attributes:
        share: most of the largest logit that merged may differ by.
        control: how many times nearer to base+adapter than to the base it must be.
    """

    share: float
    control: float


BOUNDS = {"fp32": Bounds(1e-5, 10), "fp16": Bounds(1e-2, 2), "bf16": Bounds(5e-2, 2)}
"""By the precision that the merged weights are saved in; half precision rounds every weight."""


def prove(merged: Path, base: Path, adapter: Path) -> Proof:
    """Compare in a fresh process.

    Raises:
        IntegrityError: one of them does not load there.
    """
    command = [sys.executable, "-m", "slm_lora.export.proof"]
    command += [str(path.resolve()) for path in (merged, base, adapter)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise IntegrityError(f"{adapter}: the merged model does not load elsewhere: {last}")
    return Proof(**json.loads(result.stdout.strip().splitlines()[-1]))


def judge(proof: Proof, dtype: str, name: str) -> None:
    """Refuse a merged model that is not base+adapter, or cannot be told from the base.

    Raises:
        IntegrityError: it is so; the message has the numbers.
    """
    bounds = BOUNDS[dtype]
    # Written so that a NaN fails.
    if not proof.max_difference <= bounds.share * proof.max_logit:
        raise IntegrityError(
            f"{name}: the merged model is not base+adapter: logits differ by "
            f"{proof.max_difference:.2e}, allowed in {dtype} are "
            f"{bounds.share * proof.max_logit:.2e}; nothing was written"
        )
    if not proof.base_difference > bounds.control * proof.max_difference:
        raise IntegrityError(
            f"{name}: the merged model cannot be told from its base: logits differ from the base's "
            f"by {proof.base_difference:.2e}, from base+adapter's by {proof.max_difference:.2e}; "
            "the adapter has no effect, or less than the rounding of the weights "
            "(--dtype fp32 rounds least); nothing was written"
        )


def _compare(merged: Path, base: Path, adapter: Path) -> Proof:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

    def load(path: Path) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
        return model

    def logits(model: Callable[..., object]) -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(input_ids=ids).logits[0] for ids in prompts]  # type: ignore[attr-defined]

    tokenizer = AutoTokenizer.from_pretrained(merged, local_files_only=True)
    prompts = [tokenizer(text, return_tensors="pt")["input_ids"] for text in PROMPTS]
    adapted = PeftModel.from_pretrained(load(base), str(adapter)).eval()
    wanted = logits(adapted)
    with adapted.disable_adapter():
        untouched = logits(adapted)
    # One model in memory at a time: each may be all that fits.
    del adapted
    found = logits(load(merged))

    def largest(ones: list[torch.Tensor], others: list[torch.Tensor]) -> float:
        differences = [(a - b).abs().max() for a, b in zip(ones, others, strict=True)]
        # Not Python's max, which may drop a NaN.
        return float(torch.stack(differences).max())

    return Proof(
        prompts=len(prompts),
        tokens=sum(ids.numel() for ids in prompts),
        max_logit=float(torch.stack([each.abs().max() for each in wanted]).max()),
        max_difference=largest(found, wanted),
        base_difference=largest(found, untouched),
    )


if __name__ == "__main__":
    print(json.dumps(asdict(_compare(*map(Path, sys.argv[1:4])))))
