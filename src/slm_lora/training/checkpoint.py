"""Where a training stands: enough to go on as if it had never stopped.

Order and dropout follow from the seed and the step number, so a checkpoint is the adapter's
weights, the optimizer's moments and the steps so far. It is written whole or not at all, and is
only taken up by the run with the same identity; another's is passed over.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from slm_lora.errors import IntegrityError
from slm_lora.records import Step
from slm_lora.runs import content_hash
from slm_lora.storage import atomic_folder, sha256_file

_STATE, _ABOUT = "state.safetensors", "checkpoint.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Checkpointer:
    """Saves and takes up one training's checkpoint.

    Attributes:
        folder: where it lies.
        identity: of the run; a checkpoint of another is not taken up.
        every_seconds: least time between two saves.
    """

    folder: Path
    identity: str
    every_seconds: float = 60.0

    def save(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        history: list[Step],
        best: tuple[float, int, dict[str, torch.Tensor]] | None,
        scaler: dict[str, Any],
    ) -> None:
        """Write the state after the last step of ``history``.

        Raises:
            StorageError: no space, or no right to write.
        """
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in parameters.items():
            tensors[f"weight/{name}"] = parameter.detach().cpu().contiguous()
            # Empty before the first update that was not skipped (fp16).
            for moment, value in optimizer.state[parameter].items():
                tensors[f"{moment}/{name}"] = value.cpu().contiguous()
        about: dict[str, Any] = {
            "identity": self.identity,
            "history": [asdict(step) for step in history],
            "scaler": scaler,
        }
        if best is not None:
            about["best"] = {"loss": best[0], "step": best[1]}
            tensors |= {f"best/{name}": value.contiguous() for name, value in best[2].items()}
        with atomic_folder(self.folder) as temporary:
            save_file(tensors, temporary / _STATE)
            about["sha256"] = sha256_file(temporary / _STATE)
            sealed = {"about": about, "sha256": content_hash(about)}
            (temporary / _ABOUT).write_text(json.dumps(sealed), encoding="utf-8")

    def load(
        self, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> Resumed | None:
        """Put the saved state back; None where there is no checkpoint of this run.

        Raises:
            IntegrityError: the checkpoint is this run's, but broken.
        """
        if not (self.folder / _ABOUT).is_file():
            return None
        try:
            sealed = json.loads((self.folder / _ABOUT).read_text(encoding="utf-8"))
            about = sealed["about"]
            if about["identity"] != self.identity:
                return None
            if sealed["sha256"] != content_hash(about):
                raise ValueError("what it says of itself does not match its SHA-256")
            if about["sha256"] != sha256_file(self.folder / _STATE):
                raise ValueError("its state does not match its SHA-256")
            history = [Step(**step) for step in about["history"]]
            best: tuple[float, int, dict[str, torch.Tensor]] | None = None
            with safe_open(self.folder / _STATE, framework="pt") as file, torch.no_grad():
                saved = set(file.keys())
                for name, parameter in parameters.items():
                    parameter.copy_(file.get_tensor(f"weight/{name}"))
                    if f"step/{name}" in saved:
                        optimizer.state[parameter] = {
                            "step": file.get_tensor(f"step/{name}").to(parameter.device),
                            **{
                                moment: file.get_tensor(f"{moment}/{name}").to(parameter.device)
                                for moment in _MOMENTS
                            },
                        }
                if "best" in about:
                    kept = {name: file.get_tensor(f"best/{name}") for name in parameters}
                    best = (about["best"]["loss"], about["best"]["step"], kept)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise IntegrityError(
                f"{self.folder}: the checkpoint is broken ({error}); delete the folder to train "
                "this cell from its beginning"
            ) from error
        return Resumed(history, best, about["scaler"])

    def remove(self) -> None:
        """Forget the checkpoint: the run is finished and kept elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint says beside the state that it has put back."""

    history: list[Step]
    best: tuple[float, int, dict[str, torch.Tensor]] | None
    scaler: dict[str, Any]
