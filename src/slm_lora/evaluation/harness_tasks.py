"""Tasks of lm-evaluation-harness: found by name or file, checked, and evaluated per document."""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from slm_lora.config.tasks import TasksSection
from slm_lora.errors import DataError, UsageError
from slm_lora.runs.tasks import DocumentResult, TaskMetricRecord

if TYPE_CHECKING:
    from slm_lora.evaluation.harness_model import HarnessModel

_SEEDS = (0, 1234)
"""Of `random`, and of NumPy, PyTorch and few-shot examples: the defaults of ``lm_eval``."""
_YAML = (".yaml", ".yml")
_WHERE = ("metadata", "dataset_path", "dataset_name", "dataset_kwargs")
"""Keys of a task that say where its documents are; these are hashed themselves."""


@dataclass(frozen=True)
class HarnessMetric:
    """A metric of a task.

    Attributes:
        key: name in lm-eval's results.
        filter: of the responses, before it is computed.
        record: direction and unit.
    """

    key: str
    filter: str
    record: TaskMetricRecord


@dataclass(frozen=True)
class HarnessTask:
    """A task, or a group or tag whose documents are taken together.

    Attributes:
        name: in files and in names of metrics.
        leaves: lm-eval's tasks, by name.
        metrics: by their names after that of the task.
        left_out: metrics that are no ratio of sums over documents.
        documents: their number, of all leaves.
        requests: to the model, likewise.
        digest: SHA-256 of all documents, requests, targets, metrics and filters.
    """

    name: str
    leaves: Mapping[str, Any]
    metrics: Mapping[str, HarnessMetric]
    left_out: tuple[str, ...]
    documents: int
    requests: int
    digest: str


def harness_version() -> str:
    """Version of lm-eval.

    Raises:
        UsageError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UsageError("tasks: needs lm-eval: pip install 'slm-lora[tasks]'")
    from importlib.metadata import version

    return version("lm_eval")


def load_tasks(section: TasksSection) -> list[HarnessTask]:
    """All tasks of a recipe, with their documents.

    Raises:
        UsageError: lm-eval is not installed, a task does not exist or cannot be read, or is not
            supported.
        DataError: documents cannot be loaded.
    """
    harness_version()
    tasks: dict[str, HarnessTask] = {}
    with _seeded(), _quiet():
        for name, leaves in _found(section.names):
            safe = _safe(name)
            if safe in tasks:
                raise UsageError(f"tasks.names: two tasks have the name {safe}")
            tasks[safe] = _checked(safe, leaves, section)
    return list(tasks.values())


def evaluate_task(
    task: HarnessTask, model: HarnessModel, section: TasksSection
) -> list[DocumentResult]:
    """Responses of a model to all documents of a task, and their values."""
    from lm_eval.evaluator import evaluate

    for leaf in task.leaves.values():
        leaf.set_fewshot_seed(seed=_SEEDS[1])
    with _seeded(), _quiet():
        output = evaluate(
            lm=model,
            task_dict={"tasks": dict(task.leaves)},
            limit=section.limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=section.training_template,
            fewshot_as_multiturn=True,
        )
    results = []
    for leaf, samples in output["samples"].items():
        by_document: dict[int, list[Mapping[str, Any]]] = {}
        for sample in samples:
            by_document.setdefault(sample["doc_id"], []).append(sample)
        for document, own in by_document.items():
            responses = [
                answers[0] if len(answers) == 1 else answers for answers in own[0]["resps"]
            ]
            values = _values(task.metrics, own)
            results.append(DocumentResult(leaf, document, own[0]["doc_hash"], responses, values))
    return results


def _values(
    metrics: Mapping[str, HarnessMetric], samples: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[float, float]]:
    """Numerators and denominators from lm-eval's samples of one document, one per filter."""
    values = {}
    by_filter = {sample["filter"]: sample for sample in samples}
    for name, metric in metrics.items():
        value = by_filter.get(metric.filter, {}).get(metric.key)
        if isinstance(value, tuple | list) and metric.key == "bits_per_byte":
            nats, size = map(float, value)
            values[name] = (-nats / math.log(2), size)
        elif isinstance(value, bool | int | float | np.number) and math.isfinite(value):
            values[name] = (float(value), 1.0)
    return values


