"""The stacks that train branches: the names of their keys, their command and their packages."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from merit_fast.export.target import Stack
from merit_fast.train.config import TrainConfig
from merit_fast.train.stack.options import Engine


@dataclass(frozen=True)
class EngineStack:
    """One stack.

    Attributes:
        form: the form of its rows and of its configuration.
        module: the module that ``python -m`` runs, with words behind it and the configuration last;
            "": the user's own command.
        packages: modules that its environment must have.
        model_key: the configuration's key of the base model.
        epochs_key: the configuration's key of the epochs.
        install: the command that installs it.
    """

    form: Stack
    module: tuple[str, ...]
    packages: tuple[str, ...]
    model_key: str
    epochs_key: str
    install: str = ""


STACKS: Mapping[Engine, EngineStack] = {
    "trl": EngineStack(
        "trl",
        ("merit_fast.engines.trl_runner",),
        ("trl", "merit_fast"),
        "model_name_or_path",
        "num_train_epochs",
        "pip install trl",
    ),
    "axolotl": EngineStack(
        "axolotl",
        ("axolotl.cli.train",),
        ("axolotl",),
        "base_model",
        "num_epochs",
        "pip install axolotl",
    ),
    "llamafactory": EngineStack(
        "llamafactory",
        ("llamafactory.cli", "train"),
        ("llamafactory",),
        "model_name_or_path",
        "num_train_epochs",
        "pip install llamafactory",
    ),
    "swift": EngineStack(
        "swift",
        ("swift.cli.main", "sft"),
        ("swift", "merit_fast"),
        "model",
        "num_train_epochs",
        "pip install ms-swift",
    ),
    "command": EngineStack("trl", (), (), "model_name_or_path", "num_train_epochs"),
}


def python_of(recipe: TrainConfig) -> str:
    """The interpreter of the stack's environment."""
    if recipe.engine_python is None:
        return sys.executable
    return str(Path(recipe.engine_python).expanduser())


def command_of(recipe: TrainConfig, rows: Sequence[Path], values: Mapping[str, str]) -> list[str]:
    """The words of the command that trains one branch.

    Args:
        recipe: the branch's recipe.
        rows: the files of its training rows. A word that is {rows} becomes a word for each file;
            within a longer word they are joined by commas.
        values: the other placeholders: config, base, out, branch, group and seed; and the column
            of the dataset's name.
    """
    if recipe.engine != "command":
        module = [*STACKS[recipe.engine].module, values["config"]]
        column = [values["column"]] if recipe.engine == "trl" else []
        return [python_of(recipe), "-m", *module, *column]
    files = [str(file) for file in rows]
    words: list[str] = []
    for word in shlex.split(recipe.engine_command or ""):
        if word == "{rows}":
            words += files
        else:
            words.append(word.format(rows=",".join(files), **values))
    return words
