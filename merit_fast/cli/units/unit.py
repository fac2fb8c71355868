"""The command `unit`: does one piece of a run's work, by hand or for an executor."""

import argparse
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from merit_fast.cli.flags import Parser, Work
from merit_fast.cli.units.stored import add_storage_flags, config_here, store_of
from merit_fast.errors import InputError
from merit_fast.manifests.stages import TRAIN
from merit_fast.progress import PlainProgress, Progress, SilentProgress

if TYPE_CHECKING:
    from merit_fast.pipeline.config import RunConfig
    from merit_fast.pipeline.run import Run


def add_unit(parser: Parser) -> Work:
    """Adds the arguments of `unit`."""
    form = "RUN | CONFIG.yml [SECTION.KEY=VALUE ...] [NAME]"
    help = (
        "the output of a run, or its YAML file and values that override its keys; then the name "
        "of the unit. Without a name: the units and their states"
    )
    parser.add_positional("inputs", form, help, nargs="+")
    help = "CPU threads of torch, in place of the key `threads`"
    parser.add_argument("--threads", type=int, metavar="N", help=help)
    add_storage_flags(parser)
    return _unit


def _unit(arguments: argparse.Namespace) -> None:
    from merit_fast.cli.stages import progress_of
    from merit_fast.execution.process import end_with_parent
    from merit_fast.model import keep_freed_memory
    from merit_fast.pipeline.run import Run
    from merit_fast.train.parallel.world import require_one_process, world_rank, world_size

    source, name, assignments = _words(arguments.inputs)
    store = store_of(arguments)
    file = config_here(source, arguments.scratch)
    file, config = read_unit_config(file, assignments, arguments.threads)
    if arguments.scratch is not None:
        config = replace(config, output=arguments.scratch)
    if world_size() > 1:  # torchrun starts it in a session that no signal of the driver reaches
        end_with_parent()
    follows = world_size() > 1 and world_rank() > 0
    progress: Progress = SilentProgress()
    if not follows:  # with --json too: an executor keeps the lines as the unit's log
        progress = PlainProgress() if arguments.as_json else progress_of(arguments)
    command = f"merit-fast {{stage}} {file}"
    run = Run(config, progress, command, dry_run=follows or name is None, store=store)
    if name is None:
        _show_units(run, arguments.as_json)
        return
    keep_freed_memory()
    if not name.startswith(f"{TRAIN.name}/"):
        require_one_process(f"unit {name}")
    if follows:  # the leading process writes and reports
        run.train()
        return
    _do(run, name, arguments.as_json)


def read_unit_config(
    source: Path, assignments: list[str], threads: int | None
) -> "tuple[Path, RunConfig]":
    """The YAML of a run's output, or ``source`` itself, and its config with overridden values.

    Raises:
        InputError: the folder holds no config, or a key breaks a rule.
    """
    from merit_fast.pipeline.config import read_run_config
    from merit_fast.pipeline.units.listing import config_in

    file = config_in(source) if source.is_dir() else source
    config = read_run_config(file, assignments)
    return file, config if threads is None else replace(config, threads=threads)


def _words(inputs: list[str]) -> tuple[str, str | None, list[str]]:
    """The run or YAML, the unit's name if there is one, and the assignments."""
    assignments = [word for word in inputs if "=" in word]
    words = [word for word in inputs if "=" not in word]
    if len(words) not in (1, 2):
        raise InputError(
            "command line: unit: must be RUN or CONFIG.yml, and the name of one unit; "
            f"got {' '.join(words) or 'nothing'}"
        )
    return words[0], words[1] if len(words) == 2 else None, assignments


def _do(run: "Run", name: str, as_json: bool) -> None:
    """Does a unit and prints what it cost."""
    from merit_fast.pipeline.units.doing import do_unit
    from merit_fast.pipeline.units.stored import do_stored_unit
    from merit_fast.units import human_bytes, human_time

    store = run.outputs.store
    started = time.perf_counter()
    worked = do_unit(run, name) if store is None else do_stored_unit(run, name)
    seconds = time.perf_counter() - started
    copied = {} if store is None else store.copied_bytes()
    if as_json:
        answer = {"unit": name, "worked": worked, "seconds": round(seconds, 3)}
        cost = {"cpu_seconds": cpu_seconds(), **moved_bytes(), **copied}
        print(json.dumps(answer | cost))
    else:
        state = f"done in {human_time(seconds)}" if worked else "up to date"
        words = [
            f"{human_bytes(size)} {what.removesuffix('_bytes')}" for what, size in copied.items()
        ]
        print("; ".join([f"{name}: {state}", *words]))


def cpu_seconds() -> float:
    """CPU seconds of this process and of its ended children, from their first instruction."""
    times = os.times()
    return round(times.user + times.system + times.children_user + times.children_system, 3)


def moved_bytes() -> dict[str, int]:
    """Bytes that this process has read and written by system calls, those of its cache included."""
    lines = Path("/proc/self/io").read_text().splitlines()
    counts = dict(line.split(": ") for line in lines)
    return {"read_bytes": int(counts["rchar"]), "written_bytes": int(counts["wchar"])}


def _show_units(run: "Run", as_json: bool) -> None:
    """Prints the state of every unit that is known."""
    from merit_fast.cli.status import unit_lines
    from merit_fast.pipeline.units.states import unit_states
    from merit_fast.pipeline.units.stored import take_plan

    if run.outputs.store is not None:
        take_plan(run)
    states = unit_states(run.outputs, run.data.rows)
    if as_json:
        print(json.dumps({"units": [asdict(state) for state in states]}))
        return
    for line in unit_lines(states):
        print(line)
