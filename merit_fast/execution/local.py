"""Units as processes of this machine, as many at once as its cores, memory and GPUs allow."""

import os
import selectors
import shutil
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import replace

from merit_fast.execution.command import Ended, UnitCommand, ended, start_process
from merit_fast.model.memory import available_memory_bytes

_CORES_OF_A_UNIT = 4  # without --workers and without a GPU
_STOP_S = 30.0  # that a unit has to end by itself


class LocalExecutor:
    """Starts units as subprocesses.

    Args:
        workers: units at a time.
        threads: CPU threads of each; None: as many as torch takes.
        gpus: the visible devices; every unit gets ``processes`` of them for itself. Empty: none.
        processes: of a training, by torchrun.
    """

    def __init__(
        self,
        workers: int,
        threads: int | None = None,
        gpus: Sequence[str] = (),
        processes: int = 1,
    ) -> None:
        self.workers = workers
        self.threads = threads
        self.processes = processes
        self._free = [tuple(gpus[i : i + processes]) for i in range(0, len(gpus), processes)]
        self._running: dict[str, _Running] = {}

    def room(self) -> int:
        return self.workers - len(self._running)

    def start(self, command: UnitCommand) -> None:
        gpus = self._free.pop(0) if self._free else ()  # one group for a unit, training or not
        if gpus:
            visible = ("CUDA_VISIBLE_DEVICES", ",".join(gpus))
            command = replace(command, environment=(*command.environment, visible))
        self._running[command.unit] = _Running(command, gpus)

    def wait(self) -> list[Ended]:
        if not self._running:
            return []
        with selectors.DefaultSelector() as selector:
            for running in self._running.values():
                selector.register(running.pipe, selectors.EVENT_READ, running)
            while True:
                over = [key.data for key, _ in selector.select() if key.data.read()]
                if over:
                    return [self._end(running) for running in over]

    def stop(self) -> None:
        for running in self._running.values():
            running.signal(signal.SIGTERM)
        for running in self._running.values():
            running.end()
        self._running.clear()

    def _end(self, running: "_Running") -> Ended:
        del self._running[running.command.unit]
        if running.gpus:
            self._free.append(running.gpus)
        return running.result()


class _Running:
    """A unit's process and what it has printed."""

    def __init__(self, command: UnitCommand, gpus: tuple[str, ...]) -> None:
        self.command = command
        self.gpus = gpus
        self.process = start_process(command)
        self.output = b""
        assert self.process.stdout is not None
        self.pipe = self.process.stdout

    def read(self) -> bool:
        """Reads what is there; True at the end of the output."""
        text = os.read(self.pipe.fileno(), 1 << 16)
        self.output += text
        return not text

    def result(self) -> Ended:
        self.pipe.close()
        return ended(self.command, self.process.wait(), self.output)

    def signal(self, number: signal.Signals) -> None:
        """Signals the whole group: torchrun's processes too."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def end(self) -> None:
        """Waits for the process, and kills it if it does not end."""
        try:
            self.process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            self.process.wait()
        self.pipe.close()


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
