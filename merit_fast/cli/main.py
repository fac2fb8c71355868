"""merit-fast: flags and YAML -> one frozen config -> one stage call -> exit code.

Exit codes: 0 done, 1 failed, 2 bad input (one line that names the file, the key and the rule). Only the parser of the
command that was asked for is built, and only what it needs is imported: a merge may take less time than an import.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit_fast.cli.flags import Parser, add_fields, add_inputs, assignments_of, mixture_of, rows_of
from merit_fast.errors import InputError, MeritFastError, one_line
from merit_fast.progress import PlainProgress, Progress, SilentProgress, TerminalProgress

if TYPE_CHECKING:
    from merit_fast.cli.merge import Tune
    from merit_fast.pipeline.config import RunConfig

Arguments = argparse.Namespace

COMMANDS = {
    "run": "Run all stages of CONFIG.yml; what is up to date is skipped, what was interrupted goes on.",
    "sketch": "Sketch per-example gradients at the base model.",
    "split": "Group the datasets along their conflict axes, from the sketches.",
    "train": "Fine-tune every branch, and the control arms.",
    "merge": "Merge a run's branches by their token counts, or any checkpoints; docs/method.md has the methods.",
    "evaluate": "Measure every arm on held-out rows and on retention.",
    "report": "Write the run's report.html.",
    "verify": "Compare a model's files with the checksums in its index.",
    "demo": "Prepare a real small model and real tasks, then do exactly what `run` does. Works offline.",
    "doctor": "Show versions, the ISA level, and which backend each op uses and why not the others.",
}


def main() -> None:
    """The console script."""
    debug = "--debug" in sys.argv
    try:
        _command(sys.argv[1:])
        code = 0
    except InputError as error:
        code = _fail(error, 2, debug)
    except MeritFastError as error:
        code = _fail(error, 1, debug)
    except KeyboardInterrupt:
        code = _fail(
            MeritFastError("interrupted; the same command goes on where it stopped"), 1, debug
        )
    except Exception as error:
        message = f"{type(error).__name__}: {one_line(error)} (--debug shows where)"
        code = _fail(MeritFastError(message), 1, debug)
    sys.exit(code)


def _command(words: list[str]) -> None:
    """Parses the words behind `merit-fast` and does what they say."""
    name = next((word for word in words if not word.startswith("-")), None)
    if name is None:
        if unknown := [word for word in words if word not in ("-h", "--help")]:
            raise InputError(f"command line: no such option: {unknown[0]}")
        print(_overview())
        return
    if name not in COMMANDS:
        raise InputError(
            f"command line: no such command: {name!r}; commands: {', '.join(COMMANDS)}"
        )
    if name == "merge":  # it multiplies no matrices: NumPy need not start threads for that
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    parser = Parser(name, COMMANDS[name])
    work = _PARSERS[name](parser)
    parser.add_argument(
        "--json",
        dest="as_json",
        action="store_true",
        help="print one JSON object, no progress bars",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    words = list(words)
    words.remove(name)
    work(parser.parse_intermixed_args(words))


def _overview() -> str:
    lines = [
        "merit-fast COMMAND ...",
        "",
        "Split an instruction mixture along its gradient conflicts, train apart, merge once.",
    ]
    lines += ["", *(f"  {name:<10} {help}" for name, help in COMMANDS.items())]
    return "\n".join([*lines, "", "merit-fast COMMAND --help shows every option."])


# ---- parsers: each adds its arguments and returns what runs
Work = Callable[[Arguments], None]


def _doctor_parser(parser: argparse.ArgumentParser) -> Work:
    def work(arguments: Arguments) -> None:
        from merit_fast.cli.doctor import diagnose, print_diagnosis

        diagnosis = diagnose()
        print(json.dumps(diagnosis)) if arguments.as_json else print_diagnosis(diagnosis)

    return work


def _demo_parser(parser: argparse.ArgumentParser) -> Work:
    parser.add_argument("--out", help="directory of all outputs")
    parser.add_argument("--quick", action="store_true", help="fewer tasks, two groups")
    parser.add_argument(
        "--copyleft", action="store_true", help="also tasks from num2words (LGPL), if installed"
    )

    def work(arguments: Arguments) -> None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from merit_fast.demo import write_demo
        from merit_fast.pipeline.config import read_run_config

        progress = _progress(arguments.as_json)
        progress.note("preparing the demo's model and tasks (converted once, then cached)")
        folder = Path(arguments.out or ("runs/demo-quick" if arguments.quick else "runs/demo"))
        config_file = write_demo(folder, quick=arguments.quick, include_copyleft=arguments.copyleft)
        progress.note(f"this demo is: merit-fast run {config_file}")
        _run(read_run_config(config_file), progress, str(config_file), arguments.as_json)

    return work


def _run_parser(parser: argparse.ArgumentParser) -> Work:
    add_inputs(parser)

    def work(arguments: Arguments) -> None:
        from merit_fast.pipeline.config import read_run_config

        file, assignments = _config_and_assignments(arguments.inputs)
        if file is None:
            raise InputError("command line: run: needs a CONFIG.yml")
        _run(
            read_run_config(file, assignments),
            _progress(arguments.as_json),
            str(file),
            arguments.as_json,
        )

    return work


def _verify_parser(parser: argparse.ArgumentParser) -> Work:
    parser.add_argument("directory", help="a model merged with --checksum")

    def work(arguments: Arguments) -> None:
        from merit_fast.cli.merge import verify_command

        verify_command(arguments.directory, arguments.as_json)

    return work


def _report_parser(parser: argparse.ArgumentParser) -> Work:
    add_inputs(parser)
    return lambda arguments: _stage(
        "report", arguments.inputs, None, None, None, [], arguments.as_json
    )


def _stage_parser(name: str, section: str) -> Callable[[argparse.ArgumentParser], Work]:
    """The flags of a stage are the fields of its config: each help text exists once."""

    def add(parser: argparse.ArgumentParser) -> Work:
        fields = _config_of(name)
        add_inputs(parser)
        parser.add_argument("--model", help="base model: directory or hub id (key `model`)")
        help = "NAME=PATH or NAME=PATH,EVAL_PATH; repeat for each dataset (key `mixture`)"
        parser.add_argument("--dataset", action="append", help=help)
        parser.add_argument("--output", help="directory of all outputs (key `output`)")
        add_fields(parser, fields)

        def work(arguments: Arguments) -> None:
            assignments = assignments_of(arguments, fields, f"{section}.")
            common = (arguments.model, arguments.dataset, arguments.output)
            _stage(name, arguments.inputs, *common, assignments, arguments.as_json)

        return work

    return add


def _merge_parser(parser: argparse.ArgumentParser) -> Work:
    from merit_fast.merge.config import MergeConfig

    add = parser.add_argument
    add(
        "inputs",
        nargs="*",
        metavar="OUT | CONFIG [KEY=VALUE]",
        help="OUT, or CONFIG.yml and overrides",
    )
    add(
        "--model",
        action="append",
        help="DIR or DIR:WEIGHT, a URL too; repeat for each checkpoint or adapter to merge",
    )
    add("--base", help="the checkpoint they started from, where the method needs it")
    add("--run", help="output of `run`: merge its MERIT branches into OUT")
    add("--mergekit", help="a mergekit recipe (YAML) to merge into OUT")
    rows = "rows that --scale auto and --weights fit choose on, with --model or --run; repeat for each dataset"
    add("--validation", action="append", metavar="NAME=PATH", help=rows)
    add(
        "--param",
        action="append",
        metavar="KEY=VALUE",
        help="of any option below, or of a registered method; repeatable",
    )
    add(
        "--share",
        metavar="I/N",
        help="write each N-th output file from the I-th on; the last process finishes",
    )
    add("--shard", dest="share", help=argparse.SUPPRESS)  # the name before 0.2
    add("--dry-run", action="store_true", help="check and plan from the headers, write nothing")
    add_fields(parser, MergeConfig)
    return lambda arguments: _merge(arguments, MergeConfig)


def _merge(arguments: Arguments, fields: type[Any]) -> None:
    from merit_fast.cli.merge import describe, merge_command, param_assignments

    params = param_assignments(arguments.param or [], arguments.method)
    assignments = [*params, *assignments_of(arguments, fields)]
    if not (arguments.model or arguments.run or arguments.mergekit):
        if arguments.dry_run or arguments.base or arguments.share or arguments.validation:
            flags = "--dry-run, --base, --share and --validation"
            raise InputError(f"command line: merge: {flags} go with --model, --run or --mergekit")
        _stage(
            "merge",
            arguments.inputs,
            None,
            None,
            None,
            [f"merge.{a}" for a in assignments],
            arguments.as_json,
        )
        return
    if len(arguments.inputs) != 1 or "=" in arguments.inputs[0]:
        raise InputError(
            "command line: merge: with --model, --run or --mergekit needs exactly one OUT directory"
        )
    progress = _progress(arguments.as_json)
    summary = merge_command(
        arguments.inputs[0], arguments.model, arguments.base, arguments.run, arguments.mergekit, assignments,
        progress, dry_run=arguments.dry_run, share=arguments.share, tune=_tune(arguments.validation, progress),
    )  # fmt: skip
    print(json.dumps(summary) if arguments.as_json else describe(summary, arguments.dry_run))


def _tune(validation: list[str] | None, progress: Progress) -> "Tune | None":
    """Chooses a merge's numbers on these rows; torch is imported when it is called."""
    if not validation:
        return None
    rows = rows_of(validation)

    def tune(models: Any, base: Any, config: Any) -> Any:
        from merit_fast.cli.tune import tune_checkpoints

        return tune_checkpoints(models, base, rows, config, progress)

    return tune


