"""Text generation token by token, greedy or sampled, with a key-value cache.

Several generations can be advanced in turn. None is batched with others, so that its text does not
depend on concurrent requests; `batched_generation` computes many prompts together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from slm_lora.adapters.multi import AdapterSet
from slm_lora.data.collate import collate
from slm_lora.data.prompts import Prompt
from slm_lora.errors import UsageError
from slm_lora.model.cache import new_cache, next_logits
from slm_lora.model.forward import score_documents

if TYPE_CHECKING:
    from tokenizers.decoders import DecodeStream
    from transformers import LogitsProcessorList

Finish = Literal["", "stop", "length"]

TIE = 1e-3
"""Distance of two logits, in standard deviations of a step's logits, below which their order may be
due to rounding. `batch_is_exact` requires errors whose root mean square is at most 3e-5."""

GREEDY_BELOW = 1e-5
"""Temperatures below this count as 0, as in vLLM: logits divided by them would overflow."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters, and conditions that end a generation, as in vLLM.

    Attributes:
        max_new_tokens: limit of generated tokens, the end token included.
        temperature: 0 is greedy.
        top_p: sample from the most likely tokens with this total probability.
        top_k: sample from this number of most likely tokens; 0: all.
        repetition_penalty: above 1 makes tokens of prompt and generation less likely (Keskar et
            al. 2019, arXiv 1909.05858).
        seed: seed of the random numbers.
        stop: texts that end the generation; not part of its text.
        min_p: sample from tokens with at least this share of the highest probability.
        frequency_penalty: subtracted from a token's logit per occurrence in the generation.
        presence_penalty: subtracted once from the logit of each token in the generation. Neither
            counts tokens of the prompt.
        min_tokens: least generated tokens before an end token or a stop text is allowed.
        ignore_eos: treat the model's end tokens as any other.
        stop_token_ids: further tokens that end the generation; not part of its text.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()


