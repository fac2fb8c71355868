"""The branches of every arm: rows, start, seed and recipe of each.

Arms: ``merit``; the controls ``joint`` (one run on everything from the base), ``joint-short`` (as
many steps as merit's longest branch), ``joint-low`` (a lower learning rate), ``random``,
``random2``, ... (other balanced splits) and ``iid``, ``iid2``, ... (as many branches, each on an
equal share of every dataset's rows: merging without splitting).

Arms, branches and datasets have names, but no name decides what a branch learns: its ``content``
is made of the rows, the start, the recipe and the seed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from merit_fast.data import Dataset
from merit_fast.data.shares import (
    dealt_rows,
    mixed_rows,
    num_dealt_rows,
    num_mixed_rows,
    warmup_rows,
)
from merit_fast.manifests.schemas import SplitManifest
from merit_fast.pipeline.config import RunConfig
from merit_fast.split.config import SplitConfig
from merit_fast.train.config import TrainConfig
from merit_fast.train.schedule import num_steps

WARMUP = "warmup"  # the branch that is trained before the sketch

Part = Literal["all", "warm-up", "after the warm-up"]


@dataclass(frozen=True)
class Rows:
    """The rows of one dataset that a branch is trained on: share ``share`` of ``num_shares``.

    With ``mixed`` below 1: this share of the rows, which a branch of another group gets.
    """

    dataset: str
    content: str  # fingerprint of the dataset's examples
    part: Part = "all"
    share: int = 0
    num_shares: int = 1
    draw: int = 0  # 0: the first deal; another number deals in another order
    mixed: float = 1.0

    def choose(self, dataset: Dataset, split: SplitConfig) -> Dataset:
        """Takes these rows of the dataset.

        Raises:
            InputError: a warm-up leaves no row.
        """
        if self.part != "all":
            first, rest = warmup_rows(dataset, split.warmup, split.seed, self.content)
            dataset = first if self.part == "warm-up" else rest
        if self.mixed < 1:
            dataset = mixed_rows(
                dataset, self.mixed, self.share, self.num_shares, split.seed, self._deck
            )
        elif self.num_shares > 1:
            dataset = dealt_rows(dataset, self.share, self.num_shares, split.seed, self._deck)
        return dataset

    def count(self, num_examples: int, split: SplitConfig) -> int:
        """Number of these rows, where ``part`` has ``num_examples``."""
        if self.mixed < 1:
            return num_mixed_rows(num_examples, self.mixed)
        if self.num_shares == 1:
            return num_examples
        return num_dealt_rows(num_examples, self.share, self.num_shares, split.seed, self._deck)

    def identity(self, split: SplitConfig) -> list[Any]:
        """JSON-ready values that decide the rows and their order."""
        identity: list[Any] = [self.content]
        if self.part != "all":
            identity.append([self.part, split.warmup, split.seed])
        if self.num_shares > 1:
            identity.append([self.share, self.num_shares, self.draw, split.seed])
        if self.mixed < 1:
            identity.append(["mixed", self.mixed, self.share, self.num_shares, split.seed])
        return identity

    @property
    def _deck(self) -> str:
        return f"{self.content} {self.draw}" if self.draw else self.content


@dataclass(frozen=True)
class Branch:
    """One model to train."""

    name: str
    arm: str
    group: int
    rows: tuple[Rows, ...]  # in the mixture's order
    start: Literal["base", "start"] = "start"
    seed: int = 0  # added to train.seed
    rate_factor: float = 1.0  # on train.learning_rate
    steps: int | None = None  # None: those of train.epochs

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names of the datasets in the mixture's order."""
        return tuple(rows.dataset for rows in self.rows)

    def choose(self, datasets: Sequence[Dataset], split: SplitConfig) -> tuple[Dataset, ...]:
        """Takes the branch's rows of the mixture; a dataset may have none.

        Raises:
            InputError: a warm-up leaves no row of a dataset.
        """
        rows = {rows.dataset: rows for rows in self.rows}
        return tuple(rows[d.name].choose(d, split) for d in datasets if d.name in rows)

    def num_rows(self, counts: Mapping[str, int], split: SplitConfig) -> int:
        """Number of the branch's rows; ``counts`` holds the examples of every dataset's part."""
        return sum(rows.count(counts[rows.dataset], split) for rows in self.rows)

    def content(self, split: SplitConfig) -> list[Any]:
        """JSON-ready values that decide the branch's rows and their order; no name is in it."""
        return [rows.identity(split) for rows in self.rows]


def whole_mixture(contents: Mapping[str, str], part: Part) -> tuple[Rows, ...]:
    """The rows of this part of every dataset; ``contents`` has the datasets' fingerprints."""
    return tuple(Rows(name, content, part) for name, content in contents.items())


def warmup_branch(contents: Mapping[str, str]) -> Branch:
    """The joint run before the sketch; the branches then start from its result."""
    return Branch(WARMUP, WARMUP, 0, whole_mixture(contents, "warm-up"), "base")


def branch_recipe(branch: Branch, train: TrainConfig) -> TrainConfig:
    """Options that decide the branch's training; controls, trackers and ``shard`` do not.

    The warm-up's result is a whole model, from which branches can start, and takes all steps.
    """
    train = replace(train, report_to=(), shard="none")
    if branch.name == WARMUP:
        adapter = replace(train.adapter, save="merged") if train.adapter.is_on else train.adapter
        train = replace(train, adapter=adapter, evaluate_steps=None, patience=None)
        train = train.with_builtin_engine()
    rate = train.learning_rate * branch.rate_factor
    seed = train.seed + branch.seed
    return replace(train.without_plan(), seed=seed, learning_rate=rate)


