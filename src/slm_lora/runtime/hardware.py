"""Hardware and library versions, memory measurements, allocator settings."""

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
    """Hardware and operating system, without names of hosts, users or paths.

    ``memory_gb`` is in units of 10^9 bytes.
    """
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
    own = {"python": platform.python_version(), "slm-lora": __version__}
    return own | {name: importlib.metadata.version(name) for name in _LIBRARIES}


def processor() -> str:
    """Name of the CPU, from the operating system."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


def is_amd_processor() -> bool:
    """Whether the CPU is AMD's."""
    return "AuthenticAMD" in (_cpu_info("vendor_id") or platform.processor())


def _cpu_info(name: str) -> str:
    """A value of Linux's /proc/cpuinfo; empty without it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(name):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return ""


def cpp_compiler() -> str | None:
    """Command of the C++ compiler: ``$CXX``, g++ or clang++; None without one."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def available_bytes(device: str) -> int:
    """Memory available to this process, in bytes: its present use and all that is free, up to the
    container's limit; `sys.maxsize` if unknown.

    Args:
        device: ``cuda`` for the GPU's memory; else the machine's.
    """
    if device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0]) + torch.cuda.memory_reserved()
    free = _memory_bytes() or sys.maxsize
    if sys.platform == "linux":
        available = _kilobytes("/proc/meminfo", "MemAvailable")
        if available:
            free = available + resident_bytes()
    # The container's limit (cgroup v2).
    with contextlib.suppress(OSError, ValueError):
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return free


def resident_bytes() -> int:
    """Resident memory of this process, in bytes; 0 except on Linux."""
    return _kilobytes("/proc/self/status", "VmRSS") if sys.platform == "linux" else 0


def _kilobytes(file: str, name: str) -> int:
    """Bytes from a line ``name: 12 kB``; 0 without such a line."""
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    return 0


def reduce_gc_frequency() -> None:
    """Collect garbage once per 50,000 new objects.

    Imports and compilation create a million objects and hardly any garbage; this reduces the time
    of collections from 1.2 to 0.5 s, of 7 to 8 s of imports.
    """
    gc.set_threshold(50_000, *gc.get_threshold()[1:])


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def disable_trim() -> None:
    """Keep freed memory in the C library's heap, whatever the size of the block.

    By default, large blocks are returned to the system at once, and eager training, full
    fine-tuning and scoring spend 10 % of their time on page faults. `release_freed_memory` returns
    the memory explicitly.
    """
    _set_heap({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1})


def cap_onednn_cache() -> None:
    """Cap the primitive caches of oneDNN and PyTorch's ideep at 128 entries each (default: 1,024).

    Call it before the first matrix product. Each shape has an entry of 0.3 MB in either, and as the
    lengths of micro-batches vary, 1,024 entries fill soon: 0.6 GB, most of it never reused. A
    micro-batch needs about 50. Values set by the user are kept.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "128")


@contextlib.contextmanager
def return_large_blocks(on: bool) -> Iterator[None]:
    """Within the block, allocate 16 MB and more with mmap, which avoids heap fragmentation.

    Compiled training of an adapter is as fast this way, and its peak memory 7 % lower.

    Args:
        on: False leaves the heap as it is.
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
    """Set options of the C library's allocator (``man mallopt``), if it has mallopt."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # other C libraries
            library = ctypes.CDLL(None)
            for option, value in options.items():
                library.mallopt(option, value)


def release_freed_memory() -> None:
    """Return freed memory to the operating system (malloc_trim); see `disable_trim`."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # other C libraries
            ctypes.CDLL(None).malloc_trim(0)


def reset_peak_memory(device: str) -> None:
    """Reset the peak of memory, see `peak_memory_bytes`.

    Memory freed by earlier work is returned first, so that it does not count.
    """
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        release_freed_memory()
        # "5" resets the high-water mark of resident memory to its present value.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory_bytes(device: str) -> int:
    """Peak memory since the last reset, in bytes: allocated on the GPU, or resident.

    Without a resettable peak (macOS), since the start of the process; 0 on Windows.
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
