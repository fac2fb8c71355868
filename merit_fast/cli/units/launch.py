"""The command `launch`: job files of a run, for a scheduler or a cloud."""

import argparse
import json
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merit_fast.cli.flags import Parser, Work
from merit_fast.errors import InputError

if TYPE_CHECKING:
    from merit_fast.execution.launch.job import Launch

_MINUTES = {"m": 1, "h": 60, "d": 24 * 60}
_MARK = "# Made by: merit-fast "  # in every file
_SUFFIXES = (".sh", ".sbatch", ".yaml")


def add_launch(parser: Parser) -> Work:
    """Adds the arguments of `launch`."""
    from merit_fast.execution.launch.targets import TARGETS, readers

    form = "CONFIG.yml [SECTION.KEY=VALUE ...]"
    help = "the run's YAML file, and values that override its keys"
    parser.add_positional("inputs", form, help, nargs="+")
    parser.add_argument("--to", required=True, choices=tuple(TARGETS), help="who runs the jobs")
    help = "write the files there [default: print them]"
    parser.add_argument("--out", metavar="FOLDER", help=help)

    def add(name: str, metavar: str, help: str, **kind: Any) -> None:
        of = ", ".join(readers(name))
        flag = "--time" if name == "minutes" else f"--{name}"
        parser.add_argument(flag, metavar=metavar, dest=name, help=f"{of}: {help}", **kind)

    add("gpus", "N", "GPUs of a branch; torchrun starts a process on each", type=int)
    add("accelerator", "NAME", "kind of GPU (H100), or the hub's flavor (h200x8)")
    add("cpus", "N", "CPU cores of a job", type=int)
    add("workers", "N", "branches at a time [default: shell 1, others all]", type=int)
    add("minutes", "TIME", "limit of a job: 90m, 12h or 2d")
    add("partition", "NAME", "the partition of the jobs")
    add("image", "IMAGE", "container that has merit-fast")
    add("install", "REQUIREMENT", "what pip installs first, such as a wheel's URL")
    help = (
        "bucket's URL or volume (sky), PersistentVolumeClaim (k8s-job), hf://buckets/OWNER/NAME; "
        "it holds the current folder and is mounted at the same path. With --scratch: the URL "
        "where outputs meet"
    )
    add("storage", "NAME", help)
    help = "mount nothing; units fetch and send by themselves and work in this folder"
    add("scratch", "FOLDER", help)
    help = "variable with a secret, never its value; Secret object (k8s-job); repeat for each"
    add("secret", "NAME", help, action="append")
    return _launch


def _launch(arguments: argparse.Namespace) -> None:
    from merit_fast.cli.stages import read_config
    from merit_fast.execution.launch.job import Options
    from merit_fast.execution.launch.prepare import launch_files, prepare_launch
    from merit_fast.pipeline.run import check_output

    values = {field.name: getattr(arguments, field.name) for field in fields(Options)}
    values["minutes"] = _minutes(arguments.minutes)
    values["secret"] = tuple(arguments.secret or ())
    _, config = read_config("launch", arguments, has_flags=False)
    check_output(config)
    words = tuple(sorted(arguments.inputs, key=lambda word: "=" in word))  # CONFIG.yml first
    made_by = shlex.join(["merit-fast", *sys.argv[1:]])
    launch = prepare_launch(config, words, arguments.to, Options(**values), made_by)
    files = launch_files(launch)
    _show(arguments, files, launch)
    if files and launch.undecided and launch.target != "shell":
        print(
            f"the split decides the branches ({launch.undecided}): these files end with it; the "
            f"same command makes the others then, where {config.output} can be seen",
            file=sys.stderr,
        )


def _minutes(text: str | None) -> int | None:
    """A time such as 90m, 12h or 2d in minutes."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)([mhd])", text)
    if match is None:
        raise InputError(f"command line: --time: must be such as 90m, 12h or 2d, got {text!r}")
    return int(match.group(1)) * _MINUTES[match.group(2)]


def _show(arguments: argparse.Namespace, files: dict[str, str], launch: "Launch") -> None:
    """Prints the files, or writes them."""
    if arguments.out is not None and files:
        _write(Path(arguments.out), files)
    if arguments.as_json:
        print(json.dumps({"to": launch.target, "undecided": launch.undecided, "files": files}))
    elif not files:
        print(f"{launch.output}: every unit is done; there is nothing to launch")
    elif arguments.out is not None:
        print("\n".join(str(Path(arguments.out) / name) for name in files))
    elif len(files) == 1:
        print(*files.values(), end="")
    else:
        for name, text in files.items():
            print(f"# ---- {name}\n{text}")


def _write(folder: Path, files: dict[str, str]) -> None:
    """Writes the files in place of those of an earlier launch; scripts can be executed.

    Raises:
        InputError: a file is there and was not made by this command.
    """
    earlier = [path for path in folder.glob("*") if path.suffix in _SUFFIXES and path.is_file()]
    made = [path for path in earlier if _MARK in path.read_text(errors="replace")]
    for name in files:
        path = folder / name
        if path.exists() and path not in made:
            raise InputError(f"{path}: is there, and merit-fast launch did not make it")
    folder.mkdir(parents=True, exist_ok=True)
    for path in made:
        path.unlink()
    for name, text in files.items():
        path = folder / name
        path.write_text(text, encoding="utf-8")
        if path.suffix == ".sh":
            path.chmod(0o755)
