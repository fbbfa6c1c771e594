"""Where a training stands: enough to go on as if it had never stopped.

Order and dropout follow from the seed and the step number, so a checkpoint is the adapter's
weights, the optimizer's moments, the scaler and the steps so far: there is no generator whose
state matters, and the schedule and the place in the data are functions of the step. It is
written whole or not at all, says the SHA-256 of its files, and is only taken up by the run with
the same identity. The newest few are kept: one that is broken is passed over, by name.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from slm_lora.errors import IntegrityError, NumericError, StorageError
from slm_lora.records import Step
from slm_lora.runtime import distributed
from slm_lora.runtime.checksums import FILES, SEAL, check_files, read_sealed, sealed
from slm_lora.runtime.storage import atomic_folder, recover_all

CHECKPOINT_FORMAT = 1
KEEP_LAST = 2
"""Checkpoints that stay: the newest, and the one before, should the newest be broken."""

_TENSORS, _TRAINING, _MANIFEST = "state.safetensors", "state.json", "manifest.json"
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")

Best = tuple[float, int, dict[str, torch.Tensor]]
"""Validation loss, step and weights of the best validation so far."""


@dataclass(frozen=True)
class Resumed:
    """What a checkpoint says beside the state that it has put back."""

    history: list[Step]
    best: Best | None
    scaler: dict[str, Any]


@dataclass(frozen=True)
class Checkpointer:
    """Saves and takes up one training's checkpoints.

    Attributes:
        folder: where they lie, one folder each: ``step-000123``.
        identity: of the run; checkpoints of another are not taken up.
        every_seconds: least time between two saves.
        made_of: recipe, and hashes of rows and base, for messages.
        setting: machine, threads, versions: bits are only promised where these are the same.
        say: told one line for the user.
        writes: of several processes at one run, the first does; all others only read.
    """

    folder: Path
    identity: str
    every_seconds: float = 60.0
    made_of: Mapping[str, Any] = field(default_factory=dict)
    setting: Mapping[str, Any] = field(default_factory=dict)
    say: Callable[[str], None] = lambda line: None
    writes: bool = True

    def save(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer | None,
        history: list[Step],
        best: Best | None,
        scaler: dict[str, Any],
    ) -> None:
        """Write the state after the last step of ``history``, then drop what is older than the
        one before it.

        Args:
            parameters: that train, by name.
            optimizer: None after the last step, when moments have no use any more.
            history: all steps so far.
            best: of the validations.
            scaler: state of the gradient scaler.

        Raises:
            NumericError: a number of the state is not finite.
            StorageError: no space, no right to write, or the disk gives other bytes back.
        """
        if not self.writes:
            return
        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in parameters.items():
            tensors[f"weight/{name}"] = parameter.detach().cpu().contiguous()
            # Empty before the first update that was not skipped (fp16).
            for moment, value in (optimizer.state[parameter] if optimizer else {}).items():
                tensors[f"{moment}/{name}"] = value.cpu().contiguous()
        if best is not None:
            tensors |= {f"best/{name}": value.contiguous() for name, value in best[2].items()}
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise NumericError(
                    f"step {len(history)}: {name} is not finite; nothing was saved; "
                    "lower training.learning_rate"
                )
        training = {
            "history": [asdict(step) for step in history],
            "scaler": scaler,
            "best": None if best is None else {"loss": best[0], "step": best[1]},
        }
        about = {
            "format": CHECKPOINT_FORMAT,
            "identity": self.identity,
            "step": len(history),
            "made_of": self.made_of,
            "setting": self.setting,
        }
        target = self.folder / f"step-{len(history):06d}"
        with atomic_folder(target) as temporary:
            save_file(tensors, temporary / _TENSORS)
            (temporary / _TRAINING).write_text(
                json.dumps(training, allow_nan=False), encoding="utf-8"
            )
            (temporary / _MANIFEST).write_text(
                json.dumps(sealed(about, temporary), allow_nan=False), encoding="utf-8"
            )
        # Only once this one reads back is an older one in the way.
        try:
            read_manifest(target)
        except IntegrityError as error:
            raise StorageError(f"the disk does not keep what is written: {error}") from error
        before = [each for each in generations(self.folder) if each < target]
        keep = {target, *before[-(KEEP_LAST - 1) :]}
        for each in generations(self.folder):
            if each not in keep:
                shutil.rmtree(each, ignore_errors=True)

    def load(
        self, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> Resumed | None:
        """Put the newest checkpoint that verifies back; None where there is none of this run.

        Those that were passed over are named, with the reason.
        """
        if self.writes:
            recover_all(self.folder)
        distributed.barrier()
        found = generations(self.folder)
        for generation in reversed(found):
            try:
                resumed = self._take_up(generation, parameters, optimizer)
            except IntegrityError as error:
                self.say(f"  warning: checkpoint passed over: {error}")
            else:
                self.say(f"  going on from {generation.name} of {self.folder.name}")
                return resumed
        if found:
            self.say(
                f"  warning: no checkpoint in {self.folder} is whole; training from the beginning"
            )
        return None

    def _take_up(
        self,
        generation: Path,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> Resumed:
        about = read_manifest(generation)
        if about["identity"] != self.identity:
            raise IntegrityError(f"{generation}: of another run")
        try:
            training = json.loads((generation / _TRAINING).read_text(encoding="utf-8"))
            history = [Step(**step) for step in training["history"]]
            with safe_open(generation / _TENSORS, framework="pt") as file:
                saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            best = training["best"] and (
                training["best"]["loss"],
                training["best"]["step"],
                {name: saved[f"best/{name}"] for name in parameters},
            )
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise IntegrityError(f"{generation}: broken ({error})") from error
        # Only now that all of it was read: half a state would be another training.
        _put_back(saved, parameters, optimizer)
        self._say_what_changed(about)
        return Resumed(history, best, training["scaler"])

    def _say_what_changed(self, about: Mapping[str, Any]) -> None:
        then = about["setting"]
        changed = [
            f"{key} {then.get(key)} → {self.setting.get(key)}"
            for key in sorted(then.keys() | self.setting.keys())
            if then.get(key) != self.setting.get(key)
        ]
        if changed:
            self.say(
                f"  warning: the checkpoint was made with other {', '.join(changed)}: the result "
                "may differ in rounding from that of one process"
            )

    def remove(self) -> None:
        """Forget the checkpoints: the run is finished and kept elsewhere."""
        if self.writes:
            shutil.rmtree(self.folder, ignore_errors=True)


def _put_back(
    saved: Mapping[str, torch.Tensor],
    parameters: Mapping[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[f"weight/{name}"])
            if f"step/{name}" in saved:
                optimizer.state[parameter] = {
                    moment: saved[f"{moment}/{name}"].to(parameter.device, copy=True)
                    for moment in _MOMENTS
                }


def generations(folder: Path) -> list[Path]:
    """The checkpoints of one cell, oldest first, whole or not."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def read_manifest(generation: Path) -> dict[str, Any]:
    """What a checkpoint says of itself, after its files were compared with it.

    Raises:
        IntegrityError: it is not as it was written.
    """
    try:
        about = read_sealed(generation / _MANIFEST)
    except FileNotFoundError as error:
        raise IntegrityError(f"{generation}: has no {_MANIFEST}") from error
    if about.get("format") != CHECKPOINT_FORMAT or SEAL not in about:
        raise IntegrityError(f"{generation}: of another version")
    if set(about[FILES]) != {_TENSORS, _TRAINING}:
        raise IntegrityError(f"{generation}: not the files of a checkpoint")
    check_files(generation, about)
    return about


def space_needed(parameters: int, validates: bool, steps: int) -> int:
    """Bytes that a training's checkpoints take at most, the one being written included.

    Args:
        parameters: weights that train; each has two moments, all in fp32.
        validates: whether the best weights are kept beside the last.
        steps: of the whole training; each leaves some 400 bytes of history.
    """
    return (KEEP_LAST + 1) * (4 * parameters * (4 if validates else 3) + 400 * steps + 100_000)
