"""How fast a cell would be, and what it would hold: measured on a slice of its model.

The slice has the model's own widths, but few layers and few words, at random: enough for it to be
trained and scored for some seconds by the very code that computes the whole.
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

LAYERS, WORDS = 8, 256
"""Of the slice: with fewer layers, what is done once a step would count for too much."""

STEP_TOKENS = 1_000
"""Tokens of a training step of the slice, about."""

SCORED_TOKENS = 2_500
"""Tokens of the test set that the slice scores, about."""

KEPT_TOKENS = 64, 512
"""Tokens over which is counted what layers keep: some keep something whatever the tokens."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What the whole model would need, from what its slice and its output layer did.

    Attributes:
        training: seconds a token: forward, backward and update.
        scoring: seconds a token.
        kept: bytes a token that all layers keep for the backward pass.
        kept_beside: bytes that they keep whatever the tokens.
        adapter: weights of the adapter; 0 where there is none.
        r: its rank.
        layers: of the whole model.
        words: of its vocabulary.
        width: of its hidden states.
    """

    training: float
    scoring: float
    kept: float
    kept_beside: float
    adapter: int
    r: int
    layers: int
    words: int
    width: int


def measure(job: Job, compiled: bool) -> Measured:
    """Train and score a slice of a job's model.

    Args:
        job: whose base, adapter and rows they are.
        compiled: whether to compile; what is compiled here the run need not compile again.

    Raises:
        UsageError: a target module that the base does not have.
    """
    from transformers import AutoConfig

    recipe = job.config
    config: Any = AutoConfig.from_pretrained(
        job.source.path, local_files_only=True, trust_remote_code=False
    ).get_text_config()
    layers, width, words = (
        int(config.num_hidden_layers), int(config.hidden_size), int(config.vocab_size)
    )  # fmt: skip
    few = min(LAYERS, layers)
    full = trains_all(recipe.adapter)
    with tempfile.TemporaryDirectory() as folder:
        base = load_base(
            _sliced(job.source, config, few, Path(folder)),
            device=job.device,
            precision=job.precision,
            quantization=recipe.model.quantization,
        )
        scoring = _scoring(base, job, compiled)
        peft_model = attach.attach(base, recipe.adapter, recipe.seed)
    trainable = 0 if full else attach.count_parameters(peft_model).trainable
    kept, beside = _line(*(_kept(base, peft_model, job, tokens) for tokens in KEPT_TOKENS))
    training = _training(base, peft_model, job, compiled)
    del base, peft_model
    gc.collect()  # layers that are `compilable` refer to themselves
    # (Scaled, for exp is slow where it underflows.)
    head = torch.nn.Parameter(
        torch.randn(words, width, device=job.device).mul_(width**-0.5).to(DTYPES[job.precision]),
        requires_grad=full,
    )
    times = layers / few
    return Measured(
        training=times * training + _head_training(head, job, compiled),
        scoring=times * scoring + _head_scoring(head, job, compiled),
        kept=times * kept,
        kept_beside=times * beside,
        adapter=round(times * trainable),
        r=recipe.adapter.r,
        layers=layers,
        words=words,
        width=width,
    )


def _sliced(source: ModelSource, config: Any, layers: int, folder: Path) -> ModelSource:
    """A model of few layers and words at random, in a folder like that of the whole."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    config.num_hidden_layers, config.vocab_size = layers, WORDS
    # (In some configurations it is computed from other keys.)
    if isinstance(vars(config).get("layer_types"), list):
        config.layer_types = config.layer_types[:layers]
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    made: Any = AutoModelForCausalLM
    try:
        made.from_config(config, dtype=torch.float32).save_pretrained(folder)
    except Exception as error:  # the model's code, with an unusual configuration
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(
            f"--plan: no slice of {source.name} can be made, so nothing can be timed ({reason}); "
            "the experiment itself needs none: leave --plan out"
        ) from error
    return replace(source, path=folder)


def _in_few_words(examples: Sequence[Example], tokens: int) -> list[Example]:
    """The first examples, up to so many tokens, with ids that the slice has."""
    chosen: list[Example] = []
    while len(chosen) < len(examples) and sum(each.length for each in chosen) < tokens:
        example = examples[len(chosen)]
        chosen.append(replace(example, ids=example.ids % WORDS))
    return chosen


