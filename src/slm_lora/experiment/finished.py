"""Models of finished runs, loaded again to generate or score."""

from __future__ import annotations

from collections.abc import Sequence

from slm_lora.adapters.methods import trains_all
from slm_lora.adapters.multi import BASE, AdapterSet, load_adapter_set
from slm_lora.data.tokenization import RowTokenizer
from slm_lora.errors import IntegrityError
from slm_lora.experiment.job import Job
from slm_lora.experiment.paths import ExperimentPaths
from slm_lora.runs.folder import Run


def with_jobs(jobs: Sequence[Job], runs: Sequence[Run]) -> list[tuple[Run, Job]]:
    """Each finished run with its job; a base with the first job that is trained on it."""
    by_identity = {job.identity: job for job in jobs}
    by_base = {job.base_identity: job for job in reversed(jobs)}
    return [
        (run, (by_base if run.record.adapter is None else by_identity)[run.record.hash])
        for run in runs
    ]


def load_finished(job: Job, run: Run, paths: ExperimentPaths) -> tuple[AdapterSet, str]:
    """The model of a run, and its name in the set. The base gets the prompts of the training.

    Raises:
        IntegrityError: the run's adapter is gone, or was changed.
    """
    if run.record.adapter is None:
        return load_job_base(job), BASE
    folder = paths.adapter_of(run)
    if folder is None:
        raise IntegrityError(
            f"{paths.adapter_name(run.cell)}: the adapter of {run.folder.name} is not in "
            f"{paths.adapters}, or was changed; put it back, or remove the run and train again"
        )
    whole = trains_all(job.config.adapter)
    model = job.config.model
    variants = load_adapter_set(
        str(folder) if whole else model.name,
        [] if whole else [folder],
        revision=None if whole else model.revision,
        device=job.device.type,
        precision=job.precision,
        quantization=None if whole else model.quantization,
    )
    return variants, variants.names[-1]


def load_job_base(job: Job) -> AdapterSet:
    """The base of a job, with the prompts of the training."""
    model = job.config.model
    variants = load_adapter_set(
        model.name,
        [],
        revision=model.revision,
        device=job.device.type,
        precision=job.precision,
        quantization=model.quantization,
    )
    variants.row_tokenizers[BASE] = RowTokenizer(variants.tokenizer, job.data.template)
    return variants
