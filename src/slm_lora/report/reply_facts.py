"""Whether replies and tasks of the recommended setting improved as its loss did, a line each."""

from __future__ import annotations

from collections.abc import Sequence

from slm_lora.report.blocks import Fact
from slm_lora.runs.judge import WIN_RATE
from slm_lora.runs.metrics import METRICS, OF_REPLIES, Metric
from slm_lora.runs.scored_run import has_metric
from slm_lora.stats.inference import interval
from slm_lora.stats.settings import Setting, pair_runs, sample_of


def reply_facts(base: Setting, recommended: Setting) -> list[Fact]:
    """Metrics of replies and of tasks, recommended setting against the base, at 95 % each: which
    are better, worse, and neither; no line for what was not measured of both."""
    metrics = [metric for metric in METRICS.values() if metric.compared]
    of_replies = [metric for metric in metrics if metric.scope == OF_REPLIES]
    of_tasks = [metric for metric in metrics if metric.task]
    return [
        *_facts("Replies", of_replies, base, recommended),
        *_judge_fact(base, recommended),
        *_facts("Tasks", of_tasks, base, recommended),
    ]


def _facts(name: str, metrics: Sequence[Metric], base: Setting, recommended: Setting) -> list[Fact]:
    better: list[str] = []
    worse: list[str] = []
    unclear: list[str] = []
    for metric in metrics:
        if not all(has_metric(run, metric) for run in (*base.runs, *recommended.runs)):
            continue
        sample = sample_of(pair_runs(base, recommended), metric)
        low, high = interval(sample, 0.95)
        title = _in_text(metric)
        if not (low > 0 or high < 0):
            unclear.append(title)
            continue
        before, after = base.estimate(metric).value, recommended.estimate(metric).value
        text = f"{title} {before:.3f} → {after:.3f} ({low:+.3f} to {high:+.3f})"
        (better if metric.is_better(sample.value) else worse).append(text)
    if not (better or worse or unclear):
        return []
    parts = [
        *(["better than the base's: " + "; ".join(better)] if better else []),
        *(["WORSE than the base's: " + "; ".join(worse)] if worse else []),
        *(["no clear difference: " + ", ".join(unclear)] if unclear else []),
    ]
    return [Fact(name, "; ".join(parts) + ".", "metrics")]


def _judge_fact(base: Setting, recommended: Setting) -> list[Fact]:
    """The win rate, which is a comparison with the base by itself; empty without a judge."""
    metric = METRICS[WIN_RATE]
    if not all(has_metric(run, metric) for run in (*base.runs, *recommended.runs)):
        return []
    low, high = interval(sample_of(pair_runs(base, recommended), metric), 0.95)
    verdict = "better" if low > 0 else "WORSE" if high < 0 else ""
    return [
        Fact(
            "Judge",
            f"replies win {recommended.estimate(metric).value:.3f} against the base's "
            f"({max(0.0, 0.5 + low):.3f} to {min(1.0, 0.5 + high):.3f}; 0.5 is even)"
            + (f": {verdict}." if verdict else ": no clear difference."),
            "judge",
        )
    ]


def _in_text(metric: Metric) -> str:
    """The title within a sentence: names such as ROUGE-L, and those of tasks, keep their
    capitals."""
    title = metric.title
    return title if metric.task else title[0].lower() + title[1:] if title[1:2].islower() else title
