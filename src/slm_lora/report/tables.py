"""The result table: one row a run, the described columns first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from slm_lora.config.types import METHOD_LABELS
from slm_lora.records import LossOn
from slm_lora.report.blocks import markdown_table
from slm_lora.report.names import MOST_MODULES, rate_name
from slm_lora.runs.metrics import METRICS, mean_over_rows
from slm_lora.runs.scored_run import ScoredRun
from slm_lora.runtime.progress import clock
from slm_lora.stats.estimates import Estimate, estimate, perplexity
from slm_lora.stats.inference import LEAST_GROUPS

DESCRIBED = ("Model", "Dataset Size", "r", "Epochs", "Eval Loss", "Perplexity")
MEASURED = (
    "Learning Rate", "Scale", "Training Rows", "Trainable Parameters", "Trainable %", "Tokens/s",
    "Time", "Peak Memory",
)  # fmt: skip


def varied_keys(runs: Sequence[ScoredRun]) -> list[str]:
    """Keys that differ between the adapters' cells and have no column of their own."""
    shown = {
        "adapter.r", "adapter.lora_alpha", "data.size", "training.num_train_epochs",
        "training.learning_rate",
    }  # fmt: skip
    seen: dict[str, set[str]] = {}
    for run in runs:
        if not run.is_base:
            for key in run.run.record.settings:
                seen.setdefault(key, set())
    for key, values in seen.items():
        values.update(str(run.setting(key)) for run in runs if not run.is_base)
    return sorted(key for key, values in seen.items() if key not in shown and len(values) > 1)


def header(runs: Sequence[ScoredRun]) -> list[str]:
    """Column titles."""
    varied = [key.rsplit(".", 1)[-1] for key in varied_keys(runs)]
    return [*DESCRIBED, *varied, *MEASURED]


def cells(run: ScoredRun, runs: Sequence[ScoredRun]) -> list[str]:
    """What one run shows under `header`."""
    record = run.run.record
    loss = record.evaluation.loss(run.headline) or record.evaluation.all
    scores = [f"{loss.loss:.4f}", f"{loss.perplexity:.3f}"]
    if run.is_base:
        varied = ["–"] * len(varied_keys(runs))
        quantization = run.setting("model.quantization")
        name = record.model.name + (f" ({quantization})" if quantization else "")
        return [name, "–", "–", "–", *scores, *varied, *["–"] * len(MEASURED)]
    adapter, training = record.saved, record.trained
    full = run.setting("adapter.kind") == "full"
    size = run.setting("data.size")
    return [
        METHOD_LABELS[run.setting("adapter.kind")],
        "all" if size is None else f"{size}",
        "–" if full else f"{run.setting('adapter.r')}",
        f"{training.epochs:g}" if training.epochs == int(training.epochs)
        else f"{training.epochs:.2f}",
        *scores,
        *[_shown(run.setting(key)) for key in varied_keys(runs)],
        rate_name(float(run.setting("training.learning_rate"))),
        "–" if full else f"{scale(run):g}",
        f"{record.data.sets.train.rows}",
        f"{adapter.trainable_parameters:,}",
        f"{adapter.percent:.3f}",
        f"{training.tokens_per_s:.0f}",
        clock(training.seconds),
        f"{training.peak_memory_bytes / 1e9:.2f} GB",
    ]  # fmt: skip


def scale(run: ScoredRun) -> float:
    """Factor on the adapter's output: alpha/r, and alpha/√r of rsLoRA."""
    rank, alpha = run.setting("adapter.r"), run.setting("adapter.lora_alpha")
    root = run.setting("adapter.kind") == "rslora"
    return round(float(alpha / (math.sqrt(rank) if root else rank)), 3)


def _shown(value: Any) -> str:
    if isinstance(value, list) and len(value) > MOST_MODULES:
        return f"{len(value)} modules"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def described_table(runs: Sequence[ScoredRun]) -> str:
    """One row per run, as Markdown."""
    return markdown_table(header(runs), [cells(run, runs) for run in runs])


def losses_table(runs: Sequence[ScoredRun], tokens: LossOn) -> str:
    """Markdown: loss, perplexity and the mean of the rows' own losses, with 95 % intervals."""
    rows = []
    for run in runs:
        recorded = run.run.record.evaluation.loss(tokens)
        if recorded is None:
            rows.append([run.run.cell, "–", "–", "–", "–"])
            continue
        metric = METRICS[tokens]
        loss, of_rows = (estimate([run.scores], of) for of in (metric, mean_over_rows(metric)))
        per_token = (
            f"{recorded.perplexity:.2f} ({perplexity(loss.low):.2f} to {perplexity(loss.high):.2f})"
        )
        shown = [run.run.cell, loss_shown(loss), per_token, loss_shown(of_rows)]
        rows.append([*shown, f"{recorded.bits_per_byte:.4f}"])
    return markdown_table(["Cell", "Loss", "Perplexity", "Mean over rows", "Bits/byte"], rows)


def loss_shown(loss: Estimate, digits: int = 4) -> str:
    """With its interval, where there are groups enough for one."""
    value = f"{loss.value:.{digits}f}"
    if loss.groups < LEAST_GROUPS:
        return value
    return f"{value} ({loss.low:.{digits}f} to {loss.high:.{digits}f})"


def runs_text(runs: Sequence[ScoredRun]) -> str:
    """Every run in the described columns, losses with their intervals, and what they are."""
    record = runs[0].run.record
    data, machine = record.data, record.machine
    tokens = "the whole text" if runs[0].headline == "all" else "the response"
    seeds = ", ".join(map(str, sorted({run.resolved["seed"] for run in runs})))
    gpu = f", {machine.gpu}" if machine.gpu else ""
    notes = [
        f"Eval Loss: total negative log-likelihood over the tokens of {tokens} (end-of-sequence "
        f"token included), in nats per token, on the same {data.sets.test.rows} test rows "
        "for every run; Perplexity is its exponential.",
        f"Base: {record.model.name}, {record.model.precision}; data: {data.origin}; "
        f"template: {data.template.kind}; seeds: {seeds}.",
        f"Run on {machine.processor}, {machine.cores} cores, {machine.memory_gb} GB{gpu}. "
        "Scale: factor on the adapter's output, alpha/r (rsLoRA: alpha/√r). Tokens/s: training "
        "tokens without padding, first two steps excluded.",
    ]
    return (
        f"{described_table(runs)}\n"
        + "\n".join(f"- {note}" for note in notes)
        + f"\n\n### Whole text, with 95 % intervals\n\n{losses_table(runs, 'all')}"
        + f"\n### Response only, with 95 % intervals\n\n{losses_table(runs, 'response')}\n"
        "Intervals cover the choice of test rows, not the training seed."
    )