class Generation:
    """A generation in progress.

    Attributes:
        prompt: token ids.
        ids: generated token ids so far, an end token included.
        max_tokens: limit of generated tokens.
        finished: reason of the end: ``stop`` (end token or stop text) or ``length``; empty before.
        tied: whether a greedy choice was between logits nearer than `TIE`.
    """

    def __init__(
        self, variants: AdapterSet, variant: str, prompt: Sequence[int], sampling: Sampling
    ) -> None:
        """
        Args:
            variants: the base and its adapters.
            variant: name of the adapter, or of the base.
            prompt: token ids.
            sampling: sampling parameters.

        Raises:
            UsageError: the prompt fills the context length, or has ids without an embedding.
        """
        if len(prompt) >= variants.max_length:
            raise UsageError(
                f"prompt: {len(prompt)} tokens, but the limit of {variants.base.source.name} is "
                f"{variants.max_length} with the reply; shorten it"
            )
        embedding: Any = variants.base.model.get_input_embeddings()
        vocab_size = len(embedding.weight)
        if max(prompt, default=0) >= vocab_size:
            raise UsageError(
                f"prompt: token {max(prompt)} is beyond the embedding of "
                f"{variants.base.source.name} ({vocab_size} rows): its tokenizer was extended, but "
                "not the model"
            )
        self.ids: list[int] = []
        self.finished: Finish = ""
        self.tied = False
        self._variants, self._variant, self._sampling = variants, variant, sampling
        self.prompt = list(prompt)
        self.max_tokens = min(sampling.max_new_tokens, variants.max_length - len(prompt))
        self._cache = new_cache(variants.base) if variants.uses_cache else None
        self._n_cached = 0
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._repetition_penalty = _repetition_processor(sampling.repetition_penalty)
        self._warp = _warpers(sampling)
        # Special tokens are part of the text if responses were trained with them.
        special = variants.row_tokenizers[variant].template.special_in_responses
        self._text = StreamedText(variants, self.prompt, sampling.stop, special)
        model_ends = frozenset[int]() if sampling.ignore_eos else variants.stop_ids
        self._end_ids = model_ends | frozenset(sampling.stop_token_ids)

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is chosen."""
        return self._sampling.temperature < GREEDY_BELOW

    def advance(self) -> str:
        """Generate one token; returns the text that became final, possibly empty."""
        return self.add(self._next_logits())

    def add(self, logits: torch.Tensor) -> str:
        """Choose the next token; returns the text that became final, possibly empty.

        Args:
            logits: of it, fp32 [1, vocab_size], on the CPU; may be overwritten.
        """
        token = self._choose(logits)
        self.ids.append(token)
        if token in self._end_ids:
            self.finished = "stop"
            return self._text.rest()
        text, stopped = self._text.add(token, len(self.ids) > self._sampling.min_tokens)
        if stopped:
            self.finished = "stop"
        elif len(self.ids) >= self.max_tokens:
            self.finished = "length"
            text += self._text.rest()
        return text

    def pieces(self) -> Iterator[str]:
        """Generate to the end; yields the text in pieces."""
        while not self.finished:
            if new := self.advance():
                yield new

    @torch.inference_mode()
    def _next_logits(self) -> torch.Tensor:
        """Logits of the next token, fp32 [1, vocab_size], on the CPU."""
        self._variants.activate(self._variant)
        ids, cached = [*self.prompt, *self.ids], self._n_cached
        logits = next_logits(self._variants.base, ids, self._cache, cached)
        self._n_cached = len(ids)
        on_cpu: torch.Tensor = logits.to("cpu", torch.float32)
        return on_cpu

    @torch.inference_mode()
    def _choose(self, logits: torch.Tensor) -> int:
        if len(self.ids) < self._sampling.min_tokens:
            excluded = [token for token in self._end_ids if token < logits.shape[1]]
            logits[0, excluded] = -torch.inf
        previous: Any = torch.tensor([[*self.prompt, *self.ids]])
        logits = self._repetition_penalty(previous, logits)
        self._penalise(logits)
        if self.is_greedy:
            (first, second), tokens = logits[0].topk(2)
            self.tied |= bool(first - second < TIE * logits.std())
            return int(tokens[0])
        logits = self._warp(previous, logits)
        probabilities = torch.softmax(logits[0], 0)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def _penalise(self, logits: torch.Tensor) -> None:
        """Subtract frequency and presence penalties, in place."""
        sampling = self._sampling
        if sampling.frequency_penalty or sampling.presence_penalty:
            counts = Counter(self.ids)
            penalties = sampling.frequency_penalty * torch.tensor(
                list(counts.values()), dtype=torch.float32
            )
            logits[0, list(counts)] -= penalties + sampling.presence_penalty


def _repetition_processor(penalty: float) -> LogitsProcessorList:
    """Processor of the repetition penalty, which counts the prompt's tokens, as vLLM does."""
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    processors = LogitsProcessorList()
    if penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(penalty))
    return processors


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """transformers' warpers in vLLM's order: as in `generate`, but with min_p before top_k and
    top_p."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    warpers = LogitsProcessorList()
    if sampling.temperature >= GREEDY_BELOW and sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers


class StreamedText:
    """Incremental detokenizer; holds back text that may be the start of a stop text."""

    def __init__(
        self, variants: AdapterSet, prompt: list[int], stop: tuple[str, ...], special: bool
    ) -> None:
        from tokenizers.decoders import DecodeStream

        self._stream: DecodeStream = DecodeStream(ids=prompt, skip_special_tokens=not special)
        self._backend = variants.tokenizer.backend_tokenizer
        self._stop = tuple(text for text in stop if text)
        self._pending = ""

    def add(self, token: int, may_stop: bool = True) -> tuple[str, bool]:
        """Add a token.

        Args:
            token: id.
            may_stop: False: release all text, so that no later stop text can begin in it.

        Returns:
            The text that became final, and whether a stop text occurred.
        """
        self._pending += self._stream.step(self._backend, token) or ""
        if not may_stop:
            return self.rest(), False
        stop_positions = [i for text in self._stop if (i := self._pending.find(text)) >= 0]
        if stop_positions:
            return self._pending[: min(stop_positions)], True
        n_certain = len(self._pending) - self._stop_prefix_length()
        released, self._pending = self._pending[:n_certain], self._pending[n_certain:]
        return released, False

    def rest(self) -> str:
        """Release the held-back text, at the end of the generation."""
        text, self._pending = self._pending, ""
        return text

    def _stop_prefix_length(self) -> int:
        """Length of the longest end of the pending text that starts a stop text."""
        longest = max(map(len, self._stop), default=1) - 1
        return next(
            (
                length
                for length in range(min(longest, len(self._pending)), 0, -1)
                if any(text.startswith(self._pending[-length:]) for text in self._stop)
            ),
            0,
        )


def prompt_ids(variants: AdapterSet, variant: str, prompt: Prompt) -> list[int]:
    """Token ids of a prompt in the template that a variant was trained with."""
    return variants.row_tokenizers[variant].prompt(prompt.turns, prompt.context)


def reference_loss(
    variants: AdapterSet, variant: str, template_variant: str, prompt: Prompt
) -> float | None:
    """NLL of a prompt's reference answer, in nats per token; None without a reference.

    Args:
        variants: the base and its adapters.
        variant: the model to score with.
        template_variant: the variant whose template formats the text.
        prompt: prompt and reference.
    """
    if not prompt.reference:
        return None
    row = prompt.as_row
    examples, _ = variants.row_tokenizers[template_variant].encode(
        [row], {row.row_id: row.row_id}, variants.max_length
    )
    variants.activate(variant)
    scores = score_documents(variants.base, collate(examples, "all"))
    return float(scores.nll_response[0] / scores.tokens_response[0])
