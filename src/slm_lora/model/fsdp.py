"""A frozen base that does not fit one device: its layers in shards over the processes (FSDP2).

Adapters are attached afterwards and stay whole in every process, and so do embeddings, which the
loss multiplies with itself. All processes must compute equally many micro-batches: a layer is
gathered from all of them each time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from slm_lora.model.base import decoder_layers, trunk
from slm_lora.runtime import distributed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard_layers(model: PreTrainedModel, device: torch.device) -> None:
    """Shard a frozen model in place; a layer goes to ``device`` as it is sharded, so that the whole
    never has to be there."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    whole = {
        parameter
        for ends in (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
        for parameter in ends.parameters()
    }
    fully_shard(trunk(model), mesh=mesh, ignored_params=whole)
