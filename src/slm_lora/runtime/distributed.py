"""Several processes at one run: who this one is, and what they tell each other.

Data parallelism needs no wrapper around a model here. Every process takes its share of a step's
examples, and the gradients are summed: one all-reduce a step. What is
random depends on seed, step and row alone, so which process has a row changes nothing.

The processes are started by `slm-lora --processes N` (see `launch.local`) or by torchrun. A value
that all must agree on is sent as JSON, whose numbers are exact; nothing is pickled.
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
"""Environment: file through which the processes of one machine find each other; without it
torchrun's MASTER_ADDR and MASTER_PORT say where."""
PEER_TIMEOUT = datetime.timedelta(minutes=30)
"""Longest wait for the others: while the first one fetches a model, say."""

T = TypeVar("T")
_rank, _size, _local = 0, 1, 0


class PeerLostError(StorageError):
    """Another process of this run is gone, so this one cannot go on.

    A secondary failure, by its exit code: the launcher reports the root cause.
    """

    exit_code = 76


def rank() -> int:
    """Number of this process, from 0."""
    return _rank


def local_rank() -> int:
    """Number of this process on its machine, from 0."""
    return _local


def world_size() -> int:
    """How many processes work on this run."""
    return _size


def is_main() -> bool:
    """Whether this is the one that writes and speaks."""
    return _rank == 0


def is_single() -> bool:
    """Whether there are no others."""
    return _size == 1


def is_child() -> bool:
    """Whether something started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


@contextmanager
def process_group() -> Iterator[None]:
    """Within, this process is one of those that the environment speaks of, if it does.

    Raises:
        UsageError: the environment is not that of one of several processes.
        StorageError: the others cannot be reached.
    """
    global _rank, _size, _local
    if not is_child():
        yield
        return
    import torch
    from torch import distributed

    try:
        number, many = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_RANK", number))
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"WORLD_SIZE is set, but RANK is missing or no number ({error}); start several "
            "processes with slm-lora train --processes N, or with torchrun"
        ) from error
    on_gpus = torch.cuda.is_available() and distributed.is_nccl_available()
    if on_gpus:
        torch.cuda.set_device(local % torch.cuda.device_count())
    try:
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
            init_method=f"file://{os.environ[STORE]}" if STORE in os.environ else "env://",
            rank=number,
            world_size=many,
            timeout=PEER_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        raise StorageError(
            f"process {number + 1} of {many} cannot reach the others: {_first_line(error)}"
        ) from error
    _rank, _size, _local = number, many, local
    try:
        yield
    finally:
        _rank, _size, _local = 0, 1, 0
        # After a failure the others may be gone, or wait for us: leaving tells them.
        with contextlib.suppress(RuntimeError):
            distributed.destroy_process_group()


def partition(items: Sequence[T], cost: Callable[[T], int], many: int) -> list[list[T]]:
    """What of ``items`` is whose, of so many processes: the dearest first, each to whom has least
    so far."""
    if many == 1:
        return [list(items)]
    loads: list[int] = [0] * many
    found: list[list[T]] = [[] for _ in range(many)]
    for item in sorted(items, key=lambda item: -cost(item)):
        least = loads.index(min(loads))
        loads[least] += cost(item)
        found[least].append(item)
    return found


def all_reduce_sum(tensor: Tensor) -> None:
    """Replace a tensor by its sum over the processes; the same bits in all of them.

    Raises:
        PeerLostError: one is gone.
    """
    from torch import distributed

    with peer_errors():
        if tensor.device.type in ("cpu", "cuda"):
            distributed.all_reduce(tensor)
        else:  # Apple's GPUs have no collectives
            copy = tensor.cpu()
            distributed.all_reduce(copy)
            tensor.copy_(copy)


def all_gather(value: Any) -> list[Any]:
    """What every process says, a JSON value each, in their order.

    Raises:
        PeerLostError: one is gone.
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
        texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(_size)]
        distributed.all_gather(texts, padded)
    return [
        json.loads(each[: int(many)].numpy().tobytes())
        for each, many in zip(texts, sizes, strict=True)
    ]


def from_first(work: Callable[[], Any]) -> Any:
    """Do ``work`` in the first process only; all get its JSON value.

    Raises:
        PeerLostError: one is gone; the first, say, as its work failed.
    """
    return all_gather(work() if is_main() else None)[0]


def first_then_all(work: Callable[[], T]) -> T:
    """Do ``work`` everywhere, but in the first process before the others: what it fetches or
    builds is then there for all.

    Raises:
        PeerLostError: one is gone; the first, say, as its work failed.
    """
    done = [work()] if is_main() else []
    wait()
    return done[0] if done else work()


def wait() -> None:
    """Until all have come so far.

    Raises:
        PeerLostError: one is gone.
    """
    all_gather(None)


@contextmanager
def peer_errors() -> Iterator[None]:
    """Within, the processes talk to each other, by way of torch.

    Raises:
        PeerLostError: one is gone.
    """
    try:
        yield
    except RuntimeError as error:  # torch.distributed's own errors among them
        if type(error).__name__ == "OutOfMemoryError":
            raise
        raise PeerLostError(
            f"process {_rank + 1} of {_size}: another process of this run is gone "
            f"({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