def branches_part(config: RunConfig) -> Part:
    """The part of the rows that merit's branches and their controls share."""
    return "after the warm-up" if config.split.warmup else "all"


def split_arms(config: RunConfig, split: SplitManifest) -> list[str]:
    """The arms that have a branch for every group: merit, the random splits, the iid deals."""
    controls = config.train.controls
    random = split.control_arms[: controls.random]
    return ["merit", *random, *iid_arms(config)]


def iid_arms(config: RunConfig) -> list[str]:
    """The arms that deal all rows equally to the branches."""
    numbers = range(1, config.train.controls.num_iid + 1)
    return [f"iid{number if number > 1 else ''}" for number in numbers]


def joint_arms(config: RunConfig) -> list[str]:
    """The arms that are one run on all rows."""
    controls = config.train.controls
    wanted = {
        "joint": controls.joint,
        "joint-short": controls.joint_short,
        "joint-low": controls.joint_low is not None,
    }
    return [arm for arm, is_wanted in wanted.items() if is_wanted]


def plan_branches(
    config: RunConfig, split: SplitManifest, contents: Mapping[str, str]
) -> Iterator[Branch]:
    """Every branch except the warm-up: of one seed after another, merit's first.

    Args:
        config: the run's config.
        split: the split in force.
        contents: name -> fingerprint of each dataset's examples, in the mixture's order.
    """
    steps = max(merit_steps(config, split, contents))
    num_examples = sum(row.num_examples for row in split.datasets)
    is_whole = not config.split.warmup and steps == num_steps(num_examples, config.train)
    for seed in range(config.train.seeds):
        for arm in split_arms(config, split):
            yield from _branches_of(arm, config, split, contents, seed)
        for arm in joint_arms(config):
            yield _joint_branch(arm, config, contents, seed, None if is_whole else steps)


def merit_steps(config: RunConfig, split: SplitManifest, contents: Mapping[str, str]) -> list[int]:
    """Optimizer steps of each of merit's branches, [K]."""
    branches = _branches_of("merit", config, split, contents, 0)
    return [split_branch_steps(branch, config, split) for branch in branches]


def split_branch_steps(branch: Branch, config: RunConfig, split: SplitManifest) -> int:
    """Optimizer steps of a branch of one group, found without its rows."""
    if branch.steps is not None:
        return branch.steps
    counts = {row.name: row.num_examples for row in split.datasets}
    return num_steps(branch.num_rows(counts, config.split), config.train)


def _branches_of(
    arm: str, config: RunConfig, split: SplitManifest, contents: Mapping[str, str], seed: int
) -> list[Branch]:
    part = branches_part(config)
    is_iid = arm.startswith("iid")
    labels = dict.fromkeys(contents, -1) if is_iid else split.group_of(arm)
    draw = int(arm.removeprefix("iid") or 1) - 1 if is_iid else 0
    mix = config.train.mix
    branches = []
    for group in range(split.groups):
        rows = []
        for name, content in contents.items():
            if labels[name] == group:
                rows.append(Rows(name, content, part))
            elif labels[name] == -1:
                rows.append(Rows(name, content, part, group, split.groups, draw))
            elif mix:
                rows.append(Rows(name, content, part, group, split.groups, mixed=mix))
        branch = Branch(seeded(f"{arm}-{group}", seed), arm, group, tuple(rows), seed=seed)
        branches.append(branch)
    steps = budgeted_steps(branches, config, split)
    return [replace(branch, steps=count) for branch, count in zip(branches, steps, strict=True)]


def budgeted_steps(
    branches: Sequence[Branch], config: RunConfig, split: SplitManifest
) -> list[int | None]:
    """Optimizer steps of the branches of one arm by ``train.budget``; None: those of the epochs.

        epochs:       None
        equal-steps:  ceil(sum_k s_k / K)
        equal-tokens: round(s_k * (sum_j t_j / K) / t_k), at least 1

    s_k are the steps of branch k's epochs, t_k the target tokens of its rows.
    """
    if config.train.budget == "epochs":
        return [None] * len(branches)
    steps = [split_branch_steps(branch, config, split) for branch in branches]
    if config.train.budget == "equal-steps":
        return [math.ceil(sum(steps) / len(steps))] * len(steps)
    tokens = [_target_tokens(branch, config, split) for branch in branches]
    mean = sum(tokens) / len(tokens)
    return [max(1, round(s * mean / t)) if t else s for s, t in zip(steps, tokens, strict=True)]


def _target_tokens(branch: Branch, config: RunConfig, split: SplitManifest) -> float:
    """Target tokens of a branch's rows in one epoch, from the mean of each dataset's rows."""
    per_dataset = {row.name: (row.num_target_tokens, row.num_examples) for row in split.datasets}
    total = 0.0
    for rows in branch.rows:
        tokens, count = per_dataset[rows.dataset]
        total += tokens * rows.count(count, config.split) / max(count, 1)
    return total


def _joint_branch(
    arm: str, config: RunConfig, contents: Mapping[str, str], seed: int, steps: int | None
) -> Branch:
    branch = Branch(seeded(arm, seed), arm, 0, whole_mixture(contents, "all"), "base", seed)
    if arm == "joint-short":
        return replace(branch, steps=steps)
    factor = config.train.controls.joint_low
    if arm == "joint-low" and factor is not None:
        return replace(branch, rate_factor=factor)
    return branch


def seeded(name: str, seed: int) -> str:
    """The name of a branch or merge for one seed: the first seed adds nothing to it."""
    return f"{name}.seed{seed}" if seed else name
