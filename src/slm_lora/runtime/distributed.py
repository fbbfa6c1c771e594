"""Data-parallel processes of a run: process group, ranks, collectives.

The model needs no DDP wrapper: every process computes its share of a step's examples, and one
all-reduce per step sums the gradients. Random numbers depend on seed, step and row alone, so the
assignment of rows to processes does not affect results.

Processes are started by `slm-lora --processes N` (see `launch.local`) or by torchrun. Values are
exchanged as JSON, which keeps floats exact; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from slm_lora.errors import StorageError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

STORE = "SLM_LORA_STORE"
"""Environment variable: file for rendezvous on one machine; without it torchrun's MASTER_ADDR and
MASTER_PORT are used."""
PEER_TIMEOUT = datetime.timedelta(minutes=30)
"""Timeout of collectives; rank 0 may download a model in the meantime."""

T = TypeVar("T")
_rank, _size, _local = 0, 1, 0


class PeerLostError(StorageError):
    """Another process of this run is gone, so this one cannot continue.

    The exit code marks it as secondary: the launcher reports the root failure.
    """

    exit_code = 76


def rank() -> int:
    """Rank of this process, from 0."""
    return _rank


def local_rank() -> int:
    """Rank of this process on its machine, from 0."""
    return _local


def world_size() -> int:
    """Number of processes of this run."""
    return _size


def is_main() -> bool:
    """Whether this is rank 0, which writes files and messages."""
    return _rank == 0


def is_single() -> bool:
    """Whether the run has one process only."""
    return _size == 1


def is_launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group that the environment describes, if any, for the block.

    Raises:
        UsageError: WORLD_SIZE is set, but RANK is missing, or one is no number.
        StorageError: the other processes cannot be reached.
    """
    global _rank, _size, _local
    if not is_launched():
        yield
        return
    import torch
    from torch import distributed

    try:
        env_rank, env_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        env_local_rank = int(os.environ.get("LOCAL_RANK", env_rank))
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"WORLD_SIZE is set, but RANK is missing or no number ({error}); start several "
            "processes with slm-lora train --processes N, or with torchrun"
        ) from error
    on_gpus = torch.cuda.is_available() and distributed.is_nccl_available()
    if on_gpus:
        torch.cuda.set_device(env_local_rank % torch.cuda.device_count())
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
            init_method=f"file://{os.environ[STORE]}" if STORE in os.environ else "env://",
            rank=env_rank,
            world_size=env_size,
            timeout=PEER_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        raise StorageError(
            f"process {env_rank + 1} of {env_size} cannot reach the others: {_first_line(error)}"
        ) from error
    _rank, _size, _local = env_rank, env_size, env_local_rank
    try:
        yield
    finally:
        _rank, _size, _local = 0, 1, 0
        # After a failure others may be gone (RuntimeError), or wait in a collective: destroying
        # the group makes theirs fail.
        with contextlib.suppress(RuntimeError):
            distributed.destroy_process_group()


def partition(items: Sequence[T], cost: Callable[[T], int], n_parts: int) -> list[list[T]]:
    """Divide items into ``n_parts`` lists of similar cost: greedily, the most costly items first,
    each to the part of least cost so far."""
    if n_parts == 1:
        return [list(items)]
    loads: list[int] = [0] * n_parts
    parts: list[list[T]] = [[] for _ in range(n_parts)]
    for item in sorted(items, key=lambda item: -cost(item)):
        lightest = loads.index(min(loads))
        loads[lightest] += cost(item)
        parts[lightest].append(item)
    return parts


def all_reduce_sum(tensor: Tensor) -> None:
    """Sum a tensor over the processes, in place; all get the same bits.

    Raises:
        PeerLostError: another process is gone.
    """
    from torch import distributed

    with peer_errors():
        if tensor.device.type in ("cpu", "cuda"):
            distributed.all_reduce(tensor)
        else:  # no collectives on MPS
            copy = tensor.cpu()
            distributed.all_reduce(copy)
            tensor.copy_(copy)


def all_gather(value: Any) -> list[Any]:
    """The JSON value of every process, in order of rank.

    Raises:
        PeerLostError: another process is gone.
    """
    if is_single():
        return [value]
    import torch
    from torch import distributed

    text = json.dumps(value).encode()
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(_size)]
    with peer_errors():
        distributed.all_gather(sizes, torch.tensor([len(text)]))
        longest = int(max(sizes))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        gathered = [torch.empty(longest, dtype=torch.uint8) for _ in range(_size)]
        distributed.all_gather(gathered, padded)
    return [
        json.loads(text[: int(size)].numpy().tobytes())
        for text, size in zip(gathered, sizes, strict=True)
    ]


def run_on_main(work: Callable[[], Any]) -> Any:
    """Call ``work`` in rank 0 only; all processes return its JSON value.

    Raises:
        PeerLostError: another process is gone, such as rank 0 because ``work`` failed.
    """
    return all_gather(work() if is_main() else None)[0]


def main_process_first(work: Callable[[], T]) -> T:
    """Call ``work`` in rank 0, then in the others, which find its downloads and builds in the
    cache.

    Raises:
        PeerLostError: another process is gone, such as rank 0 because ``work`` failed.
    """
    results = [work()] if is_main() else []
    barrier()
    return results[0] if results else work()


def barrier() -> None:
    """Wait until all processes get here.

    Raises:
        PeerLostError: another process is gone.
    """
    all_gather(None)


@contextmanager
def peer_errors() -> Iterator[None]:
    """Translate errors of torch's collectives within the block.

    Raises:
        PeerLostError: another process is gone.
    """
    try:
        yield
    except RuntimeError as error:  # base class of torch.distributed's errors
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise PeerLostError(
            f"process {_rank + 1} of {_size}: another process of this run is gone "
            f"({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
