"""The command `extract-lora`: the difference of two models as an adapter."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from merit_fast.cli.flags import Parser, Work
from merit_fast.cli.stages import progress_of
from merit_fast.units import human_count


def add_extract(parser: Parser) -> Work:
    """Adds the arguments of `extract-lora`; returns the function that does its work."""
    parser.add_positional("out", "OUT", "directory of the adapter")
    add = parser.add_argument
    add("--base", metavar="DIR", required=True, help="the model from which the fine-tune started")
    add("--model", metavar="DIR", required=True, help="the fine-tune, with the same tensors")
    add("--rank", metavar="R", type=int, help="rank of every layer's factors")
    help = "share of each matrix's squared norm to keep, such as 0.99: ranks differ by layer"
    add("--energy", metavar="SHARE", type=float, help=help)
    return _extract


def _extract(arguments: argparse.Namespace) -> None:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(min(os.cpu_count() or 1, 8)))
    from merit_fast.merge.lora.extract import ExtractConfig, extract_lora
    from merit_fast.merge.read.remote import as_location
    from merit_fast.options.parser import parse

    given = {"rank": arguments.rank, "energy": arguments.energy}
    present = {key: value for key, value in given.items() if value is not None}
    config = parse(ExtractConfig, present, "command line: extract-lora")
    summary = extract_lora(
        as_location(arguments.base),
        as_location(arguments.model),
        Path(arguments.out),
        config,
        progress_of(arguments),
    )
    print(json.dumps(summary) if arguments.as_json else describe_extraction(summary))


def describe_extraction(summary: dict[str, Any]) -> str:
    """The summary for people: errors by kind and in total."""
    low, high = summary["rank"]
    rank = f"rank {low}" if low == high else f"ranks {low} to {high}"
    lines = [
        f"{summary['extracted']}: done: an adapter of {human_count(summary['parameters'])} "
        f"parameters, {rank}, that turns {summary['base']} into {summary['model']}"
    ]
    for kind, count in summary["tensors"].items():
        error = summary["errors"][kind]
        lines.append(f"  {kind:<9} {count:>5} tensors, relative error {error:.3e}")
    lines.append(f"  unchanged {summary['unchanged']:>5} tensors")
    lines.append(f"  total: relative error {summary['error']:.3e} of the change")
    if left := summary["left_out"]:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        lines.append(f"  left out, because no adapter holds it: {left[0]}{more}")
    return "\n".join(lines)
