"""Compile the C++ kernels of this folder on first use, cache the library, and call it by ctypes.

Without it (another CPU, no compiler) PyTorch computes the same.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from slm_lora.runtime import hardware
from slm_lora.runtime.storage import atomic_path, cache_dir

_FOLDER = Path(__file__).parent
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")

_ARGUMENTS = {
    "attention_forward": "ttttttiiiifn",
    "attention_backward": "ttttttttttiiiifn",
    "negative_log_likelihood": "tttiinn",
    "matrix_product": "tintintiiiin",
}
"""Argument types by function: t tensor, i int64, f float, n int; the last is the thread count."""


def available() -> bool:
    """Whether the library is available on this machine, with its bf16 kernels."""
    return load_library() is not None


def has_amx() -> bool:
    """Whether the library was compiled for AMX, so that it has `matrix_product`."""
    library = load_library()
    return library is not None and bool(library.has_amx())


def failure() -> str:
    """Why its compilation failed; empty if it did not, or was not attempted."""
    return _failure


def call(name: str, *arguments: Tensor | int | float) -> None:
    """Call a function of the library.

    Args:
        name: of the function.
        arguments: contiguous tensors and numbers; the thread count is appended.
    """
    library = load_library()
    assert library is not None
    values = (x.data_ptr() if isinstance(x, Tensor) else x for x in arguments)
    getattr(library, name)(*values, torch.get_num_threads())


_failure = ""


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled library; None without AVX512-BF16 or a compiler, or if compilation failed."""
    global _failure
    compiler = hardware.cpp_compiler()
    is_x86_linux = sys.platform == "linux" and platform.machine() == "x86_64"
    if not is_x86_linux or compiler is None or not torch.cpu._is_avx512_bf16_supported():
        return None
    flags: tuple[str, ...] = _FLAGS
    if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        flags += ("-mno-amx-tile", "-mno-amx-bf16")  # not permitted by the operating system
    sources = sorted(_FOLDER.glob("*.cpp"))
    # Compiled for this CPU model; machines may share a home folder.
    digest = hashlib.sha256(f"{hardware.processor()}\0{compiler}\0{flags}\0".encode())
    for file in (*sources, *sorted(_FOLDER.glob("*.h"))):
        digest.update(file.read_bytes())
    path = cache_dir() / "compiled" / f"kernels-{digest.hexdigest()[:16]}.so"
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as temporary:
                subprocess.run(
                    [compiler, *flags, *map(os.fspath, sources), "-o", os.fspath(temporary)],
                    check=True,
                    capture_output=True,
                )
        library = ctypes.CDLL(os.fspath(path))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        _failure = f"{compiler}: {lines[0] if lines else f'exit code {error.returncode}'}"
        return None
    except OSError as error:
        _failure = str(error)
        return None
    c_types = {"t": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "n": ctypes.c_int}
    for name, arguments in _ARGUMENTS.items():
        getattr(library, name).argtypes = [c_types[code] for code in arguments]
    return library
