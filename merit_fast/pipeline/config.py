"""The run's YAML: a section for each stage, declared as a record in its folder."""

import os
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import yaml

from merit_fast.data.config import DataConfig, DatasetConfig
from merit_fast.data.mixture.expand import expand_mixture
from merit_fast.data.mixture.locate import locate
from merit_fast.data.paths import is_hub_id, is_url
from merit_fast.data.template import PLAIN
from merit_fast.errors import InputError, show
from merit_fast.evaluate.config import EvaluateConfig
from merit_fast.manifests.atomic import write_text
from merit_fast.manifests.stages import STAGES
from merit_fast.merge.config import MergeConfig
from merit_fast.model import settle_dtype
from merit_fast.options.fields import REQUIRED, option, require
from merit_fast.options.parser import override, parse, to_plain
from merit_fast.options.yaml import read_yaml
from merit_fast.records import field, record, replace
from merit_fast.split.config import SplitConfig
from merit_fast.train.config import TrainConfig

DEFAULT_OUTPUT = "runs/merit"


@record
class RunConfig:
    """Everything a run needs. ``model`` and ``mixture`` are required."""

    model: str = option(REQUIRED, "base model: a folder or a hub id")
    mixture: tuple[DatasetConfig, ...] = option(
        REQUIRED,
        "the datasets; in place of an entry {from: FILE} or {folder: DIR}, with only and except",
        form="[{name: NAME, path: PATH, ...}, ...]",
    )
    data: DataConfig = field(default=DataConfig())
    split: SplitConfig = field(default=SplitConfig())
    train: TrainConfig = field(default=TrainConfig())
    merge: MergeConfig = field(default=MergeConfig())
    evaluate: EvaluateConfig = field(default=EvaluateConfig())
    output: str = option(DEFAULT_OUTPUT, "directory of all outputs")
    threads: int | None = option(None, "CPU threads of torch; absent: as many as torch takes")

    @property
    def halves_held_out(self) -> bool:
        """Whether one half of the held-out rows chooses something and the other half reports."""
        return self.merge.is_tuned or self.train.patience is not None

    def __post_init__(self) -> None:
        require(len(self.mixture) > 0, "mixture", "a list of at least one dataset", [])
        is_four_bits = self.train.adapter.base == "4bit"
        rule = "0 with train.adapter.base: 4bit, which gives no whole model to start from"
        require(not (is_four_bits and self.split.warmup), "split.warmup", rule, self.split.warmup)
        require(self.threads is None or self.threads >= 1, "threads", "at least 1", self.threads)


def read_run_config(
    file: Path | None, assignments: Sequence[str] = (), flags: dict[str, Any] | None = None
) -> RunConfig:
    """Reads the YAML; the command line overrides its values.

    Relative paths in the YAML count from its folder, those on the command line from the current
    directory.

    Args:
        file: the YAML; None: all values come from the command line.
        assignments: ``section.key=value`` strings.
        flags: values of top-level keys (model, mixture, output).

    Raises:
        InputError: the file is missing or no YAML, or a key or value breaks a rule.
    """
    values = (read_yaml(file) or {}) if file else {}
    if not isinstance(values, dict):
        raise InputError(f"{file}: must be a mapping of keys, got {type(values).__name__}")
    if file and "mixture" in values and "mixture" not in (flags or {}):
        values["mixture"] = expand_mixture(values["mixture"], file.parent, str(file))
    if file:
        overridden = {*(flags or {}), *(text.partition("=")[0] for text in assignments)}
        _resolve_paths(values, overridden, file)
    where = str(file) if file else "command line"
    if file and (assignments or flags):
        where += " with command line"
    values = override({**values, **(flags or {})}, assignments)
    if any(text.partition("=")[0] == "mixture" for text in assignments):
        values["mixture"] = expand_mixture(values["mixture"], Path(), "command line")
    _refuse_old_keys(values, where)
    if "model" in values and values["model"] is None:
        raise InputError(f"{where}: model: is empty; it must be a model's folder or a hub id")
    return parse(RunConfig, values, where)


