"""The work of the commands that run stages of a configured run."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from merit_fast.cli.flags import run_flags
from merit_fast.errors import InputError
from merit_fast.manifests.stages import MERGE, SKETCH, TRAIN, Stage
from merit_fast.options.parser import to_plain
from merit_fast.progress import PlainProgress, Progress, SilentProgress, TerminalProgress

if TYPE_CHECKING:
    from merit_fast.pipeline.config import RunConfig


def run_stage(stage: Stage, arguments: argparse.Namespace, assignments: list[str]) -> None:
    """Brings one stage up to date and prints where its output is."""
    from merit_fast.model import keep_freed_memory
    from merit_fast.pipeline.run import Run, check_output
    from merit_fast.train.parallel.world import require_one_process, world_rank, world_size

    has_flags = bool(stage.options) and stage is not MERGE
    file, config = read_config(stage.name, arguments, assignments, has_flags=has_flags)
    check_output(config)
    if stage is not MERGE:  # a merge bounds its memory itself
        keep_freed_memory()
    if stage not in (SKETCH, TRAIN):
        require_one_process(stage.name)
    follows = world_size() > 1 and world_rank() > 0
    run = Run(
        config,
        SilentProgress() if follows else progress_of(arguments),
        f"merit-fast {{stage}} {file or '...'}",
        verify=arguments.verify,
        overwrite=arguments.overwrite,
        dry_run=follows,
    )
    if follows:  # the leading process checks, writes and reports
        getattr(run, stage.name)()
        return
    run.preflight([stage])
    worked = getattr(run, stage.name)()
    output = str(Path(config.output) / stage.folder)
    if arguments.as_json:
        print(json.dumps({"stage": stage.name, "output": output, "up_to_date": not worked}))
    else:
        print(f"{stage.name}: {'done' if worked else 'up to date'}: {output}")


def read_config(
    command: str,
    arguments: argparse.Namespace,
    assignments: Sequence[str] = (),
    *,
    has_flags: bool = True,
) -> tuple[Path | None, "RunConfig"]:
    """The YAML's path, if there is one, and the run's config of a command line.

    Args:
        command: the command's name, for the error message.
        arguments: the parsed command line.
        assignments: flags of the command as ``section.key=value``.
        has_flags: whether the command has the flags of ``add_run_flags``.

    Raises:
        InputError: neither a file nor flags are given, or a key breaks a rule.
    """
    from merit_fast.pipeline.config import read_run_config

    file, overrides = split_inputs(arguments.inputs)
    flags = run_flags(arguments) if has_flags else {}
    if file is None and not flags:
        other = ", or --model and --dataset" if has_flags else ""
        raise InputError(f"command line: {command}: needs a CONFIG.yml{other}")
    return file, read_run_config(file, [*overrides, *assignments], flags)


def run_all(
    config: "RunConfig",
    progress: Progress,
    file: str,
    as_json: bool,
    *,
    rounds: int = 1,
    verify: bool = False,
    overwrite: bool = False,
) -> None:
    """Brings every stage of every round up to date and prints the last one's summary."""
    from merit_fast.model import keep_freed_memory
    from merit_fast.pipeline.rounds import rounds_lines, run_rounds
    from merit_fast.pipeline.run import check_output

    check_output(config)
    keep_freed_memory()
    command = f"merit-fast {{stage}} {file}"
    summaries = run_rounds(config, rounds, progress, command, verify=verify, overwrite=overwrite)
    if as_json:
        print(json.dumps(summaries[-1] if rounds == 1 else {"rounds": summaries}))
        return
    from merit_fast.report import print_summary

    print_summary(Path(summaries[-1]["output"]))
    if rounds > 1:
        for line in rounds_lines(summaries):
            print(line)


def show_forecast(
    config: "RunConfig", progress: Progress, file: str, as_json: bool, rounds: int = 1
) -> None:
    """Checks a run and prints the work of its first round that is still to do; writes nothing."""
    from merit_fast.pipeline.preflight.forecast import describe_forecast, forecast_run
    from merit_fast.pipeline.run import Run, check_output

    check_output(config)
    run = Run(config, progress, f"merit-fast {{stage}} {file}", dry_run=True)
    run.preflight()
    forecast = forecast_run(run.outputs, run.data)
    if as_json:
        print(json.dumps({**to_plain(forecast), "rounds": rounds}))
        return
    print(describe_forecast(forecast))
    if rounds > 1:
        print(f"that is round 1 of {rounds}; each later one takes about as long without controls")


def split_inputs(inputs: list[str]) -> tuple[Path | None, list[str]]:
    """CONFIG.yml, if there is one, and the overrides among the positional arguments."""
    files = [text for text in inputs if "=" not in text]
    if len(files) > 1:
        raise InputError(
            f"command line: must be one CONFIG.yml and section.key=value, got {' '.join(files)}"
        )
    return (Path(files[0]) if files else None), [text for text in inputs if "=" in text]


def progress_of(arguments: argparse.Namespace) -> Progress:
    """The display of a command: bars on a terminal, lines in a log, nothing with --json."""
    if arguments.as_json:
        return SilentProgress()
    return TerminalProgress() if sys.stderr.isatty() else PlainProgress()
