"""The command `export`: writes the groups of a split for another training stack."""

import argparse
import json
from pathlib import Path

from merit_fast.cli.flags import Parser, Work, add_inputs, add_run_flags
from merit_fast.cli.stages import progress_of, read_config

FORMATS = ("axolotl", "llamafactory", "swift", "trl")


def add_export(parser: Parser) -> Work:
    """Adds the arguments of `export`; returns the function that does its work."""
    add_inputs(parser)
    add_run_flags(parser)
    add = parser.add_argument
    add("--format", choices=FORMATS, required=True, help="the stack that will train the groups")
    add("--out", metavar="FOLDER", required=True, help="folder of rows and configurations")
    help = "your own YAML of that stack: its keys are kept, its datasets replaced"
    add("--extend", metavar="FILE", type=Path, help=help)
    return _export


def _export(arguments: argparse.Namespace) -> None:
    file, config = read_config("export", arguments)
    from merit_fast.export import export_groups
    from merit_fast.pipeline.outputs import Outputs

    outputs = Outputs(config, f"merit-fast {{stage}} {file or '...'}")
    progress = progress_of(arguments)
    progress.note(f"export: reads the rows and writes {arguments.out}")
    out = Path(arguments.out)
    report = export_groups(outputs, arguments.format, out, arguments.extend, progress)
    if arguments.as_json:
        print(json.dumps(report))
        return
    for group in report["groups"]:
        print(
            f"group {group['group']}: {group['num_rows']:,} rows of "
            f"{len(group['datasets'])} datasets: {out / group['config']}"
        )
    print(f"after their training: {report['merge']}")
