"""The command `merge --trajectory`: the average of one run's checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError
from merit_fast.merge import MergeConfig, merge_trajectory
from merit_fast.merge.option_names import options_named
from merit_fast.options.fields import REQUIRED, option, require
from merit_fast.options.parser import override, parse
from merit_fast.options.yaml import read_yaml
from merit_fast.progress import Progress
from merit_fast.records import field, record


@record
class TrajectoryFile:
    """A YAML file in place of a pattern."""

    trajectory: str = option(REQUIRED, "the pattern of the checkpoints")
    schedule: str | None = option(None, "as --schedule")
    last: int | None = option(None, "as --last")
    base: str | None = option(None, "as --base")
    merge: MergeConfig = field(default=MergeConfig())

    def __post_init__(self) -> None:
        rule = "auto: the schedule gives the weights"
        require(self.merge.weights == "auto", "merge.weights", rule, self.merge.weights)


def read_trajectory_file(file: Path, assignments: Sequence[str] = ()) -> TrajectoryFile:
    """Reads the keys trajectory, schedule, last, base and merge.

    Args:
        assignments: ``key=value`` of MergeConfig that replace the file's.

    Raises:
        InputError: a key or a value is wrong.
    """
    values = read_yaml(file)
    if not isinstance(values, dict):
        raise InputError(f"{file}: must be a mapping of keys with trajectory")
    values = override(values, [f"merge.{text}" for text in assignments])
    return parse(TrajectoryFile, values, str(file))


@options_named("command line")
def trajectory_command(
    out: str, pattern: str, assignments: Sequence[str], progress: Progress, **options: Any
) -> dict[str, Any]:
    """Averages the checkpoints that ``pattern`` names into the directory ``out``.

    Args:
        pattern: of the checkpoints, or a YAML file; see ``read_trajectory_file``.
        assignments: ``key=value`` of MergeConfig.
        options: schedule, last, base, dry_run and share of ``merge_trajectory``; None: its default.

    Raises:
        InputError: see ``merge_trajectory``; weights are given twice.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if pattern.endswith((".yml", ".yaml")):
        file = read_trajectory_file(Path(pattern), assignments)
        listed = {"schedule": file.schedule, "last": file.last, "base": file.base}
        given = {name: value for name, value in listed.items() if value is not None} | given
        pattern = file.trajectory
        config = file.merge
    else:
        config = parse(MergeConfig, override({}, assignments), "command line")
    if config.weights != "auto":
        raise InputError("command line: merge: --weights goes without --trajectory: use --schedule")
    return merge_trajectory(pattern, out=out, config=config, progress=progress, **given)
