"""The work of `run --executor`: makes the executor and drives the run's units with it."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from merit_fast.progress import Progress

if TYPE_CHECKING:
    from merit_fast.execution.drive import Executor
    from merit_fast.pipeline.config import RunConfig


def run_units(
    config: "RunConfig", progress: Progress, file: str, arguments: argparse.Namespace
) -> None:
    """Brings a run up to date by units and prints its summary."""
    from merit_fast.execution.drive import drive
    from merit_fast.pipeline.run import check_output

    check_output(config)
    executor = _executor(config, arguments)
    command = f"merit-fast {{stage}} {file}"
    summary = drive(config, executor, progress, command, verify=arguments.verify)
    if arguments.as_json:
        print(json.dumps(summary))
        return
    from merit_fast.report import print_summary

    print_summary(Path(config.output))


def _executor(config: "RunConfig", arguments: argparse.Namespace) -> "Executor":
    from merit_fast.execution.local import LocalExecutor, visible_gpus, workers_here
    from merit_fast.model import resolve_model

    processes = arguments.unit_processes or 1
    gpus = visible_gpus()
    workers = arguments.workers
    if workers is None:
        weights = resolve_model(config.model).glob("*.safetensors")
        size = sum(file.stat().st_size for file in weights)
        workers = workers_here(size, processes, gpus)
    threads = arguments.unit_threads or config.threads
    return LocalExecutor(workers, threads, gpus, processes)
