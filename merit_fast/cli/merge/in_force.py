"""The branches that a run's ledger says are in force, for a merge into another directory."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

from merit_fast.cli.flags import read_seconds
from merit_fast.errors import InputError
from merit_fast.manifests.io import read_manifest
from merit_fast.manifests.ledger import LEDGER_FILE, Ledger, read_ledger
from merit_fast.manifests.schemas import BranchManifest, SplitManifest
from merit_fast.manifests.stages import SPLIT, TRAIN
from merit_fast.manifests.state import check_output
from merit_fast.merge.write.card import RunFacts
from merit_fast.options.yaml import read_yaml
from merit_fast.progress import Progress, SilentProgress

_BRANCH_FILE = "branch.json"
_LOOK_S = 5.0


@dataclass(frozen=True)
class Quorum:
    """The share of an arm's branches that a merge needs, and its patience for the others.

    ``least`` of every ``of`` branches must be finished; others are waited for ``grace_s`` seconds.
    """

    least: int = 1
    of: int = 1
    grace_s: float = 0.0

    def needed(self, branches: int) -> int:
        """Number of finished branches that a merge of so many needs."""
        return math.ceil(branches * self.least / self.of)


def parse_quorum(quorum: str | None, grace: str | None) -> Quorum | None:
    """``--quorum I/N`` and ``--grace TIME``; None: every branch is needed now.

    Raises:
        InputError: one breaks its form, or a grace has no quorum.
    """
    if quorum is None:
        if grace is not None:
            raise InputError("command line: --grace: goes with --quorum, which is not given")
        return None
    least, slash, of = quorum.partition("/")
    is_share = slash and least.isdecimal() and of.isdecimal() and 1 <= int(least) <= int(of)
    if not is_share:
        raise InputError(f"command line: --quorum: must be I/N with 1 <= I <= N, got {quorum!r}")
    return Quorum(int(least), int(of), read_seconds("--grace", grace or "0s"))


@dataclass(frozen=True)
class RunSource:
    """The branches of a run that a merge takes.

    Attributes:
        run: the output of a run.
        arm: merit, or a control that ends in a merge.
        seed_index: number of the seed, from 0.
        quorum: how many branches are enough; None: all.
    """

    run: Path
    arm: str = "merit"
    seed_index: int = 0
    quorum: Quorum | None = None

    def branches(self, progress: Progress) -> tuple[list[Path], RunFacts | None]:
        """Directories of the branches by group, and what the model card tells of the run.

        Raises:
            InputError: see ``branches_in_force``.
        """
        paths, absent = _present_branches(self, progress)
        return paths, _run_facts(self, absent)


def branches_in_force(run: Path, arm: str = "merit", seed_index: int = 0) -> list[Path]:
    """Directories of exactly the branches of one arm of the split in force, by group.

    Args:
        run: the output of a run.
        arm: merit, or a control that ends in a merge.
        seed_index: number of the seed, from 0.

    Raises:
        InputError: run.json is absent or damaged; the arm is not in it; a branch is absent, is
            damaged, or belongs to another split, recipe or start.
    """
    return _present_branches(RunSource(run, arm, seed_index), SilentProgress())[0]


def _present_branches(source: RunSource, progress: Progress) -> tuple[list[Path], tuple[str, ...]]:
    """The finished branches, and the names of those that the quorum does without."""
    quorum = source.quorum or Quorum()
    end = time.monotonic() + quorum.grace_s
    while True:
        found, problems = _look(source)
        left = end - time.monotonic()
        if not problems or left <= 0:
            break
        progress.note(f"merge: waiting for {', '.join(problems)}")
        time.sleep(min(_LOOK_S, left))
    needed = quorum.needed(len(found) + len(problems))
    if len(found) < needed:
        problem = next(iter(problems.values()))
        wanted = f"; the quorum is {needed}, {len(found)} are finished" if source.quorum else ""
        raise InputError(problem + wanted)
    for name, problem in problems.items():
        progress.note(f"merge: without {name}: {problem}")
    _require_one_start(found)
    return found, tuple(problems)


def _look(source: RunSource) -> tuple[list[Path], dict[str, str]]:
    """The branches that are finished, and what is wrong with each of the others."""
    run = source.run
    try:
        ledger = read_ledger(run)
    except InputError as error:
        raise InputError(f"{error}; write it again with: merit-fast train CONFIG.yml") from None
    merge = f"{source.arm}.seed{source.seed_index}" if source.seed_index else source.arm
    mergeable = [name for name in ledger.branches if not name.startswith("joint")]
    if merge not in mergeable:
        names = ", ".join(mergeable) or "none"
        raise InputError(
            f"{run / LEDGER_FILE}: branches: has no arm {merge!r} to merge; its arms: {names}"
        )
    found = []
    problems = {}
    for name, fingerprint in ledger.branches[merge]:
        problem = _problem(run, name, fingerprint, ledger)
        if problem:
            problems[name] = problem
        else:
            found.append(run / TRAIN.folder / name)
    return found, problems


def _problem(run: Path, branch: str, fingerprint: str, ledger: Ledger) -> str:
    """Name the fault of a branch and the command that mends it; "" if it has none."""
    name = f"{TRAIN.folder}/{branch}"
    state = check_output(run, name, fingerprint, ledger)
    if state.is_current:
        return ""
    found = {
        "absent": f"{run / name}: is not finished",
        "other config": f"{run / name}: belongs to another split, recipe or start than the "
        f"one in {run / LEDGER_FILE}",
        "damaged": f"{run}/{state.detail}",
    }.get(state.state, state.detail)
    return f"{found}; run first: {ledger.command.format(stage=TRAIN.run_by)}"


def _require_one_start(paths: list[Path]) -> None:
    starts = [
        read_manifest(BranchManifest, path / _BRANCH_FILE).start_fingerprint for path in paths
    ]
    for path, start in zip(paths, starts, strict=True):
        if start != starts[0]:
            raise InputError(
                f"{path / _BRANCH_FILE}: start_fingerprint: must be {starts[0]} as in {paths[0]}, "
                f"got {start}"
            )


def _run_facts(source: RunSource, absent: tuple[str, ...]) -> RunFacts | None:
    """The run's base and split for the model card; None where its split is gone."""
    folder = source.run / SPLIT.folder
    config = folder / "config.yml"
    if not ((folder / SPLIT.file).is_file() and config.is_file()):
        return None
    values = read_yaml(config) or {}
    split = read_manifest(SplitManifest, folder / SPLIT.file)
    return RunFacts(str(values.get("model", "")), split, source.arm, is_stage=False, absent=absent)
