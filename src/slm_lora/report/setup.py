"""The setup of an experiment: model, data, sets, versions, and how to make the report again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slm_lora.report.blocks import plain
from slm_lora.runs.folder import Run, named, run_folders
from slm_lora.runs.record import RunRecord
from slm_lora.runs.scored_run import ScoredRun


def setup(runs: Sequence[ScoredRun], results: Path) -> str:
    """Facts as a Markdown list, and the command that makes the report."""
    record = runs[0].run.record
    data, model = record.data, record.model
    sets = {run.run.cell: run.run.record.data.sets for run in runs if not run.is_base}
    sets = sets or {runs[0].run.cell: data.sets}
    trained = sorted({of_run.train.rows for of_run in sets.values()})
    first = data.sets
    facts = [
        f"Model: {model.name}"
        + (f", revision {model.revision}" if model.revision else "")
        + f"; SHA-256 of its weights {model.sha256[:16]}…; computed in {model.precision}.",
        f"Data: {plain(data.origin)}, format {data.format}, template "
        f"{data.template.kind}; "
        f"{data.rows_available} rows in {data.groups} groups of related rows "
        f"({_relations(record)}; split version {data.split_version}).",
        f"Left out: {data.duplicates_dropped} exact duplicates, {data.bad_rows_skipped} "
        "malformed rows.",
        f"Sets: {first.test.rows} test rows ({first.test.tokens} tokens), "
        f"{first.validation.rows} validation rows, "
        + " and ".join(map(str, trained))
        + f" training rows; SHA-256 of the held-out tokens {data.held_out_sha256[:16]}….",
        *_cut_rows(runs),
        "Versions: " + ", ".join(f"{k} {v}" for k, v in record.versions.items()) + ".",
        f"Runs: {', '.join(f'`{run.run.folder.name}`' for run in runs)}.",
    ]
    again = (
        "The resolved recipe, every hash and every number are in `metrics.json`, the loss of every "
        "test row in `runs/*/scores.parquet`. Run folders end in a hash of recipe, rows and "
        "base. Command that writes this report from the run folders:"
    )
    command = f"slm-lora report results/{results.name}"
    if others := not_shown([run.run for run in runs], results):
        facts.append(plain(others))
    return "\n".join(f"- {fact}" for fact in facts) + f"\n\n{again}\n\n```\n{command}\n```"


def _relations(record: RunRecord) -> str:
    """What tied the rows: the recipe's relations, or what there was before a recipe named them."""
    named = {
        "group": "same named group",
        "prompt": "same prompt",
        "instruction": "same instruction",
        "context": "same context",
        "near": "nearly the same prompt",
    }
    chosen = record.recipe.data.group_by
    if chosen is not None:
        return (
            ", ".join(named.get(relation, relation) for relation in chosen)
            or "no relation: each row is its own group"
        )
    near = ", or nearly the same prompt" if record.data.split_version > 1 else ""
    return f"same instruction, context or named group{near}"


def _cut_rows(runs: Sequence[ScoredRun]) -> list[str]:
    counted = runs[0].run.record.data.long_rows
    if not counted.keys() & {"test", "all"}:
        return []
    which, test = ("test rows", counted["test"]) if "test" in counted else ("rows", counted["all"])
    if not test.rows:
        return []
    limit = runs[0].setting("data.max_length")
    if test.policy == "split":
        return [
            f"{test.rows} {which} were longer than {limit} tokens, and were split into pieces, "
            f"which count as rows here (the longest row had {test.longest} tokens)."
        ]
    return [
        f"{test.rows} {which} were longer than {limit} tokens ({test.policy}; "
        f"{test.tokens_cut} tokens cut, the longest row had {test.longest})."
    ]


def not_shown(runs: Sequence[Run], results: Path) -> str:
    """One line on finished runs in an experiment's folder besides these; else empty."""
    shown = {run.folder.name for run in runs}
    others = [path.name for path in run_folders(results / "runs") if path.name not in shown]
    if not others:
        return ""
    return (
        f"{len(others)} other finished run{'s' * (len(others) > 1)} in {results.name}/runs, not "
        f"in this table: {named(others)}. Running their recipe again writes their report, "
        "without training; slm-lora compare compares any two."
    )
