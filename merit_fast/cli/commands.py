"""The table of commands: each has a purpose and a function that adds its arguments.

The stages' commands come from ``manifests.stages``. A function that adds arguments returns the
function that does the work with the parsed ones.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from merit_fast.cli.flags import (
    Parser,
    Work,
    add_executor_flags,
    add_fields,
    add_inputs,
    add_run_flags,
    add_upkeep,
    assignments_of,
    check_executor_flags,
    help_of_keys,
    options_of,
)
from merit_fast.manifests.stages import MERGE, STAGES, Stage
from merit_fast.records import record

if TYPE_CHECKING:
    import argparse

    Arguments = argparse.Namespace


@record
class Command:
    """One command of ``merit-fast``."""

    purpose: str  # one or two sentences
    add_arguments: Callable[[Parser], Work]


def _placed(place: str) -> Callable[[Parser], Work]:
    """The function ``module:name`` of the command line, imported when it is called.

    A command's help then imports what that command needs, and nothing of the others.
    """

    def add_arguments(parser: Parser) -> Work:
        module, _, name = place.partition(":")
        add: Callable[[Parser], Work] = getattr(
            importlib.import_module(f"merit_fast.cli.{module}"), name
        )
        return add(parser)

    return add_arguments


# ---- run and its stages
def _add_run(parser: Parser) -> Work:
    from merit_fast.cli.units.stored import add_storage_flags

    add_inputs(parser)
    add_upkeep(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, then show each stage's rows, tokens, steps, disk and minutes; "
        "write nothing",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=1,
        metavar="N",
        help="split, train and merge N times, each from the merge before, in OUTPUT/round-2, ...",
    )
    add_run_flags(parser)
    add_executor_flags(parser)
    add_storage_flags(parser)
    parser.ending = help_of_keys

    def work(arguments: Arguments) -> None:
        from merit_fast.cli.stages import progress_of, read_config, run_all, show_forecast

        file, config = read_config("run", arguments)
        progress = progress_of(arguments)
        name = str(file or "...")
        check_executor_flags(arguments)
        if arguments.dry_run:
            show_forecast(config, progress, name, arguments.as_json, arguments.rounds)
            return
        if arguments.executor is not None:
            from merit_fast.cli.units.executor import run_units

            run_units(config, progress, name, arguments)
            return
        run_all(
            config,
            progress,
            name,
            arguments.as_json,
            rounds=arguments.rounds,
            verify=arguments.verify,
            overwrite=arguments.overwrite,
        )

    return work


def _stage_command(stage: Stage) -> Command:
    """The command of a stage; its flags are the fields of the stage's config."""

    def add_arguments(parser: Parser) -> Work:
        add_inputs(parser)
        add_upkeep(parser)
        if not stage.options:
            return lambda arguments: _run_stage(stage, arguments, [])
        options = options_of(stage)
        add_run_flags(parser)
        add_fields(parser, options)

        def work(arguments: Arguments) -> None:
            _run_stage(stage, arguments, assignments_of(arguments, options, f"{stage.section}."))

        return work

    return Command(stage.purpose, add_arguments)


def _run_stage(stage: Stage, arguments: Arguments, assignments: list[str]) -> None:
    from merit_fast.cli.stages import run_stage

    run_stage(stage, arguments, assignments)


# ---- advise
def _add_advise(parser: Parser) -> Work:
    add_inputs(parser)
    add_run_flags(parser)

    def work(arguments: Arguments) -> None:
        from merit_fast.cli.advise import advise_command
        from merit_fast.cli.stages import progress_of, read_config

        file, config = read_config("advise", arguments)
        advise_command(config, progress_of(arguments), str(file or "..."), arguments.as_json)

    return work


# ---- verify, demo, doctor
def _add_verify(parser: Parser) -> Work:
    help = "a run, an output of a run or of `merge`, or a model merged with --checksum"
    parser.add_positional("directory", "DIRECTORY", help)

    def work(arguments: Arguments) -> None:
        from merit_fast.cli.verify import verify_command

        verify_command(arguments.directory, arguments.as_json)

    return work


