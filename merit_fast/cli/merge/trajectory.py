"""The command `merge --trajectory`: the average of one run's checkpoints."""

from collections.abc import Sequence
from typing import Any

from merit_fast.errors import InputError
from merit_fast.merge import MergeConfig, merge_trajectory
from merit_fast.merge.option_names import options_named
from merit_fast.options.parser import override, parse
from merit_fast.progress import Progress


@options_named("command line")
def trajectory_command(
    out: str, pattern: str, assignments: Sequence[str], progress: Progress, **options: Any
) -> dict[str, Any]:
    """Averages the checkpoints that ``pattern`` names into the directory ``out``.

    Args:
        assignments: ``key=value`` of MergeConfig.
        options: schedule, last, base, dry_run and share of ``merge_trajectory``; None: its default.

    Raises:
        InputError: see ``merge_trajectory``; weights are given twice.
    """
    config = parse(MergeConfig, override({}, assignments), "command line")
    if config.weights != "auto":
        raise InputError("command line: merge: --weights goes without --trajectory: use --schedule")
    given = {name: value for name, value in options.items() if value is not None}
    return merge_trajectory(pattern, out=out, config=config, progress=progress, **given)
