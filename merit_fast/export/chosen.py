"""Takes the rows of every group from the mixture and the split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from merit_fast.data import Dataset
from merit_fast.data.mixture.select import MixtureRows
from merit_fast.export.rows import PartRows, part_rows
from merit_fast.pipeline.arms import plan_branches
from merit_fast.pipeline.outputs import Outputs


@dataclass(frozen=True)
class Group:
    """The rows of one group, and its tokens in the loss, without repeated epochs."""

    number: int
    train: tuple[PartRows, ...]
    held_out: tuple[PartRows, ...]
    num_target_tokens: int


def groups_of(outputs: Outputs) -> list[Group]:
    """The groups of the split, with the rows on which a run trains their branches.

    Raises:
        InputError: a source is unreadable or breaks a rule of the mixture.
        MeritFastError: the split is not there.
    """
    config = outputs.config
    split = outputs.split_manifest
    rows = MixtureRows(config.mixture, config.data)
    train = rows.select("train")
    held_out = rows.select("eval")
    entries = {entry.name: entry for entry in config.mixture}
    tokens = {row.name: (row.num_target_tokens, row.num_examples) for row in split.datasets}
    groups = []
    for branch in plan_branches(config, split, outputs.contents):
        if branch.arm != "merit" or branch.seed:
            continue
        parts = []
        target_tokens = 0.0
        for chosen in branch.rows:
            selection = train[chosen.dataset]
            # positions in place of examples: the cut depends on their number only
            whole = Dataset(chosen.dataset, cast(Any, range(len(selection.order))))
            positions = [int(cast(Any, i)) for i in chosen.choose(whole, config.split).examples]
            entry = entries[chosen.dataset]
            parts.append(part_rows(entry, config.data, "train", selection, positions))
            count, _ = tokens[chosen.dataset]
            target_tokens += count * len(positions) / max(1, len(selection.order))
        kept = [
            part_rows(entries[part.name], config.data, "eval", held_out[part.name])
            for part in parts
            if part.name in held_out
        ]
        groups.append(Group(branch.group, tuple(parts), tuple(kept), round(target_tokens)))
    return groups
