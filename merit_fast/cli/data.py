"""The command `data`: reads and checks the datasets of a run, and shows what is trained on."""

import argparse
import json
from typing import TYPE_CHECKING

from merit_fast.cli.data_view import CLOSE, OPEN, describe, part_lines, shared_lines
from merit_fast.cli.flags import Parser, Work, add_inputs, add_run_flags
from merit_fast.cli.stages import progress_of, read_config
from merit_fast.errors import InputError
from merit_fast.progress import SilentProgress

if TYPE_CHECKING:
    from merit_fast.data.config import Part

_PARTS: tuple["Part", ...] = ("train", "eval")


def add_data(parser: Parser) -> Work:
    """Adds the arguments of `data`; returns the function that does its work."""
    add_inputs(parser)
    add_run_flags(parser)
    help = (
        f"examples of each dataset to show, with the loss in colour or {OPEN}{CLOSE} [default: 1]"
    )
    parser.add_argument("--show", metavar="N", type=int, default=1, help=help)
    return _show_data


def _show_data(arguments: argparse.Namespace) -> None:
    if arguments.show < 0:
        raise InputError(f"command line: --show: must be at least 0, got {arguments.show}")
    file, config = read_config("data", arguments)
    from merit_fast.data.mixture.checks import check_held_out
    from merit_fast.pipeline.data import RunData
    from merit_fast.pipeline.outputs import Outputs

    check_held_out(config.mixture)
    progress = SilentProgress() if arguments.as_json else progress_of(arguments)
    data = RunData(Outputs(config, f"merit-fast {{stage}} {file or '...'}"), progress, writes=False)
    described = []
    num_leaks = 0
    for part in _PARTS:
        selections = data.rows.select(part)
        num_leaks += sum(selection.num_leaks for selection in selections.values())
        for dataset in data.load(part):
            selection = selections[dataset.name]
            decode = data.tokenizer.decode
            described.append(describe(dataset, selection, part, arguments.show, decode))
    if arguments.as_json:
        plain = [{key: value for key, value in item.items() if key[0] != "_"} for item in described]
        print(json.dumps({"datasets": plain, "leaks": num_leaks}, ensure_ascii=False))
        return
    print("\n".join([*part_lines(described, config.mixture), *shared_lines(data.rows, num_leaks)]))
