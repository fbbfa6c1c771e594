"""Commands as tasks of a Ray cluster."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

from slm_lora.errors import STOPPED_RESUMABLE, StorageError, UsageError
from slm_lora.launch.command import LOST, Command, Ended, run

CONNECT_TIMEOUT_S = 10.0
"""Seconds that a cluster's address has to answer."""


class RayEngine:
    """A task for each command: a whole node each, or a GPU, unless told otherwise.

    A task that is lost with its worker or node is told of as such, and not repeated here.
    """

    def __init__(self, address: str, options: Mapping[str, Any], gpus: int) -> None:
        """
        Args:
            address: ``host:port``; ``auto`` for the cluster that this machine is in; empty for a
                new one of this machine alone.
            options: of every task, as Ray names them: ``num_cpus``, ``num_gpus``, ``memory``,
                ``resources``.
            gpus: that a task takes, unless ``options`` say.

        Raises:
            UsageError: Ray is not installed, or has no such option.
            StorageError: the cluster does not answer, or no node has what a task takes.
        """
        # A cluster of this machine alone is not announced.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Workers keep their GPUs where a task asks for none.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError as error:
            raise UsageError(
                "--executor ray: needs Ray: pip install '.[ray]' in a checkout"
            ) from error
        self._ray = ray
        if ":" in address:
            _check_answers(address)
        try:
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level="ERROR",
            )
        except Exception as error:  # ConnectionError, ValueError, RuntimeError: as it likes
            raise StorageError(
                f"--address {address or 'of a new cluster'}: no Ray cluster answers "
                f"({str(error).strip().splitlines()[0]})"
            ) from error
        self._options = self._resources(options, gpus)
        try:
            self._task = ray.remote(run).options(max_retries=0, **self._options)
        except (TypeError, ValueError) as error:
            self.close()
            raise UsageError(f"--executor-option: {error}") from error
        self._running: dict[Any, str] = {}

    def _resources(self, given: Mapping[str, Any], gpus: int) -> dict[str, Any]:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        options = {"num_gpus": gpus, **given}
        wanted = options["num_gpus"]
        nodes = [node for node in nodes if node.get("CPU") and node.get("GPU", 0) >= wanted]
        if not nodes:
            self.close()
            raise StorageError(
                f"the Ray cluster has no node with a CPU and {wanted} GPUs: a cell would wait for "
                "ever"
            )
        # A cell uses all cores that it has: share them only where a node has several GPUs.
        shares = [max(1, int(node.get("GPU", 0) // wanted)) if wanted else 1 for node in nodes]
        a_node = min(node["CPU"] // many for node, many in zip(nodes, shares, strict=True))
        return {"num_cpus": max(1, int(a_node)), **options}

    def submit(self, command: Command) -> None:
        """See `Engine`."""
        self._running[self._task.remote(command)] = command.name

    def wait(self, seconds: float) -> list[Ended]:
        """See `Engine`."""
        ready, _ = self._ray.wait(
            list(self._running), num_returns=1, timeout=seconds, fetch_local=False
        )
        return [self._ended(each) for each in ready]

    def _ended(self, task: Any) -> Ended:
        name = self._running.pop(task)
        try:
            code, last_line = self._ray.get(task)
        except self._ray.exceptions.TaskCancelledError:
            return Ended(name, STOPPED_RESUMABLE)
        except self._ray.exceptions.RayError as error:  # of its worker, its node, or its memory
            return Ended(name, LOST, (str(error).strip().splitlines() or ["no reason given"])[0])
        return Ended(name, code, last_line)

    def stop(self) -> None:
        """See `Engine`."""
        for task in self._running:
            self._ray.cancel(task, force=False)

    def close(self) -> None:
        """See `Engine`."""
        self._ray.shutdown()


def _check_answers(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        raise UsageError(f"--address {address}: must be HOST:PORT, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise StorageError(f"--address {address}: no Ray cluster answers ({error})") from error
