"""The work of the commands that run stages of a configured run."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit_fast.cli.flags import mixture_of
from merit_fast.errors import InputError
from merit_fast.manifests.stages import MERGE, Stage
from merit_fast.options.parser import to_plain
from merit_fast.progress import PlainProgress, Progress, SilentProgress, TerminalProgress

if TYPE_CHECKING:
    from merit_fast.pipeline.config import RunConfig


def run_stage(stage: Stage, arguments: argparse.Namespace, assignments: list[str]) -> None:
    """Brings one stage up to date and prints where its output is."""
    from merit_fast.model import keep_freed_memory
    from merit_fast.pipeline.config import read_run_config
    from merit_fast.pipeline.run import Run, check_output

    file, overrides = split_inputs(arguments.inputs)
    flags: dict[str, Any] = {}
    if stage.options and stage is not MERGE:
        flags = {
            "model": arguments.model,
            "output": arguments.output,
            "mixture": mixture_of(arguments.dataset),
        }
        flags = {key: value for key, value in flags.items() if value is not None}
    if file is None and not flags:
        raise InputError(
            f"command line: {stage.name}: needs a CONFIG.yml, or --model and --dataset"
        )
    config = read_run_config(file, [*overrides, *assignments], flags)
    check_output(config)
    if stage is not MERGE:  # a merge bounds its memory itself
        keep_freed_memory()
    run = Run(
        config,
        progress_of(arguments),
        f"merit-fast {{stage}} {file or '...'}",
        verify=arguments.verify,
        overwrite=arguments.overwrite,
    )
    run.preflight([stage])
    worked = getattr(run, stage.name)()
    output = str(Path(config.output) / stage.folder)
    if arguments.as_json:
        print(json.dumps({"stage": stage.name, "output": output, "up_to_date": not worked}))
    else:
        print(f"{stage.name}: {'done' if worked else 'up to date'}: {output}")


def run_all(
    config: "RunConfig",
    progress: Progress,
    file: str,
    as_json: bool,
    *,
    verify: bool = False,
    overwrite: bool = False,
) -> None:
    """Brings every stage up to date and prints the run's summary."""
    from merit_fast.model import keep_freed_memory
    from merit_fast.pipeline.run import Run, check_output

    check_output(config)
    keep_freed_memory()
    command = f"merit-fast {{stage}} {file}"
    summary = Run(config, progress, command, verify=verify, overwrite=overwrite).all()
    if as_json:
        print(json.dumps(summary))
        return
    from merit_fast.report import print_summary

    print_summary(Path(config.output))


def show_forecast(config: "RunConfig", progress: Progress, file: str, as_json: bool) -> None:
    """Checks a run and prints the work that it has still to do; writes nothing."""
    from merit_fast.pipeline.preflight.forecast import describe_forecast, forecast_run
    from merit_fast.pipeline.run import Run, check_output

    check_output(config)
    run = Run(config, progress, f"merit-fast {{stage}} {file}")
    run.preflight()
    forecast = forecast_run(run.outputs, run.data)
    print(json.dumps(to_plain(forecast)) if as_json else describe_forecast(forecast))


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
