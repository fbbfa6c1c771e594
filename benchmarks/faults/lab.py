"""A tiny experiment, run in forked children of a process with all imports done.

Model (a random Llama) and rows are synthetic; an experiment is the base and one cell of five
optimizer steps, with a checkpoint after each, two validations, and scoring.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import itertools
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from slm_lora.cli import run_guarded
from slm_lora.config.load import load_recipe
from slm_lora.experiment.job import Job
from slm_lora.experiment.paths import ExperimentPaths
from slm_lora.experiment.resolve_jobs import make_jobs
from slm_lora.experiment.runner import run_jobs
from slm_lora.runtime.progress import Reporter

NAME = "faults"
RECIPE = """
name: {name}
model: {{name: {model}}}
data: {{name: {rows}, test_rows: 16, validation_rows: 8, size: 20, max_length: 64}}
adapter: {{r: 2, target_modules: [q_proj, v_proj]}}
training:
  max_steps: 5
  learning_rate: 1e-2
  effective_batch_size: 8
  micro_batch_tokens: 128
  precision: fp32
  eval_steps: 2
  keep_best: true
evaluation: {{micro_batch_tokens: 128}}
checkpoint_seconds: 0
"""
TIMES = {"seconds", "tokens_per_s", "first_step_seconds", "peak_memory_bytes"}
"""Keys of a record whose values vary between runs."""

_IMPORTED_LATE = ("pandas", "peft", "pyarrow.compute", "pyarrow.parquet")

Hook = Callable[[], None]


def make_model(folder: Path, seed: int = 7, **shape: int) -> Path:
    """A Llama with random weights and a byte-level tokenizer."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<eos>", *alphabet])}
    raw = Tokenizer(models.BPE(vocabulary, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.3,
            **cast("Any", {**sizes, **shape}),
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Lab:
    """The experiment of all cases.

    Attributes:
        folder: contains recipe, rows, model, and a folder per case.
        jobs: resolved jobs, inherited by forked children.
    """

    folder: Path
    jobs: list[Job]

    def paths(self, case: Path) -> ExperimentPaths:
        """Output folders of a case."""
        return ExperimentPaths(NAME, case / "results" / NAME, case / "adapter")


def make_lab(folder: Path) -> Lab:
    """Build everything in ``folder``."""
    # Threads do not survive a fork.
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    for module in _IMPORTED_LATE:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    model = make_model(folder / "tiny-llama")
    rows = folder / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        for index in range(80):
            row = {"instruction": f"Fact {index}?", "response": f"It is {index * 7}. " * 2}
            file.write(json.dumps(row) + "\n")
    recipe = folder / "faults.yaml"
    recipe.write_text(RECIPE.format(name=NAME, model=model, rows=rows), encoding="utf-8")
    lab = Lab(folder, make_jobs(load_recipe(recipe)[1]))
    # Children's garbage collectors skip the objects that exist by now.
    gc.collect()
    gc.freeze()
    return lab


def start(lab: Lab, case: Path, hook: Hook = lambda: None) -> int:
    """Fork a child that runs the experiment, after ``hook``; its process id."""
    case.mkdir(parents=True, exist_ok=True)
    log = (lab.folder / f"{case.name}.log").open("ab", buffering=0)
    child = os.fork()
    if child:
        log.close()
        return child
    code = 99
    try:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        # A new stream, without the parent's buffered output.
        sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
        reporter = Reporter(Console(file=sys.stderr, highlight=False, width=200))
        hook()
        code = run_guarded(lambda: run_jobs(lab.jobs, lab.paths(case), reporter) and None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def finish(child: int) -> int:
    """Exit code of a child; negative: the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(lab: Lab, case: Path, hook: Hook = lambda: None) -> int:
    """Run the experiment in a child; its exit code."""
    return finish(start(lab, case, hook))


def log_of(lab: Lab, case: Path) -> str:
    """Output of all processes of a case."""
    return (lab.folder / f"{case.name}.log").read_text(encoding="utf-8")


def outcome(case: Path) -> dict[str, Any]:
    """Results of a finished experiment without times: adapter hashes, records, steps, scores."""
    results: dict[str, Any] = {}
    for path in sorted((case / "adapter").rglob("*")):
        if path.is_file():
            results[path.relative_to(case).as_posix()] = digest(path)
    for run_folder in sorted((case / "results" / NAME / "runs").iterdir()):
        record = json.loads((run_folder / "run.json").read_text(encoding="utf-8"))
        steps = run_folder / "steps.jsonl"
        lines = steps.read_text(encoding="utf-8").splitlines() if steps.exists() else []
        results[run_folder.name] = {
            "record": without_times(record),
            "steps": [without_times(json.loads(line)) for line in lines],
            "scores": digest(run_folder / "scores.parquet"),
        }
    hidden = [path for path in case.rglob(".*") if path.name != ".lock"]
    results["leftovers"] = sorted(path.name for path in hidden)
    results["checkpoints"] = sorted(p.name for p in (case / "results" / NAME).glob("checkpoints/*"))
    return results


def without_times(value: Any) -> Any:
    """The value without any key of `TIMES`."""
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in TIMES}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def clean(lab: Lab, case: Path) -> None:
    """Remove the files of a case."""
    shutil.rmtree(case, ignore_errors=True)
    with contextlib.suppress(OSError):
        (lab.folder / f"{case.name}.log").unlink()


# --- hooks: run in the child ---------------------------------------------------------------------

_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def on_each_operation(folder: Path, callback: Callable[[], None]) -> None:
    """Call ``callback`` right before every file operation of this process: opening a file in
    ``folder`` for writing, fsync, rename, remove, making or removing a folder."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, str | Path) and flags & _WRITES and str(folder) in str(path):
                callback()
        elif event in _CHANGES:
            callback()

    sync = os.fsync

    def fsync(descriptor: int) -> None:
        callback()
        sync(descriptor)

    sys.addaudithook(audit)
    os.fsync = fsync  # type: ignore[assignment]


def at_operation(folder: Path, number: int, action: Callable[[], None]) -> Hook:
    """Call ``action`` right before file operation ``number`` (from 1)."""
    counter = itertools.count(1)
    return lambda: on_each_operation(folder, lambda: action() if next(counter) == number else None)


def count_operations(lab: Lab, case: Path) -> int:
    """File operations of an undisturbed experiment."""
    reader, writer = os.pipe()
    code = run(
        lab, case, lambda: on_each_operation(case, lambda: (os.write(writer, b"."), None)[1])
    )
    os.close(writer)
    if code:
        sys.exit(f"the undisturbed experiment ended with {code}:\n{log_of(lab, case)}")
    with os.fdopen(reader, "rb") as operations:
        return len(operations.read())


def at_call(module: Any, name: str, number: int, action: Callable[[], None]) -> Hook:
    """Call ``action`` right before call ``number`` (from 1) of a function."""

    def hook() -> None:
        function, calls = getattr(module, name), 0

        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number:
                action()
            return function(*arguments, **options)

        setattr(module, name, counted)

    return hook


def die() -> None:
    """SIGKILL, as from the kernel's out-of-memory killer."""
    os.kill(os.getpid(), signal.SIGKILL)


def request_stop() -> None:
    """SIGTERM, as from a scheduler."""
    os.kill(os.getpid(), signal.SIGTERM)
