"""What a saved adapter's score is worth: the base beside it, and whether it is asked as it was
trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slm_lora.adapters.io import ABOUT
from slm_lora.data.chat_templates import default_template, freeze_date, read_template
from slm_lora.data.templates import Template
from slm_lora.errors import IntegrityError
from slm_lora.experiment.job import Job
from slm_lora.model.loading import load_tokenizer
from slm_lora.records import LossOn, RowScore
from slm_lora.runs.metrics import METRICS
from slm_lora.runtime.checksums import read_sealed
from slm_lora.stats.estimates import paired
from slm_lora.stats.inference import interval


@dataclass(frozen=True)
class Evaluated:
    """Scores of the test rows and their losses; of the base, too, where it was asked for.

    Attributes:
        record: losses by ``all`` and ``response``, as runs have them.
    """

    scores: Sequence[RowScore]
    record: dict[str, Any]
    base_scores: Sequence[RowScore] = ()
    base_record: dict[str, Any] | None = None

    def difference(self, tokens: LossOn) -> tuple[float, float, float]:
        """Loss minus the base's, nats per token, and its 95 % interval over the test rows."""
        sample = paired([(self.base_scores, self.scores)], METRICS[tokens])
        return sample.value, *interval(sample, 0.95)


def warnings_on(folder: Path, job: Job) -> list[str]:
    """Where a score would say little: another template, or rows that were trained on.

    Args:
        folder: an adapter, or a fully trained model.
        job: what it is scored on.
    """
    shipped = folder / "chat_template.jinja"
    try:
        about = read_sealed(folder / ABOUT)
        trained, recipe = Template(**about["template"]), about["recipe"]
        warnings = [
            _other_template(trained, job),
            _other_split(recipe["data"], job.resolved["data"]),
        ]
    except FileNotFoundError:
        warnings = [_foreign_template(shipped, job)]
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"{folder / ABOUT}: broken ({error})") from error
    return [f"{folder} {warning}" for warning in warnings if warning]


def _other_template(trained: Template, job: Job) -> str:
    now = job.data.template
    if trained.kind != now.kind or trained.source != now.source:
        same = "another .jinja file" if trained.kind == now.kind else f"template {now.kind}"
        way = (
            "data.template= its .jinja file scores"
            if trained.kind == "jinja"
            else f"data.template={trained.kind} scores"
        )
        return (
            f"was trained in template {trained.kind}, and is scored in {same}: {way} it as it was"
        )
    shows, hides = ("with", "without") if trained.shows_context else ("without", "with")
    if trained.shows_context != now.shows_context and any(row.context for row in job.rows.rows):
        return (
            f"was trained {shows} contexts, and is scored {hides} them: "
            f"data.include_context={str(trained.shows_context).lower()} scores it as it was"
        )
    if trained.special_in_responses != now.special_in_responses:
        key, was = "data.special_tokens_in_responses", trained.special_in_responses
        return (
            f"was trained with {key}={'special' if was else 'text'}, and is scored with "
            f"{'text' if was else 'special'}"
        )
    return ""


def _foreign_template(shipped: Path, job: Job) -> str:
    kind = job.data.template.kind
    if (text := read_template(shipped)) is None:
        return f"does not say which prompts it was trained on; it is scored in template {kind}"
    now = {job.data.chat_template}
    if kind == "chat" and (own := default_template(load_tokenizer(job.source))):
        now.add(freeze_date(own))
    if job.data.template.source:
        now.add(freeze_date(job.data.template.source))
    if freeze_date(text, str(shipped)) in now:
        return ""
    return (
        f"has a chat_template.jinja of its own, and is scored in template {kind}: "
        f"data.template={shipped} scores it in its own"
    )


def _other_split(trained: dict[str, Any], now: dict[str, Any]) -> str:
    """Says it where rows that are scored may have been trained on."""
    if "split_seed" not in trained or trained.get("name") != now["name"]:
        return ""
    for key in ("split_seed", "test_rows"):
        before, after = trained.get(key), now[key]
        # Fewer test rows are the first of the same.
        if before != after and not (key == "test_rows" and before and after and after < before):
            return (
                f"was trained with data.{key}={before}, and is scored with {after}: rows that are "
                "scored may be among those that it was trained on"
            )
    return ""
