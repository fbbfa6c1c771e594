"""Files of task results: read as written, refused when changed; metrics of documents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from slm_lora.config.conditions import parse_condition
from slm_lora.config.tasks import TasksSection
from slm_lora.errors import IntegrityError
from slm_lora.report.reply_facts import reply_facts
from slm_lora.runs.metrics import METRICS
from slm_lora.runs.scored_run import ScoredRun, has_metric
from slm_lora.runs.tasks import (
    DocumentResult,
    TaskMetricRecord,
    read_documents,
    read_task,
    task_file,
    write_task,
)
from slm_lora.stats.comparisons import all_comparisons
from slm_lora.stats.settings import Setting
from slm_lora.stats.ship import judge

from ..support.runs import scored_run

METRICS_OF_TASK = {
    "acc": TaskMetricRecord(higher_is_better=True, unit="mean over documents"),
    "nats": TaskMetricRecord(higher_is_better=False, unit="nats"),
}


def documents(hits: int) -> list[DocumentResult]:
    """60 documents, the first ones right; the last two are equal, and have no ``nats``."""
    return [
        DocumentResult(
            "part", number, f"{min(number, 58):064d}", [[-1.5, True], "text\u2028 of a line"],
            {"acc": (float(number < hits), 1.0)}
            | ({"nats": (2.0 * number, 10.0)} if number < 58 else {}),
        )
        for number in range(60)
    ]  # fmt: skip


def written(folder: Path, name: str, hits: int) -> Path:
    path = task_file(folder / "runs" / name, "toy")
    write_task(path, name * 2, "toy", {"limit": None}, METRICS_OF_TASK, documents(hits))
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[ScoredRun, ScoredRun]:
    runs = []
    for name, hits in (("base", 20), ("r2", 50)):
        written(tmp_path, name, hits)
        own = read_documents(tmp_path / "runs" / name, name * 2)
        runs.append(replace(scored_run(name, 2.0), documents=own))
    return runs[0], runs[1]


def test_results_are_read_as_written(tmp_path: Path) -> None:
    path = written(tmp_path, "base", 7)
    there = read_task(path)
    assert there is not None
    assert there[1] == documents(7)
    assert (there[0].run, there[0].task, there[0].metrics) == ("basebase", "toy", METRICS_OF_TASK)
    assert read_task(path.with_name("other.jsonl")) is None


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"acc": [0.0,', '"acc": [1.0,', "SHA-256"),
        ('"format":1', '"format":2', "format 2, not 1"),
        ('"unit":"nats"', '"unit":3', "broken"),
        ('"basebase"', '"r2r2"', "of another run or task"),
    ],
)
def test_changed_results_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = written(tmp_path, "base", 7)
    whole = path.read_text(encoding="utf-8")
    assert old in whole
    path.write_text(whole.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(IntegrityError, match=message):
        read_documents(tmp_path / "runs" / "base", "basebase")


def test_document_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "toy.jsonl"
    write_task(path, "r", "toy", {}, METRICS_OF_TASK, [documents(1)[0], documents(1)[0]])
    with pytest.raises(IntegrityError, match="a document twice"):
        read_task(path)


def test_documents_are_compared_in_pairs(pair: tuple[ScoredRun, ScoredRun]) -> None:
    base, tuned = pair
    metric = METRICS["toy.acc"]
    assert has_metric(base, metric)
    assert not has_metric(scored_run("base", 2.0), metric)
    assert Setting((base,)).estimate(metric).value == pytest.approx(20 / 60)
    assert Setting((base,)).estimate().value == pytest.approx(2.0)
    nats = Setting((base,)).estimate(METRICS["toy.nats"])
    assert (nats.value, nats.groups) == (pytest.approx(sum(range(58)) * 2 / 580), 58)
    (comparison,) = all_comparisons([replace(run, headline="toy.acc") for run in pair])
    assert comparison.difference.value == pytest.approx(30 / 60)
    assert comparison.difference.groups == 59, "equal documents are one group"
    assert comparison.verdict == "different"
    (fact,) = reply_facts(Setting((base,)), Setting((tuned,)))
    assert fact.label == "Tasks"
    assert fact.text.startswith("better than the base's: toy.acc 0.333 → 0.833 (+0.3")
    assert fact.text.endswith("no clear difference: toy.nats.")


def test_conditions_on_tasks(pair: tuple[ScoredRun, ScoredRun]) -> None:
    base, tuned = (Setting((run,)) for run in pair)
    texts = ("toy.acc > 0.6", "gain:toy.acc > 0.6", "gain:toy.acc > 0.49", "toy.nats < 5")
    judged = judge(tuned, base, [parse_condition(text) for text in texts])
    assert [each.value for each in judged[:3]] == [pytest.approx(v) for v in (50 / 60, 0.5, 0.5)]
    assert [each.measurement.rows for each in judged] == [60, 60, 60, 58]
    assert judged[0].state == "met"
    assert judged[2].hint().endswith(" documents of toy")
    assert judged[0].measurement.limits == (0.0, 1.0)


def test_names_of_the_section() -> None:
    assert TasksSection(names=("arc_easy", "own.yaml")).limit is None
    for names in ((), ("",), ("a", "a")):
        with pytest.raises(ValueError, match=r"task|name"):
            TasksSection(names=names)
