"""Dropout with masks that depend only on seed, row, position and column.

PyTorch draws masks from a sequential generator, so they depend on the division of rows into
micro-batches, and drawing takes 6 % of a training step on a CPU. With a hash instead, the backward
pass, another micro-batch or another process computes the same mask, at little cost in a compiled
layer.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slm_lora.data.collate import MicroBatch

_GOLDEN_RATIO = 0x9E3779B1
# Multipliers of the 32-bit finaliser of MurmurHash3 (Appleby 2011, public domain) as signed
# integers: PyTorch does not multiply uint32.
_FIRST, _SECOND = 0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32


def _mix(x: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """The finaliser of MurmurHash3: each input bit flips about half of the output bits."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _hash32(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def token_keys(batch: MicroBatch, seed: str) -> Tensor:
    """Hash of each token's row id, its position in the row, and the seed; int32 [T]."""
    row_hashes = np.array([_hash32(f"{seed}:{row_id}") for row_id in batch.row_ids], np.uint32)
    positions = batch.positions.astype(np.uint32) * np.uint32(_GOLDEN_RATIO)
    return torch.from_numpy(_mix(row_hashes[batch.document] + positions).view(np.int32))


class TokenDropout(nn.Module):
    """Zero values with probability ``p`` and scale the others by 1/(1-p), in training mode.

    Attributes:
        keys: of the next batch's tokens, int32 [batch, length].
    """

    keys: Tensor | None
    columns: Tensor
    threshold: Tensor
    scale: Tensor

    def __init__(self, p: float, name: str, width: int) -> None:
        """
        Args:
            p: probability that a value becomes zero.
            name: of the module; modules of different names have different masks.
            width: size of the last dimension.
        """
        super().__init__()
        self.p = p
        self.keys = None
        columns = _mix(np.arange(width, dtype=np.uint32) * np.uint32(_GOLDEN_RATIO) + _hash32(name))
        self.register_buffer("columns", torch.from_numpy(columns.view(np.int32)), persistent=False)
        # Tensors, not numbers: torch.compile may trace numbers as symbols, and its cache (2.13)
        # then reuses code with the threshold of another p.
        threshold = torch.tensor(round(p * 2**32) - 2**31, dtype=torch.int32)
        self.register_buffer("threshold", threshold, persistent=False)
        self.register_buffer("scale", torch.tensor(1 / (1 - p)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mask ``x`` [batch, length, width], or [batch × length, width].

        Raises:
            RuntimeError: no keys, or ``x`` has other tokens than the batch (in an expert, say).
        """
        if not self.training:
            return x
        if self.keys is None:
            raise RuntimeError("dropout has no keys for this batch")
        keys = self.keys
        if x.shape[:-1] != keys.shape:
            if x.shape[:-1].numel() != keys.numel():
                raise RuntimeError("adapter.lora_dropout: a module does not see the batch's tokens")
            keys = keys.reshape(x.shape[:-1])
        if torch.compiler.is_compiling():
            # The mask is cheaper to recompute in the backward pass than to store.
            masked: Tensor = checkpoint(
                self._masked, x, keys, use_reentrant=False, preserve_rng_state=False
            )
            return masked
        return self._masked(x, keys)

    def _masked(self, x: Tensor, keys: Tensor) -> Tensor:
        # Keys and columns are mixed already; products carry all bits into the high bits, which
        # decide the comparison. An arithmetic right shift copies the sign bit, so it is masked off.
        hashes = (keys.unsqueeze(-1) ^ self.columns) * _FIRST
        hashes = (hashes ^ ((hashes >> 15) & 0x1FFFF)) * _SECOND
        return torch.where(hashes >= self.threshold, x * self.scale, 0)


def replace_dropout(peft_model: nn.Module) -> None:
    """Replace the dropout before an adapter's first matrix in PEFT's tuners (``lora_dropout`` and
    similar) by `TokenDropout`, in place."""
    for name, module in peft_model.named_modules():
        base_layer: Any = getattr(module, "base_layer", None)
        for child, dropouts in module.named_children():
            if not child.endswith("_dropout") or not isinstance(dropouts, nn.ModuleDict):
                continue
            for key, dropout in dropouts.items():
                if isinstance(dropout, nn.Dropout):
                    device = next(base_layer.parameters()).device
                    dropouts[key] = TokenDropout(dropout.p, name, module.in_features).to(device)


def set_keys(model: nn.Module, keys: Tensor) -> None:
    """Set the keys of the next batch, int32 [batch, length], in all `TokenDropout` modules."""
    for module in model.modules():
        if isinstance(module, TokenDropout):
            module.keys = keys
