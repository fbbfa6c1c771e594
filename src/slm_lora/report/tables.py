"""The result table: one row a run, the described columns first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from slm_lora.records import LossOn
from slm_lora.runs.scored_run import ScoredRun
from slm_lora.runtime.progress import clock
from slm_lora.stats.estimates import Estimate, loss_estimate, mean_over_rows, perplexity
from slm_lora.stats.inference import LEAST_GROUPS

KINDS = {
    "lora": "LoRA",
    "rslora": "rsLoRA",
    "dora": "DoRA",
    "pissa": "PiSSA",
    "full": "Full fine-tuning",
}
DESCRIBED = ("Model", "Dataset Size", "r", "Epochs", "Eval Loss", "Perplexity")
MEASURED = (
    "Training Rows", "Trainable Parameters", "Trainable %", "Tokens/s", "Time", "Peak Memory",
)  # fmt: skip


def varied_keys(lines: Sequence[ScoredRun]) -> list[str]:
    """Keys beyond rank, alpha and size that differ between the adapters' cells."""
    shown = {"adapter.r", "adapter.lora_alpha", "data.size", "training.num_train_epochs"}
    seen: dict[str, set[str]] = {}
    for line in lines:
        if not line.is_base:
            for key in line.run.record["settings"]:
                seen.setdefault(key, set())
    for key, values in seen.items():
        values.update(str(line.setting(key)) for line in lines if not line.is_base)
    return sorted(key for key, values in seen.items() if key not in shown and len(values) > 1)


def header(lines: Sequence[ScoredRun]) -> list[str]:
    """Column titles."""
    varied = [key.rsplit(".", 1)[-1] for key in varied_keys(lines)]
    return [*DESCRIBED, *varied, *MEASURED]


def cells(line: ScoredRun, lines: Sequence[ScoredRun]) -> list[str]:
    """What one run shows under `header`."""
    record = line.run.record
    found = record["evaluation"][line.headline]
    scores = [f"{found['loss']:.4f}", f"{found['perplexity']:.3f}"]
    if line.is_base:
        varied = ["–"] * len(varied_keys(lines))
        quantization = line.setting("model.quantization")
        name = record["model"]["name"] + (f" ({quantization})" if quantization else "")
        return [name, "–", "–", "–", *scores, *varied, *["–"] * len(MEASURED)]
    adapter, training = record["adapter"], record["training"]
    full = line.setting("adapter.kind") == "full"
    size = line.setting("data.size")
    return [
        KINDS[line.setting("adapter.kind")],
        "all" if size is None else f"{size}",
        "–" if full else f"{line.setting('adapter.r')}",
        f"{training['epochs']:g}" if training["epochs"] == int(training["epochs"])
        else f"{training['epochs']:.2f}",
        *scores,
        *[_shown(line.setting(key)) for key in varied_keys(lines)],
        f"{record['data']['sets']['train']['rows']}",
        f"{adapter['trainable_parameters']:,}",
        f"{adapter['percent']:.3f}",
        f"{training['tokens_per_s']:.0f}",
        clock(training["seconds"]),
        f"{training['peak_memory_bytes'] / 1e9:.2f} GB",
    ]  # fmt: skip


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def markdown_table(lines: Sequence[ScoredRun]) -> str:
    """The table as Markdown, numbers to the right."""
    titles = header(lines)
    rows = [cells(line, lines) for line in lines]
    marks = [":--" if index == 0 else "--:" for index in range(len(titles))]
    return "\n".join("| " + " | ".join(row) + " |" for row in [titles, marks, *rows]) + "\n"


def losses_table(lines: Sequence[ScoredRun], tokens: LossOn) -> str:
    """Markdown: loss, perplexity and the mean of the rows' own losses, with 95 % intervals."""
    rows = ["| Cell | Loss | Perplexity | Mean over rows | Bits/byte |"]
    rows.append("| :-- | --: | --: | --: | --: |")
    for line in lines:
        found = line.run.record["evaluation"].get(tokens)
        if found is None:
            rows.append(f"| {line.run.cell} | – | – | – | – |")
            continue
        loss, of_rows = loss_estimate([line.scores], tokens), mean_over_rows([line.scores], tokens)
        per_token = (
            f"{found['perplexity']:.2f} ({perplexity(loss.low):.2f} to {perplexity(loss.high):.2f})"
        )
        shown = [line.run.cell, loss_shown(loss), per_token, loss_shown(of_rows)]
        rows.append("| " + " | ".join(shown) + f" | {found['bits_per_byte']:.4f} |")
    return "\n".join(rows) + "\n"


def loss_shown(loss: Estimate, digits: int = 4) -> str:
    """With its interval, where there are groups enough for one."""
    value = f"{loss.value:.{digits}f}"
    if loss.groups < LEAST_GROUPS:
        return value
    return f"{value} ({loss.low:.{digits}f} to {loss.high:.{digits}f})"
