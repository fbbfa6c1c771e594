"""Write what came out of an experiment: table, metrics, analysis. Reads run folders only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.table import Table

from slm_lora.errors import UsageError
from slm_lora.experiment.analysis import analysis
from slm_lora.experiment.contrasts import Contrast, all_contrasts
from slm_lora.experiment.table import (
    MEASURED,
    Line,
    both_losses,
    cells,
    header,
    markdown_table,
    read_lines,
)
from slm_lora.runs import METRICS_FILE, Run, to_json
from slm_lora.storage import atomic_write_text

TABLE_FILE, ANALYSIS_FILE = "experiment_table.md", "analysis.md"


def write_report(runs: Sequence[Run], results: Path) -> list[Line]:
    """Write the three files of an experiment and return the table's lines.

    Raises:
        UsageError: there are no runs.
        IntegrityError: a run's scores are broken, or runs were scored on different rows.
    """
    if not runs:
        raise UsageError(f"{results}: no finished run in it")
    lines = read_lines(runs)
    found = all_contrasts(lines)
    atomic_write_text(results / TABLE_FILE, _table_file(lines))
    atomic_write_text(results / METRICS_FILE, to_json(_metrics(lines, found)))
    atomic_write_text(results / ANALYSIS_FILE, analysis(lines, found))
    return lines


def terminal_table(lines: Sequence[Line]) -> Table:
    """The described columns for a terminal, with the interval of the perplexity."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    titles = header(lines)
    shown = len(titles) - len(MEASURED)
    for index, title in enumerate([*titles[:shown], "95 % interval"]):
        side: Literal["left", "right"] = "left" if index == 0 else "right"
        table.add_column(title, justify=side, no_wrap=index > 0, overflow="fold")
    for line in lines:
        loss = line.loss()
        interval = f"{math.exp(loss.low):.2f} – {math.exp(loss.high):.2f}"
        table.add_row(*cells(line, lines)[:shown], interval)
    return table


def _table_file(lines: Sequence[Line]) -> str:
    record = lines[0].run.record
    data, machine = record["data"], record["machine"]
    tokens = "the whole text" if lines[0].headline == "all" else "the response"
    test = data["sets"]["test"]
    notes = [
        f"Eval Loss: total negative log-likelihood over the tokens of {tokens} (end-of-sequence "
        f"token included), in nats a token, on the same {test['rows']} test rows for every line; "
        "Perplexity is exp of that number.",
        f"Base: {record['model']['name']}, {record['model']['precision']}; "
        f"data: {data['origin']}; template: {data['template']['kind']}; seed(s): "
        + ", ".join(sorted({str(line.recipe["seed"]) for line in lines}))
        + ".",
        f"Run on {machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB"
        + (f", {machine['gpu']}" if "gpu" in machine else "")
        + ". Tokens/s counts real tokens of training, the first two steps left out.",
        *_cut_rows(lines),
    ]
    return (
        f"# {record['experiment']}\n\n{markdown_table(lines)}\n"
        + "\n".join(f"- {note}" for note in notes)
        + f"\n\n## Whole text and response only, with 95 % intervals\n\n{both_losses(lines)}\n"
        "Intervals cover the choice of test rows, not the training seed.\n"
    )


def _cut_rows(lines: Sequence[Line]) -> list[str]:
    counted = lines[0].run.record["data"]["long_rows"]
    which, test = ("test rows", counted["test"]) if "test" in counted else ("rows", counted["all"])
    if not test["rows"]:
        return []
    limit = lines[0].setting("data.max_length")
    return [
        f"{test['rows']} {which} were longer than {limit} tokens ({test['policy']}; "
        f"{test['tokens_cut']} tokens cut, the longest row had {test['longest']})."
    ]


def _metrics(lines: Sequence[Line], found: Sequence[Contrast]) -> dict[str, object]:
    return {
        "experiment": lines[0].run.record["experiment"],
        "runs": [
            {
                "folder": line.run.folder.name,
                **line.run.record,
                "intervals": {
                    tokens: line.loss(tokens).record()
                    for tokens in ("all", "response")
                    if tokens in line.run.record["evaluation"]
                },
            }
            for line in lines
        ],
        "contrasts": [each.record() for each in found],
    }  # fmt: skip
