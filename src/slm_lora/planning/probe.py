"""Time and memory of a cell, measured on a slice of its model.

The slice has the model's hidden size, but few layers, a small vocabulary and random weights: it is
trained and scored within seconds by the same code as the whole model.
"""

from __future__ import annotations

import functools
import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from slm_lora.adapters import attach
from slm_lora.adapters.methods import trains_all
from slm_lora.data.collate import collate, make_micro_batches
from slm_lora.errors import UsageError
from slm_lora.evaluation.scoring import score
from slm_lora.experiment.job import Job
from slm_lora.model.activation_checkpointing import checkpointed_layers
from slm_lora.model.base import DTYPES, Base
from slm_lora.model.forward import batch_nll
from slm_lora.model.loading import load_base
from slm_lora.model.resolve import ModelSource
from slm_lora.ops import compilation
from slm_lora.ops.cross_entropy import summed_nll, token_nll
from slm_lora.ops.output_head import OutputHead
from slm_lora.records import Example
from slm_lora.training.loop import train
from slm_lora.training.optimizer import adamw

SLICE_LAYERS, SLICE_VOCAB = 8, 256
"""With fewer layers, the constant cost of a step would dominate."""

STEP_TOKENS = 1_000
"""Approximate tokens of a training step of the slice."""

SCORED_TOKENS = 2_500
"""Approximate tokens of the test set that the slice scores."""

SAVED_TOKENS = 64, 512
"""Two sizes for counting saved tensors: a line through both separates the constant part."""


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """Estimates for the whole model, from its slice and its output head.

    Attributes:
        training_s_per_token: seconds per token of forward, backward and update.
        scoring_s_per_token: seconds per token.
        saved_bytes_per_token: bytes per token that all layers save for the backward pass.
        saved_fixed_bytes: bytes that they save independent of the number of tokens.
        adapter_parameters: parameters of the adapter; 0 for full fine-tuning.
        r: rank of that adapter.
        num_layers: of the whole model.
        vocab_size: of the whole model.
        hidden_size: of the whole model.
    """

    training_s_per_token: float
    scoring_s_per_token: float
    saved_bytes_per_token: float
    saved_fixed_bytes: float
    adapter_parameters: int
    r: int
    num_layers: int
    vocab_size: int
    hidden_size: int


def measure(job: Job, compiled: bool) -> ProbeResult:
    """Train and score a slice of a job's model.

    Args:
        job: base, adapter and rows.
        compiled: whether to compile; the run reuses the compiled code.

    Raises:
        UsageError: the base lacks a target module, or no slice of it can be made.
    """
    from transformers import AutoConfig

    config = job.config
    model_config: Any = AutoConfig.from_pretrained(
        job.source.path, local_files_only=True, trust_remote_code=False
    ).get_text_config()
    num_layers = int(model_config.num_hidden_layers)
    hidden_size, vocab_size = int(model_config.hidden_size), int(model_config.vocab_size)
    slice_layers = min(SLICE_LAYERS, num_layers)
    full = trains_all(config.adapter)
    with tempfile.TemporaryDirectory() as folder:
        base = load_base(
            _make_slice(job.source, model_config, slice_layers, Path(folder)),
            device=job.device,
            precision=job.precision,
            quantization=config.model.quantization,
        )
        scoring = _time_scoring(base, job, compiled)
        peft_model = attach.attach(base, config.adapter, config.seed)
    trainable = 0 if full else attach.count_parameters(peft_model).trainable
    saved, saved_fixed = _fit_line(
        *(_saved_bytes(base, peft_model, job, tokens) for tokens in SAVED_TOKENS)
    )
    training = _time_training(base, peft_model, job, compiled)
    del base, peft_model
    gc.collect()  # compilable layers have reference cycles
    # Scaled, as exp is slow where it underflows.
    head = torch.nn.Parameter(
        torch.randn(vocab_size, hidden_size, device=job.device)
        .mul_(hidden_size**-0.5)
        .to(DTYPES[job.precision]),
        requires_grad=full,
    )
    layer_ratio = num_layers / slice_layers
    return ProbeResult(
        training_s_per_token=layer_ratio * training + _time_head_training(head, job, compiled),
        scoring_s_per_token=layer_ratio * scoring + _time_head_scoring(head, job, compiled),
        saved_bytes_per_token=layer_ratio * saved,
        saved_fixed_bytes=layer_ratio * saved_fixed,
        adapter_parameters=round(layer_ratio * trainable),
        r=config.adapter.r,
        num_layers=num_layers,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
    )


def _make_slice(
    source: ModelSource, model_config: Any, num_layers: int, folder: Path
) -> ModelSource:
    """Save a model of few layers, a small vocabulary and random weights to a folder."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    model_config.num_hidden_layers, model_config.vocab_size = num_layers, SLICE_VOCAB
    # Some configurations compute layer_types from other keys.
    if isinstance(vars(model_config).get("layer_types"), list):
        model_config.layer_types = model_config.layer_types[:num_layers]
    model_config.pad_token_id = model_config.bos_token_id = model_config.eos_token_id = None
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model_class: Any = AutoModelForCausalLM
    try:
        model_class.from_config(model_config, dtype=torch.float32).save_pretrained(folder)
    except Exception as error:  # raised by the model's code for unusual configurations
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"--plan: cannot make a slice of {source.name} to time ({reason}); the experiment "
            "itself needs none: leave --plan out"
        ) from error
    return replace(source, path=folder)


def _slice_examples(examples: Sequence[Example], tokens: int) -> list[Example]:
    """The first examples, about ``tokens`` in all, with ids within the slice's vocabulary."""
    chosen: list[Example] = []
    while len(chosen) < len(examples) and sum(example.length for example in chosen) < tokens:
        candidate = examples[len(chosen)]
        chosen.append(replace(candidate, ids=candidate.ids % SLICE_VOCAB))
    return chosen


