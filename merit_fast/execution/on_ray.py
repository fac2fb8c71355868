"""Units as tasks of Ray: on an existing cluster, or on one that starts and ends with the driver.

Weights never pass through Ray's object store: a task gets a command line and gives its result.
"""

import os
import secrets
from types import ModuleType
from typing import Any

from merit_fast.execution.command import Ended, UnitCommand
from merit_fast.execution.process import run_to_end

_LOOK_S = 1.0  # so that an interruption is seen soon
_NODE_ID = "ray.io/node-id"  # the label that Ray gives every node


class RayExecutor:
    """Starts units as tasks of Ray, which places them by their cores and GPUs.

    Args:
        workers: units at a time; None: Ray decides by the cluster's resources.
        threads: CPU threads of a unit, which is also the number of its cores.
        processes: of a training, by torchrun on one node; each has ``threads`` cores.
        gpus: GPUs of each process of a unit; a fraction lets units share one.
        address: of a cluster, as ``ray.init`` takes it; None: RAY_ADDRESS, else a cluster here.
        limit_s: seconds after which a unit is ended; None: it may take any time.
    """

    def __init__(
        self,
        workers: int | None,
        threads: int = 1,
        processes: int = 1,
        gpus: float = 0,
        address: str | None = None,
        limit_s: float | None = None,
    ) -> None:
        self.workers = workers
        self.threads: int | None = threads
        self.processes = processes
        self._gpus = gpus
        self._tasks: dict[Any, UnitCommand] = {}
        self._ray, self._owns_ray = _connected(address)
        self._limit_s = limit_s
        self._failed_on: dict[str, set[str]] = {}  # unit -> nodes
        self._remote = self._ray.remote(_run_here)

    def room(self) -> int:
        return (self.workers or len(self._tasks) + 1) - len(self._tasks)

    def start(self, command: UnitCommand) -> None:
        processes = self.processes if command.is_training else 1
        task = self._remote.options(
            name=command.unit,
            num_cpus=(self.threads or 1) * processes,
            num_gpus=self._gpus * processes,
            max_retries=0,  # the driver starts a unit again, and counts
            scheduling_strategy=self._place(command.unit),
        ).remote(command, self._limit_s)
        self._tasks[task] = command

    def wait(self) -> list[Ended]:
        over: list[Any] = []
        while self._tasks and not over:
            over, _ = self._ray.wait(list(self._tasks), timeout=_LOOK_S)
        return [self._result(task, self._tasks.pop(task)) for task in over]

    def stop(self) -> None:
        for task in self._tasks:
            self._ray.cancel(task, force=True)  # the unit ends with its worker
        if self._tasks:
            self._ray.wait(list(self._tasks), num_returns=len(self._tasks), timeout=30)
        self._tasks.clear()
        if self._owns_ray:
            self._ray.shutdown()

    def _place(self, unit: str) -> Any:
        """Where a unit goes: rather to a node on which it has not failed."""
        nodes = self._failed_on.get(unit)
        if not nodes:
            return "SPREAD"
        from ray.util.scheduling_strategies import NodeLabelSchedulingStrategy, NotIn

        others = NotIn(*sorted(nodes))  # type: ignore[no-untyped-call]
        return NodeLabelSchedulingStrategy(hard={}, soft={_NODE_ID: others})

    def _result(self, task: Any, command: UnitCommand) -> Ended:
        """A task's result; the death of its worker or node is the end of the unit."""
        try:
            result: Ended
            result, node = self._ray.get(task)
        except self._ray.exceptions.RayError as error:
            text = str(error).strip().splitlines()[0]
            return Ended(command.unit, 1, "Ray", f"{type(error).__name__}: {text}")
        if result.code != 0:
            self._failed_on.setdefault(command.unit, set()).add(node)
        return result


def _run_here(command: UnitCommand, limit_s: float | None) -> tuple[Ended, str]:
    """Runs a unit on the node that Ray has chosen; returns its end and the node's id."""
    import ray

    return run_to_end(command, limit_s), ray.get_runtime_context().get_node_id()


def _connected(address: str | None) -> tuple[ModuleType, bool]:
    """Ray, connected to a cluster; and whether this call has connected it.

    A cluster that starts here gets a token by its environment, or Ray would write one into the
    home folder. Ray reads the environment when it is imported.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    if address is None and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
    import ray

    if ray.is_initialized():
        return ray, False
    ray.init(address=address, include_dashboard=False, log_to_driver=False)
    return ray, True
