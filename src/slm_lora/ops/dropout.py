"""Dropout whose mask is a function of seed, row, position and column, and of nothing else.

PyTorch draws masks one after another from a generator, so they depend on how rows are divided
into micro-batches, and the drawing costs 6 % of a training step on a CPU. A hash needs no
generator: the backward pass, another micro-batch or another process computes the same mask,
and inside a compiled layer it costs next to nothing.
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

_GOLDEN = 0x9E3779B1
# Multipliers of the 32-bit finaliser of MurmurHash3 (Appleby 2011, public domain), as signed
# numbers: PyTorch's uint32 knows no products.
_FIRST, _SECOND = 0x85EBCA6B - 2**32, 0xC2B2AE35 - 2**32


def _mixed(x: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    """The finaliser of MurmurHash3: every bit in moves about half of the bits out."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return x ^ (x >> np.uint32(16))


def _hash32(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def token_keys(batch: MicroBatch, seed: str) -> Tensor:
    """One key a token, of its row, its position there and the seed; int32 [T]."""
    rows = np.array([_hash32(f"{seed}:{row_id}") for row_id in batch.row_ids], np.uint32)
    positions = batch.positions.astype(np.uint32) * np.uint32(_GOLDEN)
    return torch.from_numpy(_mixed(rows[batch.document] + positions).view(np.int32))


class TokenDropout(nn.Module):
    """Zero a share ``p`` of the values and scale the others by 1/(1-p), while training.

    Attributes:
        keys: of the tokens of the batch that is computed next, int32 [batch, length].
    """

    keys: Tensor | None
    columns: Tensor
    least: Tensor
    scale: Tensor

    def __init__(self, p: float, name: str, width: int) -> None:
        """
        Args:
            p: share of the values that become zero.
            name: of the module; modules of other names have other masks.
            width: size of the last dimension.
        """
        super().__init__()
        self.p = p
        self.keys = None
        columns = _mixed(np.arange(width, dtype=np.uint32) * np.uint32(_GOLDEN) + _hash32(name))
        self.register_buffer("columns", torch.from_numpy(columns.view(np.int32)), persistent=False)
        # Tensors, not numbers: torch's compiler may make symbols of numbers, and its cache (2.13)
        # then takes code with another p's threshold for ours.
        least = torch.tensor(round(p * 2**32) - 2**31, dtype=torch.int32)
        self.register_buffer("least", least, persistent=False)
        self.register_buffer("scale", torch.tensor(1 / (1 - p)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mask ``x`` [batch, length, width], or [batch × length, width].

        Raises:
            RuntimeError: no keys, or ``x`` has other tokens than the batch (an expert's, say).
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
            # The mask is cheaper to compute again in the backward pass than to keep.
            masked: Tensor = checkpoint(
                self._masked, x, keys, use_reentrant=False, preserve_rng_state=False
            )
            return masked
        return self._masked(x, keys)

    def _masked(self, x: Tensor, keys: Tensor) -> Tensor:
        # Both sides are mixed already; products carry every bit into the high ones, which
        # decide the comparison. A shift of a signed number copies its sign: masked off.
        h = (keys.unsqueeze(-1) ^ self.columns) * _FIRST
        h = (h ^ ((h >> 15) & 0x1FFFF)) * _SECOND
        return torch.where(h >= self.least, x * self.scale, 0)


def replace_dropout(peft_model: nn.Module) -> None:
    """Put `TokenDropout` in place of the dropout that PEFT's tuners have before an adapter's first
    matrix (``lora_dropout`` and the like)."""
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
    """Hand the keys of the next batch, int32 [batch, length], to all dropouts of the model."""
    for module in model.modules():
        if isinstance(module, TokenDropout):
            module.keys = keys
