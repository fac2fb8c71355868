"""Makes the files of a launch: checks the run and the options, and finds the units to do."""

import os
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

from merit_fast.data.paths import is_hub_id, is_url
from merit_fast.errors import InputError
from merit_fast.execution.launch.job import Launch, Options
from merit_fast.execution.launch.steps import Step, only, predicted_units, steps_of, undecided
from merit_fast.execution.launch.targets import TARGETS, Target
from merit_fast.manifests.ledger import UNITS_FOLDER
from merit_fast.manifests.stages import SPLIT
from merit_fast.options.parser import to_plain
from merit_fast.pipeline.config import RunConfig, paths_in, run_config_text
from merit_fast.pipeline.outputs import Outputs
from merit_fast.pipeline.storage.place import refuse_credentials
from merit_fast.pipeline.storage.secret import secrets_in
from merit_fast.pipeline.units.listing import list_units, missing_units

_FLAGS = {"minutes": "--time"}
_PARTITION = re.compile(r"[A-Za-z0-9_.,-]+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OBJECT = re.compile(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?")
_FLAVOR_GPUS = re.compile(r"x(\d+)$")


def prepare_launch(
    config: RunConfig, words: tuple[str, ...], target: str, options: Options, made_by: str
) -> Launch:
    """Checks a run and the options of its jobs, and finds the units that are to be done.

    Args:
        config: the run's, as ``words`` give it in the current folder.
        words: CONFIG.yml and the values that override its keys.
        target: a name of ``TARGETS``.
        options: of the jobs.
        made_by: the command line, for comments.

    Raises:
        InputError: an option or the config breaks a rule of the target.
    """
    table = TARGETS[target]
    check_options(target, options)
    folder = Path.cwd()
    if not table.is_here:
        _check_dtypes(config, target)
    if table.mounts and options.scratch is None:
        _check_places(config, words[0], folder)
    elif table.mounts:
        _check_inputs(config)
    steps, open_keys = _steps(config, options.gpus or 0, made_by)
    if table.drives:  # the driver finds the units itself
        open_keys = ""
    return Launch(
        target=target,
        made_by=made_by,
        output=config.output,
        folder=str(folder),
        words=words,
        steps=steps,
        undecided=open_keys,
        options=options,
        config="" if table.drives else _carried_config(config, options.scratch),
    )


def launch_files(launch: Launch) -> dict[str, str]:
    """The job files by their names; empty if every unit is done.

    Raises:
        InputError: a file would hold a secret.
    """
    if not launch.steps:
        return {}
    files = TARGETS[launch.target].make(launch)
    _refuse_secrets(files)
    return files


def _steps(config: RunConfig, gpus: int, command: str) -> tuple[tuple[Step, ...], str]:
    """The steps that are to do, and the keys that leave further ones to the split."""
    outputs = _current_outputs(config, command)
    if outputs is None:
        return tuple(steps_of(config, predicted_units(config), gpus)), undecided(config)
    units = list_units(outputs)
    missing = missing_units(units, outputs)
    return tuple(only(steps_of(config, list(units), gpus), set(missing))), ""


def _current_outputs(config: RunConfig, command: str) -> Outputs | None:
    """The run's outputs if its split is here, finished and of this config."""
    if not (Path(config.output) / SPLIT.folder / SPLIT.file).exists():
        return None
    outputs = Outputs(config, command)
    state = outputs.records.check(outputs.folder(SPLIT), outputs.split.fingerprint)
    return outputs if state.is_current else None


def check_options(target: str, options: Options) -> None:
    """Refuses options that the target does not read, and values that break a rule.

    Raises:
        InputError: names the option.
    """
    table = TARGETS[target]
    for option in fields(Options):
        flag = _FLAGS.get(option.name, f"--{option.name}")
        is_given = getattr(options, option.name) not in (None, ())
        if is_given and option.name not in table.needs + table.reads:
            raise InputError(f"command line: {flag}: --to {target} reads {_read_by(table)}")
        if option.name in table.needs and not is_given:
            raise InputError(f"command line: {flag}: is absent; --to {target} needs it")
    for name in ("gpus", "cpus", "workers"):
        number = getattr(options, name)
        if number is not None and number < 1:
            raise InputError(f"command line: --{name}: must be at least 1, got {number}")
    if options.partition is not None and not _PARTITION.fullmatch(options.partition):
        rule = "letters, digits, '.', ',', '_' and '-'"
        raise InputError(f"command line: --partition: must be {rule}, got {options.partition!r}")
    _check_accelerator(target, options)
    _check_storage(target, options)
    _check_secret(target, options)


def _read_by(table: Target) -> str:
    names = (*table.needs, *table.reads)
    return ", ".join(_FLAGS.get(name, f"--{name}") for name in names)


