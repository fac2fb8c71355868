"""The table of commands: each has a purpose and a function that adds its arguments.

The stages' commands come from ``manifests.stages``. A function that adds arguments returns the
function that does the work with the parsed ones.
"""

import argparse
import importlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit_fast.cli.flags import (
    Parser,
    add_fields,
    add_inputs,
    add_upkeep,
    assignments_of,
    rows_of,
)
from merit_fast.cli.stages import progress_of, run_all, run_stage, split_inputs
from merit_fast.cli.status import add_clean, add_status
from merit_fast.errors import InputError
from merit_fast.manifests.stages import MERGE, STAGES, Stage
from merit_fast.progress import Progress

if TYPE_CHECKING:
    from merit_fast.cli.merge import Tune

Arguments = argparse.Namespace
Work = Callable[[Arguments], None]


@dataclass(frozen=True)
class Command:
    """One command of ``merit-fast``."""

    purpose: str  # one or two sentences
    add_arguments: Callable[[Parser], Work]


# ---- run and its stages
def _add_run(parser: Parser) -> Work:
    add_inputs(parser)
    add_upkeep(parser)

    def work(arguments: Arguments) -> None:
        from merit_fast.pipeline.config import read_run_config

        file, assignments = split_inputs(arguments.inputs)
        if file is None:
            raise InputError("command line: run: needs a CONFIG.yml")
        config = read_run_config(file, assignments)
        run_all(
            config,
            progress_of(arguments),
            str(file),
            arguments.as_json,
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
            return lambda arguments: run_stage(stage, arguments, [])
        options = _options_of(stage)
        parser.add_argument(
            "--model", metavar="MODEL", help="base model: directory or hub id (key `model`)"
        )
        parser.add_argument(
            "--dataset",
            action="append",
            metavar="NAME=PATH[,EVAL_PATH]",
            help="one dataset and its held-out rows; repeat for each dataset (key `mixture`)",
        )
        parser.add_argument(
            "--output", metavar="FOLDER", help="directory of all outputs (key `output`)"
        )
        add_fields(parser, options)

        def work(arguments: Arguments) -> None:
            run_stage(stage, arguments, assignments_of(arguments, options, f"{stage.section}."))

        return work

    return Command(stage.purpose, add_arguments)


def _options_of(stage: Stage) -> type[Any]:
    module, _, name = stage.options.partition(":")
    options: type[Any] = getattr(importlib.import_module(module), name)
    return options


# ---- advise
def _add_advise(parser: Parser) -> Work:
    add_inputs(parser)

    def work(arguments: Arguments) -> None:
        from merit_fast.cli.advise import advise_command
        from merit_fast.pipeline.config import read_run_config

        file, assignments = split_inputs(arguments.inputs)
        if file is None:
            raise InputError("command line: advise: needs a CONFIG.yml")
        config = read_run_config(file, assignments)
        advise_command(config, progress_of(arguments), str(file), arguments.as_json)

    return work


# ---- merge, which also takes checkpoints without a run
def _add_merge(parser: Parser) -> Work:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy multiplies no matrices here
    options = _options_of(MERGE)
    help = "output directory; or the run's YAML file and values that override its keys"
    form = "OUT | CONFIG.yml [SECTION.KEY=VALUE ...]"
    parser.add_positional("inputs", form, help, nargs="*")
    add = parser.add_argument
    add(
        "--model",
        action="append",
        metavar="DIR[:WEIGHT]",
        help="a checkpoint or adapter to merge, as directory or URL; repeat for each",
    )
    add("--base", metavar="DIR", help="the checkpoint from which the models were trained")
    add("--run", metavar="DIR", help="output of `run`: merge the split in force into OUT")
    add("--arm", metavar="ARM", help="with --run: the arm to merge [default: merit]")
    add("--seed-index", metavar="N", type=int, help="with --run: number of the seed, from 0")
    add("--mergekit", metavar="RECIPE.yml", help="a mergekit recipe to merge into OUT")
    add(
        "--validation",
        action="append",
        metavar="NAME=PATH",
        help="rows for --scale auto and --weights fit, with --model or --run; "
        "repeat for each dataset",
    )
    add(
        "--param",
        action="append",
        metavar="KEY=VALUE",
        help="sets any key of the `merge` section, or a number of a registered method; repeatable",
    )
    add(
        "--share",
        "--shard",
        dest="share",
        metavar="I/N",
        help="write the I-th of N shares of the output files; the last process finishes",
    )
    add("--dry-run", action="store_true", help="check and plan from the headers, write nothing")
    add_upkeep(parser)
    add_fields(parser, options)
    return lambda arguments: _merge(arguments, options)


def _merge(arguments: Arguments, options: type[Any]) -> None:
    from merit_fast.cli.merge import describe, merge_command, param_assignments

    parameters = param_assignments(arguments.param or [], arguments.method)
    assignments = [*parameters, *assignments_of(arguments, options)]
    if not (arguments.model or arguments.run or arguments.mergekit):
        given = (arguments.dry_run, arguments.base, arguments.share, arguments.validation)
        if any(given) or arguments.arm or arguments.seed_index is not None:
            flags = "--dry-run, --base, --share, --validation, --arm and --seed-index"
            raise InputError(f"command line: merge: {flags} go with --model, --run or --mergekit")
        run_stage(MERGE, arguments, [f"{MERGE.section}.{text}" for text in assignments])
        return
    if arguments.verify or arguments.overwrite:
        raise InputError("command line: merge: --verify and --overwrite go with a CONFIG.yml")
    if len(arguments.inputs) != 1 or "=" in arguments.inputs[0]:
        raise InputError(
            "command line: merge: with --model, --run or --mergekit needs exactly one OUT directory"
        )
    progress = progress_of(arguments)
    summary = merge_command(
        arguments.inputs[0],
        arguments.model,
        arguments.base,
        arguments.run,
        arguments.mergekit,
        assignments,
        progress,
        dry_run=arguments.dry_run,
        share=arguments.share,
        arm=arguments.arm,
        seed_index=arguments.seed_index,
        tune=_tune(arguments.validation, progress),
    )
    print(json.dumps(summary) if arguments.as_json else describe(summary, arguments.dry_run))


def _tune(validation: list[str] | None, progress: Progress) -> "Tune | None":
    """A function that chooses a merge's numbers on these rows; it imports torch when called."""
    if not validation:
        return None
    rows = rows_of(validation)

    def tune(models: Any, base: Any, config: Any) -> Any:
        from merit_fast.cli.tune import tune_checkpoints

        return tune_checkpoints(models, base, rows, config, progress)

    return tune


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
        from merit_fast.cli.doctor import diagnose, print_diagnosis

        diagnosis = diagnose()
        if arguments.as_json:
            print(json.dumps(diagnosis))
        else:
            print_diagnosis(diagnosis)

    return work


COMMANDS: dict[str, Command] = {
    "run": Command(
        "Run every stage of CONFIG.yml. Skips finished stages, resumes interrupted ones.", _add_run
    ),
    "advise": Command(
        "Sketch and split the mixture of CONFIG.yml, then advise for or against the split.",
        _add_advise,
    ),
    **{stage.name: _stage_command(stage) for stage in STAGES},
    MERGE.name: Command(MERGE.purpose, _add_merge),  # keeps its place between train and evaluate
    "verify": Command("Compare the files of a run or a model with their checksums.", _add_verify),
    "status": Command("Show the state, time and size of every output of a run.", add_status),
    "clean": Command("Remove what no command needs any more from a run's output.", add_clean),
    "demo": Command(
        "Prepare a real small model and real tasks, then run all stages. Works offline.", _add_demo
    ),
    "doctor": Command(
        "Show versions, the ISA level, and each op's backend with the reasons against others.",
        _add_doctor,
    ),
}