_PARSERS: dict[str, Callable[[argparse.ArgumentParser], Work]] = {
    "run": _run_parser,
    "sketch": _stage_parser("sketch", "split"),
    "split": _stage_parser("split", "split"),
    "train": _stage_parser("train", "train"),
    "merge": _merge_parser,
    "evaluate": _stage_parser("evaluate", "evaluate"),
    "report": _report_parser,
    "verify": _verify_parser,
    "demo": _demo_parser,
    "doctor": _doctor_parser,
}


def _config_of(stage: str) -> type[Any]:
    if stage == "evaluate":
        from merit_fast.evaluate.config import EvaluateConfig

        return EvaluateConfig
    if stage == "train":
        from merit_fast.train.config import TrainConfig

        return TrainConfig
    from merit_fast.sketch.config import SketchConfig
    from merit_fast.split.config import SplitConfig

    return SketchConfig if stage == "sketch" else SplitConfig


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
    from merit_fast.pipeline.config import read_run_config
    from merit_fast.pipeline.run import Run, check_output

    file, given = _config_and_assignments(inputs)
    flags: dict[str, Any] = {"model": model, "output": output, "mixture": mixture_of(datasets)}
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
    print(
        json.dumps(result)
        if as_json
        else f"{name}: {'done' if worked else 'up to date'}: {result['output']}"
    )


def _run(config: "RunConfig", progress: Progress, file: str, as_json: bool) -> None:
    from merit_fast.pipeline.run import Run, check_output

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
        raise InputError(
            f"command line: must be one CONFIG.yml and section.key=value, got {' '.join(files)}"
        )
    return (Path(files[0]) if files else None), [text for text in inputs if "=" in text]


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
