"""Who trains on what: the branches of every arm, from the config and the split alone.

Arms: ``merit``; the controls ``joint`` (one run on everything from the base), ``random`` (a balanced random split) and
``iid`` (as many branches, each on an equal share of every dataset's rows: what merging does without splitting).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from merit_fast.data import Dataset
from merit_fast.data.shares import dealt_rows, warmup_rows
from merit_fast.manifests.schemas import SplitManifest
from merit_fast.pipeline.config import RunConfig


@dataclass(frozen=True)
class Branch:
    """One model to train: on all rows of ``datasets``, and on one of ``parts`` equal shares of those of ``dealt``."""

    name: str
    arm: str
    group: int
    datasets: tuple[str, ...]
    rows: Literal["all", "warmup", "after warmup"] = "all"
    dealt: tuple[str, ...] = ()
    parts: int = 1

    def choose(self, datasets: Sequence[Dataset], config: RunConfig) -> tuple[Dataset, ...]:
        """Its rows of the mixture; datasets of which it has none are left out.

        Raises:
            InputError: a warm-up leaves no row of a dataset.
        """
        chosen = []
        for dataset in datasets:
            if dataset.name not in self.datasets + self.dealt:
                continue
            if self.rows != "all":
                first, rest = warmup_rows(dataset, config.split.warmup, config.split.seed)
                dataset = first if self.rows == "warmup" else rest
            if dataset.name in self.dealt:
                dataset = dealt_rows(dataset, self.group, self.parts, config.split.seed)
            if dataset.examples:
                chosen.append(dataset)
        return tuple(chosen)

    def identity(self, config: RunConfig) -> dict[str, str]:
        """What its training depends on beside the recipe, the start and the mixture."""
        rows = (
            self.rows
            if self.rows == "all"
            else f"{self.rows} {config.split.warmup:g} seed {config.split.seed}"
        )
        part = (
            f"{self.group} of {self.parts} seed {config.split.seed}: " + "\n".join(self.dealt)
            if self.dealt
            else ""
        )
        return {
            "branch": self.name,
            "datasets": "\n".join(self.datasets),
            "rows": rows,
            "dealt": part,
        }


def warmup_branch(config: RunConfig) -> Branch:
    """The joint run before the sketch, where the branches then start."""
    return Branch("warmup", "warmup", 0, _names(config), "warmup")


def merged_arms(config: RunConfig) -> list[str]:
    """The arms that end in a merge, merit first."""
    return ["merit", *(arm for arm in ("random", "iid") if arm in config.train.arms)]


def branches(config: RunConfig, split: SplitManifest) -> dict[str, Branch]:
    """Every branch but the warm-up by its name, joint first, merit last."""
    found = [Branch("joint", "joint", 0, _names(config))] if "joint" in config.train.arms else []
    rows: Literal["all", "after warmup"] = "after warmup" if config.split.warmup else "all"
    for arm in reversed(merged_arms(config)):
        label = dict.fromkeys(_names(config), -1) if arm == "iid" else split.group_of(arm)
        dealt = tuple(name for name in _names(config) if label[name] < 0)
        for group in range(split.groups):
            whole = tuple(name for name in _names(config) if label[name] == group)
            found.append(Branch(f"{arm}-{group}", arm, group, whole, rows, dealt, split.groups))
    return {branch.name: branch for branch in found}


def _names(config: RunConfig) -> tuple[str, ...]:
    return tuple(dataset.name for dataset in config.mixture)
