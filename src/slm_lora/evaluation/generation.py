"""Replies, token by token: greedy or sampled, with a key-value cache, one reply at a time or
several in turn.

A reply is computed alone (never in a batch with others), so that its text does not depend on
what else is asked at the same time.
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

GREEDY_BELOW = 1e-5
"""Temperatures under this are 0, as in vLLM: logits divided by them would overflow."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, and when a reply ends.

    Attributes:
        max_new_tokens: of the reply, its end included.
        temperature: 0 takes the most likely token.
        top_p: sample among the most likely tokens of this much probability.
        top_k: sample among so many most likely tokens; 0: all.
        repetition_penalty: above 1 makes tokens less likely that were there (Keskar et al.
            2019, arXiv 1909.05858).
        seed: of the samples.
        stop: texts that end the reply, and are not part of it.
        min_p: sample among tokens of at least this share of the most likely one's probability.
        frequency_penalty: taken off a logit for each time that the token is in the reply so far.
        presence_penalty: taken off a logit once, where the token is in the reply so far. Both as
            OpenAI and vLLM define them: of the prompt's tokens none counts.
        min_tokens: of the reply, before its end or a stop may come.
        ignore_eos: the model's own end is a token like others.
        stop_token_ids: tokens that end the reply besides, and are not part of its text.
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
    """A reply in the making.

    Attributes:
        ids: tokens so far, the end's included.
        finished: empty while there is more: ``stop`` (the model ended it, or a stop text came)
            or ``length``.
    """

    def __init__(
        self, variants: AdapterSet, variant: str, prompt: Sequence[int], sampling: Sampling
    ) -> None:
        """
        Args:
            variants: the base and its adapters.
            variant: who answers.
            prompt: token ids.
            sampling: how.

        Raises:
            UsageError: the prompt leaves no room for a reply.
        """
        if len(prompt) >= variants.max_length:
            raise UsageError(
                f"prompt: {len(prompt)} tokens, and {variants.base.source.name} takes "
                f"{variants.max_length} with the reply; shorten it"
            )
        embedding: Any = variants.base.model.get_input_embeddings()
        rows = len(embedding.weight)
        if max(prompt, default=0) >= rows:
            raise UsageError(
                f"prompt: token {max(prompt)} is not among the {rows} of the embedding of "
                f"{variants.base.source.name}: its tokenizer was extended, and the model was not"
            )
        self.ids: list[int] = []
        self.finished: Finish = ""
        self._variants, self._variant, self._sampling = variants, variant, sampling
        self._prompt = list(prompt)
        self._room = min(sampling.max_new_tokens, variants.max_length - len(prompt))
        self._cache = new_cache(variants.base) if variants.uses_cache else None
        self._known = 0
        self._generator = torch.Generator().manual_seed(sampling.seed)
        self._repeated = _repetition(sampling.repetition_penalty)
        self._warp = _warpers(sampling)
        # Where responses were trained to hold special tokens, they are part of what is said.
        special = variants.row_tokenizers[variant].template.special_in_responses
        self._text = StreamedText(variants, self._prompt, sampling.stop, special)
        own = frozenset[int]() if sampling.ignore_eos else variants.stop_ids
        self._ends = own | frozenset(sampling.stop_token_ids)

    def advance(self) -> str:
        """Compute the next token; the text that is certain now, which may be none."""
        token = self._choose(self._next_logits())
        self.ids.append(token)
        if token in self._ends:
            self.finished = "stop"
            return self._text.rest()
        new, stopped = self._text.add(token, len(self.ids) > self._sampling.min_tokens)
        if stopped:
            self.finished = "stop"
        elif len(self.ids) >= self._room:
            self.finished = "length"
            new += self._text.rest()
        return new

    def pieces(self) -> Iterator[str]:
        """Its text, piece by piece, to its end."""
        while not self.finished:
            if new := self.advance():
                yield new

    @torch.inference_mode()
    def _next_logits(self) -> torch.Tensor:
        """Logits of the token that follows, fp32 [1, vocabulary], on the CPU."""
        self._variants.activate(self._variant)
        ids, known = [*self._prompt, *self.ids], self._known
        logits = next_logits(self._variants.base, ids, self._cache, known)
        self._known = len(ids)
        on_cpu: torch.Tensor = logits.to("cpu", torch.float32)
        return on_cpu

    @torch.inference_mode()
    def _choose(self, logits: torch.Tensor) -> int:
        if len(self.ids) < self._sampling.min_tokens:
            barred = [token for token in self._ends if token < logits.shape[1]]
            logits[0, barred] = -torch.inf
        seen: Any = torch.tensor([[*self._prompt, *self.ids]])
        logits = self._repeated(seen, logits)
        self._penalise(logits)
        if self._sampling.temperature < GREEDY_BELOW:
            return int(logits.argmax())
        logits = self._warp(seen, logits)
        chances = torch.softmax(logits[0], 0)
        return int(torch.multinomial(chances, 1, generator=self._generator))

    def _penalise(self, logits: torch.Tensor) -> None:
        """Frequency and presence, in place."""
        how = self._sampling
        if how.frequency_penalty or how.presence_penalty:
            times = Counter(self.ids)
            taken = how.frequency_penalty * torch.tensor(list(times.values()), dtype=torch.float32)
            logits[0, list(times)] -= taken + how.presence_penalty


