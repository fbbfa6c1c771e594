"""Metrics of a reply against the reference of its row: numbers per row."""

from __future__ import annotations

import functools
import importlib
import json
import math
import re
import string
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slm_lora.config.replies import RepliesSection
from slm_lora.errors import UsageError

ReplyMetric = Callable[[str, str, str], float | None]
"""Prompt, reply and reference → value; None leaves the row out."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?\.?\d+(?:[eE][-+]?\d+)?")


def reply_metrics(section: RepliesSection) -> dict[str, ReplyMetric]:
    """The metrics of a recipe, by name.

    Raises:
        UsageError: a library, file, module or function is missing.
    """
    metrics: dict[str, ReplyMetric] = {name: _METRICS[name]() for name in section.metrics}
    if section.labels:
        metrics["label"] = functools.partial(_label, labels=tuple(map(normalised, section.labels)))
    if section.pattern is not None:
        pattern = re.compile(section.pattern)
        metrics["pattern"] = lambda prompt, reply, reference: float(bool(pattern.search(reply)))
    if section.json_schema is not None:
        metrics["json_schema"] = _json_schema(Path(section.json_schema))
    for name, target in section.functions.items():
        metrics[name] = _own_function(name, target)
    return metrics


def normalised(text: str) -> str:
    """Text without case, punctuation and repeated spaces, as for SQuAD (Rajpurkar et al. 2016), but
    with articles, which are English."""
    text = unicodedata.normalize("NFKC", text).casefold().translate(_PUNCTUATION)
    return " ".join(text.split())


def exact_match(prompt: str, reply: str, reference: str) -> float:
    """Whether reply and reference are equal when `normalised`."""
    return float(normalised(reply) == normalised(reference))


def token_f1(prompt: str, reply: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words of both, as for SQuAD."""
    own, wanted = Counter(normalised(reply).split()), Counter(normalised(reference).split())
    if not own or not wanted:
        return float(own == wanted)
    common = (own & wanted).total()
    return 2 * common / (own.total() + wanted.total())


def number(prompt: str, reply: str, reference: str) -> float | None:
    """Whether the last number of the reply is that of the reference; None if that has none."""
    wanted, own = _last_number(reference), _last_number(reply)
    if wanted is None:
        return None
    return float(own is not None and math.isclose(own, wanted, rel_tol=1e-6, abs_tol=1e-12))


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def parsed_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none; NaN and infinities are none.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        return json.loads(text.strip(), parse_constant=refuse)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def valid_json(prompt: str, reply: str, reference: str) -> float:
    """Whether the whole reply is JSON."""
    try:
        parsed_json(reply)
    except ValueError:
        return 0.0
    return 1.0


def _label(prompt: str, reply: str, reference: str, labels: tuple[str, ...]) -> float | None:
    """Whether the reply names the reference's label and no other; None if that is no label."""
    wanted = normalised(reference)
    if wanted not in labels:
        return None
    words = f" {normalised(reply)} "
    named = [label for label in labels if f" {label} " in words]
    # "not good" names "good" as well: the longest of overlapping labels counts.
    named = [label for label in named if not any(label in o and label != o for o in named)]
    return float(named == [wanted])


def _rouge_l() -> ReplyMetric:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise _missing("rouge_l", "rouge-score") from error
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return lambda prompt, reply, reference: float(scorer.score(reference, reply)["rougeL"].fmeasure)


def _chrf() -> ReplyMetric:
    try:
        from sacrebleu.metrics import CHRF
    except ImportError as error:
        raise _missing("chrf", "sacrebleu") from error
    scorer = CHRF()
    return lambda prompt, reply, reference: float(
        scorer.sentence_score(reply, [reference]).score / 100
    )


def _json_schema(path: Path) -> ReplyMetric:
    try:
        import jsonschema
    except ImportError as error:
        raise _missing("json_schema", "jsonschema") from error
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
        validator_class = jsonschema.validators.validator_for(schema)
        validator_class.check_schema(schema)
    except (OSError, ValueError, jsonschema.SchemaError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"replies.json_schema = {path}: no JSON schema ({reason})") from error
    validator = validator_class(schema)

    def matches(prompt: str, reply: str, reference: str) -> float:
        try:
            return float(validator.is_valid(parsed_json(reply)))
        except ValueError:
            return 0.0

    return matches


def _missing(metric: str, library: str) -> UsageError:
    return UsageError(f"replies.{metric}: needs {library}: pip install 'slm-lora[replies]'")


_METRICS: Mapping[str, Callable[[], ReplyMetric]] = {
    "exact_match": lambda: exact_match,
    "token_f1": lambda: token_f1,
    "rouge_l": _rouge_l,
    "chrf": _chrf,
    "number": lambda: number,
    "valid_json": lambda: valid_json,
}


def _own_function(name: str, target: str) -> ReplyMetric:
    module_name, _, function_name = target.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # the user's module may raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"replies.functions.{name} = {target}: cannot be loaded: {reason}"
        ) from error

    def value(prompt: str, reply: str, reference: str) -> float:
        result = float(function(prompt, reply, reference))
        if not abs(result) <= 1e300:
            raise ValueError(f"{result} is no number that can be summed")
        return result

    return value