def _check_accelerator(target: str, options: Options) -> None:
    if "accelerator" not in TARGETS[target].reads:
        return
    if (options.accelerator is None) != (options.gpus is None):
        raise InputError(
            f"command line: --accelerator: goes with --gpus with --to {target}, got only one"
        )
    if target == "hf-jobs" and options.accelerator is not None:
        match = _FLAVOR_GPUS.search(options.accelerator)
        count = int(match.group(1)) if match else 1
        if count != options.gpus:
            flavor = options.accelerator
            raise InputError(
                f"command line: --gpus: must be {count}, those of the flavor {flavor}, "
                f"got {options.gpus}"
            )
    if target == "sky" and options.image is None and options.install is None:
        raise InputError(
            "command line: --image or --install: is absent; --to sky needs one, so that the "
            "machines have merit-fast"
        )


def _check_storage(target: str, options: Options) -> None:
    storage = options.storage
    if options.scratch is not None or target in ("slurm", "ray"):
        _check_scratch(target, options)
        return
    if storage is None:
        return
    rules = {
        "k8s-job": (_OBJECT.fullmatch(storage), "the name of a PersistentVolumeClaim"),
        "hf-jobs": (storage.startswith("hf://buckets/"), "hf://buckets/OWNER/NAME"),
        "sky": ("://" in storage or _OBJECT.fullmatch(storage), "a bucket's URL or a volume"),
    }
    holds, rule = rules[target]
    if not holds:
        raise InputError(f"command line: --storage: must be {rule}, got {storage!r}")


def _check_scratch(target: str, options: Options) -> None:
    """Checks the store and the scratch folder of units that fetch and send by themselves."""
    if (options.storage is None) != (options.scratch is None):
        given = "--scratch" if options.storage is None else "--storage"
        other = "--storage" if options.storage is None else "--scratch"
        raise InputError(f"command line: {given}: goes with {other}, which is not given")
    if options.storage is None or options.scratch is None:
        return
    refuse_credentials(options.storage)
    is_path = options.storage.startswith("/") and not TARGETS[target].mounts
    if "://" not in options.storage and not is_path:
        rule = "a URL with --scratch, such as s3://bucket/run"
        raise InputError(f"command line: --storage: must be {rule}, got {options.storage!r}")
    if not options.scratch.startswith("/"):
        raise InputError(
            f"command line: --scratch: must be an absolute path, got {options.scratch!r}"
        )


def _carried_config(config: RunConfig, scratch: str | None) -> str:
    """The YAML that jobs with a scratch folder bring along; "" without one."""
    if scratch is None:
        return ""
    return run_config_text(replace(config, output=scratch), Path(scratch) / UNITS_FOLDER)


def _check_inputs(config: RunConfig) -> None:
    """Checks that jobs that see no disk of this machine find the base and the rows."""
    plain = to_plain(config)
    for mapping, name, key in paths_in(plain):
        path = mapping[name]
        if path and (Path(path).expanduser().exists() or not (is_hub_id(path) or is_url(path))):
            raise InputError(
                f"{key}: must be an id of the hub or a URL with --scratch, since the jobs see no "
                f"disk of this machine; got {path}"
            )


def _check_secret(target: str, options: Options) -> None:
    form, rule = _VARIABLE, "the name of a variable, without its value"
    if target == "k8s-job":
        form, rule = _OBJECT, "the name of a Secret object"
    for name in options.secret:
        if not form.fullmatch(name):  # the message shows no value
            raise InputError(f"command line: --secret: must be {rule}")


def _check_dtypes(config: RunConfig, target: str) -> None:
    """Refuses dtypes that each machine would settle for itself: their outputs would not fit."""
    dtypes = {
        "split.dtype": config.split.dtype,
        "train.dtype": config.train.dtype,
        "evaluate.dtype": config.evaluate.dtype,
    }
    loose = [key for key, dtype in dtypes.items() if dtype == "auto"]
    if loose:
        example = " ".join(f"{key}=bf16" for key in loose)
        raise InputError(
            f"{', '.join(loose)}: must be bf16 or fp32 with --to {target}, since auto may differ "
            f"from machine to machine; such as {example}"
        )


def _check_places(config: RunConfig, file: str, folder: Path) -> None:
    """Checks that the storage, which is mounted at ``folder``, can hold every local path."""
    if ":" in str(folder):
        raise InputError(f"{folder}: must have no colon in its path, to be mounted there")
    plain = to_plain(config)
    paths = {key: mapping[name] for mapping, name, key in paths_in(plain) if mapping[name]}
    for key, path in {"CONFIG.yml": file, "output": config.output, **paths}.items():
        is_local = Path(path).expanduser().exists() or not (is_hub_id(path) or is_url(path))
        place = Path(os.path.abspath(Path(path).expanduser()))
        if (is_local or key == "output") and not place.is_relative_to(folder):
            raise InputError(
                f"{key}: must lie in the current folder {folder}, at which the jobs see the "
                f"storage; got {path}"
            )


def _refuse_secrets(files: Mapping[str, str]) -> None:
    """Refuses files that hold the value of a variable whose name tells a secret.

    Raises:
        InputError: names the file and the variable.
    """
    for name, text in files.items():
        for variable in secrets_in(text):
            raise InputError(
                f"{name}: would hold the value of {variable}; give names of secrets only"
            )
