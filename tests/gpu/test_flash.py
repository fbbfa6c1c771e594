"""FlashAttention on a CUDA GPU against `attention_bmm`, and a training run with it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from slm_lora.adapters import attach
from slm_lora.config.schema import AdapterSection, TrainingSection
from slm_lora.model.base import Base
from slm_lora.model.loading import load_base
from slm_lora.ops import attention, attention_bmm, attention_flash
from slm_lora.training.loop import train

from ..support.examples import make_examples

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 80, 128])
def test_flash_attention_is_verified_and_chosen_for_usual_head_widths(
    dtype: torch.dtype, width: int
) -> None:
    q = torch.zeros(1, 1, width, dtype=dtype, device="cuda")
    assert attention_flash.usable(q), attention_flash.failure()
    assert attention.choose_backend(q) is attention_flash
    assert attention.choose_backend(q.float()) is attention_bmm


def test_training_losses_on_cuda_equal_those_on_cpu(load_tiny: Callable[..., Base]) -> None:
    examples = make_examples([30, 70, 9, 41] * 4)
    section = TrainingSection(num_train_epochs=3, learning_rate=1e-3, effective_batch_size=8)
    losses = []
    for device in ("cpu", "cuda"):
        source = load_tiny().source
        base = load_base(source, device=torch.device(device), precision="bf16")
        peft_model = attach.attach(
            base, AdapterSection(r=4, lora_dropout=0.0, target_modules=("q_proj", "v_proj")), 3
        )
        losses.append([s.loss for s in train(base, peft_model, examples, section, 0).history])
    for cpu_loss, cuda_loss in zip(*losses, strict=True):
        assert math.isclose(cpu_loss, cuda_loss, rel_tol=1e-2)
