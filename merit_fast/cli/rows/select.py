"""The command `select`: writes the rows of a mixture that agree most with a target."""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit_fast.cli.flags import Parser, Work, add_inputs, add_run_flags
from merit_fast.cli.stages import progress_of, read_config

if TYPE_CHECKING:
    from merit_fast.row_store.hits import Hit
    from merit_fast.row_store.rows import Rows


def add_select(parser: Parser) -> Work:
    """Adds the arguments of `select`; returns the function that does its work."""
    add_inputs(parser)
    add_run_flags(parser)
    add = parser.add_argument
    help = "a dataset of the mixture, or a file of other rows, which are sketched as its rows"
    add("--target", metavar="NAME|NAME=PATH", required=True, help=help)
    help = "rows to write: a number, or a share of all stored rows but the target's own"
    add("--keep", metavar="N|P%", required=True, help=help.replace("%", "%%"))
    add("--out", metavar="FILE", required=True, help="JSONL of the rows as they came, with scores")
    help = "measure between a row's gradient and the target's mean gradient [default: cosine]"
    add("--by", choices=("cosine", "dot"), default="cosine", help=help)
    help = "what a row counts in the target's mean: its target tokens, or 1 [default: split.weight]"
    add("--weight", choices=("tokens", "examples"), help=help)
    return _select


def _select(arguments: argparse.Namespace) -> None:
    file, config = read_config("select", arguments)
    from merit_fast.pipeline.outputs import Outputs
    from merit_fast.selection.picked import (
        check_out,
        num_candidates,
        num_kept,
        pick_rows,
        read_keep,
        write_picked,
    )
    from merit_fast.selection.store import open_store
    from merit_fast.selection.target import read_target, sketch_target

    outputs = Outputs(config, f"merit-fast {{stage}} {file or '...'}")
    config = outputs.config
    out = Path(arguments.out).expanduser()
    keep = read_keep(arguments.keep)
    target = read_target(arguments.target, outputs)
    check_out(out, config, [] if target.outside is None else [target.outside])
    rows = open_store(outputs)
    searched: str | Rows = target.name
    candidates = num_candidates(rows, None if target.outside else target.name)
    count = num_kept(keep, candidates)
    if target.outside is not None:
        searched = sketch_target(target.outside, rows, outputs, progress_of(arguments))
    weight = arguments.weight or config.split.filled().weight
    hits = pick_rows(rows, searched, count, arguments.by, weight)
    write_picked(out, hits, config)
    measures = {"by": arguments.by, "weight": weight, "candidates": candidates}
    report = {"out": str(out), "target": target.name, **measures, **_described(hits)}
    if arguments.as_json:
        print(json.dumps(report, ensure_ascii=False))
    else:
        print("\n".join(_lines(report)))


def _described(hits: "Sequence[Hit]") -> dict[str, Any]:
    from merit_fast.row_store.hits import count_indistinct

    return {
        "kept": len(hits),
        "datasets": dict(Counter(hit.dataset for hit in hits).most_common()),
        "best_score": hits[0].score,
        "last_score": hits[-1].score,
        "last_error": hits[-1].error,
        "indistinct": count_indistinct(hits),
    }


def _lines(report: dict[str, Any]) -> list[str]:
    """The report for a terminal."""
    listed = ", ".join(f"{name} {number:,}" for name, number in report["datasets"].items())
    scores = f"{report['by']} {report['best_score']:.3g} to {report['last_score']:.3g}"
    rows = f"{report['kept']:,} of {report['candidates']:,} rows in {report['out']}"
    indistinct = report["indistinct"]
    if indistinct is None:
        last = "the scores have no errors: the target has too few rows"
    else:
        last = (
            f"{indistinct:,} of the rows kept cannot be told apart from the last one "
            "(two standard errors of the difference)"
        )
    return [f"select: {rows}: {scores}; {listed}", last]
