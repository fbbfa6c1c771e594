"""Replies computed together equal those computed alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from slm_lora.adapters.multi import BASE, AdapterSet, load_adapter_set
from slm_lora.errors import UsageError
from slm_lora.evaluation import batched_generation
from slm_lora.evaluation.batched_generation import Reply, generate_replies
from slm_lora.evaluation.generation import Generation, Sampling
from slm_lora.model import cache
from slm_lora.model.resolve import ModelSource

from ..support.exports import make_adapter


@pytest.fixture(scope="module")
def variants(tiny_source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> AdapterSet:
    folder = make_adapter(tiny_source, tmp_path_factory.mktemp("adapters") / "one", scale=0.5)
    return load_adapter_set(str(tiny_source.path), [folder], precision="fp32")


@pytest.fixture(scope="module")
def prompts(variants: AdapterSet) -> list[list[int]]:
    """Forty prompts of 1 to 40 tokens: more than a batch."""
    size = len(variants.base.model.get_input_embeddings().weight)  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, size, (1 + 7 * i % 40,), generator=generator).tolist() for i in range(40)
    ]


def alone(variants: AdapterSet, name: str, prompts: list[list[int]], sampling: Sampling) -> list:  # type: ignore[type-arg]
    replies = []
    for index, prompt in enumerate(prompts):
        values = {field: getattr(sampling, field) for field in Sampling.__slots__}
        own = Sampling(**{**values, "seed": sampling.seed + index})
        generation = Generation(variants, name, prompt, own)
        replies.append(("".join(generation.pieces()), tuple(generation.ids), generation.finished))
    return replies


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(24),
        Sampling(24, repetition_penalty=1.3, frequency_penalty=0.5),
        Sampling(24, temperature=0.8, top_p=0.9, seed=5),
        Sampling(24, stop=("e", "tea")),
    ],
    ids=["greedy", "penalties", "sampled", "stop"],
)
def test_replies_together_equal_replies_alone(
    variants: AdapterSet, prompts: list[list[int]], sampling: Sampling
) -> None:
    assert variants.batches_exactly
    for name in variants.names:
        seen: list[Reply] = []
        replies = generate_replies(variants, name, prompts, sampling, seen.append)
        own = [(reply.text, reply.ids, reply.finished) for reply in replies]
        assert own == alone(variants, name, prompts, sampling)
        assert len(seen) == len(prompts)
        assert sum(reply.alone for reply in replies) < len(prompts) / 4
    # Replies end at different steps, so that batches shrink.
    assert len({len(reply.ids) for reply in replies}) > 1 or not sampling.stop


def test_replies_together_equal_those_of_transformers(
    variants: AdapterSet, prompts: list[list[int]], tiny_source: ModelSource
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_source.path).eval()
    replies = generate_replies(variants, BASE, prompts[:6], Sampling(16))
    for prompt, reply in zip(prompts, replies, strict=False):
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False
        )
        assert reply.ids == tuple(out[0, len(prompt) :].tolist())


def test_order_and_company_of_prompts_do_not_matter(
    variants: AdapterSet, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [reply.ids for reply in generate_replies(variants, "one", prompts, Sampling(12))]
    backwards = generate_replies(variants, "one", prompts[::-1], Sampling(12))
    assert [reply.ids for reply in backwards] == whole[::-1]
    monkeypatch.setattr(batched_generation, "CACHE_BYTES", 1)  # batches of one
    assert [r.ids for r in generate_replies(variants, "one", prompts[:5], Sampling(12))] == whole[
        :5
    ]


def test_tie_is_decided_alone(
    variants: AdapterSet, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With errors planted into the logits of batches, replies are still those alone."""
    plain = cache.batch_logits

    def inexact(*args: object) -> torch.Tensor:
        logits = plain(*args)  # type: ignore[arg-type]
        # The two highest of every third row exchange their places, within a tie.
        for row in logits[::3]:
            (first, second), (top, next_) = row.topk(2)
            row[top], row[next_] = second, second + (first - second) * 1e-3
        return logits

    monkeypatch.setattr(batched_generation, "batch_logits", inexact)
    replies = generate_replies(variants, "one", prompts[:9], Sampling(8))
    own = [(reply.text, reply.ids, reply.finished) for reply in replies]
    assert own == alone(variants, "one", prompts[:9], Sampling(8))
    assert sum(reply.alone for reply in replies) >= 3


def test_model_that_ignores_padding_replies_alone(
    variants: AdapterSet, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = cache.batch_logits

    def ignores_mask(base, ids, mask, positions, kept):  # type: ignore[no-untyped-def]
        return plain(base, ids, torch.ones_like(mask), positions, kept)

    monkeypatch.setattr(cache, "batch_logits", ignores_mask)
    assert not cache.batch_is_exact(variants.base)
    monkeypatch.setitem(variants.__dict__, "batches_exactly", False)
    replies = generate_replies(variants, "one", prompts[:3], Sampling(5))
    assert all(reply.alone for reply in replies)


def test_prompt_that_is_too_long_is_refused_before_any_reply(
    variants: AdapterSet, prompts: list[list[int]]
) -> None:
    seen: list[Reply] = []
    long = [1] * variants.max_length
    with pytest.raises(UsageError, match="shorten it"):
        generate_replies(variants, "one", [*prompts, long], Sampling(5), seen.append)
    assert not seen


def test_no_prompt_has_no_reply(variants: AdapterSet) -> None:
    assert generate_replies(variants, "one", [], Sampling(5)) == []


def test_bf16_replies_are_replies(
    tiny_source: ModelSource, prompts: list[list[int]], tmp_path: Path
) -> None:
    folder = make_adapter(tiny_source, tmp_path / "one", scale=0.5)
    variants = load_adapter_set(str(tiny_source.path), [folder], precision="bf16")
    replies = generate_replies(variants, "one", prompts, Sampling(6))
    assert all(reply.finished and reply.ids and not reply.alone for reply in replies)