def _found(names: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Names of tasks, and lm-eval's tasks behind each."""
    for name in names:
        path = Path(name).expanduser()
        is_path = len(path.parts) > 1 or path.suffix in _YAML
        # A folder of data may have the name of its task.
        if path.is_dir() and (is_path or any(path.rglob("*.yaml"))):
            yield from _of_folder(path)
        elif is_path:
            yield _of_file(path)
        else:
            yield name, _loaded(_registry(), name, f"tasks.names: {name}")


@functools.cache
def _registry() -> Any:
    """All tasks that lm-eval has; takes a quarter of a minute."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _of_file(path: Path) -> tuple[str, Mapping[str, Any]]:
    from lm_eval.tasks import TaskManager

    config = _config(path)
    name = config.get("group", config.get("task"))
    if not isinstance(name, str):
        raise UsageError(f"tasks.names: {path}: has no key `task` or `group` with a name")
    members = config.get("task") if "group" in config else None
    if not isinstance(members, list):
        manager = TaskManager(include_defaults=False)
        return name, _loaded(manager, str(path), f"tasks.names: {path}")
    manager = TaskManager(include_path=[path.parent], include_defaults=False)
    names = {member.get("task") if isinstance(member, dict) else member for member in members}
    if not names <= {None, *manager.all_tasks}:  # some are lm-eval's own
        manager = TaskManager(include_path=[path.parent])
    if unknown := sorted(map(str, names - {None, *manager.all_tasks})):
        raise UsageError(f"tasks.names: {path}: no such task: {unknown[0]}")
    return name, _loaded(manager, name, f"tasks.names: {path}")


def _of_folder(folder: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    from lm_eval.tasks import TaskManager

    for path in sorted(path for path in folder.rglob("*.yaml")):
        _config(path)  # lm-eval leaves out a file that it cannot read
    manager = TaskManager(include_path=[folder], include_defaults=False)
    if not manager.all_subtasks:
        raise UsageError(f"tasks.names: {folder}: no task file (.yaml) with a task in it")
    for name in manager.all_subtasks:
        yield name, _loaded(manager, name, f"tasks.names: {folder}: {name}")


def _config(path: Path) -> Mapping[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        config: Mapping[str, Any] = load_yaml(path, resolve_func=False)
    except FileNotFoundError as error:
        missing = Path(error.filename or path)
        raise UsageError(f"tasks.names: {path}: no such file: {missing.name}") from error
    except Exception as error:  # of YAML and of lm-eval
        raise UsageError(f"tasks.names: {path}: is no task file: {_reason(error)}") from error
    _require_known_metrics(path, config)
    return config


def _require_known_metrics(path: Path, config: Mapping[str, Any]) -> None:
    """Raise UsageError for a metric that lm-eval would look up on the hub without being told to."""
    from lm_eval.api.registry import metric_registry

    importlib.import_module("lm_eval.api.metrics")  # registers them
    metrics = config.get("metric_list") or []
    if "process_results" in config or not isinstance(metrics, list):
        return
    for metric in metrics:
        name = metric.get("metric") if isinstance(metric, dict) else metric
        hub = isinstance(metric, dict) and metric.get("hf_evaluate") is True
        # A function is written as its path.
        if isinstance(name, str) and not hub and "/" not in name and name not in metric_registry:
            raise UsageError(
                f"tasks.names: {path}: lm-eval has no metric {name!r:.40} (one of the library "
                "evaluate needs hf_evaluate: true)"
            )


def _loaded(manager: Any, spec: str, where: str) -> Mapping[str, Any]:
    """lm-eval's tasks of a specification, with their data sets."""
    if spec not in manager.all_tasks and Path(spec).suffix not in _YAML:
        near = difflib.get_close_matches(spec, manager.all_tasks, n=3, cutoff=0.7)
        hint = f"; near it: {', '.join(near)}" if near else " (`lm_eval ls tasks` lists them)"
        raise UsageError(f"{where}: lm-eval {harness_version()} has no such task{hint}")
    try:
        tasks: Mapping[str, Any] = manager.load([spec])["tasks"]
    except Exception as error:  # of lm-eval, datasets, and code of the task
        raise DataError(f"{where}: cannot be loaded: {_reason(error)}") from error
    if not tasks:
        raise UsageError(f"{where}: a group without tasks")
    return tasks


def _checked(name: str, leaves: Mapping[str, Any], section: TasksSection) -> HarnessTask:
    """A task whose requests can be built and whose metrics can be compared."""
    from lm_eval.evaluator_utils import get_sample_size

    metrics: dict[str, HarnessMetric] = {}
    left_out: dict[str, None] = {}
    digest = hashlib.sha256()
    documents = requests = 0
    for leaf, task in leaves.items():
        _refuse_unsupported(leaf, task)
        _set_fewshot(task, section.num_fewshot)
        own, others = _metrics(task)
        metrics |= own
        left_out |= dict.fromkeys(others)
        try:
            task.build_all_requests(limit=get_sample_size(task, section.limit))
            targets = {
                request.doc_id: task.doc_to_target(request.doc) for request in task.instances
            }
        except Exception as error:  # code of the task
            raise DataError(f"tasks: {leaf}: its questions fail: {_reason(error)}") from error
        documents += len(targets)
        requests += sum(request.repeats or 1 for request in task.instances)
        config = {key: own for key, own in task.dump_config().items() if key not in _WHERE}
        asked = [[request.doc, request.args] for request in task.instances]
        text = json.dumps([leaf, config, asked, targets], default=_as_text, sort_keys=True)
        digest.update(text.encode("utf-8", "surrogatepass"))
    if not metrics:
        listed = ", ".join(left_out) or "none"
        raise UsageError(f"tasks: {name}: none of its metrics is a mean over documents ({listed})")
    return HarnessTask(
        name, leaves, metrics, tuple(left_out), documents, requests, digest.hexdigest()
    )


def _refuse_unsupported(leaf: str, task: Any) -> None:
    from slm_lora.evaluation.harness_model import sampling_of

    if getattr(task, "UNSAFE_CODE", False):
        raise UsageError(f"tasks: {leaf}: runs code that a model writes; not supported")
    if getattr(task, "MULTIMODAL", False):
        raise UsageError(f"tasks: {leaf}: asks for images or sounds; not supported")
    if task.OUTPUT_TYPE == "generate_until":
        try:
            sampling_of(task.get_config("generation_kwargs") or {})
        except UsageError as error:
            raise UsageError(f"tasks: {leaf}: {error}") from error


def _set_fewshot(task: Any, count: int | None) -> None:
    """As `lm_eval.simple_evaluate` does."""
    own = task.get_config("num_fewshot")
    if count is not None and own != 0:
        task.set_config(key="num_fewshot", value=count)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_SEEDS[1])


