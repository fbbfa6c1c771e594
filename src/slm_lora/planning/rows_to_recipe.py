"""Plan of `slm-lora tune`: rows read, this machine timed, sizes chosen, the recipe's text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from slm_lora.config.load import parse_recipe
from slm_lora.data.column_kinds import NoFormatError
from slm_lora.data.split_sizes import LEAST_GROUPS, GroupedRows
from slm_lora.data.tokenization import RowTokenizer
from slm_lora.errors import DataError, UsageError
from slm_lora.experiment.job import Job
from slm_lora.experiment.preflight import text_config
from slm_lora.experiment.resolve_jobs import JobResolver
from slm_lora.ops import compilation
from slm_lora.planning.budget import (
    SEARCHES,
    Material,
    Sizes,
    Speed,
    fit,
    least_budget,
)
from slm_lora.planning.plan import COMPILE_SECONDS
from slm_lora.planning.probe import measure
from slm_lora.planning.tuning_recipe import DataChoices, Request, duration, recipe_text

LENGTHS = (512, 1024, 2048)
"""Limits of length to choose from: the smallest that keeps `KEPT_TOKENS`."""
KEPT_TOKENS = 0.95


@dataclass(frozen=True, slots=True)
class TuningPlan:
    """What `slm-lora tune` will do.

    Attributes:
        text: the recipe.
        sizes: of the experiment.
        job: one of its final runs.
        data: treatment of the rows.
    """

    text: str
    sizes: Sizes
    job: Job
    data: DataChoices


def plan_tuning(request: Request, resolver: JobResolver) -> TuningPlan:
    """Choose sizes that fit the budget, and write the recipe's text.

    Raises:
        SlmLoraError: whatever is wrong with model or rows.
        DataError: too few unrelated rows.
        UsageError: nothing fits the budget.
    """
    draft = DataChoices(skips_bad_rows=True)
    try:
        job = _job(request, draft, resolver)
    except NoFormatError as error:
        if not error.mapping:
            raise
        draft = replace(draft, columns=error.mapping)
        job = _job(request, draft, resolver)
    lengths = _lengths(job)
    data = replace(_data_choices(job, lengths), columns=draft.columns)
    grouped = GroupedRows(job.rows.rows, job.data.rule)
    if grouped.count < 3 * LEAST_GROUPS:
        raise DataError(
            f"{job.rows.origin.split(' ')[0]}: {grouped.rows} rows in {grouped.count} groups of "
            f"related rows are too few: {LEAST_GROUPS} groups each are needed to train, to choose "
            f"the learning rate and to test; give more rows (at least {3 * LEAST_GROUPS}, 1,000 "
            "for small differences)"
        )
    tokens = sum(min(length, data.max_length) for length in lengths)
    if data.on_long_row == "split":
        tokens = sum(lengths)
    material = Material(grouped.rows, tokens / len(lengths), grouped.sizes_near)
    sizes, speed = _sizes(request.budget, material, job)
    if sizes is None:
        raise UsageError(_too_small(request.budget, material, speed))
    text = recipe_text(request, sizes, data)
    _, cells = parse_recipe(text, f"{request.experiment}.yaml")
    return TuningPlan(text, sizes, resolver.jobs(cells[-1:])[0], data)


def _job(request: Request, data: DataChoices, resolver: JobResolver) -> Job:
    """The job of a draft with the default sets, which every number of rows has."""
    text = recipe_text(request, Sizes(SEARCHES[-1], 0, 0, None, 0, 1.0, 0.0), data)
    defaults = ["data.test_rows=null", "data.validation_rows=null"]
    _, cells = parse_recipe(text, f"{request.experiment}.yaml", defaults)
    return resolver.jobs(cells[-1:])[0]


def _lengths(job: Job) -> list[int]:
    """Tokens of every row, however long."""
    from slm_lora.model.loading import load_tokenizer

    rows = job.rows.rows
    tokenize = RowTokenizer(load_tokenizer(job.source), job.data.template)
    examples, _ = tokenize.encode(rows, {row.row_id: row.row_id for row in rows})
    return [example.length for example in examples]


def _data_choices(job: Job, lengths: Sequence[int]) -> DataChoices:
    config = text_config(job.source)
    most = config.get("max_position_embeddings") or config.get("n_positions") or LENGTHS[0]
    limits = [min(limit, most) for limit in LENGTHS]
    plain = job.rows.format == "text" and job.data.template.kind == "plain"
    if plain:  # cut into pieces without loss
        limit = limits[0]
    else:
        kept = {limit: sum(min(length, limit) for length in lengths) for limit in limits}
        enough = [limit for limit in limits if kept[limit] >= KEPT_TOKENS * sum(lengths)]
        limit = enough[0] if enough else limits[-1]
    mean = sum(lengths) / len(lengths)
    return DataChoices(
        note=f"{job.rows.format}, {len(lengths):,} rows of about {mean:.0f} tokens",
        max_length=limit,
        on_long_row="split" if plain and max(lengths) > limit else "truncate",
        skips_bad_rows=bool(job.rows.bad_rows),
    )


def _sizes(budget: float, material: Material, job: Job) -> tuple[Sizes | None, Speed]:
    """Sizes at the speed of eager code, and at that of compiled where they are enough for it."""
    speed = _speed(job, compiled=False)
    sizes = fit(budget, material, speed)
    if sizes is not None and _compiles(job, material, sizes):
        compiled = _speed(job, compiled=True)
        if (larger := fit(budget, material, compiled)) is not None:
            return larger, compiled
    return sizes, speed


def _speed(job: Job, compiled: bool) -> Speed:
    probe = measure(job, compiled)
    seconds = sum(COMPILE_SECONDS.values()) if compiled else 0
    return Speed(probe.training_s_per_token, probe.scoring_s_per_token, seconds)


def _compiles(job: Job, material: Material, sizes: Sizes) -> bool:
    tokens = round(material.tokens_per_row * sizes.training_rows * sizes.epochs)
    return compilation.should_compile("auto", tokens, job.device, job.low_precision)


def _too_small(budget: float, material: Material, speed: Speed) -> str:
    least, repeated = (
        least_budget(material, speed, search) for search in (SEARCHES[-1], SEARCHES[0])
    )
    rate = f"{1 / speed.training:.0f} tokens/s"
    return (
        f"--budget {duration(budget)}: too little for {material.rows:,} rows of about "
        f"{material.tokens_per_row:.0f} tokens at {rate}; --budget {duration(least)} would do, "
        f"with one seed; {duration(repeated)} with three; or take a smaller model"
    )
