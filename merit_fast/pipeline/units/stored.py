"""Does a unit whose inputs and output lie in a store; this machine's folder holds copies only.

The outputs that the unit reads come here, each file proved by its hash; what is here already stays.
The unit works as in any run, and its finished output goes to the store.
"""

from collections.abc import Mapping, Sequence

from merit_fast.errors import InputError
from merit_fast.manifests.stages import AUDIT, EVALUATE, MERGE, REPORT, SKETCH, SPLIT, TRAIN
from merit_fast.merge.write.shards import free_bytes
from merit_fast.pipeline.arms import WARMUP
from merit_fast.pipeline.branches import adopt_branches
from merit_fast.pipeline.outputs import Outputs
from merit_fast.pipeline.run import Run
from merit_fast.pipeline.storage.store import OutputStore, wanted_files
from merit_fast.pipeline.units.doing import do_unit, units_for
from merit_fast.pipeline.units.listing import BASE, Unit, is_done, unit_named
from merit_fast.units import human_bytes


def do_stored_unit(run: Run, name: str) -> bool:
    """Brings one unit up to date in the run's store; returns whether it had work to do.

    The same unit may run twice at once, anywhere: the first attempt that is sent is the output.

    Raises:
        InputError: no unit has this name, one that it needs is not done, or the disk is too small.
        MeritFastError: a request of the store fails, or a file there is not as it was sent.
    """
    outputs = run.outputs
    store = take_plan(run)
    units = units_for(run, name)
    unit = unit_named(name, units, outputs)
    if is_done(unit, outputs):
        run.progress.note(f"{name}: up to date in {store.place}")
        run.release_followers()
        return False
    _take_inputs(run, unit, units)
    worked = do_unit(run, name)
    if not store.push(unit.path, outputs.records.name(unit.path)):
        run.progress.note(f"{name}: another process was faster; its output counts")
    return worked


def take_plan(run: Run) -> OutputStore:
    """Looks at the run's store, and copies the split from it if it is finished."""
    outputs = run.outputs
    store = outputs.store
    assert store is not None
    store.look()
    if outputs.is_finished(outputs.folder(SPLIT), outputs.split):
        run.take(outputs.folder(SPLIT), outputs.split)
    return store


def take_results(run: Run) -> None:
    """Copies what the summary of a finished run reads; of merged models their JSON files only."""
    take_plan(run)
    outputs = run.outputs
    run.take(outputs.folder(EVALUATE), outputs.evaluate)
    run.take(outputs.folder(REPORT), outputs.report)
    for name in outputs.plan.merges:
        run.take(outputs.merge_path(name), outputs.merge(name), whole=False)


def inputs_of(unit: Unit, units: Mapping[str, Unit], outputs: Outputs) -> dict[str, bool]:
    """Units whose outputs a unit reads, next to the split -> whether it reads all their files.

    Of the others it reads JSON files only, which costs no weights. Shares count if they are done.
    """
    shares = (share for share in unit.shares if is_done(units[share], outputs))
    whole = dict.fromkeys((*unit.needs, *shares), True)
    merges = [name for name in units if name.startswith(f"{MERGE.name}/")]
    read: list[str] = []
    if unit.name == EVALUATE.name:
        read = [*(f"{TRAIN.name}/{branch.name}" for branch in outputs.plan.trained), *merges]
    elif unit.name == REPORT.name:
        read = [SKETCH.name, *merges]
    elif WARMUP in units and _reads_start(unit, outputs):
        whole[WARMUP] = True
    return dict.fromkeys(read, False) | whole


def _reads_start(unit: Unit, outputs: Outputs) -> bool:
    """Whether a unit reads the warm-up's model."""
    if unit.name in (WARMUP, BASE):
        return False
    if unit.stage == SKETCH.name:
        return unit.name != SKETCH.name  # that one joins the datasets' sketches
    if unit.stage == TRAIN.name:
        return outputs.branches[unit.item].start != "base"
    if unit.stage == EVALUATE.name:  # an adapter is loaded on its start
        return outputs.config.train.adapter.is_on and unit.item in outputs.branches
    return unit.stage in (MERGE.name, AUDIT.name)


def _take_inputs(run: Run, unit: Unit, units: Mapping[str, Unit]) -> None:
    """Copies the outputs that a unit reads; branches get the names of the split in force."""
    outputs = run.outputs
    inputs = inputs_of(unit, units, outputs)
    _check_disk(outputs, [(units[name], whole) for name, whole in inputs.items()])
    for name, whole in inputs.items():
        run.take(units[name].path, units[name].manifest, whole)
    branches = [
        outputs.branches[units[name].item]
        for name, whole in inputs.items()
        if whole and name != WARMUP and units[name].stage == TRAIN.name
    ]
    if branches:
        with run.claim():
            adopt_branches(branches, outputs, run.progress)


def _check_disk(outputs: Outputs, inputs: Sequence[tuple[Unit, bool]]) -> None:
    """Checks that the disk holds what is to be copied.

    Raises:
        InputError: it does not.
    """
    store = outputs.store
    assert store is not None
    needed = 0
    for unit, whole in inputs:
        name = outputs.records.name(unit.path)
        files = wanted_files(store.manifest(name, unit.manifest.fingerprint), whole)
        needed += sum(size for file, (size, _) in files.items() if not (unit.path / file).exists())
    free = free_bytes(outputs.root.absolute())
    if needed > free:
        raise InputError(
            f"{outputs.root}: must have {human_bytes(needed)} free for the unit's inputs, the disk "
            f"has {human_bytes(free)}"
        )
