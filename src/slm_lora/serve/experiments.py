"""The experiments of a folder as `slm-lora watch` shows them: JSON values, read anew from disk.

A file that is missing, broken or half of another version leaves its values out and never fails.
"""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slm_lora.errors import IntegrityError
from slm_lora.runs.folder import METRICS_FILE, RUN_FILE, STEPS_FILE, parse_json
from slm_lora.runs.progress import (
    PROGRESS_FOLDER,
    ProgressRecord,
    is_running,
    read_plan,
    read_progress,
    thin,
)
from slm_lora.runs.replies import read_replies, replies_file
from slm_lora.runs.tuning import STOPPED_FILE, tuning_folder

BASE = "base"
REPORT_FILE, OUTPUTS_FILE = "report.html", "outputs.json"
_MARKS = ("runs", "tuning", PROGRESS_FOLDER, "checkpoints", METRICS_FILE, REPORT_FILE)
"""Files and folders of which an experiment's folder has at least one."""
MOST_PROMPTS, MOST_REPLIES, MOST_CHARACTERS = 50, 8, 4000
"""Limits of the replies shown."""


def is_experiment(folder: Path) -> bool:
    """Whether a folder holds an experiment's results."""
    return any((folder / mark).exists() for mark in _MARKS)


def folders(root: Path) -> dict[str, Path]:
    """The experiments' folders by name; the only ones that a request can name."""
    found = {}
    for folder in _children(root):
        # Names on disk need not be text.
        if folder.name.isprintable() and not folder.name.startswith("."):
            try:
                folder.name.encode()
                if folder.is_dir() and is_experiment(folder):
                    found[folder.name] = folder
            except (OSError, UnicodeEncodeError):
                continue
    return found


def summaries(root: Path) -> list[dict[str, Any]]:
    """All experiments: counts of cells, last change, whether there is a report."""
    entries = [_summary(name, folder) for name, folder in folders(root).items()]
    return sorted(entries, key=lambda entry: (not entry["running"], -entry["changed"]))


def details(name: str, folder: Path) -> dict[str, Any]:
    """One experiment: its summary, card, cells and replies."""
    return {
        **_summary(name, folder),
        "card": _card(folder),
        "cells": _cells(folder, "cell"),
        "tuning_cells": _cells(tuning_folder(folder), "tuning run"),
        "replies": [*_replies(folder), *_row_replies(folder)][:MOST_PROMPTS],
    }


def report_file(folder: Path) -> Path | None:
    """The experiment's report; None if there is none, or a link to somewhere else."""
    path = folder / REPORT_FILE
    inside = path.is_file() and path.resolve().is_relative_to(folder.resolve())
    return path if inside else None


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _summary(name: str, folder: Path) -> dict[str, Any]:
    now = time.time()
    live = [*read_progress(folder), *read_progress(tuning_folder(folder))]
    running = [record for record in live if is_running(record, now)]
    plan = read_plan(folder)
    names = _finished_cells(folder)
    if plan is not None:
        # Runs of an earlier recipe may lie there, too.
        names &= set(plan.runs or ())
    report = report_file(folder)
    return {
        "name": name,
        "description": plan.description if plan else "",
        "finished": len(names),
        "running": len(running),
        "total": plan.cells if plan else len(names),
        "tuning": len(_finished_cells(tuning_folder(folder)))
        + len(_stopped(tuning_folder(folder))),
        # Between two cells, and while rows and model are read, no cell runs.
        "active": bool(running) or (plan is not None and is_running(plan, now)),
        "unfinished": plan is not None,
        "changed": max([_changed(folder), *(record.updated for record in live)]),
        "report": _mtime(report) if report else None,
    }


def _finished_cells(results: Path) -> set[str]:
    """Names of the run folders, without the base's."""
    return {run["folder"] for run in _runs(results) if run["cell"] != BASE}


def _changed(folder: Path) -> float:
    """Time of the last change of a run, table or report."""
    paths = [folder / name for name in (METRICS_FILE, REPORT_FILE, OUTPUTS_FILE)]
    paths += [folder / "runs", tuning_folder(folder) / "runs"]
    times = [time_ for path in paths if (time_ := _mtime(path))]
    return max(times, default=_mtime(folder))


