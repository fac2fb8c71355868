"""The work of `run --executor`: makes the executor and drives the run's units with it."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from merit_fast.cli.flags import read_seconds
from merit_fast.cli.units.stored import store_of
from merit_fast.errors import InputError
from merit_fast.manifests.ledger import UNITS_FOLDER
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

    store = store_of(arguments)
    if arguments.scratch is not None:
        config = replace(config, output=arguments.scratch)
    check_output(config)
    executor = _executor(config, arguments)
    command = f"merit-fast {{stage}} {file}"
    summary = drive(config, executor, progress, command, verify=arguments.verify, store=store)
    if arguments.as_json:
        print(json.dumps(summary))
        return
    from merit_fast.report import print_summary

    print_summary(Path(config.output))


def _executor(config: "RunConfig", arguments: argparse.Namespace) -> "Executor":
    options = _options(arguments.executor_option or [])
    makers = {"local": _local, "ray": _ray, "submitit": _submitit}
    return makers[arguments.executor](config, arguments, options)


def _local(
    config: "RunConfig", arguments: argparse.Namespace, options: dict[str, Any]
) -> "Executor":
    from merit_fast.execution.local import LocalExecutor, visible_gpus, workers_here
    from merit_fast.model import resolve_model

    _refuse_others(options, ())
    if arguments.unit_gpus is not None:
        raise InputError("command line: --unit-gpus: is of ray and submitit; see --unit-processes")
    processes = arguments.unit_processes or 1
    gpus = visible_gpus()
    workers = arguments.workers
    if workers is None:
        weights = resolve_model(config.model).glob("*.safetensors")
        size = sum(file.stat().st_size for file in weights)
        workers = workers_here(size, processes, gpus)
    threads = arguments.unit_threads or config.threads
    return LocalExecutor(workers, threads, gpus, processes, _limit_s(arguments))


def _ray(config: "RunConfig", arguments: argparse.Namespace, options: dict[str, Any]) -> "Executor":
    _refuse_others(options, ("address",))
    from merit_fast.execution.on_ray import RayExecutor

    processes = arguments.unit_processes or 1
    threads = arguments.unit_threads or config.threads or 1
    gpus = (arguments.unit_gpus or 0) / processes
    address = options.get("address")
    limit_s = _limit_s(arguments)
    with _extra("ray"):
        return RayExecutor(arguments.workers, threads, processes, gpus, address, limit_s)


def _submitit(
    config: "RunConfig", arguments: argparse.Namespace, options: dict[str, Any]
) -> "Executor":
    with _extra("submitit"):
        from merit_fast.execution.on_slurm import SubmititExecutor

    cluster = options.pop("cluster", None)
    folder = Path(options.pop("folder", None) or Path(config.output) / UNITS_FOLDER / "submitit")
    threads = arguments.unit_threads or config.threads or 1
    processes = arguments.unit_processes or 1
    gpus = arguments.unit_gpus or 0
    workers = arguments.workers
    limit_s = _limit_s(arguments)
    return SubmititExecutor(folder, workers, threads, processes, gpus, cluster, options, limit_s)


def _limit_s(arguments: argparse.Namespace) -> float | None:
    """Seconds of ``--unit-limit``; None: a unit may take any time."""
    text = arguments.unit_limit
    return None if text is None else read_seconds("--unit-limit", text)


def _options(words: Sequence[str]) -> dict[str, Any]:
    """``--executor-option KEY=VALUE`` as a mapping; values are YAML."""
    options = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (key and equals):
            raise InputError(f"command line: --executor-option: must be KEY=VALUE, got {word!r}")
        options[key] = yaml.safe_load(value)
    return options


def _refuse_others(options: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in options.keys() - set(known):
        rule = f"must be {', '.join(known)}" if known else "has no options with this executor"
        raise InputError(f"command line: --executor-option: {rule}, got {key}")


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Names the extra to install where a library is absent."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise InputError(
            f"--executor {name}: needs {name}: pip install 'merit_fast[{name}]'"
        ) from None
