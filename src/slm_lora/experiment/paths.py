"""Where an experiment's files lie, which of its cells are finished, and room for the others."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from slm_lora.adapters import io as adapter_io
from slm_lora.errors import IntegrityError
from slm_lora.runs.folder import Run
from slm_lora.runtime.checksums import sha256_file


@dataclass(frozen=True, slots=True)
class ExperimentPaths:
    """Where an experiment's results and adapters go.

    Attributes:
        experiment: its name.
        results: folder of tables and run folders.
        adapters: folder that adapter folders are put into.
    """

    experiment: str
    results: Path
    adapters: Path

    def adapter(self, cell: str, identity: str) -> Path:
        """Folder that the adapter of a run is written to: ``<experiment>-<cell>``, or
        ``<experiment>-<cell>-<hash8>`` where another run's adapter, or anything else, has that.

        Raises:
            IntegrityError: both are taken.
        """
        plain, own = self.adapter_names(cell, identity)
        if adapter_io.run_of(own) == identity:
            return own
        for folder in (plain, own):
            if _is_free(folder) or adapter_io.run_of(folder) == identity:
                return folder
        raise IntegrityError(
            f"{plain} and {own} hold something else than this run's adapter, and nothing finished "
            "is replaced: move one of them away, or choose another folder (--adapters)"
        )

    def temporary_adapter(self, cell: str, identity: str) -> Path:
        """Folder of an adapter that is removed once it is scored, with its checkpoints."""
        return self.checkpoint(cell, identity) / "adapter"

    def adapter_of(self, run: Run) -> Path | None:
        """Folder with the very adapter of a finished run, if it is here.

        Results are shared without adapters, and a folder may have been changed since.
        """
        for folder in self.adapter_names(run.cell, run.raw["hash"]):
            weights = adapter_io.weights_file(folder)
            if weights is not None and sha256_file(weights) == run.record.saved.sha256:
                return folder
        return None

    def adapter_name(self, cell: str) -> str:
        """Name of the folder that the first adapter of a cell gets."""
        return f"{self.experiment}-{cell}"

    def adapter_names(self, cell: str, identity: str) -> tuple[Path, Path]:
        """The two folders that the adapter of a run may lie in, the usual one first."""
        plain = self.adapters / self.adapter_name(cell)
        return plain, plain.with_name(f"{plain.name}-{identity[:8]}")

    @property
    def checkpoints(self) -> Path:
        """Folder of all unfinished cells."""
        return self.results / "checkpoints"

    def checkpoint(self, cell: str, identity: str) -> Path:
        """Folder of one unfinished cell's checkpoints."""
        return self.checkpoints / f"{cell}-{identity[:8]}"


def _is_free(folder: Path) -> bool:
    """Whether nothing lies there: not even a link that leads nowhere."""
    if folder.is_dir() and not folder.is_symlink():
        return not any(folder.iterdir())
    return not os.path.lexists(folder)


BASE = "base"
"""Name of the base model's cell."""
