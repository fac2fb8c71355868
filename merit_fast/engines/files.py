"""The rows and the configuration of one branch, in the stack's own form."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from merit_fast.engines.options import minimal_keys
from merit_fast.engines.stacks import STACKS
from merit_fast.engines.swift import swift_keys
from merit_fast.errors import InputError, show
from merit_fast.export.chosen import Group
from merit_fast.export.folder import INFO
from merit_fast.export.form import free_names
from merit_fast.export.groups import read_user
from merit_fast.export.settings import settings_of
from merit_fast.export.target import Target, plan_files, surveys_of, write_files
from merit_fast.manifests.atomic import write_text
from merit_fast.pipeline.arms import Branch
from merit_fast.pipeline.outputs import Outputs
from merit_fast.train.config import TrainConfig

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
STATE_FILE = "trainer_state.json"
COUNTS_FILES = ("dataset_counts.json", "merit_counts.json")  # of our callbacks


@dataclass(frozen=True)
class BranchFiles:
    """The files of one branch: rows, configuration, and the folder for the model."""

    rows: tuple[Path, ...]
    config: Path
    values: dict[str, Any]  # of the configuration
    out: Path
    column: str  # of the rows, with the dataset's name


def write_branch_files(
    branch: Branch, group: Group, outputs: Outputs, folder: Path, recipe: TrainConfig
) -> BranchFiles:
    """Writes rows and configuration of a branch into ``folder``.

    Rows and configuration of an earlier try are replaced; the folder of the model stays, and the
    configuration resumes from the last whole checkpoint in it.

    Raises:
        InputError: the stack cannot train on a row as the run does.
    """
    stack = STACKS[recipe.engine]
    rows = folder / "rows"
    shutil.rmtree(rows, ignore_errors=True)
    rows.mkdir(parents=True)
    surveys = surveys_of([group])
    names = free_names(surveys.values())
    planned = plan_files(stack.form, group, surveys, names)
    counts = [write_files(files, rows, rows, names) for files in planned]
    config = replace(outputs.config, train=recipe)
    start = str(outputs.start_of(branch)[0])
    settings = settings_of(config, start, folder)
    user = read_user(Path(recipe.engine_config).expanduser()) if recipe.engine_config else None
    target = Target(stack.form, rows, settings, user, group.number, counts[0])
    values, info = target.configure(planned, [surveys[part.name] for part in group.train])
    out = folder / "model"
    values |= _own_keys(branch, recipe, user, values)
    values |= {stack.model_key: start, "output_dir": str(out)}
    if recipe.engine == "swift":
        values |= swift_keys(recipe, user, str(outputs.base))
    if recipe.engine == "axolotl":
        values["dataset_prepared_path"] = str(folder / "prepared")
    if recipe.engine == "trl":
        for entry in values["datasets"]:  # the runner tells them apart
            entry["columns"] = [*entry["columns"], names.dataset]
    if checkpoint := last_checkpoint(out):
        values["resume_from_checkpoint"] = str(checkpoint)
    if info:
        write_text(rows / INFO, json.dumps(info, indent=2, ensure_ascii=False) + "\n")
    file = folder / "config.yml"
    write_text(file, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    trained = tuple(rows / file.name for file in planned[0])
    return BranchFiles(trained, file, values, out, names.dataset)


def _own_keys(
    branch: Branch,
    recipe: TrainConfig,
    user: Mapping[str, Any] | None,
    values: Mapping[str, Any],
) -> dict[str, Any]:
    """Keys in which branches differ: seed, learning rate and the name on the hub."""
    own: dict[str, Any] = {}
    if user is None:
        own |= _precision(recipe) | minimal_keys(recipe)
    elif branch.seed:
        own["seed"] = int(user.get("seed", 0)) + branch.seed
        if recipe.engine == "swift":  # its own order of rows has another seed
            own["data_seed"] = int(user.get("data_seed", 42)) + branch.seed
    if user is not None and branch.rate_factor != 1.0:
        rate = user.get("learning_rate")
        try:
            own["learning_rate"] = float(rate) * branch.rate_factor  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise InputError(
                f"{recipe.engine_config}: learning_rate: must be a number for the arm "
                f"{branch.arm}, got {show(rate)}"
            ) from None
    if values.get("hub_model_id") and user is not None:
        own["hub_model_id"] = f"{user['hub_model_id']}-{branch.name}"
    return own


def _precision(recipe: TrainConfig) -> dict[str, Any]:
    """Keys of mixed precision; transformers takes bf16 on a CPU only where it is told to use it."""
    import torch

    is_bf16 = recipe.dtype == "bf16"
    if recipe.engine == "swift":
        return {"bf16": is_bf16, **({} if torch.cuda.is_available() else {"use_cpu": True})}
    if not is_bf16 or torch.cuda.is_available():
        return {"bf16": is_bf16}
    return {"bf16": False} if recipe.engine == "axolotl" else {"bf16": True, "use_cpu": True}


def last_checkpoint(out: Path) -> Path | None:
    """The latest whole checkpoint: one with trainer_state.json, which a Trainer writes last.

    A callback may add its counts even later. Where one checkpoint has them, those without are of a
    killed training, and no callback would resume from them.
    """
    numbered = {
        int(match[1]): path
        for path in (out.iterdir() if out.is_dir() else ())
        if (match := _CHECKPOINT.fullmatch(path.name)) and (path / STATE_FILE).is_file()
    }
    counted = {
        number: path
        for number, path in numbered.items()
        if any((path / name).is_file() for name in COUNTS_FILES)
    }
    whole = counted or numbered
    return whole[max(whole)] if whole else None