def _add_demo(parser: Parser) -> Work:
    help = "directory of all outputs [default: runs/demo, with --quick runs/demo-quick]"
    parser.add_argument("--out", metavar="FOLDER", help=help)
    parser.add_argument("--quick", action="store_true", help="fewer tasks, two groups")
    help = "adds tasks from num2words (LGPL), if it is installed"
    parser.add_argument("--copyleft", action="store_true", help=help)

    def work(arguments: Arguments) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from pathlib import Path

        from merit_fast.cli.stages import progress_of, run_all
        from merit_fast.demo import write_demo
        from merit_fast.pipeline.config import read_run_config

        progress = progress_of(arguments)
        progress.note("preparing the demo's model and tasks (converted once, then cached)")
        folder = Path(arguments.out or ("runs/demo-quick" if arguments.quick else "runs/demo"))
        file = write_demo(folder, quick=arguments.quick, include_copyleft=arguments.copyleft)
        progress.note(f"this demo is: merit-fast run {file}")
        run_all(read_run_config(file), progress, str(file), arguments.as_json)

    return work


def _add_doctor(parser: Parser) -> Work:
    def work(arguments: Arguments) -> None:
        import json

        from merit_fast.cli.doctor import diagnose, print_diagnosis

        diagnosis = diagnose()
        if arguments.as_json:
            print(json.dumps(diagnosis))
        else:
            print_diagnosis(diagnosis)

    return work


COMMANDS: dict[str, Command] = {
    "init": Command(
        "Write a commented YAML for the files of rows in a folder.", _placed("init:add_init")
    ),
    "data": Command(
        "Show the datasets of CONFIG.yml: rows, tokens, and what is trained on.",
        _placed("data:add_data"),
    ),
    "run": Command(
        "Run every stage of CONFIG.yml. Skips finished stages, resumes interrupted ones.", _add_run
    ),
    "unit": Command(
        "Do one unit of a run's work, or list the units. May run twice, anywhere.",
        _placed("units.unit:add_unit"),
    ),
    "launch": Command(
        "Print the job files of a run for a shell, SLURM, Kubernetes, Ray or a cloud.",
        _placed("units.launch:add_launch"),
    ),
    "advise": Command(
        "Sketch and split the mixture of CONFIG.yml, then advise for or against the split.",
        _add_advise,
    ),
    **{stage.name: _stage_command(stage) for stage in STAGES},
    MERGE.name: Command(
        MERGE.purpose, _placed("merge.flags:add_merge")
    ),  # keeps its place between train and evaluate
    "extract-lora": Command(
        "Write the adapter that turns a base into a fine-tune, by truncated SVD.",
        _placed("merge.extract:add_extract"),
    ),
    "select": Command(
        "Write the rows that agree most with a target, by their stored sketches.",
        _placed("rows.select:add_select"),
    ),
    "duplicates": Command(
        "Show pairs of rows with nearly the same gradient.", _placed("rows.doubtful:add_duplicates")
    ),
    "outliers": Command(
        "Show the rows that agree least with their own dataset.",
        _placed("rows.doubtful:add_outliers"),
    ),
    "export": Command(
        "Write the groups of a split for axolotl, LLaMA-Factory or TRL.",
        _placed("export:add_export"),
    ),
    "verify": Command("Compare the files of a run or a model with their checksums.", _add_verify),
    "status": Command(
        "Show the state, time and size of every output of a run.", _placed("status:add_status")
    ),
    "clean": Command(
        "Remove what no command needs any more from a run's output.", _placed("status:add_clean")
    ),
    "demo": Command(
        "Prepare a real small model and real tasks, then run all stages. Works offline.", _add_demo
    ),
    "doctor": Command(
        "Show versions, the ISA level, and each op's backend with the reasons against others.",
        _add_doctor,
    ),
}
