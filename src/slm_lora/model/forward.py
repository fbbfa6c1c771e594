"""Hidden states and losses of a micro-batch, packed or padded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from slm_lora.data.collate import IGNORE_INDEX, MicroBatch
from slm_lora.model.base import trunk
from slm_lora.model.head_form import output_head
from slm_lora.ops.cross_entropy import NLL, summed_nll, token_scores
from slm_lora.ops.dropout import set_keys, token_keys
from slm_lora.ops.output_head import OutputHead
from slm_lora.ops.token_metrics import TOKEN_METRICS, TokenMetric

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slm_lora.model.base import Base
    from slm_lora.ops.output_head import HeadForm


def batch_nll(base: Base, batch: MicroBatch, dropout_seed: str = "") -> Tensor:
    """Sum of the NLL over the batch's labels, differentiable in the trainable weights.

    Args:
        base: with its adapter.
        batch: the micro-batch.
        dropout_seed: determines, with the row's id, the dropout masks of a row.

    Returns:
        float64 scalar in nats (float32 on Apple's GPUs).
    """
    scored = _scored(batch)
    keys = token_keys(batch, dropout_seed).to(base.device)
    hidden = _hidden(base, batch, keys)[scored.to(base.device)]
    return summed_nll(hidden, _head(base), _labels(base, batch, scored))


@dataclass(frozen=True, slots=True)
class DocumentScores:
    """Per document of a micro-batch: NLL in nats (float64) and numbers of tokens; sums of further
    values of tokens (`ops.token_metrics`) by name, over all labels and over the response's."""

    nll_all: npt.NDArray[np.float64]
    tokens_all: npt.NDArray[np.int64]
    nll_response: npt.NDArray[np.float64]
    tokens_response: npt.NDArray[np.int64]
    values_all: dict[str, npt.NDArray[np.float64]]
    values_response: dict[str, npt.NDArray[np.float64]]


def score_documents(
    base: Base, batch: MicroBatch, metrics: Mapping[str, TokenMetric] = TOKEN_METRICS
) -> DocumentScores:
    """NLL and further values of each document, over all its labels and over its response labels,
    without gradient."""
    scored = _scored(batch)
    with torch.no_grad():
        hidden = _hidden(base, batch)[scored.to(base.device)]
        scores = token_scores(hidden, _head(base), _labels(base, batch, scored), metrics)
    values = {name: value.to("cpu", torch.float64).numpy() for name, value in scores.items()}
    losses = values.pop(NLL)
    document = batch.document[scored.numpy()]
    response = batch.response[scored.numpy()].astype(np.float64)
    n_documents = len(batch.lengths)
    return DocumentScores(
        nll_all=np.bincount(document, losses, n_documents).astype(np.float64),
        tokens_all=np.bincount(document, minlength=n_documents),
        nll_response=np.bincount(document, losses * response, n_documents).astype(np.float64),
        tokens_response=np.bincount(document, response, n_documents).astype(np.int64),
        values_all={
            name: np.bincount(document, value, n_documents).astype(np.float64)
            for name, value in values.items()
        },
        values_response={
            name: np.bincount(document, value * response, n_documents).astype(np.float64)
            for name, value in values.items()
        },
    )


def scored_hidden(base: Base, batch: MicroBatch) -> Tensor:
    """Last hidden states [labels, hidden_size] of the positions that have a label, in the order of
    the batch, without gradient."""
    with torch.no_grad():
        return _hidden(base, batch)[_scored(batch).to(base.device)]


def packed_logits(model: PreTrainedModel, form: HeadForm, documents: list[Tensor]) -> Tensor:
    """Logits [T, vocab_size] of concatenated documents by packed attention and the output head, as
    in `batch_nll`."""
    lengths = torch.tensor([len(document) for document in documents])
    hidden = _packed_hidden(
        model,
        torch.cat(documents).to(model.device),
        torch.cat([torch.arange(int(n)) for n in lengths]).to(model.device),
        lengths,
    )
    return output_head(model, form).logits(hidden)


def document_logits(base: Base, documents: list[Tensor]) -> Tensor:
    """Logits [T, vocab_size] of concatenated documents by the forward pass of training and scoring.

    In training mode the dropout masks are arbitrary.
    """
    lengths = tuple(len(document) for document in documents)
    ids = torch.cat(documents).to(base.device)
    _set_dropout_keys(base, torch.arange(len(ids), dtype=torch.int32, device=base.device), lengths)
    with mixed_precision(base):
        if base.packed:
            positions = torch.cat([torch.arange(n) for n in lengths]).to(base.device)
            hidden = _packed_hidden(base.model, ids, positions, torch.tensor(lengths))
        else:
            hidden = _padded_hidden(base.model, ids, lengths)
    return _head(base).logits(hidden)


def _scored(batch: MicroBatch) -> Tensor:
    # Computed in numpy: on a GPU, nonzero would synchronise.
    return torch.from_numpy(np.flatnonzero(batch.labels != IGNORE_INDEX))


def _labels(base: Base, batch: MicroBatch, scored: Tensor) -> Tensor:
    return torch.from_numpy(batch.labels)[scored].to(base.device)


def _head(base: Base) -> OutputHead:
    """The output head in the precision of the matrix products."""
    return output_head(base.model, base.head).to(base.dtype)


def _hidden(base: Base, batch: MicroBatch, dropout_keys: Tensor | None = None) -> Tensor:
    """Last hidden states [T, hidden_size], in the order of the batch's tokens."""
    ids = torch.from_numpy(batch.ids).to(base.device)
    if dropout_keys is not None:
        _set_dropout_keys(base, dropout_keys, batch.lengths)
    with mixed_precision(base):
        if not base.packed:
            return _padded_hidden(base.model, ids, batch.lengths)
        positions = torch.from_numpy(batch.positions).to(base.device)
        return _packed_hidden(base.model, ids, positions, torch.tensor(batch.lengths))


def _set_dropout_keys(base: Base, keys: Tensor, lengths: tuple[int, ...]) -> None:
    """Set the tokens' dropout keys [T] in all dropout modules, in the shape of the batch."""
    set_keys(base.model, keys.unsqueeze(0) if base.packed else _padded(keys, lengths))


def mixed_precision(base: Base) -> torch.autocast:
    """Autocast to the base's bf16 or fp16, as with `bf16=True` in transformers' Trainer: trainable
    weights and their gradients are fp32."""
    return torch.autocast(
        base.device.type, base.dtype if base.low_precision else None, enabled=base.low_precision
    )


def _packed_hidden(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, lengths: Tensor
) -> Tensor:
    if len(lengths) == 1:
        # An empty second document: Dynamo would specialise on a size of one.
        lengths = torch.nn.functional.pad(lengths, (0, 1))
    output = trunk(model)(
        input_ids=ids.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        use_cache=False,
        document_lengths=lengths,
    )
    hidden: Tensor = output.last_hidden_state[0]
    return hidden


def _padded_hidden(model: PreTrainedModel, ids: Tensor, lengths: tuple[int, ...]) -> Tensor:
    mask = _padded(torch.ones_like(ids), lengths)
    output = trunk(model)(input_ids=_padded(ids, lengths), attention_mask=mask, use_cache=False)
    hidden: Tensor = output.last_hidden_state[mask.bool()]
    return hidden


def _padded(packed: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Token values [T] as [documents, longest document], padded with zeros at the end."""
    documents = torch.split(packed, list(lengths))
    return torch.nn.utils.rnn.pad_sequence(list(documents), batch_first=True)