def _repetition(penalty: float) -> LogitsProcessorList:
    """transformers' own, which counts the prompt's tokens, too, as vLLM does."""
    from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

    kept = LogitsProcessorList()
    if penalty != 1:
        kept.append(RepetitionPenaltyLogitsProcessor(penalty))
    return kept


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    """transformers' own, in vLLM's order: that of its `generate`, but for min_p, which comes
    before top_k and top_p."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    warp = LogitsProcessorList()
    if sampling.temperature >= GREEDY_BELOW and sampling.temperature != 1:
        warp.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.min_p > 0:
        warp.append(MinPLogitsWarper(sampling.min_p))
    if sampling.top_k:
        warp.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warp.append(TopPLogitsWarper(sampling.top_p))
    return warp


class StreamedText:
    """Tokens to text as they come. What may be the beginning of a stop text is held back."""

    def __init__(
        self, variants: AdapterSet, prompt: list[int], stop: tuple[str, ...], special: bool
    ) -> None:
        from tokenizers.decoders import DecodeStream

        self._stream: DecodeStream = DecodeStream(ids=prompt, skip_special_tokens=not special)
        self._backend = variants.tokenizer.backend_tokenizer
        self._stop = tuple(text for text in stop if text)
        self._held = ""

    def add(self, token: int, may_stop: bool = True) -> tuple[str, bool]:
        """Text that is certain now, and whether a stop text came. One that begins in text of
        before it might is none."""
        self._held += self._stream.step(self._backend, token) or ""
        if not may_stop:
            return self.rest(), False
        ends = [at for text in self._stop if (at := self._held.find(text)) >= 0]
        if ends:
            return self._held[: min(ends)], True
        certain = len(self._held) - self._doubtful()
        new, self._held = self._held[:certain], self._held[certain:]
        return new, False

    def rest(self) -> str:
        """What was held back: no stop text came of it."""
        new, self._held = self._held, ""
        return new

    def _doubtful(self) -> int:
        """Characters at the end that a stop text may begin with."""
        most = max(map(len, self._stop), default=1) - 1
        return next(
            (
                many
                for many in range(min(most, len(self._held)), 0, -1)
                if any(text.startswith(self._held[-many:]) for text in self._stop)
            ),
            0,
        )


def prompt_ids(variants: AdapterSet, variant: str, prompt: Prompt) -> list[int]:
    """Tokens of a prompt as a variant was trained to be asked."""
    return variants.row_tokenizers[variant].prompt(prompt.turns, prompt.context)


def reference_loss(
    variants: AdapterSet, variant: str, asked_as: str, prompt: Prompt
) -> float | None:
    """NLL a token, in nats, of the answer that a prompt brings along; None if it brings none.

    Args:
        variants: the base and its adapters.
        variant: whose loss.
        asked_as: the variant whose template the text is made with.
        prompt: with its reference.
    """
    if not prompt.reference:
        return None
    row = prompt.as_row
    examples, _ = variants.row_tokenizers[asked_as].encode(
        [row], {row.row_id: row.row_id}, variants.max_length
    )
    variants.activate(variant)
    found = score_documents(variants.base, collate(examples, "all"))
    return float(found.nll_response[0] / found.tokens_response[0])
