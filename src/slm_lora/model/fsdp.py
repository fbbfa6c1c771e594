"""Shard the layers of a frozen base that does not fit one device over the processes (FSDP2).

Adapters are attached afterwards and are replicated, and so are embeddings, by which the loss
multiplies directly. All processes must compute the same number of micro-batches, because each
forward pass of a layer gathers its shards from all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from slm_lora.model.base import decoder_layers, trunk
from slm_lora.runtime import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard_layers(model: PreTrainedModel, device: torch.device) -> None:
    """Shard a frozen model in place; layers are moved to ``device`` one at a time, as each is
    sharded, so that it never holds the full model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    replicated = {
        parameter
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
        for parameter in embedding.parameters()
    }
    fully_shard(trunk(model), mesh=mesh, ignored_params=replicated)
