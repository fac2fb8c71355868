"""Rounds of split, train and merge: each starts from the merge of the round before.

One round is MERIT. The first one lies in the run's output, round r in its folder ``round-r``, each
an output of its own: `status`, `verify`, `clean`, `merge --run` and its ``config.yml`` work there.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from merit_fast.errors import InputError
from merit_fast.pipeline.config import RunConfig
from merit_fast.pipeline.run import Run
from merit_fast.progress import Progress
from merit_fast.train.config import ControlsConfig


def run_rounds(
    config: RunConfig,
    rounds: int,
    progress: Progress,
    command: str,
    *,
    verify: bool = False,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Brings all rounds up to date, one after another; finished stages are kept.

        theta_r = merge(train(split(mixture at theta_{r-1}), from theta_{r-1})),  theta_0 = the base

    Only the first round trains control arms: those of a later one would start from a merge. Only
    its branches start after a warm-up.

    Args:
        config: of the first round.
        rounds: number of rounds, at least 1.
        progress: display of the run.
        command: the command line that error messages name, with {stage}.
        verify: as in ``Run``.
        overwrite: as in ``Run``.

    Returns:
        The summary of each round, as ``Run.summary``, with its "output".

    Raises:
        InputError: ``rounds`` is below 1, or a round meets a broken rule.
    """
    if rounds < 1:
        raise InputError(f"command line: --rounds: must be at least 1, got {rounds}")
    summaries = []
    start = config.model
    for number, each in enumerate(configs_of_rounds(config, rounds), start=1):
        if number > 1:
            progress.note(f"round {number} of {rounds}: starts from {start}, in {each.output}")
        each = replace(each, model=start)
        own = command if number == 1 else f"merit-fast {{stage}} {each.output}/split/config.yml"
        run = Run(each, progress, own, verify=verify, overwrite=overwrite)
        summary = run.all()
        start = summary["merged"]
        summaries.append({"output": each.output, **summary})
    return summaries


def configs_of_rounds(config: RunConfig, rounds: int) -> Iterator[RunConfig]:
    """The config of each round; ``model`` of a later one is known when the round before ends."""
    yield config
    later = replace(
        config,
        split=replace(config.split, warmup=0.0),
        train=replace(config.train, controls=ControlsConfig()),
    )
    for number in range(2, rounds + 1):
        yield replace(later, output=str(Path(config.output) / f"round-{number}"))


def rounds_lines(summaries: list[dict[str, Any]]) -> list[str]:
    """A line for each round: loss and exact match of its start and its merge on held-out rows."""
    lines = []
    for number, summary in enumerate(summaries, start=1):
        base = summary["arms"]["base"]
        merged = summary["arms"]["merit"]
        lines.append(
            f"round {number}: loss {base['loss']:.3f} -> {merged['loss']:.3f}, exact match "
            f"{100 * base['exact_match']:.1f} -> {100 * merged['exact_match']:.1f} %: "
            f"{summary['merged']}"
        )
    return lines
