"""The branches that a run's ledger says are in force, for a merge into another directory."""

from pathlib import Path

from merit_fast.errors import InputError
from merit_fast.manifests.io import read_manifest
from merit_fast.manifests.ledger import LEDGER_FILE, Ledger, read_ledger
from merit_fast.manifests.schemas import BranchManifest
from merit_fast.manifests.stages import TRAIN
from merit_fast.manifests.state import check_output

_BRANCH_FILE = "branch.json"


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
    try:
        ledger = read_ledger(run)
    except InputError as error:
        raise InputError(f"{error}; write it again with: merit-fast train CONFIG.yml") from None
    merge = f"{arm}.seed{seed_index}" if seed_index else arm
    mergeable = [name for name in ledger.branches if not name.startswith("joint")]
    if merge not in mergeable:
        names = ", ".join(mergeable) or "none"
        raise InputError(
            f"{run / LEDGER_FILE}: branches: has no arm {merge!r} to merge; its arms: {names}"
        )
    paths = [
        _checked_branch(run, name, fingerprint, ledger)
        for name, fingerprint in ledger.branches[merge]
    ]
    _require_one_start(paths)
    return paths


def _checked_branch(run: Path, branch: str, fingerprint: str, ledger: Ledger) -> Path:
    name = f"{TRAIN.folder}/{branch}"
    state = check_output(run, name, fingerprint, ledger)
    if not state.is_current:
        found = {
            "absent": f"{run / name}: is not finished",
            "other config": f"{run / name}: belongs to another split, recipe or start than the "
            f"one in {run / LEDGER_FILE}",
            "damaged": f"{run}/{state.detail}",
        }.get(state.state, state.detail)
        raise InputError(f"{found}; run first: {ledger.command.format(stage=TRAIN.run_by)}")
    return run / name


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