def _mtime(path: Path) -> float:
    """Time of a path's last change; 0 if it is not there."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _card(folder: Path) -> list[list[str]]:
    """Lines of the result: title and text."""
    metrics = _cached_json(folder / METRICS_FILE)
    facts = _mapping(_mapping(_mapping(metrics).get("card")).get("facts"))
    return [[title, text] for title, text in facts.items() if isinstance(text, str)]


def _cells(results: Path, kind: str) -> list[dict[str, Any]]:
    """Finished, stopped and running cells of a folder, those at work first."""
    finished = [{**run, "kind": kind} for run in _runs(results)]
    stopped = [{**run, "kind": kind} for run in _stopped(results)]
    done = {cell["folder"] for cell in (*finished, *stopped)}
    now = time.time()
    live = [
        {**_live_cell(record, is_running(record, now)), "kind": kind}
        for record in read_progress(results)
        if f"{record.cell}-{record.hash[:8]}" not in done
    ]
    return [*live, *finished, *stopped]


def _live_cell(record: ProgressRecord, running: bool) -> dict[str, Any]:
    return {
        "cell": record.cell,
        "folder": f"{record.cell}-{record.hash[:8]}",
        "state": record.phase if running else "not running",
        "step": record.step,
        "total_steps": record.total_steps,
        "loss": record.loss,
        "tokens_per_s": record.tokens_per_s,
        "seconds_left": record.seconds_left if running else None,
        "updated": record.updated,
        "curve": [list(point) for point in record.curve],
    }


def _runs(results: Path) -> list[dict[str, Any]]:
    """Finished runs of a folder."""
    runs = []
    for folder in _children(results / "runs"):
        run = _cached_json(folder / RUN_FILE)
        if not isinstance(run, Mapping) or not isinstance(run.get("cell"), str):
            continue
        evaluation = _mapping(run.get("evaluation"))
        headline = evaluation.get("headline")
        loss = _mapping(evaluation.get(headline) if isinstance(headline, str) else None)
        training = _mapping(run.get("training"))
        runs.append(
            {
                "cell": run["cell"],
                "folder": folder.name,
                "state": "finished",
                "step": _number(training.get("steps")),
                "total_steps": _number(training.get("steps")),
                "loss": _number(training.get("last_step_loss")),
                "held_out_loss": _number(loss.get("loss")),
                "perplexity": _number(loss.get("perplexity")),
                "tokens_per_s": _number(training.get("tokens_per_s")),
                "curve": _curve(folder / STEPS_FILE),
            }
        )
    return runs


def _stopped(results: Path) -> list[dict[str, Any]]:
    """Tuning runs that were stopped before their end."""
    stopped = []
    for folder in _children(results / "stopped"):
        record = _cached_json(folder / STOPPED_FILE)
        if not isinstance(record, Mapping) or not isinstance(record.get("cell"), str):
            continue
        curve = _curve(folder / STEPS_FILE)
        stopped.append(
            {
                "cell": record["cell"],
                "folder": folder.name,
                "state": "stopped",
                "reason": str(record.get("reason", ""))[:300],
                "step": curve[-1][0] if curve else None,
                "loss": curve[-1][1] if curve else None,
                "curve": curve,
            }
        )
    return stopped


def _replies(folder: Path) -> list[dict[str, Any]]:
    """Replies of all models to the same prompts, from outputs.json."""
    outputs = _cached_json(folder / OUTPUTS_FILE)
    prompts = outputs.get("prompts") if isinstance(outputs, Mapping) else None
    entries = []
    for entry in prompts[:MOST_PROMPTS] if isinstance(prompts, list) else []:
        try:
            entries.append(
                {
                    "prompt": _text(entry["prompt"]),
                    "reference": _text(entry["reference"]),
                    "answers": [
                        {
                            "variant": _text(answer["variant"]),
                            "text": _text(answer["greedy"]),
                            "loss": _number(answer.get("loss")),
                        }
                        for answer in entry["answers"]
                    ],
                }
            )
        except (KeyError, TypeError, AttributeError):
            continue
    return entries


def _row_replies(folder: Path) -> list[dict[str, Any]]:
    """Replies of the runs to the same test rows, whose texts their files do not hold."""
    runs = {run["folder"]: run["cell"] for run in _runs(folder)}
    first = sorted(runs, key=lambda name: (runs[name] != BASE, name))
    files = [(runs[name], replies_file(folder / "runs" / name)) for name in first]
    answers: dict[str, list[dict[str, Any]]] = {}
    for cell, path in [(cell, path) for cell, path in files if path.is_file()][:MOST_REPLIES]:
        for row, reply in _of_version(_read_row_replies, path) or ():
            answers.setdefault(row, []).append({"variant": cell, "text": reply, "loss": None})
    return [
        {"prompt": f"Test row {row[:12]}", "reference": "", "answers": entries}
        for row, entries in itertools.islice(answers.items(), MOST_PROMPTS)
    ]


def _text(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) < 1e15 else None


def _cached_json(path: Path) -> Any:
    """The content of a file, parsed once per version of it; None if it cannot be read."""
    return _of_version(_read_json, path)


def _curve(path: Path) -> list[list[float]]:
    """Pairs of step and training loss of steps.jsonl."""
    return _of_version(_read_curve, path) or []


def _of_version(read: Any, path: Path) -> Any:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return read(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=4096)
def _read_json(path: Path, mtime_ns: int, size: int) -> Any:
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@functools.lru_cache(maxsize=4096)
def _read_curve(path: Path, mtime_ns: int, size: int) -> list[list[float]]:
    try:
        return [list(point) for point in thin(list(_losses(path)))]
    except (OSError, ValueError):
        return []


@functools.lru_cache(maxsize=256)
def _read_row_replies(path: Path, mtime_ns: int, size: int) -> list[tuple[str, str]]:
    try:
        _, replies = read_replies(path) or (None, [])
        first = [(reply.row, _text(reply.reply)) for reply in replies[:MOST_PROMPTS]]
        json.dumps(first, ensure_ascii=False).encode()
    except (IntegrityError, UnicodeEncodeError):
        return []
    return first


def _losses(path: Path) -> Iterator[tuple[float, float]]:
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            step = _mapping(parse_json(line))
            number, loss = _number(step.get("step")), _number(step.get("loss"))
            if number is not None and loss is not None:
                yield number, loss
