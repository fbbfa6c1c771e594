"""Metrics beyond losses: stored beside the scores, compared like losses, in their own direction."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from slm_lora.errors import IntegrityError
from slm_lora.records import RowScore
from slm_lora.report.card import gap, make_card
from slm_lora.report.names import SettingNames
from slm_lora.report.summary import metrics_table
from slm_lora.report.write import write_report
from slm_lora.runs import metrics
from slm_lora.runs.folder import read_run, run_folders
from slm_lora.runs.metrics import METRICS, Metric, row_value
from slm_lora.runs.scored_run import ScoredRun
from slm_lora.runs.scores import read_scores, write_scores
from slm_lora.stats.comparisons import all_comparisons
from slm_lora.stats.estimates import estimate, paired
from slm_lora.stats.inference import difference
from slm_lora.stats.settings import Setting, group_settings

from ..support.runs import scored_run

COMMITTED = Path(__file__).parents[2] / "results" / "smollm2-dolly" / "runs"
MATCH = Metric(
    name="exact_match",
    title="Exact match",
    scope="the replies",
    unit="share of rows",
    parts=row_value("exact_match"),
    higher_is_better=True,
)


@pytest.fixture
def with_match(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(metrics.METRICS, "exact_match", MATCH)


def matched(run: ScoredRun, share: int) -> ScoredRun:
    """The run with an exact match in ``share`` of every ten rows, as its headline."""
    scores = tuple(
        replace(score, values={"exact_match": (float(index % 10 < share), 1.0)})
        for index, score in enumerate(run.scores)
    )
    return replace(run, scores=scores, headline="exact_match")


def test_score_values_are_written_and_read_back(tmp_path: Path) -> None:
    scores = list(matched(scored_run("r8", 2.0), 3).scores)
    write_scores(scores, tmp_path / "scores.parquet")
    assert read_scores(tmp_path / "scores.parquet") == scores


def test_scores_without_values_have_the_fixed_columns(tmp_path: Path) -> None:
    write_scores(scored_run("r8", 2.0).scores, tmp_path / "scores.parquet")
    assert pq.read_schema(tmp_path / "scores.parquet").names == [
        "row_id", "group_id", "category", "split", "nll_all", "tokens_all", "bytes_all",
        "nll_response", "tokens_response", "bytes_response",
    ]  # fmt: skip


@settings(deadline=None)
@given(
    st.dictionaries(
        st.text("abc", min_size=1, max_size=3),
        st.tuples(st.floats(0, 9), st.floats(0, 9)),
        max_size=3,
    )
)
def test_any_score_values_survive_a_round_trip(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, tuple[float, float]]
) -> None:
    score = replace(scored_run("r8", 2.0).scores[0], values=values)
    path = tmp_path_factory.mktemp("scores") / "scores.parquet"
    write_scores([score], path)
    assert read_scores(path) == [score]


def test_highest_value_is_recommended_where_higher_is_better(with_match: None) -> None:
    runs = [
        matched(scored_run("base", 3.0), 1),
        matched(scored_run("r4", 2.0, adapter__r=4), 5),
        matched(scored_run("r8", 1.0, adapter__r=8), 3),  # the lower loss, the fewer matches
    ]
    runs[1:] = [_with_steps(run) for run in runs[1:]]
    settings = group_settings(runs)
    comparisons = all_comparisons(runs)
    names = SettingNames(settings)
    card = make_card(settings, [Setting((runs[0],))], comparisons, 0.01, names)
    assert card.recommended is not None and card.recommended.name == "r4"
    facts = {fact.label: fact.text for fact in card.facts}
    assert facts["Recommended"].startswith("r=4 (exact match 0.5000): the highest exact match")
    assert facts["Against the base"].startswith("0.1000 → 0.5000, +0.4000")
    assert "significantly higher across" in facts["Against the base"]
    assert card.gaps[0].value == pytest.approx(-0.2)


def _with_steps(run: ScoredRun) -> ScoredRun:
    """Without files: no training to read steps from."""
    from types import SimpleNamespace

    stand_in = SimpleNamespace(
        record=run.run.record, raw=run.run.raw, cell=run.run.cell, folder=run.run.folder, steps=list
    )
    return replace(run, run=stand_in)  # type: ignore[arg-type]


def test_metric_difference_has_the_interval_of_the_bootstrap(with_match: None) -> None:
    first, second = (matched(scored_run(name, 2.0), share) for name, share in (("a", 3), ("b", 7)))
    sample = paired([(first.scores, second.scores)], MATCH)
    result = difference(sample, 0.01)
    assert result.value == pytest.approx(0.4)
    changes = [b.values["exact_match"][0] - a.values["exact_match"][0]
               for a, b in zip(first.scores, second.scores, strict=True)]  # fmt: skip
    exact = stats.bootstrap((changes,), lambda x, axis: x.mean(axis), vectorized=True,
                            n_resamples=9_999, method="BCa", rng=1).confidence_interval  # fmt: skip
    assert (result.low, result.high) == pytest.approx((exact.low, exact.high), abs=0.03)
    assert MATCH.is_better(result.value) and not METRICS["all"].is_better(result.value)


def test_rows_without_the_value_are_left_out_of_estimates(with_match: None) -> None:
    run = matched(scored_run("r8", 2.0), 10)
    missing = tuple(
        replace(score, values={}) if index < 30 else score for index, score in enumerate(run.scores)
    )
    assert estimate([missing], MATCH).groups == 10
    assert estimate([missing], MATCH).value == 1.0


def test_metrics_table_shows_only_metrics_of_every_run(with_match: None) -> None:
    runs = [matched(scored_run("base", 3.0), 1), _with_steps(matched(scored_run("r8", 2.0), 4))]
    settings = group_settings(runs)
    card = make_card(settings, [], [], 0.01, SettingNames(settings))
    table = metrics_table(card, settings, [Setting((runs[0],))], SettingNames(settings))
    assert "Exact match, share of rows ↑" in table
    assert "LoRA r=8 vs base" in table and "+0.3000" in table
    without = [replace(runs[0], scores=scored_run("base", 3.0).scores), runs[1]]
    table = metrics_table(card, settings, [Setting((without[0],))], SettingNames(settings))
    assert "Exact match" not in table


def test_bits_per_byte_is_nats_over_ln_2_and_bytes() -> None:
    rows = [RowScore("a", "a", "", "test", 3.0, 5, 4, 1.0, 2, 2)]
    assert estimate([rows], METRICS["bits_per_byte"]).value == pytest.approx(3 / math.log(2) / 4)


def test_gap_is_measured_in_the_requested_metric(with_match: None) -> None:
    first, second = (
        matched(scored_run(name, 2.0), share) for name, share in (("base", 2), ("r8", 6))
    )
    result = gap(Setting((first,)), Setting((second,)), MATCH)
    assert result is not None and result.value == pytest.approx(0.4)


@pytest.fixture
def results(tmp_path: Path, with_match: None) -> Path:
    """Committed runs whose rows also have an exact match: the loss below two nats."""
    shutil.copytree(COMMITTED, tmp_path / "runs")
    for folder in run_folders(tmp_path / "runs"):
        path = folder / "scores.parquet"
        rows = read_scores(path)
        write_scores([replace(row, values={"exact_match": _match(row)}) for row in rows], path)
    return tmp_path


def _match(row: RowScore) -> tuple[float, float]:
    return float(row.nll_all < 2 * row.tokens_all), 1.0


def test_further_metric_is_compared_in_report_and_metrics_json(results: Path) -> None:
    analysis = write_report([read_run(folder) for folder in run_folders(results / "runs")], results)
    (pairs,) = analysis.other_metrics
    assert [pair.key for pair in pairs] == [pair.key for pair in analysis.comparisons]
    assert all(pair.metric is MATCH and pair.verdict != "equivalent" for pair in pairs)
    scores = [read_scores(folder / "scores.parquet") for folder in run_folders(results / "runs")]
    shares = [sum(_match(row)[0] for row in rows) / len(rows) for rows in scores]
    assert pairs[0].second.estimate().value in shares
    record = json.loads((results / "metrics.json").read_text())["other_metrics"]["exact_match"]
    assert [pair["verdict"] for pair in record] == [pair.verdict for pair in pairs]
    report = (results / "report.md").read_text()
    assert "### Exact match\n\nOver the replies; higher is better." in report
    assert "| First minus second | Exact match difference, share of rows (95 %) |" in report


def test_report_names_runs_without_the_further_metric(results: Path) -> None:
    (base,) = (results / "runs").glob("base-*")
    path = base / "scores.parquet"
    write_scores([replace(row, values={}) for row in read_scores(path)], path)
    runs = [read_run(folder) for folder in run_folders(results / "runs")]
    analysis = write_report(runs, results)
    assert {pair.key for pair in analysis.other_metrics[0]} == {"adapter.r", "data.size"}
    assert (
        f"Exact match is not in {base.name}, scored before" in (results / "report.md").read_text()
    )


def test_further_metric_as_headline_decides_the_recommendation(results: Path) -> None:
    runs = [read_run(folder) for folder in run_folders(results / "runs")]
    analysis = write_report(runs, results, headline="exact_match")
    assert analysis.card.recommended is not None
    best = max(analysis.settings, key=lambda setting: setting.estimate().value)
    assert analysis.card.lowest is best
    assert "Exact match (share of rows) is computed on" in (results / "report.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nll_all": float("nan")}, "row 00 has a score that is no finite number"),
        ({"nll_all": None}, "row 00 has a score that is no finite number"),
        ({"tokens_all": None}, "row 00 has no counts of tokens and bytes"),
        ({"row_id": "01"}, "row 01 is there twice"),
    ],
)
def test_broken_score_file_is_refused_by_row(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "scores.parquet"
    write_scores(scored_run("r8", 2.0).scores, path)
    rows = pq.read_table(path).to_pylist()
    rows[0] |= change
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(IntegrityError, match=message):
        read_scores(path)
