"""The work that a run has still to do: models, rows, tokens and optimizer steps of each stage."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from merit_fast.data import Dataset
from merit_fast.pipeline.arms import Branch, joint_arms
from merit_fast.pipeline.config import RunConfig
from merit_fast.pipeline.data import RunData
from merit_fast.pipeline.outputs import Outputs
from merit_fast.pipeline.preflight.pending import pending_branches, pending_merges
from merit_fast.split.auto import candidate_numbers
from merit_fast.train.schedule import num_steps


@dataclass(frozen=True)
class Load:
    """Models made or measured, with the rows, tokens and steps that go through them."""

    models: int = 0
    rows: int = 0
    tokens: int = 0
    steps: int = 0
    longest: int = 0  # steps of the longest branch

    def __add__(self, other: "Load") -> "Load":
        return Load(
            self.models + other.models,
            self.rows + other.rows,
            self.tokens + other.tokens,
            self.steps + other.steps,
            max(self.longest, other.longest),
        )

    def times(self, count: int) -> "Load":
        """This work, done ``count`` times."""
        return sum([self] * count, Load())


def num_groups(outputs: Outputs, data: RunData) -> int:
    """K: that of the split in force or of the config; with ``auto`` the largest that is tried."""
    if pending_branches(outputs) is not None:
        return outputs.split_manifest.groups
    groups = outputs.config.split.groups
    if groups != "auto":
        return groups
    split = outputs.config.split
    names = [dataset.name for dataset in data.branch]
    longest = data.num_steps(data.branch) // split.min_steps
    numbers = candidate_numbers(names, split.pins, split.spread)
    return max((number for number in numbers if number <= longest), default=1)


def count_tokens(datasets: Iterable[Dataset]) -> int:
    """Tokens of all rows, padding not counted."""
    return sum(dataset.num_tokens for dataset in datasets)


def warmup_load(outputs: Outputs, data: RunData) -> Load:
    """The warm-up's training."""
    return branch_load(outputs.warmup, outputs.config, data.train)


def sketch_load(config: RunConfig, datasets: Sequence[Dataset]) -> Load:
    """The examples that are sketched; with ``precision`` at most so many."""
    rows = tokens = 0
    for dataset in datasets:
        wanted = config.split.examples
        taken = dataset.num_examples if wanted == "all" else min(wanted, dataset.num_examples)
        rows += taken
        tokens += count_tokens([dataset]) * taken // max(dataset.num_examples, 1)
    return Load(1, rows, tokens)


def train_load(outputs: Outputs, data: RunData) -> Load:
    """The branches that are still to be trained; before the split, those that the config asks for.

    The groups of a split are not known before it, but their sum is: every arm sees all rows once.
    """
    branches = pending_branches(outputs)
    config = outputs.config
    if branches is not None:
        loads = [branch_load(branch, config, data.train) for branch in branches]
        return sum(loads, Load())
    groups = num_groups(outputs, data)
    controls = config.train.controls
    mixed = 1 + config.train.mix * (groups - 1)  # each other group trains on this share, too
    total = _split_arm_load(config, data.branch, groups, mixed).times(1 + controls.random)
    total += _split_arm_load(config, data.branch, groups).times(controls.num_iid)
    whole = _rows_load(config, data.train)
    for arm in joint_arms(config):
        share = groups if arm == "joint-short" else 1
        steps = -(-whole.steps // share)
        total += Load(1, whole.rows // share, whole.tokens // share, steps, steps)
    return total.times(config.train.seeds)


def branch_load(branch: Branch, config: RunConfig, datasets: Sequence[Dataset]) -> Load:
    """The training of one branch."""
    load = _rows_load(config, branch.choose(datasets, config.split))
    if branch.steps is None or not load.steps:
        return load
    share = branch.steps / load.steps
    rows = round(load.rows * share)
    return Load(1, rows, round(load.tokens * share), branch.steps, branch.steps)


def merges_of(outputs: Outputs) -> int:
    """Number of merges that are still to be made."""
    merges = pending_merges(outputs)
    if merges is not None:
        return len(merges)
    controls = outputs.config.train.controls
    return (1 + controls.random + controls.num_iid) * outputs.config.train.seeds


def measured_models(outputs: Outputs, data: RunData) -> int:
    """Number of models that evaluation loads."""
    config = outputs.config
    points = len(config.evaluate.interpolate) * config.train.seeds * config.train.controls.joint
    if pending_branches(outputs) is not None:
        plan = outputs.plan
        return 1 + len(plan.trained) + len(plan.merges) + points
    split_arms = 1 + config.train.controls.random + config.train.controls.num_iid
    each = split_arms * (num_groups(outputs, data) + 1) + len(joint_arms(config))
    return 1 + each * config.train.seeds + points


def _rows_load(config: RunConfig, datasets: Sequence[Dataset]) -> Load:
    rows = sum(dataset.num_examples for dataset in datasets)
    steps = num_steps(rows, config.train)
    epochs = config.train.epochs
    return Load(1, rows * epochs, count_tokens(datasets) * epochs, steps, steps)


def _split_arm_load(
    config: RunConfig, datasets: Sequence[Dataset], groups: int, mixed: float = 1.0
) -> Load:
    """The training of an arm whose branches take each row ``mixed`` times on average."""
    whole = _rows_load(config, datasets)
    rows = round(mixed * sum(dataset.num_examples for dataset in datasets))
    steps = num_steps(-(-rows // groups), config.train)
    tokens = round(mixed * whole.tokens)
    return Load(groups, round(mixed * whole.rows), tokens, steps * groups, steps)
