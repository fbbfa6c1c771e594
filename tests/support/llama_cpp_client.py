"""llama.cpp (the prebuilt xllamacpp) as a server of exported GGUF files."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

PROMPTS = (
    "Tell me fact 12 about bees.",
    "Instruction:\nWhat is a bridge?\nResponse:\n",
    "The river runs past the old mill and",
    "def add(a, b):\n    return a",
    "In 1912 there were 37,450 ships;  who\tbuilt them?",
    "Übrigens: das Café kostet 3 € – naïve 数字 ١٢٣",
    "Bread rises because",
    "it's, they'll, WE'VE, I'm   \n\n  done.",
)


_SERVE = """
import sys
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
if len(sys.argv) > 2:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(sys.argv[2], 1.0)]
params.n_ctx, params.n_parallel = 512, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.warmup, params.verbosity = False, 0
# Its default keeps keys and values in half precision.
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(params)
print(f"address {server.listening_address}", flush=True)
sys.stdin.read()
"""


class LlamaCpp:
    """One model, with an adapter on it or without, in fp32 throughout.

    In a process of its own, which is killed: the server may wait for itself when it is destroyed.
    """

    def __init__(self, model: Path, adapter: Path | None = None) -> None:
        pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")
        command = [sys.executable, "-c", _SERVE, str(model), *([str(adapter)] if adapter else [])]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        weakref.finalize(self, _end, process)
        assert process.stdout is not None
        # (llama.cpp may print lines of its own.)
        lines = iter(process.stdout.readline, "")
        self._address = next(line.split()[1] for line in lines if line.startswith("address "))

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self._address + path,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            content: dict[str, Any] = json.load(answer)
        return content

    def greedy(self, prompt: str, tokens: int = 40) -> tuple[list[int], str]:
        """Ids and text of an answer; the end-of-text token is not in it."""
        body = {
            "prompt": prompt,
            "n_predict": tokens,
            "temperature": 0,
            "return_tokens": True,
            "cache_prompt": False,
        }
        completion = self.post("/completion", body)
        return completion["tokens"], completion["content"]

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        body = {"content": text, "add_special": True, "parse_special": special}
        ids: list[int] = self.post("/tokenize", body)["tokens"]
        return ids


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def greedy(model: Any, tokenizer: Any, prompt: str, tokens: int = 40) -> list[int]:
    """The same by plain transformers; without the end-of-text token."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        output = model.generate(
            **inputs,
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    new: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return new[:-1] if new[-1:] == [tokenizer.eos_token_id] else new
