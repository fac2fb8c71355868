"""Plans the branches of every arm from the config and the split.

Arms: ``merit``; the controls ``joint`` (one run on everything from the base), ``random`` (a
    balanced
random split) and ``iid`` (as many branches, each on an equal share of every dataset's rows: merging
without splitting).
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
    """One model to train.

    It gets all rows of ``datasets``, and share ``group`` of ``num_shares`` of the rows of
    ``dealt``.
    """

    name: str
    arm: str
    group: int
    datasets: tuple[str, ...]
    rows: Literal["all", "warmup", "after warmup"] = "all"
    dealt: tuple[str, ...] = ()
    num_shares: int = 1

    def choose(self, datasets: Sequence[Dataset], config: RunConfig) -> tuple[Dataset, ...]:
        """Takes the branch's rows of the mixture; drops datasets without any.

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
                dataset = dealt_rows(dataset, self.group, self.num_shares, config.split.seed)
            if dataset.examples:
                chosen.append(dataset)
        return tuple(chosen)

    def identity(self, config: RunConfig) -> dict[str, str]:
        """Inputs of the branch's fingerprint next to the recipe, the start and the mixture."""
        rows: str = self.rows
        if rows != "all":
            rows += f" {config.split.warmup:g} seed {config.split.seed}"
        dealt = ""
        if self.dealt:
            share = f"{self.group} of {self.num_shares} seed {config.split.seed}"
            dealt = f"{share}: " + "\n".join(self.dealt)
        return {
            "branch": self.name,
            "datasets": "\n".join(self.datasets),
            "rows": rows,
            "dealt": dealt,
        }


def warmup_branch(config: RunConfig) -> Branch:
    """The joint run before the sketch; the branches then start from its result."""
    return Branch("warmup", "warmup", 0, _names(config), "warmup")


def merged_arms(config: RunConfig) -> list[str]:
    """The arms that end in a merge, merit first."""
    return ["merit", *(arm for arm in ("random", "iid") if arm in config.train.arms)]


def plan_branches(config: RunConfig, split: SplitManifest) -> dict[str, Branch]:
    """Every branch except the warm-up by its name, joint first, merit last."""
    planned = [Branch("joint", "joint", 0, _names(config))] if "joint" in config.train.arms else []
    rows: Literal["all", "after warmup"] = "after warmup" if config.split.warmup else "all"
    for arm in reversed(merged_arms(config)):
        labels = dict.fromkeys(_names(config), -1) if arm == "iid" else split.group_of(arm)
        dealt = tuple(name for name in _names(config) if labels[name] < 0)
        for group in range(split.groups):
            whole = tuple(name for name in _names(config) if labels[name] == group)
            name = f"{arm}-{group}"
            planned.append(Branch(name, arm, group, whole, rows, dealt, split.groups))
    return {branch.name: branch for branch in planned}


def _names(config: RunConfig) -> tuple[str, ...]:
    return tuple(dataset.name for dataset in config.mixture)
