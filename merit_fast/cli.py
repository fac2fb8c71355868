"""merit-fast: flags and YAML -> one frozen config -> one stage call -> exit code.

Exit codes: 0 done, 1 failed, 2 bad input (one line that names the file, the key and the rule).
"""

import dataclasses
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merit_fast.errors import InputError, MeritFastError, one_line
from merit_fast.progress import PlainProgress, Progress, SilentProgress, TerminalProgress

if TYPE_CHECKING:
    from merit_fast.run_config import RunConfig

app = typer.Typer(
    name="merit-fast",
    help="Split an instruction mixture along its gradient conflicts, train the groups apart, merge once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="print one JSON object on standard output, no progress bars")]
Debug = Annotated[bool, typer.Option("--debug", help="show the traceback of an error")]
Model = Annotated[str | None, typer.Option("--model", help="base model: directory or hub id (key `model`)")]
Data = Annotated[
    list[str] | None,
    typer.Option("--dataset", help="NAME=PATH or NAME=PATH,EVAL_PATH; repeat for each dataset (key `mixture`)"),
]
Output = Annotated[str | None, typer.Option("--output", help="directory of all outputs (key `output`)")]
Inputs = Annotated[
    list[str] | None,
    typer.Argument(help="CONFIG.yml and section.key=value overrides", metavar="[CONFIG] [KEY=VALUE]..."),
]
MergeInputs = Annotated[
    list[str] | None,
    typer.Argument(help="OUT, or CONFIG.yml and overrides", metavar="OUT | CONFIG [KEY=VALUE]..."),
]
Models = Annotated[
    list[str] | None,
    typer.Option("--model", help="DIR or URL, also with :WEIGHT; repeat for each checkpoint or adapter"),
]
Base = Annotated[str | None, typer.Option("--base", help="the checkpoint they started from, where the method needs it")]
RunDirectory = Annotated[str | None, typer.Option("--run", help="output of `run`: merge its MERIT branches into OUT")]
Mergekit = Annotated[str | None, typer.Option("--mergekit", help="a mergekit recipe (YAML) to merge into OUT")]
Parameters = Annotated[list[str] | None, typer.Option("--param", help="KEY=VALUE of any option below; repeatable")]
Shard = Annotated[
    str | None,
    typer.Option("--shard", help="I/N: write every N-th output file from the I-th on; the last one finishes"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="check and plan from the headers, write nothing")]


def main() -> None:
    """The console script."""
    debug = "--debug" in sys.argv
    try:
        _add_commands(next((word for word in sys.argv[1:] if word in _STAGES), None))
        code = app(standalone_mode=False)
    except InputError as error:
        code = _fail(error, 2, debug)
    except MeritFastError as error:
        code = _fail(error, 1, debug)
    except KeyboardInterrupt:
        code = _fail(MeritFastError("interrupted; the same command goes on where it stopped"), 1, debug)
    except Exception as error:
        if hasattr(error, "format_message"):  # the command line's own usage errors
            code = _fail(InputError(f"command line: {error.format_message()}"), 2, debug)
        else:
            message = f"{type(error).__name__}: {one_line(error)} (--debug shows where)"
            code = _fail(MeritFastError(message), 1, debug)
    sys.exit(code if isinstance(code, int) else 0)


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Show versions, the ISA level, and which backend each op uses and why not the others."""
    from merit_fast.doctor import diagnose, print_diagnosis

    diagnosis = diagnose()
    print(json.dumps(diagnosis)) if as_json else print_diagnosis(diagnosis)


@app.command()
def demo(
    out: Annotated[str | None, typer.Option("--out", help="directory of all outputs")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="fewer tasks, two groups")] = False,
    copyleft: Annotated[
        bool, typer.Option("--copyleft", help="also tasks from num2words (LGPL), if installed")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Prepare a real small model and real tasks, then do exactly what `run` does. Works offline."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from merit_fast.demo import write_demo
    from merit_fast.run_config import read_run_config

    progress = _progress(as_json)
    progress.note("preparing the demo's model and tasks (converted once, then cached)")
    folder = Path(out or ("runs/demo-quick" if quick else "runs/demo"))
    config_file = write_demo(folder, quick=quick, include_copyleft=copyleft)
    progress.note(f"this demo is: merit-fast run {config_file}")
    _run(read_run_config(config_file), progress, str(config_file), as_json)


@app.command()
def run(inputs: Inputs = None, as_json: Json = False, debug: Debug = False) -> None:
    """Run all stages of CONFIG.yml; what is up to date is skipped, what was interrupted goes on."""
    from merit_fast.run_config import read_run_config

    file, assignments = _config_and_assignments(inputs)
    if file is None:
        raise InputError("command line: run: needs a CONFIG.yml")
    _run(read_run_config(file, assignments), _progress(as_json), str(file), as_json)


@app.command()
def verify(
    directory: Annotated[str, typer.Argument(help="a model merged with --checksum")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare a model's files with the checksums in its index."""
    from merit_fast.merge_command import verify_command

    verify_command(directory, as_json)


def _stage(
    name: str,
    inputs: list[str] | None,
    model: str | None,
    datasets: list[str] | None,
    output: str | None,
    assignments: list[str],
    as_json: bool,
) -> None:
    """Brings one stage up to date and says where its output is."""
    from merit_fast.pipeline import Run, check_output
    from merit_fast.run_config import read_run_config

    file, given = _config_and_assignments(inputs)
    flags: dict[str, Any] = {"model": model, "output": output, "mixture": _mixture(datasets)}
    flags = {key: value for key, value in flags.items() if value is not None}
    if file is None and not flags:
        raise InputError(f"command line: {name}: needs a CONFIG.yml, or --model and --dataset")
    config = read_run_config(file, [*given, *assignments], flags)
    check_output(config)
    if name != "merge":  # the merge's memory is bounded by itself
        _keep_freed_memory()
    stages = Run(config, _progress(as_json), f"merit-fast {{stage}} {file or '...'}")
    worked = getattr(stages, name)()
    folder = {"train": "branches", "merge": "merged"}.get(name, name)
    result = {"stage": name, "output": str(Path(config.output) / folder), "up_to_date": not worked}
    print(json.dumps(result) if as_json else f"{name}: {'done' if worked else 'up to date'}: {result['output']}")


def _stage_command(name: str, section: str, config: type[Any], help: str) -> None:
    """Adds a command whose flags are the fields of the stage's config: each help text exists once."""

    def command(
        inputs: list[str] | None, model: str | None, dataset: list[str] | None, output: str | None, as_json: bool,
        debug: bool, **flags: Any,
    ) -> None:  # fmt: skip
        _stage(name, inputs, model, dataset, output, _assignments(flags, f"{section}."), as_json)

    common = {"inputs": Inputs, "model": Model, "dataset": Data, "output": Output}
    _add_command(command, name, common, config, help)


def _add_command(command: Callable[..., None], name: str, common: dict[str, Any], config: type[Any], help: str) -> None:
    """Gives ``command`` the signature that Typer reads: common parameters, the config's fields, switches."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(key, kind, default=None, annotation=hint) for key, hint in common.items()]
    for field in dataclasses.fields(config):
        shown = list(field.default) if isinstance(field.default, tuple) else field.default
        flag, text = "--" + field.name.replace("_", "-"), f"{field.metadata['help']} [default: {shown}]"
        if isinstance(field.default, bool):
            hint: Any = Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", help=text)]
        else:
            hint = Annotated[str | None, typer.Option(flag, help=text)]
        parameters.append(inspect.Parameter(field.name, kind, default=None, annotation=hint))
    switches = {"dry_run": DryRun} if name == "merge" else {}
    switches |= {"as_json": Json, "debug": Debug}
    parameters += [inspect.Parameter(key, kind, default=False, annotation=hint) for key, hint in switches.items()]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(name, help=help)(command)


def _merge_command(
    inputs: list[str] | None, model: list[str] | None, base: str | None, run: str | None, mergekit: str | None,
    param: list[str] | None, shard: str | None, dry_run: bool, as_json: bool, debug: bool, **flags: Any,
) -> None:  # fmt: skip
    from merit_fast.merge_command import describe, merge_command

    if not (model or run or mergekit):
        if dry_run or base or shard:
            raise InputError("command line: merge: --dry-run, --base and --shard go with --model, --run or --mergekit")
        _stage(
            "merge", inputs, None, None, None, [*_parameters(param, "merge."), *_assignments(flags, "merge.")], as_json
        )
        return
    if not inputs or len(inputs) != 1 or "=" in inputs[0]:
        raise InputError("command line: merge: with --model, --run or --mergekit needs exactly one OUT directory")
    assignments = [*_parameters(param), *_assignments(flags)]
    summary = merge_command(
        inputs[0], model, base, run, mergekit, assignments, _progress(as_json), dry_run=dry_run, shard=shard
    )
    print(json.dumps(summary) if as_json else describe(summary, dry_run))


def _assignments(flags: dict[str, Any], prefix: str = "") -> list[str]:
    shown = {key: str(value).lower() if isinstance(value, bool) else value for key, value in flags.items()}
    return [f"{prefix}{key}={value}" for key, value in shown.items() if value is not None]


def _parameters(texts: list[str] | None, prefix: str = "") -> list[str]:
    for text in texts or []:
        if "=" not in text:
            raise InputError(f"command line: --param: must be KEY=VALUE, got {text!r}")
    return [prefix + text for text in texts or []]


_STAGES = ("sketch", "split", "train", "merge", "evaluate", "report")


def _add_commands(only: str | None) -> None:
    """Adds the stages' commands; if the command line names one, that one alone: importing the others takes time."""
    for name in _STAGES:
        if only in (None, name) and name not in {command.name for command in app.registered_commands}:
            _add_stage(name)


def _add_stage(name: str) -> None:
    if name == "merge":
        from merit_fast.merge.config import MergeConfig

        common = {"inputs": MergeInputs, "model": Models, "base": Base, "run": RunDirectory, "mergekit": Mergekit}
        common |= {"param": Parameters, "shard": Shard}
        help = "Merge a run's branches by their token counts, or any checkpoints; docs/method.md has the methods."
        _add_command(_merge_command, "merge", common, MergeConfig, help)
    elif name == "evaluate":
        from merit_fast.evaluate.config import EvaluateConfig

        _stage_command(name, "evaluate", EvaluateConfig, "Measure every arm on held-out rows and on retention.")
    elif name == "train":
        from merit_fast.train.config import TrainConfig

        _stage_command(name, "train", TrainConfig, "Fine-tune every branch, and the control arms.")
    elif name == "report":

        @app.command()
        def report(inputs: Inputs = None, as_json: Json = False, debug: Debug = False) -> None:
            """Write the run's report.html."""
            _stage("report", inputs, None, None, None, [], as_json)
    else:
        from merit_fast.split.config import SketchConfig, SplitConfig

        config = SketchConfig if name == "sketch" else SplitConfig
        help = "Sketch per-example gradients at the base model."
        help = help if name == "sketch" else "Group the datasets along their conflict axes, from the sketches."
        _stage_command(name, "split", config, help)


def _run(config: "RunConfig", progress: Progress, file: str, as_json: bool) -> None:
    from merit_fast.pipeline import Run, check_output

    check_output(config)
    _keep_freed_memory()
    run = Run(config, progress, f"merit-fast {{stage}} {file}")
    summary = run.all()
    if as_json:
        print(json.dumps(summary))
        return
    from merit_fast.report import print_summary

    print_summary(Path(config.output))


def _keep_freed_memory() -> None:
    """Lets glibc keep 256 MiB of what torch frees: fresh pages cost training a fault per 4 KiB of every gradient."""
    import ctypes

    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return  # another C library: nothing to tune
    mallopt(mmap_threshold, 128 << 20)
    mallopt(trim_threshold, 256 << 20)


def _config_and_assignments(inputs: list[str] | None) -> tuple[Path | None, list[str]]:
    inputs = inputs or []
    files = [text for text in inputs if "=" not in text]
    if len(files) > 1:
        raise InputError(f"command line: must be one CONFIG.yml and section.key=value, got {' '.join(files)}")
    return (Path(files[0]) if files else None), [text for text in inputs if "=" in text]


def _mixture(datasets: list[str] | None) -> list[dict[str, str]] | None:
    if not datasets:
        return None
    mixture = []
    for text in datasets:
        name, equals, paths = text.partition("=")
        path, _, eval_path = paths.partition(",")
        if not equals or not path:
            raise InputError(f"command line: --dataset: must be NAME=PATH or NAME=PATH,EVAL_PATH, got {text!r}")
        mixture.append({"name": name, "path": path, **({"eval_path": eval_path} if eval_path else {})})
    return mixture


def _progress(as_json: bool) -> Progress:
    if as_json:
        return SilentProgress()
    return TerminalProgress() if sys.stderr.isatty() else PlainProgress()


def _fail(error: Exception, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    print(f"{'error' if code == 2 else 'failed'}: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
