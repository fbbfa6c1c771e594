"""What a run and an adapter say of how they were made, as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from slm_lora.data.splits import SPLIT_VERSION
from slm_lora.experiment.job import Job
from slm_lora.experiment.paths import ExperimentPaths
from slm_lora.model.base import Base
from slm_lora.runtime import distributed, hardware
from slm_lora.training.loop import TrainingResult


def common_record(job: Job, base: Base, paths: ExperimentPaths) -> dict[str, Any]:
    """What every run says: recipe, model, rows, machine and versions."""
    return {
        "experiment": paths.experiment,
        "recipe": job.resolved,
        "model": {
            "name": job.source.name,
            "revision": job.source.revision,
            "sha256": job.source.sha256,
            "precision": base.precision,
            "packed": base.packed,
            **({"quantization": base.quantization} if base.quantization else {}),
        },
        "data": data_record(job),
        "machine": hardware.describe(job.device.type) | {"processes": distributed.world_size()},
        "versions": hardware.versions(),
    }


def training_record(result: TrainingResult) -> dict[str, Any]:
    """Of a finished training."""
    last = result.history[-1]
    return {
        "steps": len(result.history),
        "epochs": last.epoch,
        "tokens": result.tokens,
        "label_tokens": sum(step.label_tokens for step in result.history),
        "seconds": result.seconds,
        "first_step_seconds": result.first_step_seconds,
        "tokens_per_s": result.tokens_per_s,
        "peak_memory_bytes": result.peak_memory_bytes,
        "compiled": result.compiled,
        "last_step_loss": last.loss,
        "rows_without_labels": result.rows_without_labels,
        "kept_step": result.kept_step,
        "stopped_early": result.stopped_early,
        "skipped_steps": sum(step.skipped for step in result.history),
    }


def about_adapter(job: Job, paths: ExperimentPaths) -> dict[str, Any]:
    """What an adapter's folder says of its making."""
    quantization = job.config.model.quantization
    return {
        "experiment": paths.experiment,
        "cell": job.name,
        "base": {
            "name": job.source.name,
            "revision": job.source.revision,
            "sha256": job.source.sha256,
            **({"quantization": quantization} if quantization else {}),
        },
        "template": asdict(job.data.template),
        "recipe": job.resolved,
        "run": job.identity,
        "versions": hardware.versions(),
    }


def data_record(job: Job) -> dict[str, Any]:
    """What a run says of its rows."""
    prepared = job.data
    return {
        "origin": job.rows.origin,
        "format": job.rows.format,
        "template": asdict(prepared.template),
        "rows_available": prepared.rows_available,
        "groups": prepared.groups,
        "duplicates_dropped": prepared.duplicates,
        "bad_rows_skipped": prepared.bad_rows,
        "split_version": SPLIT_VERSION,
        "held_out_sha256": prepared.held_out_hash,
        "train_sha256": prepared.train_hash,
        "sets": {
            name: {"rows": len(examples), "tokens": sum(e.length for e in examples)}
            for name, examples in (
                ("test", prepared.test),
                ("validation", prepared.validation),
                ("train", prepared.train),
            )
        },
        "long_rows": {
            name: {"policy": job.config.data.on_long_row, **asdict(counted)}
            for name, counted in prepared.long.items()
        },
    }
