"""The commands `status` and `clean`: the outputs of a run, and the removal of those not needed."""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from merit_fast.cli.flags import Parser, Work
from merit_fast.errors import InputError
from merit_fast.progress import SilentProgress
from merit_fast.units import human_bytes, human_time

if TYPE_CHECKING:
    from merit_fast.merge.read.remote import Location
    from merit_fast.pipeline.config import RunConfig
    from merit_fast.pipeline.kept.status import OutputStatus
    from merit_fast.pipeline.units.states import UnitState

    Remove = Callable[[Sequence[OutputStatus]], list[OutputStatus]]


def add_status(parser: Parser) -> Work:
    """Adds the arguments of `status`."""
    _add_inputs(parser)
    parser.add_argument("--verify", action="store_true", help="hash every file of the outputs")
    return _status


def add_clean(parser: Parser) -> Work:
    """Adds the arguments of `clean`."""
    _add_inputs(parser, nargs="*")
    help = "a store of outputs in place of RUN: attempts that died more than a day ago"
    parser.add_argument("--storage", metavar="URL", help=help)
    parser.add_argument("--dry-run", action="store_true", help="list the folders, remove nothing")
    parser.add_argument("--yes", action="store_true", help="remove without asking")
    return _clean


def _add_inputs(parser: Parser, nargs: str = "+") -> None:
    form = "RUN | CONFIG.yml [SECTION.KEY=VALUE ...]"
    help = "the output of a run; or its YAML file and values that override its keys"
    parser.add_positional("inputs", form, help, nargs=nargs)


def _status(arguments: argparse.Namespace) -> None:
    root, config, rows = _read(arguments.inputs, arguments.verify)
    states, problem = _unit_states(root, config)
    if arguments.as_json:
        outputs = [asdict(row) for row in rows]
        units = [asdict(state) for state in states]
        answer = {"output": str(root), "outputs": outputs, "units": units}
        print(json.dumps(answer | ({"units_problem": problem} if problem else {})))
        return
    for line in _table(rows):
        print(line)
    for line in unit_lines(states):
        print(line)
    if problem:
        print(f"units: their states cannot be told here: {problem}")


def _unit_states(root: Path, config: "RunConfig | None") -> "tuple[list[UnitState], str]":
    """States of the units of a run that a driver has divided, and why they cannot be told."""
    from merit_fast.manifests.ledger import UNITS_FOLDER
    from merit_fast.pipeline.config import read_run_config
    from merit_fast.pipeline.data import TOKENS_FOLDER, RunData
    from merit_fast.pipeline.outputs import Outputs
    from merit_fast.pipeline.units.listing import CONFIG_FILE
    from merit_fast.pipeline.units.states import unit_states

    file = root / UNITS_FOLDER / CONFIG_FILE
    if not file.exists():
        return [], ""
    try:
        driven = config or replace(read_run_config(file), output=str(root))  # it may have moved
        outputs = Outputs(driven, f"merit-fast {{stage}} {file}")
        data = RunData(outputs, SilentProgress(), writes=(root / TOKENS_FOLDER).is_dir())
        return unit_states(outputs, data.rows), ""
    except InputError as error:  # the base or the rows are not here
        return [], str(error)


def unit_lines(states: "list[UnitState]") -> list[str]:
    """A line for the state of each unit."""
    width = max((len(state.name) for state in states), default=0)
    return [f"{s.name:{width}}  {s.state:<10}  {s.detail}".rstrip() for s in states]


def _clean(arguments: argparse.Namespace) -> None:
    root, rows, remove = _removable(arguments)
    total = sum(row.num_bytes for row in rows)
    if not arguments.as_json:
        for line in _table(rows):
            print(line)
    if not rows or arguments.dry_run:
        _report(arguments, root, [], f"{human_bytes(total)} can be freed", rows)
        return
    if not arguments.yes and not _agreed(root, total):
        print(f"{root}: nothing was removed")
        return
    gone = remove(rows)
    freed = sum(row.num_bytes for row in gone)
    kept = [row for row in rows if row not in gone]
    _report(arguments, root, gone, f"freed {human_bytes(freed)}", kept)


def _removable(
    arguments: argparse.Namespace,
) -> "tuple[Location, list[OutputStatus], Remove]":
    """The outputs that a run or a store can spare, and the function that removes them."""
    if arguments.storage is None:
        from merit_fast.pipeline.kept.clean import removable, remove

        root, _, rows = _read(arguments.inputs, verify=False)
        return root, removable(rows), functools.partial(remove, root)
    if arguments.inputs:
        raise InputError(f"command line: clean: {arguments.inputs[0]}: does not go with --storage")
    from merit_fast.pipeline.kept.attempts import dead_attempts, remove_attempts
    from merit_fast.pipeline.storage.place import open_place
    from merit_fast.pipeline.storage.store import OutputStore

    store = OutputStore(open_place(arguments.storage))
    return store.place, dead_attempts(store), functools.partial(remove_attempts, store)


def _agreed(root: "Location", total: int) -> bool:
    if not sys.stdin.isatty():
        raise InputError(
            "command line: clean: asks on a terminal only; --yes removes these folders"
        )
    return input(f"{root}: remove these, {human_bytes(total)}? [y/N] ").strip().lower() in (
        "y",
        "yes",
    )


def _report(
    arguments: argparse.Namespace,
    root: "Location",
    gone: "list[OutputStatus]",
    sentence: str,
    kept: "list[OutputStatus]",
) -> None:
    if arguments.as_json:
        lists = {"removed": [row.name for row in gone], "kept": [row.name for row in kept]}
        freed = sum(row.num_bytes for row in gone)
        print(json.dumps({"output": str(root), **lists, "freed_bytes": freed}))
        return
    print(f"{root}: {sentence}")
    if gone and kept:
        names = ", ".join(row.name for row in kept)
        print(f"{root}: another process works here, so these stay: {names}")


def _read(inputs: list[str], verify: bool) -> "tuple[Path, RunConfig | None, list[OutputStatus]]":
    """The run's output, its config where a YAML is given, and the states of its outputs."""
    from merit_fast.cli.stages import split_inputs
    from merit_fast.pipeline.config import read_run_config
    from merit_fast.pipeline.kept.status import config_status, run_status
    from merit_fast.pipeline.run import check_output

    file, assignments = split_inputs(inputs)
    if file is None:
        raise InputError("command line: needs a RUN directory or a CONFIG.yml")
    if file.is_dir():
        if assignments:
            raise InputError(f"command line: {assignments[0]}: must go with a CONFIG.yml")
        return file, None, run_status(file, verify)
    config = read_run_config(file, assignments)
    check_output(config)
    rows = config_status(config, f"merit-fast {{stage}} {file}", verify)
    return Path(config.output), config, rows


def _table(rows: "list[OutputStatus]") -> list[str]:
    width = max((len(row.name) for row in rows), default=0)
    lines = []
    for row in rows:
        time = "" if row.seconds is None else human_time(row.seconds)
        size = human_bytes(row.num_bytes) if row.num_bytes else ""
        line = f"{row.name:<{width}}  {row.state:<24}  {time:>11}  {size:>9}  {row.detail}"
        lines.append(line.rstrip())
    return lines
