"""Where torch.compile is used, and the switch that turns it on.

Compiled code does elementwise work in single passes over memory. It computes the same to
rounding, costs seconds on first use, and needs a C++ compiler on a CPU (Triton on a GPU): so
short runs go without it, and everything also runs as it is written.
"""

from __future__ import annotations

import functools
import os
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from slm_lora.errors import SlmLoraError
from slm_lora.runtime import hardware
from slm_lora.runtime.storage import cache_dir

P = ParamSpec("P")
R = TypeVar("R")

PAYS_FROM = {"cpu": (30_000, 75_000), "cuda": (2_000_000, 2_000_000)}
"""Tokens from which a run wins back the time of compiling with nothing in the cache, in half
precision and in fp32: measured on CPUs (16 s against 0.85 ms a token with AVX512-BF16, when the
first layer was compiled apart; 34 s against 0.3 to 0.8 ms with AVX2), a guess on GPUs."""

MOST_VARIANTS = 256
"""Of one function, after which nothing is compiled any more."""

_on = False
_failure = ""


def wanted(
    setting: bool | str,
    tokens: int,
    device: torch.device,
    low_precision: bool,
    sharded: bool = False,
) -> bool:
    """Whether a run over ``tokens`` compiles; ``auto``: if it pays and a compiler is there.

    Args:
        setting: of the recipe.
        tokens: of the whole run.
        device: where it computes.
        low_precision: whether in half precision.
        sharded: whether the base's layers are shared out, which are never compiled.
    """
    return pays(setting, tokens, device, low_precision, sharded) and (
        setting != "auto" or _has_compiler(device)
    )


def pays(
    setting: bool | str, tokens: int, device: torch.device, low_precision: bool, sharded: bool
) -> bool:
    """As `wanted`, on a machine that has a compiler."""
    if sharded:
        return False
    if setting != "auto":
        return bool(setting)
    in_half, in_fp32 = PAYS_FROM.get(device.type, (tokens + 1, tokens + 1))
    return tokens >= (in_half if low_precision else in_fp32)


def _has_compiler(device: torch.device) -> bool:
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return hardware.cpp_compiler() is not None and headers.is_file()


_set_up = threading.local()


def _set_up_compiler() -> None:
    """For this thread (torch's settings are a thread's; backward passes on GPUs have their own);
    only where it is used, as this imports it."""
    if getattr(_set_up, "done", False):
        return
    import torch._dynamo.config as tracing
    import torch._functorch.config as ahead_of_time
    import torch.fx.experimental._config as shapes

    # What it makes is kept between runs.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "compiled"))
    # Each kind of adapter and each rank of a grid wants code of its own, to train and to score.
    # PyTorch's limit of 8 is soon reached, and later cells would run as written but for a warning.
    tracing.recompile_limit = tracing.accumulated_recompile_limit = MOST_VARIANTS
    tracing.fail_on_recompile_limit_hit = True
    # Else floats are symbols, until it turns out which cannot be: then all is traced once more.
    tracing.specialize_float = True
    # Else sizes that happen to be equal in the first batch are taken to be equal in all.
    shapes.use_duck_shape = False
    # This check at the first call of an operator would have the functions that it calls compiled
    # once more, for the state of the check; the tests check our operator, on a CPU.
    ahead_of_time.check_custom_op_aliasing = False
    _set_up.done = True


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """A function of tensors that runs compiled within `fusion`, and as it is written outside."""

    @functools.cache
    def compiled() -> Callable[P, R]:
        # Sizes vary from batch to batch.
        return torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _on:
            return function(*args, **kwargs)
        _set_up_compiler()
        return compiled()(*args, **kwargs)

    return run


def fuse_layers(layers: Sequence[torch.nn.Module]) -> None:
    """Make every decoder layer a `fused` function. One compilation serves all of them."""
    for layer in layers:
        layer.forward = fused(layer.forward)
    for first in layers[:1]:
        first.forward = _as_if_in_the_middle(first.forward)


def _as_if_in_the_middle(forward: Callable[..., R]) -> Callable[..., R]:
    """The first layer, whose input has no gradient where the embeddings are frozen: code compiled
    for that would serve it alone, and take as long to make as that of all the others. A gradient
    that is not read costs a few thousandths of a step."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> R:
        hidden = args[0] if args else None
        if (
            _on
            and torch.is_grad_enabled()
            and isinstance(hidden, torch.Tensor)
            and hidden.is_floating_point()
            and not hidden.requires_grad
        ):
            args = hidden.detach().requires_grad_(), *args[1:]
        return forward(*args, **kwargs)

    return run


@contextmanager
def fusion(on: bool) -> Iterator[None]:
    """Whether `fused` functions run compiled inside."""
    global _on
    before, _on = _on, on
    try:
        yield
    finally:
        _on = before


def run_with_compile_fallback(on: bool, work: Callable[[], R]) -> R:
    """Do ``work`` with `fusion` on or off; if compiling fails, again and from then on without.

    Args:
        on: whether to compile.
        work: may be done twice.
    """
    global _failure
    reason = ""
    if on and not _failure:
        try:
            with fusion(True):
                return work()
        except (SlmLoraError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as caught:  # compilers raise all kinds
            # (Not the error itself: with its traceback it would hold all that was computed.)
            reason = (str(caught).strip().splitlines() or [type(caught).__name__])[0]
    with fusion(False):
        done = work()
    # Only now is it known that compiling was the trouble.
    if reason:
        _failure = reason
    return done


def is_on() -> bool:
    """Whether `fused` functions run compiled now."""
    return _on


def failure() -> str:
    """Why compiling failed in this process, in one line; empty if it did not."""
    return _failure
