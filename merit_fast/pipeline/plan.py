"""The plan of a run's training: which branches are trained, and which arms they make.

Branches of equal content are one directory, that of the first. An arm whose model equals another
arm's is trained, merged and measured as that arm, and a note tells.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from merit_fast.errors import InputError
from merit_fast.manifests.hashes import checksum
from merit_fast.manifests.io import fingerprint
from merit_fast.manifests.schemas import SplitManifest
from merit_fast.merge import MergeConfig
from merit_fast.merge.table import DEFAULT_METHOD
from merit_fast.pipeline.arms import (
    Branch,
    joint_arms,
    seeded,
    split_arms,
    split_branch_steps,
)
from merit_fast.pipeline.config import RunConfig
from merit_fast.train.config import TrainConfig


@dataclass(frozen=True)
class Plan:
    """The branches of a run without its warm-up, its merges and its arms."""

    branches: dict[str, Branch]  # by name, merit's first
    owners: dict[str, str]  # branch -> the branch whose directory holds the same content
    merges: dict[str, tuple[str, ...]]  # merge -> its branches, [K]
    arms: dict[str, tuple[str, ...]]  # arm -> its models, one for each seed: branches or merges
    joint: tuple[str, ...]  # directories of the joint runs, one for each seed
    notes: tuple[str, ...]  # why an arm is absent

    @property
    def trained(self) -> list[Branch]:
        """The branches that have a directory."""
        return [branch for name, branch in self.branches.items() if self.owners[name] == name]

    @property
    def single(self) -> list[str]:
        """The branches that are the model of an arm: joint and its variants."""
        models = (name for names in self.arms.values() for name in names)
        return [name for name in models if name not in self.merges]

    @property
    def measured_arms(self) -> dict[str, tuple[str, ...]]:
        """Arm -> its models, a branch by the name of its directory."""
        return {
            arm: tuple(self.owners.get(name, name) for name in names)
            for arm, names in self.arms.items()
        }

    @property
    def first_merges(self) -> list[str]:
        """The merges of the first seed: each has the name of its arm."""
        return [name for name in self.merges if name in self.arms]


def make_plan(
    config: RunConfig,
    split: SplitManifest,
    branches: Sequence[Branch],
    fingerprints: Mapping[str, str],
) -> Plan:
    """Finds branches of equal content and arms of equal models.

    Args:
        config: the run's config.
        split: the split in force.
        branches: every arm's branches, merit's first.
        fingerprints: branch -> fingerprint of its content.
    """
    members = _members(branches)
    same_as = _equal_arms(config, split, members, fingerprints)
    kept = {branch.name: branch for branch in branches if branch.arm not in same_as}
    owners: dict[str, str] = {}
    first: dict[str, str] = {}
    for name in kept:
        owners[name] = first.setdefault(fingerprints[name], name)
    merged = [arm for arm in split_arms(config, split) if arm not in same_as]
    arms = [*joint_arms(config), *reversed(merged)]
    seeds = range(config.train.seeds)
    return Plan(
        branches=kept,
        owners=owners,
        merges={seeded(arm, seed): members[arm, seed] for seed in seeds for arm in merged},
        arms={
            arm: tuple(seeded(arm, seed) for seed in seeds) for arm in arms if arm not in same_as
        },
        joint=tuple(first[fingerprints[b.name]] for b in branches if b.arm == "joint"),
        notes=(*_control_notes(config, split), *_equal_notes(same_as)),
    )


def shortest_branch(plan: Plan, config: RunConfig, split: SplitManifest) -> tuple[int, str]:
    """Optimizer steps and name of the shortest branch of a merge."""
    names = [plan.owners[name] for branches in plan.merges.values() for name in branches]
    steps = {name: split_branch_steps(plan.branches[name], config, split) for name in names}
    shortest = min(steps, key=lambda name: steps[name])
    return steps[shortest], shortest


def _members(branches: Sequence[Branch]) -> dict[tuple[str, int], tuple[str, ...]]:
    """(arm, seed) -> names of its branches."""
    keys = dict.fromkeys((branch.arm, branch.seed) for branch in branches)
    return {key: tuple(b.name for b in branches if (b.arm, b.seed) == key) for key in keys}


def _equal_arms(
    config: RunConfig,
    split: SplitManifest,
    members: Mapping[tuple[str, int], tuple[str, ...]],
    fingerprints: Mapping[str, str],
) -> dict[str, str]:
    """Arm -> the earlier arm that has the same model."""
    merged = split_arms(config, split)
    known: dict[tuple[object, ...], str] = {}
    same_as = {}
    for arm in (*merged, *joint_arms(config)):
        contents = tuple(fingerprints[name] for name in members[arm, 0])
        is_one_model = len(contents) == 1 and keeps_one_model(config.merge)
        key = (contents, is_one_model or arm in merged)
        owner = known.setdefault(key, arm)
        if owner != arm:
            same_as[arm] = owner
    return same_as


def keeps_one_model(config: MergeConfig) -> bool:
    """Whether the merge of a single branch is this branch."""
    return (
        config.method == DEFAULT_METHOD
        and not (config.needs_base or config.is_tuned or config.models)
        and config.dtype is None
        and (config.normalize or isinstance(config.weights, str))
    )


def _control_notes(config: RunConfig, split: SplitManifest) -> Iterator[str]:
    wanted = config.train.controls.random
    count = len(split.controls)
    if count == 0 < wanted:
        yield "random: no other balanced split exists, so no random arm is trained"
    elif count < wanted:
        splits = "split exists" if count == 1 else "splits exist"
        yield f"random: {count} of {wanted}: only {count} other balanced {splits}"


def _equal_notes(same_as: Mapping[str, str]) -> Iterator[str]:
    for owner in dict.fromkeys(same_as.values()):
        equal = [arm for arm, other in same_as.items() if other == owner]
        yield f"{', '.join(equal)}: the same model as {owner}, trained and shown once"


def recorded_recipe(recipe: TrainConfig) -> TrainConfig:
    """The recipe as a branch's fingerprint covers it: without paths of this machine."""
    if recipe.engine == "builtin":
        return recipe
    return replace(recipe, engine_config=None, engine_python=None)


def watched_rows(branch: Branch, config: RunConfig, contents: Mapping[str, str]) -> str:
    """The fingerprint of the held-out rows on which a branch is measured while it is trained.

    A dataset's name counts only where it decides which half of its rows is meant.

    Args:
        branch: the branch.
        config: the run's config.
        contents: name -> fingerprint of each dataset's held-out examples.
    """
    rows: list[object] = [contents[name] for name in branch.datasets]
    if config.halves_held_out:
        half = "reports" if config.train.patience is None else "chooses"
        rows += ["the half that " + half, branch.datasets]
    return fingerprint(rows)


def engine_inputs(recipe: TrainConfig) -> dict[str, str]:
    """The content of the stack's own configuration, as an input of the branch.

    Raises:
        InputError: the file is not there.
    """
    if recipe.engine_config is None:
        return {}
    file = Path(recipe.engine_config).expanduser()
    if not file.is_file():
        raise InputError(f"train.engine_config: must be a file, {file} is not there")
    return {"engine_config": checksum(file)}
