"""The arguments of the command `merge`, and its two ways: a stage of a run, or checkpoints."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING, Any

from merit_fast.cli.flags import (
    Parser,
    Work,
    add_fields,
    add_upkeep,
    assignments_of,
    options_of,
    rows_of,
)
from merit_fast.errors import InputError
from merit_fast.manifests.stages import MERGE

if TYPE_CHECKING:
    import argparse

    from merit_fast.cli.merge.command import Tune
    from merit_fast.cli.merge.in_force import RunSource
    from merit_fast.progress import Progress

_RUN_FLAGS = "--arm, --seed-index, --quorum and --grace"
_MOST_NEW_OBJECTS = 10_000  # between two looks for garbage; Python's own 700


def add_merge(parser: Parser) -> Work:
    """Adds the arguments of `merge`, which also takes checkpoints without a run."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # NumPy multiplies no matrices here
    gc.set_threshold(_MOST_NEW_OBJECTS)  # imports and plans make many objects and little garbage
    options = options_of(MERGE)
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
    add(
        "--trajectory",
        metavar="PATTERN",
        help="average the checkpoints of one run that a quoted pattern names, as 'run/ckpt-*', "
        "or a YAML file",
    )
    add(
        "--schedule",
        metavar="NAME",
        help="with --trajectory: uniform, linear, minus-sqrt, ema:BETA, or a file of names and "
        "weights [default: uniform]",
    )
    add("--last", metavar="N", type=int, help="with --trajectory: only the latest N checkpoints")
    add("--base", metavar="DIR", help="the checkpoint from which the models were trained")
    add("--run", metavar="DIR", help="output of `run`: merge the split in force into OUT")
    add("--arm", metavar="ARM", help="with --run: the arm to merge [default: merit]")
    add("--seed-index", metavar="N", type=int, help="with --run: number of the seed, from 0")
    help = "with --run: enough branches, such as 3/4; the others cost their tokens [default: all]"
    add("--quorum", metavar="I/N", help=help)
    add("--grace", metavar="TIME", help="with --quorum: how long to wait for the others, as 2h")
    add("--mergekit", metavar="RECIPE.yml", help="a mergekit recipe to merge into OUT")
    add(
        "--validation",
        action="append",
        metavar="NAME=PATH",
        help="rows for --scale auto and --weights fit, with --model or --run; repeat for each "
        "dataset; data.KEY=VALUE sets an option of `data:` in place of the models' own",
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


def _merge(arguments: argparse.Namespace, options: type[Any]) -> None:

    from merit_fast.cli.merge.command import (
        merge_command,
        param_assignments,
        require_merge_inputs,
    )
    from merit_fast.cli.stages import progress_of, run_stage

    parameters = param_assignments(arguments.param or [], arguments.method)
    assignments = [*parameters, *assignments_of(arguments, options)]
    sources = (arguments.model, arguments.run, arguments.mergekit, arguments.trajectory)
    if arguments.trajectory is None and (arguments.schedule or arguments.last is not None):
        raise InputError("command line: merge: --schedule and --last go with --trajectory")
    if not any(sources):
        given = (arguments.dry_run, arguments.base, arguments.share, arguments.validation)
        if any(given) or any(flag is not None for flag in _run_flags(arguments)):
            flags = f"--dry-run, --base, --share, --validation, {_RUN_FLAGS}"
            rule = "go with --model, --run, --mergekit or --trajectory"
            raise InputError(f"command line: merge: {flags} {rule}")
        require_merge_inputs(arguments.inputs)
        run_stage(MERGE, arguments, [f"{MERGE.section}.{text}" for text in assignments])
        return
    if arguments.verify or arguments.overwrite:
        raise InputError("command line: merge: --verify and --overwrite go with a CONFIG.yml")
    if len(arguments.inputs) != 1 or "=" in arguments.inputs[0]:
        raise InputError(
            "command line: merge: with --model, --run, --mergekit or --trajectory needs exactly "
            "one OUT directory"
        )
    progress = progress_of(arguments)
    if arguments.trajectory is not None:
        _show(arguments, _average_trajectory(arguments, assignments, progress))
        return
    summary = merge_command(
        arguments.inputs[0],
        arguments.model,
        arguments.base,
        _run_source(arguments),
        arguments.mergekit,
        assignments,
        progress,
        dry_run=arguments.dry_run,
        share=arguments.share,
        tune=_tune(arguments.validation, progress),
    )
    _show(arguments, summary)


def _run_flags(arguments: argparse.Namespace) -> tuple[Any, ...]:
    """The flags that go with --run."""
    return arguments.arm, arguments.seed_index, arguments.quorum, arguments.grace


def _run_source(arguments: argparse.Namespace) -> RunSource | None:
    """The branches that --run and its flags name.

    Raises:
        InputError: such a flag is given without --run, or breaks its form.
    """
    if arguments.run is None:
        if any(flag is not None for flag in _run_flags(arguments)):
            raise InputError(f"command line: merge: {_RUN_FLAGS} go with --run")
        return None
    from pathlib import Path

    from merit_fast.cli.merge.in_force import RunSource, parse_quorum

    quorum = parse_quorum(arguments.quorum, arguments.grace)
    arm = arguments.arm or "merit"
    return RunSource(Path(arguments.run), arm, arguments.seed_index or 0, quorum)


def _average_trajectory(
    arguments: argparse.Namespace, assignments: list[str], progress: Progress
) -> dict[str, Any]:
    from merit_fast.cli.merge.command import share_of
    from merit_fast.cli.merge.trajectory import trajectory_command

    sources = (arguments.model, arguments.run, arguments.mergekit)
    others = (arguments.validation, *_run_flags(arguments))
    if any(sources) or any(each is not None for each in others):
        raise InputError(
            "command line: merge: --trajectory goes without --model, --run, --mergekit, "
            f"--validation, {_RUN_FLAGS}"
        )
    return trajectory_command(
        arguments.inputs[0],
        arguments.trajectory,
        assignments,
        progress,
        schedule=arguments.schedule,
        last=arguments.last,
        base=arguments.base,
        dry_run=arguments.dry_run,
        share=share_of(arguments.share),
    )


def _show(arguments: argparse.Namespace, summary: dict[str, Any]) -> None:
    import json

    from merit_fast.cli.merge.command import describe

    print(json.dumps(summary) if arguments.as_json else describe(summary, arguments.dry_run))


def _tune(validation: list[str] | None, progress: Progress) -> Tune | None:
    """A function that chooses a merge's numbers on these rows; it imports torch when called."""
    if not validation:
        return None
    rows, options = rows_of(validation)

    def tune(models: Any, base: Any, config: Any) -> Any:
        from merit_fast.cli.merge.tune import tune_checkpoints

        return tune_checkpoints(models, base, rows, config, progress, options)

    return tune