def _training(base: Base, peft_model: torch.nn.Module, job: Job, compiled: bool) -> float:
    """Seconds a token; the first two steps, which warm up and compile, left out."""
    section, rows = job.config.training, job.data.train
    mean = sum(row.length for row in rows) / len(rows)
    batch = min(section.effective_batch_size, max(1, round(STEP_TOKENS / mean)))
    few = section.model_copy(
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
    chosen = _in_few_words(rows, 4 * STEP_TOKENS)
    return 1 / train(base, peft_model, chosen, few, job.config.seed).tokens_per_s


def _scoring(base: Base, job: Job, compiled: bool) -> float:
    """Seconds a token."""
    examples = _in_few_words(job.data.test, SCORED_TOKENS)
    budget = job.config.evaluation.micro_batch_tokens
    work = functools.partial(score, base, examples, "test", budget, compiled)
    return _seconds(work) / sum(example.length for example in examples)


def _kept(base: Base, peft_model: torch.nn.Module, job: Job, about: int) -> tuple[int, int]:
    """How many tokens of about so many, and the bytes that the layers then keep for the backward
    pass: each storage once, what is there anyway left out."""
    examples = _in_few_words(job.data.train, about)
    there = {
        t.untyped_storage().data_ptr() for t in (*peft_model.parameters(), *peft_model.buffers())
    }
    found: dict[int, int] = {}

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            found[storage.data_ptr()] = storage.nbytes()
        # Not the tensor itself: its graph would reference itself.
        return tensor.detach()

    section = job.config.training
    batch = collate(make_micro_batches(examples, 10**9)[0], section.loss_on)
    peft_model.train()
    with (
        torch.autograd.graph.saved_tensors_hooks(noted, lambda tensor: tensor),
        checkpointed_layers(base.model, section.activation_checkpointing),
    ):
        batch_nll(base, batch, "kept")
    return len(batch.ids), sum(found.values())


def _line(first: tuple[int, int], second: tuple[int, int]) -> tuple[float, float]:
    """Slope and value at 0 of the line through two points; through 0, where they are one."""
    (x, y), (further, higher) = first, second
    if x == further:
        return y / x, 0.0
    slope = (higher - y) / (further - x)
    return slope, max(0.0, y - slope * x)


def _head_training(head: torch.nn.Parameter, job: Job, compiled: bool) -> float:
    """Seconds a token of loss and gradient; where the words train, of all that is done to them."""
    section = job.config.training
    hidden, labels = _step_of_head(head, job)
    optimizer = adamw({"head": head}, section) if head.requires_grad else None

    def work() -> None:
        if optimizer is None:
            torch.autograd.backward(summed_nll(hidden.requires_grad_(), OutputHead(head), labels))
            return
        optimizer.zero_grad()
        embedded = torch.nn.functional.embedding(labels, head)
        torch.autograd.backward(summed_nll(embedded, OutputHead(head), labels))
        torch.nn.utils.clip_grad_norm_([head], section.max_grad_norm)
        optimizer.step()

    return _seconds(lambda: compilation.run_with_compile_fallback(compiled, work)) / len(labels)


def _head_scoring(head: torch.Tensor, job: Job, compiled: bool) -> float:
    """Seconds a token."""
    hidden, labels = _step_of_head(head, job)
    work = functools.partial(token_nll, hidden, OutputHead(head), labels)
    return _seconds(lambda: compilation.run_with_compile_fallback(compiled, work)) / len(labels)


def _step_of_head(head: torch.Tensor, job: Job) -> tuple[torch.Tensor, torch.Tensor]:
    """Final hidden states and labels at random, as many as a step or a micro-batch has."""
    words, width = head.shape
    section, rows = job.config.training, job.data.train
    step = section.effective_batch_size * sum(row.length for row in rows) // len(rows)
    many = min(step, section.micro_batch_tokens)
    hidden = torch.randn(many, width, device=head.device, dtype=head.dtype)
    return hidden, torch.randint(words, (many,), device=head.device)


def _seconds(work: Callable[[], object]) -> float:
    """Of doing it once more after once."""
    work()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
