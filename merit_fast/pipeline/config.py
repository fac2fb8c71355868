"""The run's YAML: a section for each stage, declared as a frozen dataclass in its folder."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from merit_fast.data.config import DataConfig, DatasetConfig
from merit_fast.errors import InputError, show
from merit_fast.evaluate.config import EvaluateConfig
from merit_fast.manifests.atomic import write_text
from merit_fast.merge.config import MergeConfig
from merit_fast.options.fields import option, require
from merit_fast.options.parser import override, parse, to_plain
from merit_fast.options.yaml import read_yaml
from merit_fast.split.config import SplitConfig
from merit_fast.train.config import TrainConfig


@dataclass(frozen=True)
class RunConfig:
    """Everything a run needs. ``model`` and ``mixture`` are required."""

    model: str
    mixture: tuple[DatasetConfig, ...]
    data: DataConfig = field(default=DataConfig())
    split: SplitConfig = field(default=SplitConfig())
    train: TrainConfig = field(default=TrainConfig())
    merge: MergeConfig = field(default=MergeConfig())
    evaluate: EvaluateConfig = field(default=EvaluateConfig())
    output: str = option("runs/merit", "directory of all outputs")
    threads: int | None = option(None, "CPU threads of torch; None: as many as torch takes")

    def __post_init__(self) -> None:
        require(len(self.mixture) > 0, "mixture", "a list of at least one dataset", [])
        require(self.threads is None or self.threads >= 1, "threads", "at least 1", self.threads)


def read_run_config(
    file: Path | None, assignments: Sequence[str] = (), flags: dict[str, Any] | None = None
) -> RunConfig:
    """Reads the YAML; the command line overrides its values.

    Args:
        file: the YAML; None: all values come from the command line.
        assignments: ``section.key=value`` strings.
        flags: values of top-level keys (model, mixture, output).

    Relative paths of the model and the mixture are tried first from the YAML's folder, then from
    the current directory.

    Raises:
        InputError: the file is missing or no YAML, or a key or value breaks a rule.
    """
    values = (read_yaml(file) or {}) if file else {}
    if not isinstance(values, dict):
        raise InputError(f"{file}: must be a mapping of keys, got {type(values).__name__}")
    values = override({**values, **(flags or {})}, assignments)
    where = str(file) if file else "command line"
    if file and (assignments or flags):
        where += " with command line"
    _refuse_old_keys(values, where)
    if file:
        _resolve_paths(values, file.parent)
    return parse(RunConfig, values, where)


def write_run_config(config: RunConfig, path: Path) -> None:
    """Writes the resolved config with every default, so that running it repeats the run."""
    write_text(path, yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True))


def _refuse_old_keys(values: dict[str, Any], where: str) -> None:
    train = values.get("train")
    if isinstance(train, dict) and "arms" in train:
        raise InputError(
            f"{where}: train.arms: is now train.controls, such as {{joint: true, random: 1}}; "
            f"got {show(train['arms'])}"
        )


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    def resolve(path: Any) -> Any:
        return str(folder / path) if isinstance(path, str) and (folder / path).exists() else path

    if "model" in values:
        values["model"] = resolve(values["model"])
    mixture = values.get("mixture")
    for entry in mixture if isinstance(mixture, list) else []:
        if isinstance(entry, dict):
            for key in ("path", "eval_path"):
                if entry.get(key):
                    entry[key] = resolve(entry[key])
    data = values.get("data")
    template = data.get("chat_template") if isinstance(data, dict) else None
    if template and template != "plain":
        values["data"]["chat_template"] = resolve(template)
