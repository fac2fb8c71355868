"""The commands `duplicates` and `outliers`: rows of a mixture that deserve a look."""

import argparse
import json
from typing import TYPE_CHECKING

from merit_fast.cli.flags import Parser, Work, add_inputs, add_run_flags
from merit_fast.cli.stages import read_config
from merit_fast.errors import InputError

if TYPE_CHECKING:
    from merit_fast.row_store.rows import Rows


def add_duplicates(parser: Parser) -> Work:
    """Adds the arguments of `duplicates`; returns the function that does its work."""
    add_inputs(parser)
    add_run_flags(parser)
    help = "least cosine of two rows' gradients, above 0 and at most 1 [default: 0.999]"
    parser.add_argument("--above", metavar="COSINE", type=float, default=0.999, help=help)
    return _duplicates


def add_outliers(parser: Parser) -> Work:
    """Adds the arguments of `outliers`; returns the function that does its work."""
    add_inputs(parser)
    add_run_flags(parser)
    help = "rows of each dataset to show [default: 5]"
    parser.add_argument("--keep", metavar="N", type=int, default=5, help=help)
    return _outliers


def _duplicates(arguments: argparse.Namespace) -> None:
    rows = _open("duplicates", arguments)
    pairs = rows.duplicates(arguments.above)
    if arguments.as_json:
        plain = [{"a": list(p.a), "b": list(p.b), "cosine": p.cosine} for p in pairs]
        print(json.dumps({"pairs": plain}, ensure_ascii=False))
        return
    print(f"{len(pairs):,} pairs with a cosine of at least {arguments.above:g} (rows from 0)")
    for pair in pairs:
        print(f"  {pair.cosine:.6f}  {pair.a[0]} {pair.a[1]}  {pair.b[0]} {pair.b[1]}")


def _outliers(arguments: argparse.Namespace) -> None:
    if arguments.keep < 1:
        raise InputError(f"command line: --keep: must be at least 1, got {arguments.keep}")
    rows = _open("outliers", arguments)
    found = {name: rows.outliers(name, arguments.keep) for name in rows.datasets}
    if arguments.as_json:
        plain = {
            name: [{"row": hit.row, "cosine": hit.score, "error": hit.error} for hit in hits]
            for name, hits in found.items()
        }
        print(json.dumps({"outliers": plain}, ensure_ascii=False))
        return
    print("lowest cosines of a row's gradient with the mean of its dataset's others (rows from 0)")
    for name, hits in found.items():
        for hit in hits:
            error = "" if hit.error is None else f" ± {hit.error:.3f}"
            print(f"  {hit.score:+.3f}{error}  {name} {hit.row}")


def _open(command: str, arguments: argparse.Namespace) -> "Rows":
    file, config = read_config(command, arguments)
    from merit_fast.pipeline.outputs import Outputs
    from merit_fast.selection.store import open_store

    return open_store(Outputs(config, f"merit-fast {{stage}} {file or '...'}"))
