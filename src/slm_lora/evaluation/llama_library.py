"""llama.cpp's C functions in the library of the package ``xllamacpp``.

The package's Python interface returns probabilities of generated tokens only. Its shared library
exports llama.cpp's C API, which returns the logits of every position.

The parameter structures grow from release to release. They are passed as blocks larger than any of
them, as calling conventions permit for structures in memory, and only their first fields, which
have kept their place, are set. `load` checks the defaults of these fields.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from slm_lora.errors import NumericError, UsageError

_DEFAULTS = (512, 2048, 512)
"""n_ctx, n_batch and n_ubatch, the first fields of llama_context_params."""
TOKENS_PER_CALL = 512
"""Tokens of one call; bounds the memory of the logits."""


class _Parameters(ctypes.Structure):
    _fields_ = [("words", ctypes.c_uint32 * 512)]


class _Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


_Pointer = ctypes.c_void_p
_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LogCallback, _Pointer)),
    "llama_model_default_params": (_Parameters, ()),
    "llama_context_default_params": (_Parameters, ()),
    "llama_model_load_from_file": (_Pointer, (ctypes.c_char_p, _Parameters)),
    "llama_model_free": (None, (_Pointer,)),
    "llama_model_get_vocab": (_Pointer, (_Pointer,)),
    "llama_vocab_n_tokens": (ctypes.c_int32, (_Pointer,)),
    "llama_init_from_model": (_Pointer, (_Pointer, _Parameters)),
    "llama_free": (None, (_Pointer,)),
    "llama_n_ctx": (ctypes.c_uint32, (_Pointer,)),
    "llama_set_n_threads": (None, (_Pointer, ctypes.c_int32, ctypes.c_int32)),
    "llama_get_memory": (_Pointer, (_Pointer,)),
    "llama_memory_clear": (None, (_Pointer, ctypes.c_bool)),
    "llama_batch_init": (_Batch, (ctypes.c_int32, ctypes.c_int32, ctypes.c_int32)),
    "llama_batch_free": (None, (_Batch,)),
    "llama_decode": (ctypes.c_int32, (_Pointer, _Batch)),
    "llama_get_logits": (ctypes.POINTER(ctypes.c_float), (_Pointer,)),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        (
            *(ctypes.c_int, ctypes.POINTER(ctypes.c_float), _Pointer),
            *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64),
            ctypes.POINTER(ctypes.c_float),
        ),
    ),
}
_silent = _LogCallback(lambda level, text, data: None)  # must outlive the library


@cache
def load() -> ctypes.CDLL:
    """The library of the installed xllamacpp.

    Raises:
        UsageError: it is not installed, or its functions are not those known here.
    """
    try:
        module = importlib.import_module("xllamacpp.xllamacpp")
    except ImportError:
        raise UsageError(
            "scoring or quantising GGUF files needs llama.cpp: pip install 'slm-lora[gguf-check]'"
        ) from None
    library = ctypes.CDLL(str(module.__file__))
    for name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise UsageError(f"{_version()} does not export {name}; install 2026.10") from None
        function.restype, function.argtypes = result, list(arguments)
    library.llama_log_set(_silent, None)
    if tuple(library.llama_context_default_params().words[:3]) != _DEFAULTS:
        raise UsageError(f"{_version()} has other parameters than known here; install 2026.10")
    library.llama_backend_init()
    return library


def _version() -> str:
    return f"xllamacpp {importlib.import_module('xllamacpp').__version__}"


class LlamaModel:
    """A GGUF file in llama.cpp, with a context of one sequence.

    The key-value cache has llama.cpp's default type, F16.
    """

    def __init__(self, library: ctypes.CDLL, context: int, n_vocab: int) -> None:
        """Wrap a llama_context; see `open_model`."""
        self._library = library
        self._context = context
        self.n_vocab = n_vocab

    def token_nll(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
        """Negative log-probability of each token after the first, given those before it.

        Args:
            ids: [length], at most the context.

        Returns:
            fp64 [length - 1], in nats.

        Raises:
            NumericError: llama.cpp fails to compute the logits.
        """
        library, n_inputs = self._library, len(ids) - 1
        library.llama_memory_clear(library.llama_get_memory(self._context), True)
        nll = np.empty(n_inputs)
        batch = library.llama_batch_init(TOKENS_PER_CALL, 0, 1)
        try:
            for start in range(0, n_inputs, TOKENS_PER_CALL):
                stop = min(start + TOKENS_PER_CALL, n_inputs)
                batch.n_tokens = stop - start
                for index, position in enumerate(range(start, stop)):
                    batch.token[index], batch.pos[index] = int(ids[position]), position
                    batch.n_seq_id[index], batch.logits[index] = 1, 1
                    batch.seq_id[index][0] = 0
                if (status := library.llama_decode(self._context, batch)) != 0:
                    raise NumericError(f"llama.cpp computed no logits (llama_decode: {status})")
                logits = np.ctypeslib.as_array(
                    library.llama_get_logits(self._context), (stop - start, self.n_vocab)
                )
                nll[start:stop] = _nll(logits, ids[start + 1 : stop + 1])
        finally:
            library.llama_batch_free(batch)
        return nll


def _nll(
    logits: npt.NDArray[np.float32], targets: npt.NDArray[np.int32]
) -> npt.NDArray[np.float64]:
    nll = np.empty(len(targets))
    for index, target in enumerate(targets):  # one row at a time: fp64 of all would be large
        row = logits[index].astype(np.float64)
        largest = row.max()
        nll[index] = largest + np.log(np.exp(row - largest).sum()) - row[target]
    return nll


@contextmanager
def open_model(path: Path, context: int, threads: int) -> Iterator[LlamaModel]:
    """Load a GGUF file.

    Args:
        path: of the file.
        context: tokens of the longest sequence.
        threads: number of threads.

    Raises:
        UsageError: no llama.cpp, or it cannot load the file.
    """
    library = load()
    model = library.llama_model_load_from_file(
        os.fsencode(path), library.llama_model_default_params()
    )
    if not model:
        raise UsageError(f"{path}: llama.cpp cannot load the file")
    try:
        parameters = library.llama_context_default_params()
        parameters.words[0] = context
        handle = library.llama_init_from_model(model, parameters)
        if not handle or library.llama_n_ctx(handle) < context:
            raise UsageError(f"{path}: llama.cpp has no context of {context} tokens for it")
        try:
            library.llama_set_n_threads(handle, threads, threads)
            n_vocab = library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
            yield LlamaModel(library, handle, n_vocab)
        finally:
            library.llama_free(handle)
    finally:
        library.llama_model_free(model)