def _refuse_old_keys(values: dict[str, Any], where: str) -> None:
    train = values.get("train")
    if isinstance(train, dict) and "arms" in train:
        raise InputError(
            f"{where}: train.arms: is now train.controls, such as {{joint: true, random: 1}}; "
            f"got {show(train['arms'])}"
        )


def write_run_config(config: RunConfig, path: Path) -> None:
    """Writes the resolved config with every default, so that running it repeats the run."""
    write_text(path, run_config_text(config, path.parent))


def run_config_text(config: RunConfig, folder: Path) -> str:
    """The resolved config as YAML, for a file in ``folder``.

    The paths of model, rows and template are absolute; ``output`` counts from the file's folder.
    So the file replays from any directory, also after the run has moved.
    """
    plain = to_plain(config)
    for mapping, key, _ in paths_in(plain):
        local = Path(mapping[key]).expanduser()
        if local.exists() or not (is_hub_id(mapping[key]) or is_url(mapping[key])):
            mapping[key] = str(local.absolute())
    output = Path(config.output).expanduser().absolute()
    plain["output"] = os.path.relpath(output, folder.absolute())
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def settle_dtypes(config: RunConfig) -> RunConfig:
    """Replaces every dtype "auto" by this machine's choice, so that outputs name the dtype used."""
    return replace(
        config,
        split=replace(config.split, dtype=settle_dtype(config.split.dtype)),
        train=replace(config.train, dtype=settle_dtype(config.train.dtype)),
        evaluate=replace(config.evaluate, dtype=settle_dtype(config.evaluate.dtype)),
    )


def paths_in(values: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str, str]]:
    """The places of paths to inputs: the mapping, its key, and the key from the top of the file."""
    if isinstance(values.get("model"), str):
        yield values, "model", "model"
    mixture = values.get("mixture")
    for i, entry in enumerate(mixture if isinstance(mixture, list) else []):
        for key in ("path", "eval_path", "media"):
            if isinstance(entry, dict) and isinstance(entry.get(key), str):
                yield entry, key, f"mixture[{i}].{key}"
    data = values.get("data")
    template = data.get("chat_template") if isinstance(data, dict) else None
    if isinstance(data, dict) and isinstance(template, str) and template != PLAIN:
        yield data, "chat_template", "data.chat_template"
    train = values.get("train")
    if isinstance(train, dict) and isinstance(train.get("engine_config"), str):
        yield train, "engine_config", "train.engine_config"


def _resolve_paths(values: dict[str, Any], overridden: Set[str], file: Path) -> None:
    """Makes the YAML's own paths, which the command line does not override, count from here."""
    for mapping, key, name in paths_in(values):
        top = name.partition("[")[0].partition(".")[0]
        if mapping[key] and overridden.isdisjoint({name, top}):
            mapping[key] = _input_path(mapping[key], name, file)
    output = values.setdefault("output", DEFAULT_OUTPUT)
    if isinstance(output, str) and "output" not in overridden:
        values["output"] = _output_path(output, file)


def _input_path(text: str, name: str, file: Path) -> str:
    """A path of the YAML; an id of the hub stays as it is.

    Raises:
        InputError: the path is there from the current directory, but not from the YAML's folder.
    """
    is_file = name in ("data.chat_template", "train.engine_config") or name.endswith(".media")
    may_be_id = not is_file
    return locate(text, file.parent, f"{file}: {name}", may_be_id=may_be_id)


def _output_path(text: str, file: Path) -> str:
    """The output of the YAML.

    Raises:
        InputError: only the current directory holds an output of this name.
    """
    path = Path(text).expanduser()
    from_yaml = file.parent / path
    stages = (stage.folder for stage in STAGES)
    if not from_yaml.exists() and any((path / folder).is_dir() for folder in stages):
        raise InputError(
            f"{file}: output: {text} is not in {file.parent.absolute()} but in {Path.cwd()}; "
            f"paths in a YAML count from its folder: move it there, or give output={text}"
        )
    return os.path.normpath(from_yaml)
