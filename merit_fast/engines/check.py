"""The checks of a stack before the first heavy step of a run."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from merit_fast.engines.keys import check_keys
from merit_fast.engines.options import check_options, given_options, recipe_note
from merit_fast.engines.stacks import STACKS, EngineStack, command_of, python_of
from merit_fast.engines.swift import check_swift
from merit_fast.errors import InputError, show
from merit_fast.export.chosen import Group, rows_of_branches
from merit_fast.export.form import free_names
from merit_fast.export.groups import read_user
from merit_fast.export.settings import settings_of
from merit_fast.export.target import plan_files, surveys_of
from merit_fast.pipeline.arms import Branch, whole_mixture
from merit_fast.pipeline.data import RunData
from merit_fast.pipeline.outputs import Outputs
from merit_fast.train.config import TrainConfig

_FIND = """
import importlib.util, json, sys
print(json.dumps([name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]))
"""
_FIND_TIMEOUT_S = 120


def check_engine(outputs: Outputs, data: RunData) -> None:
    """Checks that the stack is there, and that it can train as the run asks.

    Raises:
        InputError: the stack is not installed, its configuration names another model, or an option
            or a row is one that it cannot take.
    """
    train = outputs.config.train
    stack = STACKS[train.engine]
    check_options(train)
    settings_of(outputs.config, str(outputs.start), outputs.root)
    user: dict[str, Any] = {}
    if train.engine_config is not None:
        user = read_user(Path(train.engine_config).expanduser()) or {}
        _check_user(user, train.engine_config, stack, outputs)
    if train.engine == "command":
        _check_program(train)
    else:
        _check_packages(train, stack)
    if train.engine_config is not None:
        file = str(Path(train.engine_config).expanduser())
        check_keys(train.engine, python_of(train), file, user)
    if train.engine == "swift":
        check_swift(train, user, str(outputs.base))
    _check_rows(stack, outputs, data)
    if note := recipe_note(train, given_options(train)):
        data.progress.note(note)


def _check_user(user: Mapping[str, Any], file: str, stack: EngineStack, outputs: Outputs) -> None:
    """Checks that the user's configuration trains the run's model."""
    model = user.get(stack.model_key)
    known = {outputs.config.model, str(outputs.base)}
    if model is None or str(model) in known:
        return
    folder = Path(str(model)).expanduser()
    if not (folder.is_dir() and folder.resolve() == outputs.base.resolve()):
        raise InputError(
            f"{file}: {stack.model_key}: must be the run's model {outputs.config.model}, "
            f"got {show(model)}"
        )


def _check_program(train: TrainConfig) -> None:
    values = dict.fromkeys(("config", "base", "out", "branch", "group", "seed"), "x")
    program = command_of(train, [Path("x")], values)[0]
    if shutil.which(program) is None:
        raise InputError(f"train.engine_command: must begin with a program, {program} is none")


def _check_packages(train: TrainConfig, stack: EngineStack) -> None:
    """Asks the stack's interpreter for its packages; nothing of them is imported."""
    python = python_of(train)
    missing = _missing(python, stack.packages)
    if missing:
        raise InputError(
            f"train.engine: {train.engine} needs {' and '.join(missing)} in the environment of "
            f"{python}: {stack.install}, or name another environment's Python in "
            "train.engine_python"
        )


def _missing(python: str, packages: Sequence[str]) -> list[str]:
    command = [python, "-c", _FIND, *packages]
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, timeout=_FIND_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(
            f"train.engine_python: must be an interpreter that runs, got {python} ({error})"
        ) from None
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no output"])[-1]
        raise InputError(
            f"train.engine_python: must be an interpreter that runs, got {python} ({last})"
        )
    missing: list[str] = json.loads(process.stdout.splitlines()[-1])
    return missing


def _check_rows(stack: EngineStack, outputs: Outputs, data: RunData) -> None:
    """Plans the files of each dataset, one after the other; nothing is written."""
    everything = Branch("check", "check", 0, whole_mixture(outputs.contents, "all"))
    (group,) = rows_of_branches([everything], data)
    surveys = surveys_of([group])
    names = free_names(surveys.values())
    for part in group.train:
        single: Group = replace(group, train=(part,), held_out=())
        plan_files(stack.form, single, surveys, names)