def _metrics(task: Any) -> tuple[dict[str, HarnessMetric], list[str]]:
    """Metrics by name, and those that are no ratio of sums over documents."""
    from lm_eval.api.registry import get_aggregation

    means = [get_aggregation(name) for name in ("mean", "nanmean")]
    ratio = get_aggregation("bits_per_byte")
    filters = [entry["name"] for entry in task.get_config("filter_list") or [{"name": "none"}]]
    metrics, left_out = {}, []
    for key, aggregation in task.aggregation().items():
        higher = task.higher_is_better().get(key)
        is_ratio = aggregation is ratio and key == "bits_per_byte"
        if higher is None or not (is_ratio or aggregation in means):
            left_out.append(key)
            continue
        unit = "bits per UTF-8 byte" if is_ratio else "mean over documents"
        record = TaskMetricRecord(higher_is_better=bool(higher), unit=unit)
        for own in filters:
            name = _safe(key if len(filters) == 1 else f"{key}.{own}")
            metrics[name] = HarnessMetric(key, own, record)
    return metrics, left_out


def _safe(name: str) -> str:
    """A name that conditions of `slm-lora verdict` and file systems take."""
    text = re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)
    return text if re.match(r"[A-Za-z_]", text) else f"_{text}"


def _as_text(value: object) -> str:
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Random numbers as of the ``lm_eval`` command within the block; those of before after it."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(_SEEDS[0])
        np.random.seed(_SEEDS[1])
        torch.manual_seed(_SEEDS[1])
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No bars of lm-eval and datasets, no warnings of lm-eval, and no count of a load, which
    datasets sends out even for a local file."""
    import datasets
    import lm_eval.api.task as module

    bar, counts = module.tqdm, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    module.tqdm = functools.partial(bar, disable=True)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        module.tqdm, datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = bar, counts
        if shown:
            datasets.enable_progress_bars()
