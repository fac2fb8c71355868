"""Units as processes of this machine, as many at once as its cores, memory and GPUs allow."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace

from merit_fast.execution.command import Ended, UnitCommand
from merit_fast.execution.process import UnitProcess, wait_for_one
from merit_fast.model.memory import available_memory_bytes

_CORES_OF_A_UNIT = 4  # without --workers and without a GPU


class LocalExecutor:
    """Starts units as subprocesses.

    Args:
        workers: units at a time.
        threads: CPU threads of each; None: as many as torch takes.
        gpus: the visible devices; every unit gets ``processes`` of them for itself. Empty: none.
        processes: of a training, by torchrun.
        limit_s: seconds after which a unit is ended; None: it may take any time.
    """

    def __init__(
        self,
        workers: int,
        threads: int | None = None,
        gpus: Sequence[str] = (),
        processes: int = 1,
        limit_s: float | None = None,
    ) -> None:
        self.workers = workers
        self.threads = threads
        self.processes = processes
        self._free = [tuple(gpus[i : i + processes]) for i in range(0, len(gpus), processes)]
        self._limit_s = limit_s
        self._running: dict[UnitProcess, tuple[str, ...]] = {}

    def room(self) -> int:
        return self.workers - len(self._running)

    def start(self, command: UnitCommand) -> None:
        gpus = self._free.pop(0) if self._free else ()  # one group for a unit, training or not
        if gpus:
            visible = ("CUDA_VISIBLE_DEVICES", ",".join(gpus))
            command = replace(command, environment=(*command.environment, visible))
        self._running[UnitProcess(command, self._limit_s)] = gpus

    def wait(self) -> list[Ended]:
        if not self._running:
            return []
        over = wait_for_one(self._running.keys())
        return [self._ended(process) for process in over]

    def stop(self) -> None:
        for process in self._running:
            process.ask_to_end()
        for process in self._running:
            process.end()
        self._running.clear()

    def _ended(self, process: UnitProcess) -> Ended:
        gpus = self._running.pop(process)
        if gpus:
            self._free.append(gpus)
        return process.result()


def workers_here(model_bytes: int, processes: int, gpus: Sequence[str]) -> int:
    """Units that fit this machine at a time: by its GPUs, or by its cores and its free memory.

    A training holds weights, gradients, masters and moments, about six times a bf16 model's bytes.
    """
    if gpus:
        return max(1, len(gpus) // processes)
    cores = len(os.sched_getaffinity(0))
    by_cores = cores // (_CORES_OF_A_UNIT * processes)
    by_memory = available_memory_bytes() // (6 * model_bytes * processes + (1 << 30))
    return max(1, min(by_cores, by_memory))


def visible_gpus() -> tuple[str, ...]:
    """The devices that CUDA_VISIBLE_DEVICES names, or those that nvidia-smi lists."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return tuple(name for name in named.split(",") if name)
    if shutil.which("nvidia-smi") is None:
        return ()
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    lines = listed.stdout.splitlines() if listed.returncode == 0 else []
    return tuple(str(number) for number, line in enumerate(lines) if line.startswith("GPU "))
