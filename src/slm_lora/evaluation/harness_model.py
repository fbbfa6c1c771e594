"""A model in memory as a model of lm-evaluation-harness.

Texts become tokens, and tokens texts, as in lm-eval's own class for transformers (`HFLM`), so that
the results are those of ``lm_eval --model hf``. Forward passes and generation are ours.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
    resolve_max_length,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from slm_lora.adapters.multi import AdapterSet
from slm_lora.data.collate import IGNORE_INDEX, MicroBatch
from slm_lora.errors import UsageError
from slm_lora.evaluation.batched_generation import Reply, generate_replies
from slm_lora.evaluation.generation import Sampling
from slm_lora.model.forward import score_documents

_GREEDY = "greedy"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
MOST_TOKENS = 256
"""Limit of a generated text where a task has none, as in `HFLM`."""

Scored = tuple[float, bool]
"""Log-likelihood of a continuation, nats, and whether it is the greedy one."""


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A variant of an `AdapterSet`.

    Args:
        variants: the base and its adapters.
        name: of the variant.
        micro_batch_tokens: limit of a forward pass.
        on_request: called after requests with their number and that of their tokens.
    """

    def __init__(
        self,
        variants: AdapterSet,
        name: str,
        micro_batch_tokens: int,
        on_request: Callable[[int, int], None] = lambda requests, tokens: None,
    ) -> None:
        super().__init__()
        self.tokenizer: Any = variants.tokenizer
        self._variants, self._name = variants, name
        self._micro_batch_tokens, self._on_request = micro_batch_tokens, on_request
        own = resolve_max_length(variants.base.model.config, self.tokenizer)
        self.max_length = min(int(own), variants.max_length)

    @property
    def eot_token_id(self) -> int:
        """The end token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests, which is not used."""
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation in the template of the training; where that has no system text, it is put
        before the first question."""
        row_tokenizer = self._variants.row_tokenizers[self._name]
        has_system = row_tokenizer.template.kind in ("chat", "jinja")
        if not has_system and len(chat_history) > 1 and chat_history[0]["role"] == "system":
            system, first, *rest = chat_history
            first = {**first, "content": f"{system['content']}\n\n{first['content']}"}
            chat_history = [first, *rest]
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                chat_template=row_tokenizer.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Token ids; BOS, if the tokenizer adds one, unless the text begins with it."""
        if add_special_tokens is None:
            bos = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = not has_bos_prefix(string, bos)
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def loglikelihood(self, requests: list[Instance], **_: object) -> list[Scored]:
        """Of continuations, given their contexts."""
        scored: list[Scored] = super().loglikelihood(requests, disable_tqdm=True)
        return scored

    def loglikelihood_rolling(self, requests: list[Instance], **_: object) -> list[float]:
        """Of whole texts; one longer than the context in windows, each token once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            own = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts = [(None, *make_disjoint_window(window)) for window in own]
            windows += parts
            counts.append(len(parts))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: object
    ) -> list[Scored]:
        self._variants.activate(self._name)
        texts = []
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise UsageError(
                    f"tasks: a continuation of {len(continuation)} tokens cannot be scored; the "
                    f"limit of {self._variants.base.source.name} is {self.max_length}"
                )
            ids = [*context, *continuation][-(self.max_length + 1) :]
            texts.append((ids, len(continuation)))
        scored: dict[int, Scored] = {}
        for batch in self._batches(texts):
            scores = score_documents(
                self._variants.base,
                _micro_batch([texts[index] for index in batch]),
                {_GREEDY: _is_greedy},
            )
            for place, index in enumerate(batch):
                greedy = scores.values_all[_GREEDY][place] == scores.tokens_all[place]
                scored[index] = (-float(scores.nll_all[place]), bool(greedy))
            self._on_request(len(batch), sum(len(texts[index][0]) for index in batch))
        return [scored[index] for index in range(len(texts))]

    def _batches(self, texts: Sequence[tuple[list[int], int]]) -> list[list[int]]:
        """Numbers of texts, similar lengths together, the longest first."""
        batches: list[list[int]] = []
        longest = 0
        for index in sorted(range(len(texts)), key=lambda i: -len(texts[i][0])):
            if not batches or longest * (len(batches[-1]) + 1) > self._micro_batch_tokens:
                batches.append([])
                longest = len(texts[index][0])
            batches[-1].append(index)
        return batches

    def generate_until(self, requests: list[Instance], **_: object) -> list[str]:
        """Texts after contexts, up to the first of a task's stop texts."""
        alike: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            alike[json.dumps(request.args[1], sort_keys=True)].append(index)
        texts: dict[int, str] = {}
        for indices in alike.values():
            contexts = [requests[index].args[0] for index in indices]
            generated = self._generate(contexts, requests[indices[0]].args[1])
            texts.update(zip(indices, generated, strict=True))
        return [texts[index] for index in range(len(requests))]

    def _generate(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        end = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        sampling, stop = sampling_of(settings, end)
        room = self.max_length - sampling.max_new_tokens
        if room <= 0:
            raise UsageError(
                f"tasks: a task generates up to {sampling.max_new_tokens} tokens, but the limit of "
                f"{self._variants.base.source.name} is {self.max_length} with the question"
            )
        prompts = [(self._context(text) or [self.prefix_token_id])[-room:] for text in contexts]

        def on_reply(reply: Reply) -> None:
            self._on_request(1, len(reply.ids))

        replies = generate_replies(self._variants, self._name, prompts, sampling, on_reply)
        # Decoded without the context, as by lm-eval: a leading space may be lost.
        return [
            postprocess_generated_text(
                self.tokenizer.decode(list(reply.ids), skip_special_tokens=True), list(stop), None
            )
            for reply in replies
        ]

    def _context(self, text: str) -> list[int]:
        special = not has_bos_prefix(text, getattr(self.tokenizer, "bos_token", None))
        return list(self.tokenizer.encode(text, add_special_tokens=special))


def sampling_of(settings: Mapping[str, Any], end: str | None = None) -> tuple[Sampling, list[str]]:
    """Sampling parameters from a task's ``generation_kwargs``, and its stop texts.

    Args:
        settings: of the task.
        end: text of the end token, a stop text too.

    Raises:
        UsageError: a setting is not supported.
    """
    own: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), MOST_TOKENS))
    stop = handle_stop_sequences(own.pop("until", None), end)
    count = own.pop("max_gen_toks")
    is_sampled = own.pop("do_sample", False)
    known = {name: own.pop(name) for name in _SAMPLING if own.get(name) is not None}
    unknown = [name for name, value in own.items() if name != "use_cache" and value is not None]
    if unknown:
        raise UsageError(f"generation setting {unknown[0]!r} is not supported")
    if is_sampled:
        known = {"temperature": 1.0, **known}
    else:
        known = {name: known[name] for name in ("repetition_penalty",) if name in known}
    return Sampling(max_new_tokens=count, stop=tuple(stop), **known), stop


def _is_greedy(logits: Tensor, labels: Tensor) -> Tensor:
    return (logits.argmax(1) == labels).float()


def _micro_batch(texts: Sequence[tuple[list[int], int]]) -> MicroBatch:
    """Texts with the number of their last tokens that are scored. The last token is only a label:
    after a context of the full length there is no position for it."""
    lengths = tuple(len(ids) - 1 for ids, _ in texts)
    labels = []
    for ids, scored in texts:
        own = np.full(len(ids) - 1, IGNORE_INDEX, np.int64)
        own[-scored:] = ids[-scored:]
        labels.append(own)
    all_labels = np.concatenate(labels)
    return MicroBatch(
        ids=np.concatenate([np.array(ids[:-1], np.int64) for ids, _ in texts]),
        positions=np.concatenate([np.arange(length) for length in lengths]),
        lengths=lengths,
        labels=all_labels,
        document=np.repeat(np.arange(len(texts)), lengths),
        response=all_labels != IGNORE_INDEX,
        row_ids=tuple(str(index) for index in range(len(texts))),
    )
