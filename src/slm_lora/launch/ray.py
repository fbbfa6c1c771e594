"""Commands as tasks of a Ray cluster."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

from slm_lora.errors import STOPPED_RESUMABLE, StorageError, UsageError
from slm_lora.launch.command import LOST, Command, CommandResult, run

CONNECT_TIMEOUT_S = 10.0
"""Timeout of the connection to a cluster's address."""


class RayEngine:
    """One Ray task per command; by default a task takes a whole node, or one GPU.

    A task lost with its worker or node has the result `LOST`; Ray does not retry it.
    """

    def __init__(self, address: str, options: Mapping[str, Any], gpus: int) -> None:
        """
        Args:
            address: ``host:port``; ``auto`` for the cluster of this machine; empty for a new,
                local one.
            options: Ray's options of every task: ``num_cpus``, ``num_gpus``, ``memory``,
                ``resources``.
            gpus: GPUs per task, unless ``options`` has ``num_gpus``.

        Raises:
            UsageError: Ray is not installed, or an option is invalid.
            StorageError: the cluster does not answer, or no node has the resources of a task.
        """
        # No usage statistics from a local cluster.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Tasks without GPUs keep the CUDA_VISIBLE_DEVICES of their worker.
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
        except Exception as error:  # ConnectionError, ValueError or RuntimeError
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

    def _resources(self, overrides: Mapping[str, Any], gpus: int) -> dict[str, Any]:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        options = {"num_gpus": gpus, **overrides}
        gpus_per_task = options["num_gpus"]
        nodes = [node for node in nodes if node.get("CPU") and node.get("GPU", 0) >= gpus_per_task]
        if not nodes:
            self.close()
            raise StorageError(
                f"the Ray cluster has no node with a CPU and {gpus_per_task} GPUs, so no cell "
                "could be scheduled; lower --executor-option num_gpus, or add a node"
            )
        # A cell can use all cores of a node: divide them only if a node runs several GPU tasks.
        tasks_per_node = [
            max(1, int(node.get("GPU", 0) // gpus_per_task)) if gpus_per_task else 1
            for node in nodes
        ]
        cores = min(node["CPU"] // tasks for node, tasks in zip(nodes, tasks_per_node, strict=True))
        return {"num_cpus": max(1, int(cores)), **options}

    def submit(self, command: Command) -> None:
        """See `Engine`."""
        self._running[self._task.remote(command)] = command.name

    def wait(self, seconds: float) -> list[CommandResult]:
        """See `Engine`."""
        ready, _ = self._ray.wait(
            list(self._running), num_returns=1, timeout=seconds, fetch_local=False
        )
        return [self._ended(task) for task in ready]

    def _ended(self, task: Any) -> CommandResult:
        name = self._running.pop(task)
        try:
            code, last_line = self._ray.get(task)
        except self._ray.exceptions.TaskCancelledError:
            return CommandResult(name, STOPPED_RESUMABLE)
        except self._ray.exceptions.RayError as error:  # worker or node died, or out of memory
            return CommandResult(
                name, LOST, (str(error).strip().splitlines() or ["no reason given"])[0]
            )
        return CommandResult(name, code, last_line)

    def stop(self) -> None:
        """See `Engine`."""
        for task in self._running:
            self._ray.cancel(task, force=False)

    def close(self) -> None:
        """See `Engine`."""
        self._ray.shutdown()


def _check_answers(address: str) -> None:
    """Connect with a timeout: Ray itself would retry for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        raise UsageError(f"--address {address}: must be HOST:PORT, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise StorageError(f"--address {address}: no Ray cluster answers ({error})") from error
