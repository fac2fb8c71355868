"""The steps of a run: units that one job, or one job for each of them, does after other steps.

warmup -> factors -> sketch -> split -> train -> merge -> evaluate -> report
                               split -> base  ---------> evaluate
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from merit_fast.manifests.stages import AUDIT, EVALUATE, MERGE, REPORT, SKETCH, SPLIT, TRAIN
from merit_fast.pipeline.arms import WARMUP, iid_arms, joint_arms, seeded
from merit_fast.pipeline.config import RunConfig
from merit_fast.pipeline.units.listing import BASE, FACTORS


@dataclass(frozen=True)
class Step:
    """Units between which no other step lies.

    Attributes:
        name: of the step; job files have it.
        units: their names, in order.
        after: steps that must have ended.
        is_parallel: whether the units need nothing of each other: then each is a job of its own.
        gpus: of one job; 0: none.
    """

    name: str
    units: tuple[str, ...]
    after: tuple[str, ...] = ()
    is_parallel: bool = False
    gpus: int = 0

    @property
    def processes(self) -> int:
        """Processes of a unit: torchrun starts those of a branch, one on each GPU."""
        return max(1, self.gpus) if self.name == TRAIN.name else 1


def undecided(config: RunConfig) -> str:
    """The keys that leave the names of branches to the split; "" if the config decides them."""
    controls = config.train.controls
    keys = []
    if config.split.groups == "auto":
        keys.append("split.groups: auto")
    if controls.random:
        keys.append(f"train.controls.random: {controls.random}")
    if controls.joint and controls.joint_short:
        keys.append("train.controls.joint_short: true")
    if config.split.groups == 1 and (joint_arms(config) or controls.num_iid):
        keys.append("split.groups: 1 with controls")
    return ", ".join(keys)


def predicted_units(config: RunConfig) -> list[str]:
    """Names of the run's units without a look at rows or outputs.

    Where the config leaves the branches to the split (``undecided``): those up to the split.
    """
    names = [WARMUP] if config.split.warmup else []
    if config.split.normalize == "kfac":
        names.append(FACTORS)
    names += [f"{SKETCH.name}/{dataset.name}" for dataset in config.mixture]
    names += [SKETCH.name, SPLIT.name]
    if config.split.groups == "auto" or undecided(config):
        return names
    branches: list[str] = []
    merges: list[str] = []
    for seed in range(config.train.seeds):
        for arm in ("merit", *iid_arms(config)):
            branches += [seeded(f"{arm}-{k}", seed) for k in range(config.split.groups)]
            merges.append(seeded(arm, seed))
        branches += [seeded(arm, seed) for arm in joint_arms(config)]
    names += [f"{TRAIN.name}/{name}" for name in branches]
    names += [f"{MERGE.name}/{name}" for name in merges]
    names += [BASE, *(f"{EVALUATE.name}/{name}" for name in (*branches, *merges))]
    audit = [AUDIT.name] if config.evaluate.audit else []
    return [*names, EVALUATE.name, *audit, REPORT.name]


def steps_of(config: RunConfig, units: Sequence[str], gpus: int) -> list[Step]:
    """The steps that hold these units.

    Args:
        config: the run's.
        units: names of all units of the run that are known.
        gpus: of a branch; other units that compute gradients or losses have one of them.
    """
    one = min(gpus, 1)
    by_name = {
        WARMUP: Step(WARMUP, (), (), False, one),
        FACTORS: Step(FACTORS, (), (WARMUP,), False, one),
        SKETCH.name: Step(SKETCH.name, (), (FACTORS,), True, one),
        SPLIT.name: Step(SPLIT.name, (), (SKETCH.name,)),
        TRAIN.name: Step(TRAIN.name, (), (SPLIT.name,), True, gpus),
        "base": Step("base", (), (SPLIT.name,), False, one),
        MERGE.name: Step(MERGE.name, (), (TRAIN.name,), False, one * config.merge.is_tuned),
        EVALUATE.name: Step(EVALUATE.name, (), (MERGE.name, "base"), True, one),
        REPORT.name: Step(REPORT.name, (), (EVALUATE.name,), False, one * config.evaluate.audit),
    }
    for unit in units:
        step = by_name[_step_of(unit)]
        by_name[step.name] = replace(step, units=(*step.units, unit))
    return only(by_name.values(), set(units))


def only(steps: Iterable[Step], units: Collection[str]) -> list[Step]:
    """The steps with these units; a step that is empty hands on the steps before it."""
    before: dict[str, tuple[str, ...]] = {}
    kept = []
    for step in steps:
        after = tuple(dict.fromkeys(name for own in step.after for name in before[own]))
        mine = tuple(unit for unit in step.units if unit in units)
        before[step.name] = (step.name,) if mine else after
        if mine:
            kept.append(replace(step, units=mine, after=after))
    return kept


def _step_of(unit: str) -> str:
    """The name of the step that does a unit."""
    if unit == BASE:
        return "base"
    if unit in (SKETCH.name, SPLIT.name):
        return SPLIT.name
    if unit in (EVALUATE.name, AUDIT.name, REPORT.name):
        return REPORT.name
    return unit.partition("/")[0]
