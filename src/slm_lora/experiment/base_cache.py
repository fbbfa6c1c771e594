"""The base in memory, bare or with what an earlier run saved."""

from __future__ import annotations

import gc
from pathlib import Path

from slm_lora.adapters import io as adapter_io
from slm_lora.config.schema import ModelSection
from slm_lora.errors import UsageError
from slm_lora.experiment.job import Job
from slm_lora.model.base import Base
from slm_lora.model.loading import load_base
from slm_lora.model.model_folder import MODEL_WEIGHTS
from slm_lora.model.resolve import resolve
from slm_lora.runtime.progress import Reporter


class LoadedBase:
    """One base in memory at a time: cells in a row nearly always share it."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._base: Base | None = None

    def drop(self) -> None:
        """Forget it: a training altered it."""
        self._base = None

    def for_job(self, job: Job) -> Base:
        """The base that a job wants, without an adapter; loaded only if it is another one."""
        quantization = job.config.model.quantization
        wanted = (job.source, job.precision, job.device, quantization, job.sharded)
        base = self._base
        if base is None or _as_loaded(base) != wanted:
            self._base = None
            gc.collect()  # layers that are `compilable` refer to themselves
            self._reporter.info(
                f"  loading {job.source.name} in {quantization or job.precision} "
                f"on {job.device.type}"
            )
            base = load_base(
                job.source,
                device=job.device,
                precision=job.precision,
                quantization=quantization,
                sharded=job.sharded,
            )
            if base.fallback_reason:
                self._reporter.info(f"  note: {base.fallback_reason}")
            self._base = base
        return base


def _as_loaded(base: Base) -> tuple[object, ...]:
    return base.source, base.precision, base.device, base.quantization, base.sharded


def with_saved(folder: Path, job: Job, loaded: LoadedBase) -> Base:
    """The base with a saved adapter, or the model that full fine-tuning saved.

    Raises:
        UsageError: a model that does not say what it was trained from.
        IntegrityError: it does not belong to this base, or was changed.
    """
    if (folder / MODEL_WEIGHTS).is_file():
        if not (folder / adapter_io.ABOUT).is_file():
            raise UsageError(
                f"{folder}: a model, but without {adapter_io.ABOUT}, which says what it was "
                "trained from; to score any model, name it in model.name"
            )
        adapter_io.check_base(job.source, folder)
        source = resolve(ModelSection(name=str(folder)))
        return load_base(source, device=job.device, precision=job.precision)
    base = loaded.for_job(job)
    adapter_io.load(base, folder)
    return base
