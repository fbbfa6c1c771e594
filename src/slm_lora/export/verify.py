"""The proof of a merged model, in a fresh process and by the libraries that others load it with.

``python -m slm_lora.export.verify MERGED BASE ADAPTER DTYPE`` prints one line of JSON: a `Proof`.
Nothing of this project computes here: base+adapter is plain PEFT's, merged plain transformers'.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    "The weather is fine today. Tomorrow we shall speak of {}, and of nothing",
    "Dictionary. Look under {}: see also",
    "She wrote {} on the first page and",
    "If you ask me, {} is",
)
PROMPTS = tuple(frame.format(topic) for frame in _FRAMES for topic in _TOPICS)
"""80 short texts, of which `ENOUGH` must agree. On some text any model may be where fp32 itself is
off by 1e-5 of the largest logit and more, as fp64 shows: on draws of tokens many are."""
ENOUGH = 64
_NOISE = 10
"""How many times fp32's own error there the other prompts' differences may be."""


@dataclass(frozen=True, slots=True)
class Proof:
    """Logits of the same prompts, each computed in fp32.

    Attributes:
        prompts: how many were compared.
        agree: those whose logits differ by no more than `Bounds.share` of the largest.
        tokens: in all of them; every position's logits are compared.
        max_logit: largest magnitude of base+adapter's.
        max_difference: largest between merged and base+adapter, of the prompts that agree.
        worst_difference: the same of all prompts.
        worst_by_noise: of the prompts that do not agree, in fp32: largest difference as a multiple
            of fp32's own error there. That is how far base+adapter, or merged if it is further, is
            from itself in fp64: either may be the lucky one.
        base_difference: largest between merged and the base alone.
    """

    prompts: int
    agree: int
    tokens: int
    max_logit: float
    max_difference: float
    worst_difference: float
    worst_by_noise: float
    base_difference: float

    def sentence(self) -> str:
        """What was measured, for the user."""
        return (
            f"proved on {self.agree} of {self.prompts} prompts: logits differ from base+adapter's "
            f"by at most {self.max_difference / self.max_logit:.1e} of the largest, "
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


def prove(merged: Path, base: Path, adapter: Path, dtype: str) -> Proof:
    """Compare in a fresh process.

    Args:
        merged: the folder to prove.
        base: folder of the base.
        adapter: folder of the adapter.
        dtype: of the merged weights, a key of `BOUNDS`.

    Raises:
        IntegrityError: one of them does not load there.
    """
    command = [sys.executable, "-m", "slm_lora.export.verify"]
    command += [str(path.resolve()) for path in (merged, base, adapter)]
    command.append(dtype)
    # All is here: libraries that would ask the hub about it are not to.
    alone = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
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
    if not (proof.agree >= ENOUGH and proof.worst_by_noise <= _NOISE):
        raise IntegrityError(
            f"{name}: the merged model is not base+adapter: on {proof.prompts - proof.agree} of "
            f"{proof.prompts} prompts logits differ by more than the "
            f"{bounds.share * proof.max_logit:.2e} that are allowed in {dtype}, "
            f"by up to {proof.worst_difference:.2e}; nothing was written"
        )
    if not proof.base_difference > bounds.control * proof.worst_difference:
        raise IntegrityError(
            f"{name}: the merged model cannot be told from its base: logits differ from the base's "
            f"by {proof.base_difference:.2e}, from base+adapter's by {proof.worst_difference:.2e}; "
            "the adapter has no effect, or less than the rounding of the weights "
            "(--dtype fp32 rounds least); nothing was written"
        )


def _compare(merged: Path, base: Path, adapter: Path, dtype: str) -> Proof:
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

    def logits(model: Any, prompts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(input_ids=ids).logits[0] for ids in prompts]

    def apart(ones: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> torch.Tensor:
        """Largest difference of each prompt."""
        pairs = zip(ones, others, strict=True)
        return torch.tensor([float((a.double() - b.double()).abs().max()) for a, b in pairs])

    tokenizer = AutoTokenizer.from_pretrained(merged, local_files_only=True)
    prompts = [tokenizer(text, return_tensors="pt")["input_ids"] for text in PROMPTS]
    # One model in memory at a time: each may be all that fits.
    peft_model = PeftModel.from_pretrained(load(base), str(adapter)).eval()
    wanted = logits(peft_model, prompts)
    with peft_model.disable_adapter():
        untouched = logits(peft_model, prompts)
    del peft_model
    found = logits(load(merged), prompts)

    differences, largest = apart(found, wanted), max(float(each.abs().max()) for each in wanted)
    agrees = differences <= BOUNDS[dtype].share * largest
    others = [index for index, yes in enumerate(agrees.tolist()) if not yes]
    by_noise = 0.0
    if others and dtype == "fp32":

        def own_error(model: Any, by_fp32: Sequence[torch.Tensor]) -> torch.Tensor:
            exact = logits(model.double(), [prompts[index] for index in others])
            return apart(exact, [by_fp32[index] for index in others])

        noise = own_error(PeftModel.from_pretrained(load(base), str(adapter)).eval(), wanted)
        noise = noise.maximum(own_error(load(merged), found))
        by_noise = float((differences[others] / noise).max())
    return Proof(
        prompts=len(prompts),
        agree=len(prompts) - len(others),
        tokens=sum(ids.numel() for ids in prompts),
        max_logit=largest,
        max_difference=float(differences[agrees].max()) if agrees.any() else float("nan"),
        # torch's max keeps a NaN, Python's may drop it.
        worst_difference=float(differences.max()),
        worst_by_noise=by_noise,
        base_difference=float(apart(found, untouched).max()),
    )


if __name__ == "__main__":
    _merged, _base, _adapter = map(Path, sys.argv[1:4])
    print(json.dumps(asdict(_compare(_merged, _base, _adapter, sys.argv[4]))))
