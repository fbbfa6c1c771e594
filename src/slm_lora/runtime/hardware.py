"""What this machine is, what is installed on it, and how much memory a stretch of work took."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from slm_lora import __version__

_LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "safetensors", "numpy")


def describe(device: str) -> dict[str, str | int | float]:
    """Hardware and operating system, without names of hosts, users or paths."""
    import torch

    facts: dict[str, str | int | float] = {
        "processor": processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_gb": round(_memory_bytes() / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def versions() -> dict[str, str]:
    """Versions of Python, this package and the libraries that results depend on."""
    found = {"python": platform.python_version(), "slm-lora": __version__}
    return found | {name: importlib.metadata.version(name) for name in _LIBRARIES}


def processor() -> str:
    """Name of the CPU, as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpp_compiler() -> str | None:
    """The C++ compiler of this machine, or None."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def free_bytes(device: str) -> int:
    """Memory that this process may have in all: what it holds now, and what is free; without
    bounds where the operating system does not say.

    Args:
        device: of a GPU its own memory, else the machine's.
    """
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0]) + torch.cuda.memory_reserved()
    free = _memory_bytes() or sys.maxsize
    if sys.platform == "linux":
        available = _kilobytes("/proc/meminfo", "MemAvailable")
        if available:
            free = available + resident_bytes()
    # A container's limit, where there is one.
    with contextlib.suppress(OSError, ValueError):
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return free


def resident_bytes() -> int:
    """Memory that this process holds; 0 where the operating system does not say."""
    return _kilobytes("/proc/self/status", "VmRSS") if sys.platform == "linux" else 0


def _kilobytes(file: str, name: str) -> int:
    """Bytes of a line ``name: 12 kB``; 0 without such a line."""
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def collect_garbage_rarely() -> None:
    """Let Python look for unreachable objects once in 50,000 new ones, not in some hundred.

    Importing and compiling make a million objects and hardly any garbage: looking took 1.2 s of
    7 to 8 s of imports, and takes 0.5.
    """
    gc.set_threshold(50_000, *gc.get_threshold()[1:])


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def disable_trim() -> None:
    """Let the C library keep what is freed for the next allocation, however large.

    Else it returns large blocks at once, and plain training, full fine-tuning and scoring spend a
    tenth of their time on pages that they had a moment ago. `release_freed_memory` returns them
    now and then.
    """
    _set_heap({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1})


def cap_onednn_cache() -> None:
    """Let oneDNN, and PyTorch's layer on it, keep the code of 128 products each instead of 1,024.

    To be called before the first product. Each shape has code of its own, 0.3 MB in either, and as
    micro-batches are of ever other lengths all 1,024 are soon there: 0.6 GB, most of it never used
    again. A micro-batch has about 50. Who has set these variables knows better.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")


@contextlib.contextmanager
def returning_large_blocks(on: bool) -> Iterator[None]:
    """Inside, blocks of 16 MB and more go back to the system when freed, which leaves no holes.

    Compiled training of an adapter is as fast so, and its peak is 7 % lower.

    Args:
        on: False changes nothing.
    """
    if not on:
        yield
        return
    _set_heap({_M_MMAP_THRESHOLD: 16 << 20, _M_MMAP_MAX: 65_536, _M_TRIM_THRESHOLD: 128 << 20})
    try:
        yield
    finally:
        disable_trim()


def _set_heap(options: dict[int, int]) -> None:
    """Options of the C library's allocator (``man mallopt``), where it has them."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # not every C library has it
            library = ctypes.CDLL(None)
            for option, value in options.items():
                library.mallopt(option, value)


def release_freed_memory() -> None:
    """Give what was freed back to the operating system; see `disable_trim`."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # not every C library has it
            ctypes.CDLL(None).malloc_trim(0)


def reset_peak_memory(device: str) -> None:
    """Reset the peak of memory; see `peak_memory_bytes`.

    What earlier work freed is given back first, or it would count as ours.
    """
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        release_freed_memory()
        # "5" sets the process's high-water mark of resident memory back to what it is now.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_bytes(device: str) -> int:
    """Most memory used since the last reset: of the GPU, or resident in this process.

    Where the operating system cannot reset its mark (not Linux) it counts from the start of
    the process; 0 where it keeps none (Windows).
    """
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        return _kilobytes("/proc/self/status", "VmHWM")
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
