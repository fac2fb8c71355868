"""Runs merit-fast as a driver and kills -9 itself while a unit runs.

    python kill_driver.py UNIT ARGUMENTS...

It prints the unit's process number and dies when the unit holds the lock of its output.
"""

import os
import signal
import sys
import time
from pathlib import Path

from merit_fast.execution.command import UnitCommand
from merit_fast.execution.local import LocalExecutor
from merit_fast.manifests.locks import LOCKS_FOLDER

name = sys.argv[1]
start = LocalExecutor.start


def start_and_die(executor: LocalExecutor, command: UnitCommand) -> None:
    start(executor, command)
    if command.unit != name:
        return
    output = Path(command.log).parents[2]
    end = time.monotonic() + 120
    while not list(output.glob(f"{LOCKS_FOLDER}/stage-{name}")) and time.monotonic() < end:
        time.sleep(0.02)
    [process] = executor._running
    print(process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


LocalExecutor.start = start_and_die  # type: ignore
sys.argv = ["merit-fast", *sys.argv[2:]]

from merit_fast.cli.main import main  # noqa: E402

main()