def _time_training(base: Base, peft_model: torch.nn.Module, job: Job, compiled: bool) -> float:
    """Seconds per token, without the first two steps, which warm up and compile."""
    config, rows = job.config.training, job.data.train
    mean_length = sum(row.length for row in rows) / len(rows)
    batch = min(config.effective_batch_size, max(1, round(STEP_TOKENS / mean_length)))
    settings = config.model_copy(
        update={
            "num_train_epochs": 4.0,
            "max_steps": 4,
            "compile": compiled,
            "effective_batch_size": batch,
            "eval_steps": None,
            "early_stopping_patience": None,
            "keep_best": False,
        }
    )
    examples = _slice_examples(rows, 4 * STEP_TOKENS)
    return 1 / train(base, peft_model, examples, settings, job.config.seed).tokens_per_s


def _time_scoring(base: Base, job: Job, compiled: bool) -> float:
    """Seconds per token."""
    examples = _slice_examples(job.scored_rows, SCORED_TOKENS)
    budget = job.config.evaluation.micro_batch_tokens
    work = functools.partial(score, base, examples, "test", budget, compiled)
    return _time_second_call(work) / sum(example.length for example in examples)


def _saved_bytes(
    base: Base, peft_model: torch.nn.Module, job: Job, n_tokens: int
) -> tuple[int, int]:
    """Tokens of a batch of about ``n_tokens``, and the bytes that layers save for its backward
    pass: each storage once, without those of parameters and buffers."""
    examples = _slice_examples(job.data.train, n_tokens)
    model_storages = {
        t.untyped_storage().data_ptr() for t in (*peft_model.parameters(), *peft_model.buffers())
    }
    saved_bytes: dict[int, int] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in model_storages:
            saved_bytes[storage.data_ptr()] = storage.nbytes()
        # Detached, or the graph would hold a reference to itself.
        return tensor.detach()

    config = job.config.training
    batch = collate(make_micro_batches(examples, 10**9)[0], config.loss_on)
    peft_model.train()
    with (
        torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor),
        checkpointed_layers(base.model, config.activation_checkpointing),
    ):
        batch_nll(base, batch, "kept")
    return len(batch.ids), sum(saved_bytes.values())


def _fit_line(first: tuple[int, int], second: tuple[int, int]) -> tuple[float, float]:
    """Slope and intercept of the line through two points; through 0 if their x are equal."""
    (x, y), (x2, y2) = first, second
    if x == x2:
        return y / x, 0.0
    slope = (y2 - y) / (x2 - x)
    return slope, max(0.0, y - slope * x)


def _time_head_training(head: torch.nn.Parameter, job: Job, compiled: bool) -> float:
    """Seconds per token of loss and gradient, with embedding and update if they are trained."""
    config = job.config.training
    hidden, labels = _head_inputs(head, job)
    optimizer = adamw({"head": head}, config) if head.requires_grad else None

    def work() -> None:
        if optimizer is None:
            torch.autograd.backward(summed_nll(hidden.requires_grad_(), OutputHead(head), labels))
            return
        optimizer.zero_grad()
        embedded = torch.nn.functional.embedding(labels, head)
        torch.autograd.backward(summed_nll(embedded, OutputHead(head), labels))
        torch.nn.utils.clip_grad_norm_([head], config.max_grad_norm)
        optimizer.step()

    return _time_second_call(lambda: compilation.run_with_compile_fallback(compiled, work)) / len(
        labels
    )


def _time_head_scoring(head: torch.Tensor, job: Job, compiled: bool) -> float:
    """Seconds per token."""
    hidden, labels = _head_inputs(head, job)
    work = functools.partial(token_nll, hidden, OutputHead(head), labels)
    return _time_second_call(lambda: compilation.run_with_compile_fallback(compiled, work)) / len(
        labels
    )


def _head_inputs(head: torch.Tensor, job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """Random final hidden states [tokens, hidden_size] and labels [tokens], where tokens is the
    size of a step or of a micro-batch."""
    vocab_size, hidden_size = head.shape
    config, rows = job.config.training, job.data.train
    step_tokens = config.effective_batch_size * sum(row.length for row in rows) // len(rows)
    n_tokens = min(step_tokens, config.micro_batch_tokens)
    hidden = torch.randn(n_tokens, hidden_size, device=head.device, dtype=head.dtype)
    return hidden, torch.randint(vocab_size, (n_tokens,), device=head.device)


def _time_second_call(work: Callable[[], object]) -> float:
    """Seconds of a second call, after one to warm up."""
    work()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
