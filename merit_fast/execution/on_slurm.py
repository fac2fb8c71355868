"""Units as SLURM jobs by submitit: all that are ready go into one array."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import submitit

from merit_fast.errors import InputError
from merit_fast.execution.command import Ended, UnitCommand
from merit_fast.execution.process import run_to_end

_LOOK_S = 5.0
_JOB_LIMITS = ("timeout_min", "slurm_time", "slurm_timeout_min", "local_timeout_min")
_MARGIN_MIN = 5  # for a unit that its own limit ends
_YEAR_MIN = 365 * 24 * 60
_LOOK_HERE_S = 0.2  # at jobs of submitit's own local executor


class SubmititExecutor:
    """Starts units as jobs.

    Args:
        folder: for submitit's files, on a disk that all nodes share.
        workers: jobs of an array that run at a time; None: as many as SLURM starts.
        threads: CPU threads of a unit, and cores of its job.
        processes: of a training, by torchrun on one node.
        gpus: GPUs of a job.
        cluster: "slurm", or "local" for processes of this machine; None: SLURM where it is there.
        options: of submitit's ``update_parameters``, such as slurm_partition and timeout_min.
        limit_s: seconds after which a unit is ended; None: as many as ``options`` give a job.

    Raises:
        InputError: submitit does not know an option, or nothing limits a job of SLURM.
    """

    def __init__(
        self,
        folder: Path,
        workers: int | None,
        threads: int = 1,
        processes: int = 1,
        gpus: int = 0,
        cluster: str | None = None,
        options: Mapping[str, Any] | None = None,
        limit_s: float | None = None,
    ) -> None:
        self.workers = workers
        self.threads: int | None = threads
        self.processes = processes
        self._ready: list[UnitCommand] = []
        self._jobs: dict[submitit.Job[Ended], UnitCommand] = {}
        self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        self._is_local = self._executor.cluster == "local"
        parameters: dict[str, Any] = {"name": "merit-fast", "cpus_per_task": threads * processes}
        if gpus:
            parameters["gpus_per_node"] = gpus
        if workers is not None:
            parameters["slurm_array_parallelism"] = workers
        self._limit_s = limit_s
        parameters |= self._job_limit(options or {})
        try:
            self._executor.update_parameters(**(parameters | dict(options or {})))
        except (NameError, ValueError, TypeError, AssertionError) as error:
            raise InputError(f"command line: --executor-option: {error}") from None

    def _job_limit(self, options: Mapping[str, Any]) -> dict[str, int]:
        """The job's own limit, which comes after the unit's: submitit's are minutes."""
        if any(name in options for name in _JOB_LIMITS):
            return {}
        if self._limit_s is not None:
            return {"timeout_min": math.ceil(self._limit_s / 60) + _MARGIN_MIN}
        if self._is_local:
            return {"timeout_min": _YEAR_MIN}
        raise InputError(
            "command line: --unit-limit: must be given for SLURM, or slurm_time as an "
            "--executor-option: submitit ends every job after 5 minutes"
        )

    def room(self) -> int:
        running = len(self._jobs) + len(self._ready)
        if self.workers is None or not self._is_local:
            return 1  # SLURM's own queue holds the others
        return self.workers - running

    def start(self, command: UnitCommand) -> None:
        self._ready.append(command)

    def wait(self) -> list[Ended]:
        self.submit()
        while self._jobs:
            over = [job for job in self._jobs if job.done(force_check=False)]
            if over:
                return [_result(job, self._jobs.pop(job)) for job in over]
            time.sleep(_LOOK_HERE_S if self._is_local else _LOOK_S)
        return []

    def stop(self) -> None:
        for job in self._jobs:
            job.cancel(check=False)
        self._jobs.clear()
        self._ready.clear()

    def submit(self) -> None:
        """Submits what has been started since the last call, as one array."""
        if not self._ready:
            return
        with self._executor.batch():
            jobs = [
                self._executor.submit(run_to_end, command, self._limit_s) for command in self._ready
            ]
        self._jobs |= dict(zip(jobs, self._ready, strict=True))
        self._ready.clear()


def _result(job: "submitit.Job[Ended]", command: UnitCommand) -> Ended:
    """A job's result; a job that SLURM has ended gives its state."""
    try:
        result: Ended = job.result()
        return result
    except Exception as error:  # submitit raises several kinds, and re-raises those of the job
        text = str(error).strip().splitlines()
        reason = text[0] if text else "no reason is known"
        return Ended(command.unit, 1, "SLURM", f"job {job.job_id} {job.state}: {reason}")
