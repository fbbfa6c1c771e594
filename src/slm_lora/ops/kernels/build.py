"""The C++ of this folder: compiled on first use, kept in the cache, called through ctypes.

Where it cannot be had (another CPU, no compiler) PyTorch computes the same.
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
"""Of every function: tensors, int64, float and int. (The threads, an int, come last.)"""


def available() -> bool:
    """Whether there is a library for this CPU: bf16 on the CPU has kernels then."""
    return load_library() is not None


def has_tiles() -> bool:
    """Whether it was made for AMX, and this process may use that: with `matrix_product`."""
    library = load_library()
    return library is not None and bool(library.has_tiles())


def failure() -> str:
    """Why compiling it failed; empty if it did not, or was not tried."""
    return _failure


def call(name: str, *arguments: Tensor | int | float) -> None:
    """Call a function of the library: contiguous tensors and numbers, without the threads."""
    library = load_library()
    assert library is not None
    plain = (x.data_ptr() if isinstance(x, Tensor) else x for x in arguments)
    getattr(library, name)(*plain, torch.get_num_threads())


_failure = ""


@functools.cache
def load_library() -> ctypes.CDLL | None:
    """The compiled library; None where this CPU or machine cannot have it."""
    global _failure
    compiler = hardware.cpp_compiler()
    here = sys.platform == "linux" and platform.machine() == "x86_64"
    if not here or compiler is None or not torch.cpu._is_avx512_bf16_supported():
        return None
    flags: tuple[str, ...] = _FLAGS
    if torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        flags += ("-mno-amx-tile", "-mno-amx-bf16")  # the system does not allow it
    sources = sorted(_FOLDER.glob("*.cpp"))
    # Made for this very CPU; a home folder may be shared by machines.
    made_of = hashlib.sha256(f"{hardware.processor()}\0{compiler}\0{flags}\0".encode())
    for file in (*sources, *sorted(_FOLDER.glob("*.h"))):
        made_of.update(file.read_bytes())
    path = cache_dir() / "compiled" / f"kernels-{made_of.hexdigest()[:16]}.so"
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
        said = error.stderr.decode(errors="replace").strip().splitlines()
        _failure = f"{compiler}: {said[0] if said else f'exit code {error.returncode}'}"
        return None
    except OSError as error:
        _failure = str(error)
        return None
    kinds = {"t": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_float, "n": ctypes.c_int}
    for name, arguments in _ARGUMENTS.items():
        getattr(library, name).argtypes = [kinds[kind] for kind in arguments]
    return library
