"""torch.compile: the functions that use it, and when it is enabled.

Inductor fuses elementwise operations into one pass over memory. Results are equal up to rounding.
Compilation takes seconds and needs a C++ compiler on a CPU (Triton on a GPU), so short runs stay in
eager mode, which all functions support.
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

MIN_TOKENS = {"cpu": (30_000, 75_000), "cuda": (2_000_000, 2_000_000)}
"""Tokens of a run that repay compilation with an empty cache, in bf16 or fp16 and in fp32. Measured
on CPUs (16 s against 0.85 ms per token with AVX512-BF16, when the first layer was compiled
separately; 34 s against 0.3 to 0.8 ms with AVX2), estimated on GPUs."""

RECOMPILE_LIMIT = 256
"""Compiled variants of one function; beyond it, compilation fails."""

_enabled = False
_failure = ""


def should_compile(
    setting: bool | str,
    tokens: int,
    device: torch.device,
    low_precision: bool,
    sharded: bool = False,
) -> bool:
    """Whether a run over ``tokens`` compiles; ``auto``: if compilation pays and a compiler exists.

    Args:
        setting: ``training.compile`` of the recipe.
        tokens: number of tokens of the whole run.
        device: device of the model.
        low_precision: whether it computes in bf16 or fp16.
        sharded: whether its layers are sharded; these are never compiled.
    """
    return is_worthwhile(setting, tokens, device, low_precision, sharded) and (
        setting != "auto" or _has_compiler(device)
    )


def is_worthwhile(
    setting: bool | str, tokens: int, device: torch.device, low_precision: bool, sharded: bool
) -> bool:
    """As `should_compile`, on a machine with a compiler."""
    if sharded:
        return False
    if setting != "auto":
        return bool(setting)
    low_minimum, fp32_minimum = MIN_TOKENS.get(device.type, (tokens + 1, tokens + 1))
    return tokens >= (low_minimum if low_precision else fp32_minimum)


def _has_compiler(device: torch.device) -> bool:
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    headers = Path(sysconfig.get_path("include")) / "Python.h"
    return hardware.cpp_compiler() is not None and headers.is_file()


_thread_state = threading.local()


def _configure_compiler() -> None:
    """Configure torch.compile for this thread: its settings are thread-local, and backward passes
    on GPUs run in other threads. Called on first use, because the imports are slow."""
    if getattr(_thread_state, "configured", False):
        return
    import torch._dynamo.config as dynamo_config
    import torch._functorch.config as functorch_config
    import torch.fx.experimental._config as shape_config

    # Compiled code is cached between runs.
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "compiled"))
    # Each adapter method and rank of a grid needs separate code for training and scoring. With
    # PyTorch's limit of 8, later cells would fall back to eager mode with only a warning.
    dynamo_config.recompile_limit = dynamo_config.accumulated_recompile_limit = RECOMPILE_LIMIT
    dynamo_config.fail_on_recompile_limit_hit = True
    # Otherwise floats are traced as symbols, and traced again where a symbol is not supported.
    dynamo_config.specialize_float = True
    # Otherwise sizes that are equal in the first batch are assumed to be equal in all batches.
    shape_config.use_duck_shape = False
    # The aliasing check at an operator's first call would compile the functions that it calls
    # again, under the check's modes; the tests check our operators on a CPU.
    functorch_config.check_custom_op_aliasing = False
    _thread_state.configured = True


def compilable(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function of tensors: it runs compiled within `enabled`, otherwise eagerly."""

    @functools.cache
    def compiled() -> Callable[P, R]:
        # Sizes vary between batches.
        return torch.compile(function, dynamic=True)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _enabled:
            return function(*args, **kwargs)
        _configure_compiler()
        return compiled()(*args, **kwargs)

    return run


def make_layers_compilable(layers: Sequence[torch.nn.Module]) -> None:
    """Make the forward pass of each decoder layer `compilable`; they share one compilation."""
    for layer in layers:
        layer.forward = compilable(layer.forward)
    for first in layers[:1]:
        first.forward = _with_input_gradient(first.forward)


def _with_input_gradient(forward: Callable[..., R]) -> Callable[..., R]:
    """Let the first layer's input require a gradient, which it does not with frozen embeddings.
    Otherwise that layer would need a second compilation, as long as that of all the others. The
    unused gradient costs a few thousandths of a step."""

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> R:
        hidden = args[0] if args else None
        if (
            _enabled
            and torch.is_grad_enabled()
            and isinstance(hidden, torch.Tensor)
            and hidden.is_floating_point()
            and not hidden.requires_grad
        ):
            args = hidden.detach().requires_grad_(), *args[1:]
        return forward(*args, **kwargs)

    return run


@contextmanager
def enabled(on: bool) -> Iterator[None]:
    """Run `compilable` functions compiled within the context if ``on``, otherwise eagerly."""
    global _enabled
    previous, _enabled = _enabled, on
    try:
        yield
    finally:
        _enabled = previous


def run_with_compile_fallback(on: bool, work: Callable[[], R]) -> R:
    """Run ``work`` compiled if ``on``; if that fails, run it again eagerly.

    If the eager run succeeds, compilation is disabled for the rest of the process (`failure`).

    Args:
        on: whether to compile.
        work: a function that may be called twice.

    Returns:
        The result of ``work``.
    """
    global _failure
    reason = ""
    if on and not _failure:
        try:
            with enabled(True):
                return work()
        except (SlmLoraError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # compilers raise any exception
            # Only the message: the error's traceback would keep all tensors alive.
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    with enabled(False):
        result = work()
    # The eager run succeeded, so compilation was the cause.
    if reason:
        _failure = reason
    return result


def is_enabled() -> bool:
    """Whether `compilable` functions run compiled at present."""
    return _enabled


def failure() -> str:
    """One line on why compilation failed in this process; empty if it did not."""
    return _failure
