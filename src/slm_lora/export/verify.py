"""Verify a merged model against base+adapter in a new process.

``python -m slm_lora.export.verify MERGED BASE ADAPTER DTYPE`` prints a `Verification` as one line
of JSON. Logits come from plain PEFT (base+adapter) and plain transformers (merged), not from this
project's forward pass.
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
"""80 short texts, of which `MIN_AGREEING` must agree. Not all: on a few texts the error of fp32
itself, measured against fp64, exceeds 1e-5 of the largest logit (on random tokens, on many)."""
MIN_AGREEING = 64
_MAX_NOISE_RATIO = 10
"""Largest difference on the other prompts, as a multiple of the fp32 error there."""


@dataclass(frozen=True, slots=True)
class Verification:
    """Comparison of logits at every position of the prompts, computed in fp32.

    The names are keys of slm_lora.json.

    Attributes:
        prompts: number of prompts.
        agree: prompts whose logits differ by at most `Bounds.max_relative` of the largest logit.
        tokens: number of tokens in all prompts.
        max_logit: largest absolute logit of base+adapter.
        max_difference: largest absolute difference between merged and base+adapter over the
            prompts that agree.
        worst_difference: the same over all prompts.
        worst_by_noise: largest difference on a prompt that does not agree, divided by the fp32
            error there; only for fp32, else 0. The fp32 error is the distance between fp32 and
            fp64 logits, of base+adapter or of merged, whichever is larger.
        base_difference: largest absolute difference between merged and the base alone.
    """

    prompts: int
    agree: int
    tokens: int
    max_logit: float
    max_difference: float
    worst_difference: float
    worst_by_noise: float
    base_difference: float

    def summary(self) -> str:
        """One sentence for the terminal."""
        return (
            f"verified on {self.agree} of {self.prompts} prompts: logits differ from those of "
            f"base+adapter by at most {self.max_difference / self.max_logit:.1e} of the largest, "
            f"from those of the base by {self.base_difference / self.max_logit:.1e}"
        )


@dataclass(frozen=True, slots=True)
class Bounds:
    """Limits of a verification.

    Attributes:
        max_relative: largest allowed difference from base+adapter, relative to the largest logit.
        min_contrast: the difference from the base must exceed this multiple of the difference
            from base+adapter.
    """

    max_relative: float
    min_contrast: float


BOUNDS = {"fp32": Bounds(1e-5, 10), "fp16": Bounds(1e-2, 2), "bf16": Bounds(5e-2, 2)}
"""By the dtype of the merged weights; fp16 and bf16 round every weight."""


def verify(merged: Path, base: Path, adapter: Path, dtype: str) -> Verification:
    """Compare in a new process.

    Args:
        merged: folder of the merged model.
        base: folder of the base.
        adapter: folder of the adapter.
        dtype: dtype of the merged weights, a key of `BOUNDS`.

    Raises:
        IntegrityError: the process failed, mostly because a folder does not load.
    """
    command = [sys.executable, "-m", "slm_lora.export.verify"]
    command += [str(path.resolve()) for path in (merged, base, adapter)]
    command.append(dtype)
    # All files are local; keep the libraries from asking the hub.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        last_line = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise IntegrityError(f"{adapter}: the merged model could not be compared: {last_line}")
    return Verification(**json.loads(result.stdout.strip().splitlines()[-1]))


def check_bounds(measured: Verification, dtype: str, name: str) -> None:
    """Refuse a merged model that differs from base+adapter or does not differ from the base.

    Raises:
        IntegrityError: a bound of `BOUNDS` is exceeded; the message has the numbers.
    """
    bounds = BOUNDS[dtype]
    # Negated, so that NaN fails.
    if not (measured.agree >= MIN_AGREEING and measured.worst_by_noise <= _MAX_NOISE_RATIO):
        raise IntegrityError(
            f"{name}: the merged model differs from base+adapter: on "
            f"{measured.prompts - measured.agree} of {measured.prompts} prompts logits differ by "
            f"more than the {bounds.max_relative * measured.max_logit:.2e} allowed in {dtype}, by "
            f"up to {measured.worst_difference:.2e}; nothing was written"
        )
    if not measured.base_difference > bounds.min_contrast * measured.worst_difference:
        raise IntegrityError(
            f"{name}: the merged model is too close to its base: logits differ from the base's by "
            f"{measured.base_difference:.2e}, from base+adapter's by "
            f"{measured.worst_difference:.2e}; the adapter has no effect, or less than rounding to "
            f"{dtype} (fp32 rounds least); nothing was written"
        )


def compare_logits(merged: Path, base: Path, adapter: Path, dtype: str) -> Verification:
    """Compare a merged model with base + adapter on the prompts, all computed in fp32."""
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

    def max_differences(
        logits_a: Sequence[torch.Tensor], logits_b: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Largest absolute difference of each prompt."""
        pairs = zip(logits_a, logits_b, strict=True)
        return torch.tensor([float((a.double() - b.double()).abs().max()) for a, b in pairs])

    tokenizer = AutoTokenizer.from_pretrained(merged, local_files_only=True)
    prompts = [tokenizer(text, return_tensors="pt")["input_ids"] for text in PROMPTS]
    # One model in memory at a time; two may not fit.
    peft_model = PeftModel.from_pretrained(load(base), str(adapter)).eval()
    expected = logits(peft_model, prompts)
    with peft_model.disable_adapter():
        base_logits = logits(peft_model, prompts)
    del peft_model
    merged_logits = logits(load(merged), prompts)

    differences = max_differences(merged_logits, expected)
    max_logit = max(float(values.abs().max()) for values in expected)
    agrees = differences <= BOUNDS[dtype].max_relative * max_logit
    disagreeing = [index for index, agreed in enumerate(agrees.tolist()) if not agreed]
    by_noise = 0.0
    if disagreeing and dtype == "fp32":

        def own_error(model: Any, by_fp32: Sequence[torch.Tensor]) -> torch.Tensor:
            exact = logits(model.double(), [prompts[index] for index in disagreeing])
            return max_differences(exact, [by_fp32[index] for index in disagreeing])

        noise = own_error(PeftModel.from_pretrained(load(base), str(adapter)).eval(), expected)
        noise = noise.maximum(own_error(load(merged), merged_logits))
        by_noise = float((differences[disagreeing] / noise).max())
    return Verification(
        prompts=len(prompts),
        agree=len(prompts) - len(disagreeing),
        tokens=sum(ids.numel() for ids in prompts),
        max_logit=max_logit,
        max_difference=float(differences[agrees].max()) if agrees.any() else float("nan"),
        # torch's max propagates NaN, Python's may not.
        worst_difference=float(differences.max()),
        worst_by_noise=by_noise,
        base_difference=float(max_differences(merged_logits, base_logits).max()),
    )


if __name__ == "__main__":
    _merged, _base, _adapter = map(Path, sys.argv[1:4])
    print(json.dumps(asdict(compare_logits(_merged, _base, _adapter, sys.argv[4]))))
